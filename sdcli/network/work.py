"""How the work of a forward pass is shared out among stages: boundaries merged, dropped and added by their MACs.

Everywhere `macs` is the work of the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from sdcli.network.tap_points import TapPoint

NUM_STAGES = 4

# An exit after less of the work than this has seen next to nothing: what lies before it is the stem.
SMALLEST_FIRST_SHARE = 0.04

# Two boundaries with less of the work than this between them are one.
SMALLEST_SHARE = 0.02


def shares(points: Sequence[TapPoint], macs: int) -> list[float]:
    """Each stage's part of all the work."""
    ends = [0, *(point.macs for point in points)]
    return [(after - before) / max(macs, 1) for before, after in pairwise(ends)]


def merged(points: Sequence[TapPoint], most: int, macs: int) -> list[TapPoint]:
    """At most `most` of the boundaries: again and again, the two neighbours that do the least work become one."""
    left = list(points)
    while len(left) > most:
        joint = [before + after for before, after in pairwise(shares(left, macs))]
        del left[joint.index(min(joint))]
    return left


def apart(points: Sequence[TapPoint], macs: int) -> list[TapPoint]:
    """Without the stem, and without those that have next to no work before the following one."""
    least, first = SMALLEST_SHARE * macs, SMALLEST_FIRST_SHARE * macs
    kept: list[TapPoint] = []
    for point in reversed(points):
        if point.macs >= first and (not kept or kept[-1].macs - point.macs >= least):
            kept.append(point)
    return kept[::-1]


def is_stem(point: TapPoint, end: TapPoint) -> bool:
    """Whether a map has the resolution before a pyramid's first stage: pyramids shrink by 8, by 16 with their stem.

    The ratio keeps the first stages of networks for small images, which shrink the image by less than 4.
    """
    return point.reduction < 4 and point.layout.size[0] > 12 * end.layout.size[0]


def split(
    points: Sequence[TapPoint],
    wanted: int,
    candidates: Sequence[TapPoint],
    macs: int,
    *,
    lopsided_only: bool = False,
) -> list[TapPoint]:
    """As many stages as wanted, or as can be: the heaviest is cut at the candidate nearest its middle, again and again.

    `lopsided_only` leaves a model with fewer stages of its own as it is unless one of them does most of the work.
    """
    found = list(points)
    while len(found) < wanted:
        done = shares(found, macs)
        heaviest_first = sorted(range(len(found)), key=lambda index: -done[index])
        if lopsided_only:
            heaviest_first = [index for index in heaviest_first if done[index] > 0.5]
        for index in heaviest_first:
            before = found[index - 1] if index else None
            middle = _middle(before, found[index], candidates, macs, beside=lopsided_only)
            if middle is not None:
                found.insert(index, middle)
                break
        else:
            return found
    return found


def _middle(
    before: TapPoint | None, after: TapPoint, candidates: Sequence[TapPoint], macs: int, *, beside: bool
) -> TapPoint | None:
    """The outermost clean candidate nearest to half the work between two boundaries.

    `beside` keeps to the same container, so that a stem is not made a stage.
    """
    start = before.macs if before else 0
    least = SMALLEST_SHARE * macs
    container = after.paths[0][0].rpartition(".")[0]
    inside = [
        point
        for point in candidates
        if point.clean and start + least <= point.macs <= after.macs - least and point.node < after.node
        if not (beside and container) or point.paths[0][0].startswith(f"{container}.")
    ]
    goal, slack = (start + after.macs) / 2, (after.macs - start) / 4
    near = [point for point in inside if abs(point.macs - goal) <= slack]
    if not near and (beside or not inside):
        return None
    outermost = min(point.depth for point in near or inside)
    return min((p for p in near or inside if p.depth == outermost), key=lambda point: abs(point.macs - goal))
