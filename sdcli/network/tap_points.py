"""The tensors of one forward pass at which a stage could end.

The record of a forward pass (`trace.py`) shows which modules return maps, in which layout, and the cost up to each map.
It also shows which of them are *clean cuts*: everything later depends on this tensor and on nothing earlier (it is a
dominator of the logits in the dataflow graph). Exits, truncation and early exit are exact there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from sdcli.errors import UserError
from sdcli.network.layout import Layout, layout_of, reduction_of
from sdcli.network.trace import Call, Record, calls_by_path, channel_axes, clean_cuts, record_forward

MOST_PREFIX_TOKENS = 16

# A 1x1 map is a pooled vector, except for images so small that the network may shrink them to a single position.
LARGEST_IMAGE_OF_POINTS = 64


@dataclass(frozen=True)
class TapPoint:
    """A map of the image that one or more modules return."""

    node: int
    paths: tuple[tuple[str, int | None], ...]
    """The modules that return it, outermost first, with the index in the returned tuple; each is called only once."""
    layout: Layout
    reduction: int
    clean: bool
    params: int
    macs: int

    @property
    def depth(self) -> int:
        return self.paths[0][0].count(".")


@dataclass(frozen=True)
class TracedModel:
    """A model, the record of one forward pass, and the tap points in it."""

    name: str
    model: nn.Module
    input_size: tuple[int, int, int]
    record: Record
    calls: Mapping[str, list[Call]]
    """The calls by module path, without the call of the model itself."""
    points: tuple[TapPoint, ...]
    """In the order of the forward pass."""

    @property
    def macs(self) -> int:
        return self.record.macs


def trace_model(model: nn.Module, input_size: tuple[int, int, int], name: str) -> TracedModel:
    """Records one forward pass of `model` and finds its tap points; raises UserError if it refuses the input size."""
    parameter = next(model.parameters(), None)
    image = torch.zeros(1, *input_size)
    image = image if parameter is None else image.to(parameter)
    try:
        record = record_forward(model, [image])
    except Exception as error:  # models raise all kinds of errors for an unsuitable size
        reason = " ".join(str(error).split()) or type(error).__name__
        size = "x".join(map(str, input_size))
        raise UserError(f"{name} does not run on an image of {size}: {reason}") from error
    calls = {path: calls for path, calls in calls_by_path(record.calls).items() if path}
    height, width = input_size[1:]
    points = _find_points(model, record, calls, (height, width))
    return TracedModel(name, model, input_size, record, calls, tuple(points))


def _find_points(
    model: nn.Module, record: Record, calls: Mapping[str, list[Call]], image: tuple[int, int]
) -> list[TapPoint]:
    graph = record.graph
    clean, axes = clean_cuts(record), channel_axes(graph)
    own = getattr(model, "num_prefix_tokens", None)
    prefixes = [*([own] if isinstance(own, int) else []), *range(MOST_PREFIX_TOKENS + 1)]
    returned = _returned_by(model, calls)
    points = []
    for node in sorted(returned.keys() - graph.rewritten):
        groups = [sorted(group, key=lambda tap: tap[0].depth) for group in returned[node] if group]
        layout = layout_of(graph.values[node].shape, axes.get(node), image, prefixes)
        if not groups or layout is None or (layout.size == (1, 1) and image[0] > LARGEST_IMAGE_OF_POINTS):
            continue
        taps = min(groups, key=lambda group: group[0][0].depth)
        paths = tuple((call.path, entry) for call, entry in taps)
        reduction = reduction_of(image[0], layout.size[0])
        outermost = taps[0][0]
        points.append(TapPoint(node, paths, layout, reduction, node in clean, outermost.params, outermost.macs))
    return points


def _returned_by(model: nn.Module, calls: Mapping[str, list[Call]]) -> dict[int, list[list[tuple[Call, int | None]]]]:
    """The calls that return each node, with the index in their tuple, in groups that return the same tensor in training
    too.

    Modules that are called more than once are left out: a hook there would see several tensors.
    """
    returned: dict[int, list[list[tuple[Call, int | None]]]] = {}
    for path, (call, *more) in calls.items():
        if more:
            continue
        for entry, node in call.outputs:
            groups = returned.setdefault(node, [[]])
            if node not in call.inputs:
                groups[-1].append((call, entry))
            elif _is_random(model.get_submodule(path)):
                # In training a dropout changes the tensor: its container and the module before it then differ.
                groups.append([])
    return returned


def _is_random(module: nn.Module) -> bool:
    """Whether a module that returned its input may be a dropout rather than an identity."""
    return not isinstance(module, (nn.Identity, nn.Sequential)) and not any(True for _ in module.children())
