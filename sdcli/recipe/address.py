"""How a recipe names a point of a network: `exit1`, `peer.final`, `final@view`."""

from __future__ import annotations

import re
from dataclasses import dataclass

STUDENT = "student"
"""The network that the command line names; an address without a network means one of its points."""
TEACHER, AVERAGE = "teacher", "ema"
"""Networks that a recipe gets without a table: the student of the phase before, and the average of its weights."""
FINAL = "final"
"""The point of a model's own classifier."""
GROUPS = ("exits", "all")
"""Names that stand for several points: all but `final`, and all."""
OTHER_TARGETS = ("label", "next")
"""What a `target` may be besides a point or a signal."""

_PARTS = re.compile(
    r"(?:(?P<network>[A-Za-z]\w*)\.)?(?P<point>final|exits|all|exit[1-9]\d*)(?:@(?P<images>[A-Za-z]\w*))?"
)


@dataclass(frozen=True)
class Address:
    """A point of a network, and which of the batch's images the network is shown."""

    network: str
    point: str
    """`final`, `exit1`, `exit2`, …, or one of `GROUPS`."""
    images: str = ""
    """The name of a view (`[batch.views.NAME]`); "" for the batch's own images."""

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address that `text` writes; raises ValueError where it is none (a signal's name, `label`, …)."""
        match = _PARTS.fullmatch(text)
        if match is None:
            raise ValueError(f"not an address: {text!r}")
        return cls(match["network"] or STUDENT, match["point"], match["images"] or "")

    @classmethod
    def find(cls, text: str) -> Address | None:
        """The address that `text` writes, or None where it is none."""
        return cls.parse(text) if _PARTS.fullmatch(text) else None

    def __str__(self) -> str:
        point = self.point if self.network == STUDENT else f"{self.network}.{self.point}"
        return f"{point}@{self.images}" if self.images else point

    @property
    def bare(self) -> Address:
        """The same point, whatever images it is shown."""
        return Address(self.network, self.point)

    def shown(self, images: str) -> Address:
        """The same point with other images."""
        return Address(self.network, self.point, images)

    def at(self, point: str) -> Address:
        """Another point of the same network, with the same images."""
        return Address(self.network, point, self.images)

    @property
    def is_group(self) -> bool:
        """Whether it stands for several points."""
        return self.point in GROUPS
