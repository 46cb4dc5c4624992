"""Parses the comment at the top of a recipe file: idea, commands, and named sections.

# The idea, in a sentence or two.
#
#   sdcli train resnet18 --dataset cifar100 --recipe byot
#
# Sources   where the numbers come from,
#           on as many lines as it takes
# Differs   where the recipe departs from its source
# Measured  the results, with seeds, machine and version; "not yet" if there are none
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

NOTHING = ("", "-", "none", "not yet")
"""Texts of an empty section."""


@dataclass(frozen=True)
class Header:
    """A recipe file's opening comment; "" and () for missing parts."""

    idea: str = ""
    commands: tuple[str, ...] = ()
    sections: Mapping[str, str] = field(default_factory=dict)
    """All named sections by their lower-case names, each on one line."""

    @property
    def sources(self) -> str:
        """Where the numbers come from."""
        return self.sections.get("sources", "")

    @property
    def differs(self) -> str:
        """Where the recipe departs from its source."""
        return self.sections.get("differs", "")

    @property
    def measured(self) -> str:
        """The results; "" if nothing has been measured yet."""
        said = self.sections.get("measured", "")
        return "" if said.rstrip(".") in NOTHING else said


def parse_header(text: str) -> Header:
    """Reads the comment lines at the top of a recipe's `text`."""
    idea: list[str] = []
    commands: list[str] = []
    sections: dict[str, str] = {}
    name = ""
    for raw in text.splitlines():
        if not raw.startswith("#"):
            break
        line = raw[1:].rstrip()
        section = re.fullmatch(r" ([A-Z][a-z]+)(?:  +(.*))?", line)
        # A single word can be the last line of the idea: before the first command it does not start a section.
        if section and (section[2] is not None or commands):
            name = section[1].lower()
            sections[name] = section[2] or ""
        elif name:
            sections[name] = f"{sections[name]} {line.strip()}".strip()
        elif line.startswith("   "):
            # A long command continues on the next line after a backslash.
            if commands and commands[-1].endswith("\\"):
                commands[-1] = f"{commands[-1][:-1].rstrip()} {line.strip()}"
            else:
                commands.append(line.strip())
        elif line.strip():
            idea.append(line.strip())
    return Header(" ".join(idea), tuple(commands), sections)
