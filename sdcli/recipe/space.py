"""What a search tries: `--try KEY=A..B` and `--try KEY=A,B,C`; and what it finds, as a recipe that extends another."""

from __future__ import annotations

import copy
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from sdcli import toml
from sdcli.errors import UserError
from sdcli.recipe.about import difference
from sdcli.recipe.load import load_recipe, name_from
from sdcli.recipe.merge import Override
from sdcli.recipe.schema import Recipe

DECADE = 10
"""A range of positive numbers that spans this factor is searched on a logarithmic scale."""
DIGITS = 4
"""Significant digits of the values that are tried in a range of decimal numbers."""

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"

Check: TypeAlias = Callable[[Sequence[Override]], object]
"""Raises UserError for overrides that the recipe refuses."""

Done: TypeAlias = Callable[[Recipe], Recipe]
"""Fills in what a recipe leaves to defaults, so that recipes are compared as they are trained."""


@dataclass(frozen=True)
class Tried:
    """A recipe key and the values that are tried: `choices`, or a range from `ends[0]` to `ends[1]`."""

    key: str
    source: str
    """The option as it was typed."""
    ends: tuple[float, float] = (0.0, 0.0)
    choices: tuple[Any, ...] = ()
    whole: bool = False
    """Whether the range has whole numbers only."""

    @property
    def log(self) -> bool:
        """Whether the range is searched on a logarithmic scale."""
        low, high = self.ends
        return low > 0 and high / low >= DECADE

    @property
    def values(self) -> tuple[Any, ...]:
        """The values to check before anything is tried: all choices, or both ends."""
        return self.choices or self.ends

    def override(self, value: Any) -> Override:
        """The change of the recipe that tries `value`."""
        return Override(self.key, value, self.source)

    def rounded(self, value: Any) -> Any:
        """A value of the range to the digits that are tried; a choice as it is."""
        if self.choices or self.whole:
            return value
        return min(max(float(f"{value:.{DIGITS}g}"), self.ends[0]), self.ends[1])

    @classmethod
    def parse(cls, text: str) -> Tried:
        """`--try KEY=A..B` or `--try KEY=A,B,C`; raises UserError for any other form."""
        source = f"--try {text}"
        if "=" not in text:
            raise UserError(source, "KEY=A..B or KEY=A,B,C", "for example --try optimizer.lr=0.01..1")
        # Parsed as --set is, for the form of the key and of the numbers.
        override = Override.parse(text)
        key, given = override.key, text.partition("=")[2].strip()
        if found := re.fullmatch(rf"({_NUMBER})\.\.({_NUMBER})", given):
            low, high = (_number(end) for end in found.groups())
            if not low < high or not math.isfinite(high - low):
                raise UserError(f"{source}: the range is empty", "KEY=A..B with A below B", f"--try {key}=0.01..1")
            return cls(key, source, (low, high))
        choices = _listed(given, source)
        if len(choices) < 2 or any(choice in choices[:place] for place, choice in enumerate(choices)):
            single = len(choices) < 2
            raise UserError(
                f"{source}: " + ("one value leaves nothing to search" if single else "a value is there twice"),
                "a range A..B, or different values separated by commas",
                f"--set {key}={given}" if single and given else f"--try {key}=0.01..1",
            )
        return cls(key, source, choices=tuple(choices))


def _number(text: str) -> float:
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)


def _listed(text: str, source: str) -> list[Any]:
    """The values between the commas, each as `--set` reads it; commas inside brackets do not count."""
    try:
        values: list[Any] = tomllib.loads(f"value = [{text}]")["value"]
        return values
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):
        parts = [part for part in text.split(",") if part.strip()]
        return [replace(Override.parse(f"value={part}"), source=source).value for part in parts]


def checked(space: Sequence[Tried], check: Check) -> list[Tried]:
    """The keys with the type of their ranges; raises UserError for a value that `check` refuses, while the other keys
    have their first one."""
    keys = [tried.key for tried in space]
    for key in keys:
        if around := next((k for k in keys if key.startswith(f"{k}.")), key if keys.count(key) > 1 else ""):
            raise UserError(f"--try {key}: {around} is tried already", "each key once")
    first = [tried.override(tried.values[0]) for tried in space]
    found = []
    for place, tried in enumerate(space):

        def refuses(value: Any, place: int = place, tried: Tried = tried) -> UserError | None:
            try:
                check([*first[:place], tried.override(value), *first[place + 1 :]])
            except UserError as error:
                return error
            return None

        for value in tried.values:
            if error := refuses(value):
                raise error
        if not tried.choices and all(isinstance(end, int) for end in tried.ends):
            # 1..8 are whole numbers where the key takes nothing else.
            tried = replace(tried, whole=refuses(tried.ends[0] + 0.5) is not None)
        found.append(tried)
    return found


def extension(names: Sequence[str], found: Recipe, values: Mapping[str, Any], folder: Path, done: Done) -> str:
    """`found` as the text of a recipe file in `folder` that extends the first of the recipes `names` that stands on
    its own. `values`, by dotted key, are written also where they are those of that recipe.
    """
    tables: dict[str, Any] = {}
    for name in names:
        try:
            own = done(load_recipe([name]))
        except UserError:
            # A part, such as a schedule: another one is extended.
            continue
        changes = difference(own, done(found))
        new = {key: value for key, (_, value) in changes.changed.items()}
        new |= copy.deepcopy(changes.added) | dict.fromkeys(changes.gone, False)
        # Phases are a list, which is written as a whole.
        new |= {key: value for key, value in values.items() if not key.startswith("phases.")}
        tables = {"extends": name_from(name, folder)}
        for key, value in new.items():
            *path, last = key.split(".")
            table = tables
            for part in path:
                table = table.setdefault(part, {})
            table[last] = value
        break
    return toml.write(tables or done(found).model_dump(exclude_none=True))
