"""Turns the chosen boundaries into a plan: stages, classifier, unused parameters, notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from sdcli.network.layout import Layout
from sdcli.network.stages import Stage, StagePlan
from sdcli.network.tap_points import TapPoint, TracedModel
from sdcli.network.trace import RESHAPES, reaching

# An exit that the user places before this share of the work gets a note.
EARLY_SHARE = 0.1


def describe(traced: TracedModel, points: Sequence[TapPoint], found_by: str) -> StagePlan:
    """The plan of a model that is cut at `points`."""
    model = traced.model
    stages = tuple(_stage(model, point, points) for point in points)
    classifier, embedding_dim = _classifier(traced)
    unused = _unused(traced)
    notes = list(_notes(model, stages, unused, classifier))
    if found_by == "named":
        notes += _early(stages, traced.macs)
    return StagePlan(
        model=traced.name,
        input_size=traced.input_size,
        stages=stages,
        found_by=found_by,
        notes=tuple(notes),
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=traced.macs,
        unused=unused,
        classifier=classifier,
        embedding_dim=embedding_dim or stages[-1].num_chs,
        encoder=getattr(model, "num_classes", None) == 0,
    )


def _stage(model: nn.Module, point: TapPoint, points: Sequence[TapPoint]) -> Stage:
    others = [path for other in points if other is not point for path, _ in other.paths]
    # A container of several stages returns the same tensor as the last of them; the stage is that last module.
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
        windows=_windows(model, layout),
    )


def _windows(model: nn.Module, layout: Layout) -> int:
    """How often the tokens of a stage are still folded into windows of 2x2, by Hiera's own `reroll.schedule`."""
    schedule = getattr(getattr(model, "reroll", None), "schedule", {})
    return next((len(left) for left, size in schedule.values() if tuple(size) == layout.size), 0)


def _unused(traced: TracedModel) -> tuple[str, ...]:
    graph = traced.record.graph
    used = {id(graph.values[node]) for node in reaching(graph.sources, traced.record.outputs)}
    return tuple(name for name, parameter in traced.model.named_parameters() if id(parameter) not in used)


def _classifier(traced: TracedModel) -> tuple[str | None, int | None]:
    """The innermost module that turns one vector into the logits, and the width of that vector."""
    record = traced.record
    values = record.graph.values
    if getattr(traced.model, "num_classes", None) == 0:
        # An encoder: its output is pooled to the embedding, and sdcli adds a classifier.
        shape = values[record.outputs[0]].shape
        return None, int(shape[1] if len(shape) == 4 else shape[-1])
    if len(record.outputs) != 1:
        return None, None
    logits = {record.outputs[0]}
    for operation in reversed(record.graph.operations):
        if operation.name in RESHAPES and not logits.isdisjoint(operation.results):
            logits.update(operation.sources)
    for path, (call, *more) in traced.calls.items():
        if more or len(call.inputs) != 1 or len(call.outputs) != 1 or call.outputs[0][1] not in logits:
            continue
        shape = values[call.inputs[0]].shape
        if call.inputs[0] not in logits and shape.numel() == shape[1]:
            return path, int(shape[1])
    return None, None


def _notes(model: nn.Module, stages: Sequence[Stage], unused: Sequence[str], classifier: str | None) -> Iterator[str]:
    unclean = [stage.module for stage in stages if not stage.clean]
    if unclean:
        yield (
            f"The layers after {_listed(unclean)} also read earlier tensors: exits there can be trained and read, but "
            "the network cannot stop early or be truncated there."
        )
    several = [stage.module for stage in stages if stage.tensor is not None and not stage.clean]
    if several:
        yield f"Modules that return several maps, of which one is read: {_listed(several)}."
    if stages[0].windows:
        yield "The tokens are stored in nested windows, not row by row; sdcli restores the order of the maps."
    if not getattr(model, "num_classes", 0):
        yield "The model has no classifier: sdcli pools its output and adds a linear classifier."
    elif classifier is None:
        yield "No single module turns an embedding into the logits: the pooled map of the last stage is the embedding."
    if unused:
        few = ", ".join(unused[:3]) + (", …" if len(unused) > 3 else "")
        yield f"Parameters that never affect the output and are not trained: {len(unused)} ({few})."


def _early(stages: Sequence[Stage], macs: int) -> list[str]:
    """A note on each stage that ends in the stem or shortly after it."""
    return [
        f"{stage.module} ends after {stage.macs / macs:.1%} of the MACs: expect low accuracy at its exit."
        for stage in stages
        if stage.macs < EARLY_SHARE * macs
    ]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
