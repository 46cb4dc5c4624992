"""Boundaries that the user names, with the reason if a module cannot be tapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sdcli.errors import UserError, did_you_mean
from sdcli.network.boundaries import natural_boundaries
from sdcli.network.tap_points import TapPoint, TracedModel


def named_boundaries(traced: TracedModel, names: Sequence[str]) -> list[TapPoint]:
    """The points of the named modules, and the model's own end unless one of them comes at or after it.

    Raises UserError for an unknown module, one that cannot be tapped, and two modules that return the same tensor.
    """
    own = natural_boundaries(traced)[0] or traced.points
    points: dict[int, TapPoint] = {}
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"exits: '{name}' is named {names.count(name)} times", "each module once")
        point = _tappable(traced, name, own)
        if point.node in points:
            raise UserError(
                f"'{name}' and '{points[point.node].paths[0][0]}' return the same tensor of {traced.name}",
                "modules that return different tensors",
                "leave one of them out",
            )
        # The module that the user named comes first, before a container that returns the same tensor.
        points[point.node] = replace(point, paths=tuple(sorted(point.paths, key=lambda tap: tap[0] != name)))
    end = own[-1]
    if all(node < end.node for node in points):
        points[end.node] = end
    return [points[node] for node in sorted(points)]


def _tappable(traced: TracedModel, name: str, own: Sequence[TapPoint]) -> TapPoint:
    """The point of a module that the user names; raises UserError with the reason if it has none."""
    # Of several maps that a module returns, the one that is computed last.
    for point in reversed(traced.points):
        if any(path == name for path, _ in point.paths):
            return point
    known = [path for path, _ in traced.model.named_modules() if path]
    some = ", ".join(point.paths[0][0] for point in own[:3])
    if name not in known:
        raise UserError(
            f"{traced.name} has no module '{name}'",
            f"a module's path, such as {some}",
            did_you_mean(name, known),
        )
    raise UserError(
        f"module '{name}' of {traced.name} {_why_not(traced, name)}",
        "a module that is called once and returns a map",
        f"name others, such as {some}",
    )


def _why_not(traced: TracedModel, name: str) -> str:
    """Why a module of the model has no tap point."""
    calls = traced.calls.get(name, [])
    returned = [node for call in calls for _, node in call.outputs]
    graph = traced.record.graph
    if not calls:
        return "is never called in a forward pass"
    if len(calls) > 1:
        return f"is called {len(calls)} times in a forward pass"
    if not graph.rewritten.isdisjoint(returned):
        return "returns a tensor that is changed in place afterwards"
    if not set(calls[0].inputs).isdisjoint(returned):
        return "returns its input unchanged"
    if any(point.node in returned for point in traced.points):
        return "returns a tensor that a dropout changes in training"
    if not returned:
        return "returns no tensor"
    return f"returns a tensor of shape {list(graph.values[returned[0]].shape)}, which is not a map"
