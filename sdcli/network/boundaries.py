"""The model's own stages: the boundaries that its designers chose, found in one of four ways.

A list of exceptions covers some classes; timm's `feature_info` describes a pyramid; a trunk of equal blocks is cut into
equal shares of the work; any other model is cut at each change of resolution.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdcli.network.tap_points import TapPoint, TracedModel
from sdcli.network.work import NUM_STAGES, SMALLEST_SHARE, apart, is_stem, merged, shares

MIN_STAGES = 3

# Models, by class, whose boundaries cannot be found automatically. Each entry says why.
_QUIRKS: dict[str, tuple[str, ...]] = {
    # Its branches run side by side to the end; `feature_info` has other names and leaves out the layers that join them.
    "HighResolutionNet": ("layer1", "stage2", "stage3", "final_layer"),
    # As in `feature_info`, which misspells the names ("block.0").
    "Twins": ("blocks.0", "blocks.1", "blocks.2", "blocks.3"),
    # Three scales run side by side after the serial blocks, and `feature_info` lists all of them at the very end.
    "CoaT": ("serial_blocks1.1", "serial_blocks2.1", "parallel_blocks.2", "parallel_blocks.5"),
}


def natural_boundaries(traced: TracedModel) -> tuple[list[TapPoint], str]:
    """The model's own boundaries without its stem, and how they were found; empty if none of the ways finds stages."""
    everywhere = traced.points
    clean = [point for point in everywhere if point.clean]
    for find, points, found_by in (
        (_quirk, everywhere, "quirk"),
        (_announced, clean, "feature_info"),
        (_equal_shares, clean, "equal shares"),
        (_by_resolution, clean, "resolution"),
        (_announced, everywhere, "feature_info"),
        (_by_resolution, everywhere, "resolution"),
        (_equal_shares, everywhere, "equal shares"),
    ):
        found = find(traced, points)
        while len(found) > NUM_STAGES and is_stem(found[0], found[-1]):
            found = found[1:]
        if _sane(merged(found, NUM_STAGES, traced.macs), traced.macs):
            return found, found_by
    return [], ""


def _sane(points: Sequence[TapPoint], macs: int) -> bool:
    """Whether these are at least three stages that do most of the work together, and none does nearly all of it."""
    done = shares(points, macs)
    return len(points) >= MIN_STAGES and sum(done) > 0.5 and max(done) < 0.9


def _quirk(traced: TracedModel, points: Sequence[TapPoint]) -> list[TapPoint]:
    """The boundaries in `_QUIRKS` for this model; of several maps that a module returns, the smallest."""
    named = _QUIRKS.get(type(traced.model).__name__, ())
    found = [_find(traced, name, traced.input_size[1], points) for name in named]
    return [point for point in found if point is not None] if None not in found else []


def _announced(traced: TracedModel, points: Sequence[TapPoint]) -> list[TapPoint]:
    """The pyramid that timm's `feature_info` describes."""
    announced = apart(_resolved(traced, points), traced.macs)
    if not 3 <= len(announced) <= 8 or len({point.layout.size for point in announced}) == 1:
        return []
    following = [*announced[1:], None]
    return [_last_sibling(*pair, points) for pair in zip(announced, following, strict=True)]


def _resolved(traced: TracedModel, points: Sequence[TapPoint]) -> list[TapPoint]:
    """The points in `feature_info`, shallowest first; empty if one with a reduction above 2 cannot be tapped."""
    resolved = {}
    for info in getattr(traced.model, "feature_info", ()):
        point = _find(traced, info["module"], info["reduction"], points)
        if point is not None:
            resolved[point.node] = point
        elif info["reduction"] > 2:
            return []
    return [resolved[node] for node in sorted(resolved)]


def _find(traced: TracedModel, path: str, reduction: int, points: Sequence[TapPoint]) -> TapPoint | None:
    """The point that `feature_info` means by `path`.

    `path` may lack a prefix. If the module itself cannot be tapped (a container that is never called, or one that
    returns two tensors), the last tappable module inside it is meant.
    """
    taps = [(known, point) for point in points for known, _ in point.paths]
    # Compared by tensor, not by name: the named module may be an identity.
    nodes = [node for call in traced.calls.get(path, []) for _, node in call.outputs]
    meant = [point for point in points if point.node in nodes]
    meant = meant or [point for known, point in taps if known.endswith(f".{path}")]
    if not meant:
        # A container that is never called or returns no map itself: the last of its outermost modules.
        inside = [point for known, point in taps if path and known.startswith(f"{path}.")]
        return max(inside, key=lambda point: (-point.depth, point.node), default=None)
    # Of several maps that one module returns, the one with the reduction in `feature_info`.
    return min(meant, key=lambda point: (abs(point.reduction - reduction), -point.node))


def _last_sibling(point: TapPoint, following: TapPoint | None, points: Sequence[TapPoint]) -> TapPoint:
    """The last numbered sibling of the point's module that has a map of the same size, before the next boundary.

    For GhostNet, whose `feature_info` names the first block of each resolution.
    """
    if following is not None and following.layout.size == point.layout.size:
        return point
    families = {_family(path) for path, _ in point.paths} - {""}
    for other in reversed(points):
        if following is not None and other.node >= following.node:
            continue
        same_size = other.node > point.node and other.layout.size == point.layout.size
        if same_size and any(_family(path) in families for path, _ in other.paths):
            return other
    return point


def _equal_shares(traced: TracedModel, points: Sequence[TapPoint]) -> list[TapPoint]:
    """The blocks of a single-resolution trunk nearest to equal shares of the work; the last block is the end.

    In hybrids a convolutional part comes first: a share that ends there ends after one of its stages.
    """
    blocks = _blocks(points, traced.macs)
    if len(blocks) < MIN_STAGES:
        return []
    end = blocks[-1]
    share = end.macs / NUM_STAGES
    front = [point for point in points if point.node < blocks[0].node and _family(point.paths[0][0])]
    outermost = min((point.depth for point in front), default=0)
    chosen = []
    for goal in (share * part for part in range(1, NUM_STAGES)):
        near = [point for point in front if point.depth == outermost and abs(point.macs - goal) < share / 2]
        chosen.append(min([*blocks, *near], key=lambda point: abs(point.macs - goal)))
    return list(dict.fromkeys([*sorted(chosen, key=lambda point: point.node), end]))


def _blocks(points: Sequence[TapPoint], macs: int) -> list[TapPoint]:
    """The numbered siblings with equal maps that do much of the work; empty if the map shrinks after them."""
    families: dict[tuple[str, int, tuple[int, int]], list[TapPoint]] = {}
    for point in points:
        for path, _ in point.paths:
            if _family(path):
                alike = (_family(path), point.layout.num_chs, point.layout.size)
                families.setdefault(alike, []).append(point)
    work = {key: family[-1].macs - family[0].macs for key, family in families.items()}
    largest = max(work, key=lambda key: (work[key], key[1]), default=None)
    if largest is None or work[largest] < 0.4 * macs:
        return []
    blocks = families[largest]
    end = blocks[-1]
    # The image encoders of vision-language models end in a layer that merges tokens: that is not another stage.
    far = end.macs + 0.05 * macs
    shrinks = any(point.macs > far and point.layout.size < end.layout.size for point in points)
    return [] if shrinks else blocks


def _by_resolution(traced: TracedModel, points: Sequence[TapPoint]) -> list[TapPoint]:
    """For each resolution, the last of the outermost modules that return a map of this size.

    A numbered module (a stage or block) is preferred to an embedding before it or a norm after it.
    """
    least = SMALLEST_SHARE * traced.macs
    points = [point for point in points if point.macs >= least]
    chosen = []
    for size in dict.fromkeys(point.layout.size for point in points):
        same = [point for point in points if point.layout.size == size]
        outermost = min(point.depth for point in same)
        numbered = [
            point
            for point in same
            if any(_family(path) and path.count(".") <= outermost + 1 for path, _ in point.paths)
        ]
        last = [point for point in same if point.depth == outermost][-1]
        chosen.append(numbered[-1] if numbered and last.macs - numbered[-1].macs < least else last)
    chosen.sort(key=lambda point: point.node)
    return apart([point for point in chosen if not is_stem(point, chosen[-1])], traced.macs)


def _family(path: str) -> str:
    """The container of a numbered module ("blocks" of "blocks.3"); "" if the module has no number."""
    parent, _, number = path.rpartition(".")
    return parent if number.isdigit() else ""
