"""Where a timm model can be tapped: one traced forward, no weights and no data needed.

The record of a forward pass (`trace.py`) shows which modules return maps and in which layout, what each map cost so
far, and which of them are *clean cuts*: tensors on which everything later depends and on nothing else earlier
(dominators of the logits in the dataflow graph). Exits, truncation and early exit are exact there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn

from sdcli.errors import UserError, did_you_mean
from sdcli.network.layout import Layout, layout_of, reduction_of
from sdcli.network.stages import Stage, StagePlan
from sdcli.network.trace import RESHAPES, Call, calls_by_path, channel_axes, clean_cuts, reaching, record_forward

NUM_STAGES = 4

MIN_STAGES = 3

# An exit after less of the work than this has seen next to nothing: what lies before it is the stem.
SMALLEST_FIRST_SHARE = 0.04

# Two boundaries with less of the work than this between them are one.
SMALLEST_SHARE = 0.02

MOST_PREFIX_TOKENS = 16

# A map of one position is a pooled vector, except where the image is so small that it may be all that is left of it.
LARGEST_IMAGE_OF_POINTS = 64

# Models, by class, whose boundaries nothing tells. Each entry says why.
_QUIRKS: dict[str, tuple[str, ...]] = {
    # Its branches run side by side to the end; `feature_info` has other names and leaves out the layers that join them.
    "HighResolutionNet": ("layer1", "stage2", "stage3", "final_layer"),
    # As announced, but for a misspelt name ("block.0").
    "Twins": ("blocks.0", "blocks.1", "blocks.2", "blocks.3"),
    # Three scales run side by side after the serial blocks, and `feature_info` announces all of them at the very end.
    "CoaT": ("serial_blocks1.1", "serial_blocks2.1", "parallel_blocks.2", "parallel_blocks.5"),
}


@dataclass(frozen=True)
class _Point:
    """A tensor on which a stage could end."""

    node: int
    paths: tuple[tuple[str, int | None], ...]
    """The modules that return it, each once per forward, outermost first, with the entry of their tuple."""
    layout: Layout
    reduction: int
    clean: bool
    params: int
    macs: int

    @property
    def depth(self) -> int:
        return self.paths[0][0].count(".")


def find_stages(
    model: nn.Module,
    input_size: tuple[int, int, int],
    *,
    exits: int | Sequence[str] | None = None,
    name: str = "",
) -> StagePlan:
    """Where to put exits in `model`, which may be on the meta device.

    `exits` asks for a number of stages, the deepest included, or names the modules after which to read (the deepest
    stage is added by itself); by default four, or three where the model has only three of its own.

    The boundaries are those that timm announces in `feature_info` where it describes a pyramid and each entry is a
    clean cut. A trunk of equal blocks is cut into equal shares of the work. What remains is cut after the last
    outermost module of each resolution. Stages beyond these come from halving the heaviest one.

    Raises UserError where the model refuses the input size, where a named module cannot be tapped and where the model
    has not as many places as asked for.
    """
    search = _Search(model, input_size, name or type(model).__name__)
    if exits is None or isinstance(exits, int):
        points, found_by = search.numbered(exits)
    else:
        points, found_by = search.named(exits), "named"
    return search.plan(points, found_by)


class _Search:
    """One model's record, and the choices made from it."""

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int], name: str) -> None:
        self.model, self.input_size, self.name = model, input_size, name
        parameter = next(model.parameters(), None)
        image = torch.zeros(1, *input_size)
        image = image if parameter is None else image.to(parameter)
        try:
            self.record = record_forward(model, [image])
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            size = "x".join(map(str, input_size))
            raise UserError(f"{name} does not run on an image of {size}: {reason}") from error
        self.calls = {path: calls for path, calls in calls_by_path(self.record.calls).items() if path}
        self.points = self._find_points()
        self.by_path = {path: point for point in self.points for path, _ in point.paths}

    def _find_points(self) -> list[_Point]:
        graph, image = self.record.graph, self.input_size[1:]
        clean, axes = clean_cuts(self.record), channel_axes(graph)
        own = getattr(self.model, "num_prefix_tokens", None)
        prefixes = [*([own] if isinstance(own, int) else []), *range(MOST_PREFIX_TOKENS + 1)]
        returned: dict[int, list[list[tuple[Call, int | None]]]] = {}
        for path, calls in self.calls.items():
            if len(calls) > 1:
                continue
            for entry, node in calls[0].outputs:
                groups = returned.setdefault(node, [[]])
                if node not in calls[0].inputs:
                    groups[-1].append((calls[0], entry))
                elif _is_random(self.model.get_submodule(path)):
                    # In training a dropout returns something else: its container and the module before it differ.
                    groups.append([])
        points = []
        for node in sorted(returned.keys() - graph.rewritten):
            groups = [sorted(group, key=lambda tap: tap[0].depth) for group in returned[node] if group]
            layout = layout_of(graph.values[node].shape, axes.get(node), image, prefixes)
            if not groups or layout is None or (layout.size == (1, 1) and image[0] > LARGEST_IMAGE_OF_POINTS):
                continue
            taps = min(groups, key=lambda group: group[0][0].depth)
            paths = tuple((call.path, entry) for call, entry in taps)
            reduction = reduction_of(image[0], layout.size[0])
            points.append(_Point(node, paths, layout, reduction, node in clean, taps[0][0].params, taps[0][0].macs))
        return points

    # Choosing

    def numbered(self, exits: int | None) -> tuple[list[_Point], str]:
        """As many boundaries as asked for, and what told them."""
        natural, found_by = self._natural()
        if not natural:
            raise UserError(
                f"{self.name} has no stages of its own: no modules return maps between which the work is shared",
                "a network of stages or blocks",
                "name the modules to read after with --exits",
            )
        if exits is None:
            return self._split(self._merged(natural, NUM_STAGES), NUM_STAGES, lopsided_only=True), found_by
        points = self._split(self._merged(natural, max(1, exits)), exits)
        if len(points) != exits:
            most = len(self._split(natural, len(self.points)))
            raise UserError(
                f"{self.name} cannot be cut into {exits} stages",
                f"between 1 and {most}",
                f"--exits {min(NUM_STAGES, most) if exits < 1 else most}",
            )
        return points, found_by

    def _natural(self) -> tuple[list[_Point], str]:
        """The model's own boundaries without its stem, and what told them; none where nothing tells them."""
        clean = [point for point in self.points if point.clean]
        for choose, points, found_by in (
            (self._quirk, self.points, "quirk"),
            (self._announced, clean, "feature_info"),
            (self._equal_shares, clean, "equal shares"),
            (self._by_resolution, clean, "resolution"),
            (self._announced, self.points, "feature_info"),
            (self._by_resolution, self.points, "resolution"),
            (self._equal_shares, self.points, "equal shares"),
        ):
            chosen = choose(points)
            while len(chosen) > NUM_STAGES and _is_stem(chosen[0], chosen[-1]):
                chosen = chosen[1:]
            if self._sane(self._merged(chosen, NUM_STAGES)):
                return chosen, found_by
        return [], ""

    def _sane(self, points: list[_Point]) -> bool:
        """At least three stages that together do most of the work, and none that does nearly all of it."""
        shares = self._shares(points)
        return len(points) >= MIN_STAGES and sum(shares) > 0.5 and max(shares) < 0.9

    def _shares(self, points: list[_Point]) -> list[float]:
        """Each stage's part of all the work."""
        ends = [0, *(point.macs for point in points)]
        return [(after - before) / max(self.record.macs, 1) for before, after in pairwise(ends)]

    def _merged(self, points: list[_Point], most: int) -> list[_Point]:
        """At most `most` of the boundaries: again and again, the two neighbours that do the least work become one."""
        points = list(points)
        while len(points) > most:
            shares = self._shares(points)
            joint = [before + after for before, after in pairwise(shares)]
            del points[joint.index(min(joint))]
        return points

    def _quirk(self, points: list[_Point]) -> list[_Point]:
        """The boundaries that `_QUIRKS` has for this model; of several maps that a module returns, the smallest."""
        named = _QUIRKS.get(type(self.model).__name__, ())
        found = [self._find(name, self.input_size[1], points) for name in named]
        return [point for point in found if point is not None] if None not in found else []

    def _announced(self, points: list[_Point]) -> list[_Point]:
        """The pyramid that timm's `feature_info` describes."""
        announced = self._apart(self._resolved(points))
        if not 3 <= len(announced) <= 8 or len({point.layout.size for point in announced}) == 1:
            return []
        following = [*announced[1:], None]
        return [self._last_sibling(*pair, points) for pair in zip(announced, following, strict=True)]

    def _resolved(self, points: list[_Point]) -> list[_Point]:
        """The points that `feature_info` names, shallowest first; none where one of them cannot be tapped."""
        resolved = {}
        for info in getattr(self.model, "feature_info", ()):
            point = self._find(info["module"], info["reduction"], points)
            if point is not None:
                resolved[point.node] = point
            elif info["reduction"] > 2:
                return []
        return [resolved[node] for node in sorted(resolved)]

    def _find(self, path: str, reduction: int, points: list[_Point]) -> _Point | None:
        """The point that `feature_info` means by `path`.

        A name may lack a prefix. Where the module itself cannot be tapped (a container that is never called, or one
        that returns two tensors), the last one inside it is meant.
        """
        taps = [(known, point) for point in points for known, _ in point.paths]
        # By the tensor rather than the name: an identity may be announced.
        nodes = [node for call in self.calls.get(path, []) for _, node in call.outputs]
        meant = [point for point in points if point.node in nodes]
        meant = meant or [point for known, point in taps if known.endswith(f".{path}")]
        if not meant:
            # A container that is never called, or returns no map itself: the last of the modules right inside it.
            inside = [point for known, point in taps if path and known.startswith(f"{path}.")]
            return max(inside, key=lambda point: (-point.depth, point.node), default=None)
        # Of several maps that one module returns, the one of the announced reduction.
        return min(meant, key=lambda point: (abs(point.reduction - reduction), -point.node))

    def _last_sibling(self, point: _Point, following: _Point | None, points: list[_Point]) -> _Point:
        """The last of the numbered modules beside the point's own with a map of its size, before the next boundary.

        GhostNet announces the first block of a resolution.
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

    def _equal_shares(self, points: list[_Point]) -> list[_Point]:
        """The blocks of a trunk of one resolution nearest to equal shares of the work; the last block is the end.

        Hybrids have a convolutional trunk in front: a share that ends there ends after one of its stages.
        """
        blocks = self._blocks(points)
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

    def _blocks(self, points: list[_Point]) -> list[_Point]:
        """The numbered siblings with equal maps that do much of the work; none where the map shrinks after them."""
        families: dict[tuple[str, int, tuple[int, int]], list[_Point]] = {}
        for point in points:
            for path, _ in point.paths:
                if _family(path):
                    alike = (_family(path), point.layout.num_chs, point.layout.size)
                    families.setdefault(alike, []).append(point)
        work = {key: family[-1].macs - family[0].macs for key, family in families.items()}
        largest = max(work, key=lambda key: (work[key], key[1]), default=None)
        if largest is None or work[largest] < 0.4 * self.record.macs:
            return []
        blocks = families[largest]
        end = blocks[-1]
        # The encoders of language models end in a layer that merges tokens: that is no further stage.
        far = end.macs + 0.05 * self.record.macs
        shrinks = any(point.macs > far and point.layout.size < end.layout.size for point in points)
        return [] if shrinks else blocks

    def _by_resolution(self, points: list[_Point]) -> list[_Point]:
        """After each resolution: the last of the outermost modules that return a map of it.

        A numbered one is preferred, a stage or block, to an embedding ahead of it or a norm behind it.
        """
        least = SMALLEST_SHARE * self.record.macs
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
        return self._apart([point for point in chosen if not _is_stem(point, chosen[-1])])

    def _apart(self, points: list[_Point]) -> list[_Point]:
        """Without the stem, and without those that have next to no work before the following one."""
        least, first = SMALLEST_SHARE * self.record.macs, SMALLEST_FIRST_SHARE * self.record.macs
        apart: list[_Point] = []
        for point in reversed(points):
            if point.macs >= first and (not apart or apart[-1].macs - point.macs >= least):
                apart.append(point)
        return apart[::-1]

    def _split(self, points: list[_Point], wanted: int, *, lopsided_only: bool = False) -> list[_Point]:
        """As many stages as wanted, or as can be: the heaviest is cut at the block nearest its middle, again and again.

        `lopsided_only` leaves a model with fewer stages of its own as it is unless one of them does most of the work.
        """
        points = list(points)
        while len(points) < wanted:
            shares = self._shares(points)
            heaviest_first = sorted(range(len(points)), key=lambda index: -shares[index])
            if lopsided_only:
                heaviest_first = [index for index in heaviest_first if shares[index] > 0.5]
            for index in heaviest_first:
                middle = self._middle(points[index - 1] if index else None, points[index], beside=lopsided_only)
                if middle is not None:
                    points.insert(index, middle)
                    break
            else:
                return points
        return points

    def _middle(self, before: _Point | None, after: _Point, *, beside: bool) -> _Point | None:
        """The outermost clean point nearest to half the work between two boundaries.

        `beside` keeps to the same container, so that a stem is not made a stage.
        """
        start = before.macs if before else 0
        least = SMALLEST_SHARE * self.record.macs
        container = after.paths[0][0].rpartition(".")[0]
        inside = [
            point
            for point in self.points
            if point.clean and start + least <= point.macs <= after.macs - least and point.node < after.node
            if not (beside and container) or point.paths[0][0].startswith(f"{container}.")
        ]
        goal, slack = (start + after.macs) / 2, (after.macs - start) / 4
        near = [point for point in inside if abs(point.macs - goal) <= slack]
        if not near and (beside or not inside):
            return None
        outermost = min(point.depth for point in near or inside)
        return min((p for p in near or inside if p.depth == outermost), key=lambda point: abs(point.macs - goal))

    def named(self, names: Sequence[str]) -> list[_Point]:
        """The points of the named modules, and the model's own end unless one of them lies behind it."""
        points: dict[int, _Point] = {}
        for name in names:
            point = self._tappable(name)
            if point.node in points:
                raise UserError(
                    f"'{name}' and '{points[point.node].paths[0][0]}' return the same tensor of {self.name}",
                    "modules that return different ones",
                    "leave one of them out",
                )
            # The user's name for it, rather than that of a container which returns the same.
            points[point.node] = replace(point, paths=tuple(sorted(point.paths, key=lambda tap: tap[0] != name)))
        end = (self._natural()[0] or self.points)[-1]
        if all(node < end.node for node in points):
            points[end.node] = end
        return [points[node] for node in sorted(points)]

    def _tappable(self, name: str) -> _Point:
        """The point of a module that the user names; raises UserError where it has none, and says why."""
        if name in self.by_path:
            return self.by_path[name]
        known = [path for path, _ in self.model.named_modules() if path]
        some = ", ".join(point.paths[0][0] for point in (self._natural()[0] or self.points)[:3])
        if name not in known:
            raise UserError(
                f"{self.name} has no module '{name}'",
                f"a module's path, such as {some}",
                did_you_mean(name, known),
            )
        calls = self.calls.get(name, [])
        returned = [node for call in calls for _, node in call.outputs]
        if not calls:
            why = "is never called in a forward pass"
        elif len(calls) > 1:
            why = f"is called {len(calls)} times in a forward pass"
        elif not self.record.graph.rewritten.isdisjoint(returned):
            why = "returns a tensor that is changed in place afterwards"
        elif not set(calls[0].inputs).isdisjoint(returned):
            why = "returns what it is given"
        elif any(point.node in returned for point in self.points):
            why = "returns a tensor that a dropout changes in training"
        else:
            shapes = [list(self.record.graph.values[node].shape) for node in returned[:1]]
            why = f"returns no map but a tensor of shape {shapes[0]}" if shapes else "returns no tensor"
        raise UserError(
            f"module '{name}' of {self.name} {why}",
            "a module that is called once and returns a map",
            f"name others, such as {some}",
        )

    # Describing

    def plan(self, points: list[_Point], found_by: str) -> StagePlan:
        stages = tuple(self._stage(point, points) for point in points)
        classifier, embedding_dim = self._classifier()
        unused = self._unused()
        return StagePlan(
            model=self.name,
            input_size=self.input_size,
            stages=stages,
            found_by=found_by,
            notes=tuple(self._notes(stages, unused, classifier)),
            params=sum(parameter.numel() for parameter in self.model.parameters()),
            macs=self.record.macs,
            unused=unused,
            classifier=classifier,
            embedding_dim=embedding_dim or stages[-1].num_chs,
            encoder=getattr(self.model, "num_classes", None) == 0,
        )

    def _stage(self, point: _Point, points: list[_Point]) -> Stage:
        others = [path for other in points if other is not point for path, _ in other.paths]
        # A container of several stages returns what the last of them does; the stage is that last one.
        own = [tap for tap in point.paths if not any(path.startswith(f"{tap[0]}.") for path in others)]
        own = own or [point.paths[-1]]
        (module, entry), layout = own[0], point.layout
        return Stage(
            module=module,
            tensor=entry,
            num_chs=layout.num_chs,
            size=layout.size,
            reduction=point.reduction,
            output_fmt=layout.output_fmt,
            num_prefix_tokens=layout.num_prefix_tokens,
            clean=point.clean,
            params=point.params,
            macs=point.macs,
            inner=tuple(path for path, inner in own[1:] if inner == entry and path.startswith(f"{module}.")),
            windows=self._windows(layout),
        )

    def _windows(self, layout: Layout) -> int:
        """How often the tokens of a stage are still folded into windows of 2x2: Hiera keeps its own schedule of it."""
        schedule = getattr(getattr(self.model, "reroll", None), "schedule", {})
        return next((len(left) for left, size in schedule.values() if tuple(size) == layout.size), 0)

    def _unused(self) -> tuple[str, ...]:
        graph = self.record.graph
        used = {id(graph.values[node]) for node in reaching(graph.sources, self.record.outputs)}
        return tuple(name for name, parameter in self.model.named_parameters() if id(parameter) not in used)

    def _classifier(self) -> tuple[str | None, int | None]:
        """The innermost module that makes the logits of one vector, and the width of that vector."""
        values = self.record.graph.values
        if getattr(self.model, "num_classes", None) == 0:
            # An encoder: what it puts out is pooled to the embedding, and a head of ours follows.
            shape = values[self.record.outputs[0]].shape
            return None, int(shape[1] if len(shape) == 4 else shape[-1])
        if len(self.record.outputs) != 1:
            return None, None
        logits = {self.record.outputs[0]}
        for operation in reversed(self.record.graph.operations):
            if operation.name in RESHAPES and not logits.isdisjoint(operation.results):
                logits.update(operation.sources)
        for path, (call, *more) in self.calls.items():
            if more or len(call.inputs) != 1 or len(call.outputs) != 1 or call.outputs[0][1] not in logits:
                continue
            shape = values[call.inputs[0]].shape
            if call.inputs[0] not in logits and shape.numel() == shape[1]:
                return path, int(shape[1])
        return None, None

    def _notes(self, stages: Sequence[Stage], unused: Sequence[str], classifier: str | None) -> Iterator[str]:
        unclean = [stage.module for stage in stages if not stage.clean]
        if unclean:
            yield (
                f"What follows {_listed(unclean)} also reads earlier tensors: exits there can be trained and read, but "
                "the network can neither be stopped nor cut off there."
            )
        several = [stage.module for stage in stages if stage.tensor is not None and not stage.clean]
        if several:
            yield f"{_listed(several)} return several maps, of which one is read."
        if stages[0].windows:
            yield "The tokens lie in nested windows, not row by row; maps are put back in order."
        if not getattr(self.model, "num_classes", 0):
            yield "The model has no classifier: its output is pooled and gets a linear one of ours."
        elif classifier is None:
            yield "No single module turns an embedding into the logits: the last stage's map, pooled, stands for it."
        if unused:
            few = ", ".join(unused[:3]) + (", …" if len(unused) > 3 else "")
            yield f"{len(unused)} parameters never reach the output and are not trained: {few}."


def _is_stem(point: _Point, end: _Point) -> bool:
    """Whether a map has the resolution before a pyramid's first stage: pyramids shrink by 8, by 16 with their stem.

    The ratio keeps the first stages of networks for small images, which shrink the image by less than 4.
    """
    return point.reduction < 4 and point.layout.size[0] > 12 * end.layout.size[0]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _family(path: str) -> str:
    """The container of a numbered module ("blocks" of "blocks.3"); "" where it has no number."""
    parent, _, number = path.rpartition(".")
    return parent if number.isdigit() else ""


def _is_random(module: nn.Module) -> bool:
    """Whether a module that returned what it was given may be a dropout, rather than an identity by any name."""
    return not isinstance(module, (nn.Identity, nn.Sequential)) and not any(True for _ in module.children())
