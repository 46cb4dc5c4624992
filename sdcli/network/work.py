"""Divides the work of a forward pass among stages: merges, drops and adds boundaries by their MACs.

`macs` is always the work of the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from sdcli.network.tap_points import TapPoint

NUM_STAGES = 4

# A boundary before this share of the work belongs to the stem: an exit there could not see much.
SMALLEST_FIRST_SHARE = 0.04

# Two boundaries with less than this share of the work between them count as one.
SMALLEST_SHARE = 0.02


def shares(points: Sequence[TapPoint], macs: int) -> list[float]:
    """Each stage's share of the work."""
    ends = [0, *(point.macs for point in points)]
    return [(after - before) / max(macs, 1) for before, after in pairwise(ends)]


def merged(points: Sequence[TapPoint], most: int, macs: int) -> list[TapPoint]:
    """At most `most` of the boundaries: the two neighbouring stages with the least work are merged repeatedly."""
    left = list(points)
    while len(left) > most:
        joint = [before + after for before, after in pairwise(shares(left, macs))]
        del left[joint.index(min(joint))]
    return left


def apart(points: Sequence[TapPoint], macs: int) -> list[TapPoint]:
    """The boundaries without the stem, and without those that have almost no work before the next one."""
    least, first = SMALLEST_SHARE * macs, SMALLEST_FIRST_SHARE * macs
    kept: list[TapPoint] = []
    for point in reversed(points):
        if point.macs >= first and (not kept or kept[-1].macs - point.macs >= least):
            kept.append(point)
    return kept[::-1]


def is_stem(point: TapPoint, end: TapPoint) -> bool:
    """Whether a map has a resolution from before a pyramid's first stage.

    The stages of a pyramid shrink the map by 8 in all, or by 16 with their stem. The ratio to the last map keeps the
    first stages of networks for small images, whose reduction is below 4 as well.
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
    """Up to `wanted` stages: the heaviest stage is repeatedly cut at the candidate nearest to its middle.

    With `lopsided_only`, only stages that do more than half of the work are cut.
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
    """The outermost clean candidate nearest to half the work between two boundaries; None if there is no suitable one.

    `beside` only considers modules in the same container as `after`, so that a stem does not become a stage.
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
