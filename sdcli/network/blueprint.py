"""Everything that is needed to rebuild a network, and what the network costs.

D embedding, K classes
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from sdcli.data.transforms import Colour, Preprocess
from sdcli.errors import UserError
from sdcli.network.backbones import Architecture, create, pretrained_transform, resolve
from sdcli.network.cuts import find_stages
from sdcli.network.head_choice import suitable_heads
from sdcli.network.heads import POOLED, find_head, head_cost
from sdcli.network.stages import Stage, StagePlan
from sdcli.recipe.address import FINAL
from sdcli.recipe.schema import Network

ENSEMBLE = "ensemble"
BRANCH = "branch"
"""The head that is a copy of the network's own end. Not in the registry, because `branches` chooses it."""


@dataclass(frozen=True)
class Cost:
    """Parameters, and MACs for one image, of a head or of a network cut off at a point."""

    params: int
    macs: int


@dataclass(frozen=True)
class WeightsFile:
    """What a file of weights asks of the network that starts from it."""

    preprocess: Preprocess
    """How the images were prepared that the weights were trained on."""
    of_timm: bool
    """Whether it has timm's own format: then the stem keeps timm's kernels, as with `weights = "pretrained"`."""


@dataclass(frozen=True)
class Blueprint:
    """A network without its weights: what `inspect` prints, `check` checks, `train` builds and a checkpoint stores."""

    architecture: Architecture
    plan: StagePlan
    heads: dict[str, str]
    """The kind of each exit's head, shallowest first; for an encoder, also that of `final`."""
    classes: tuple[str, ...]
    preprocess: Preprocess

    @classmethod
    def draft(
        cls,
        table: Network,
        model: str,
        classes: Sequence[str] | None = None,
        *,
        image_size: int | None = None,
        colours: tuple[Colour, Colour] | None = None,
        file: WeightsFile | None = None,
    ) -> Blueprint:
        """Plans the network of a `[networks]` table on the meta device, without weights or data.

        `classes`, `image_size` and `colours` (mean and standard deviation) default to the model's own; with
        `weights = "pretrained"`, or with the `file` that `weights` names, preprocessing is that of the weights, and
        only `image_size` may differ. Raises UserError for a model, stem, size, exit or head that does not exist or does
        not fit.
        """
        pretrained = table.weights == "pretrained"
        if file is not None and image_size is None:
            image_size = file.preprocess.input_size[1]
        architecture = resolve(
            model,
            num_classes=len(classes) if classes else None,
            image_size=image_size,
            stem=table.stem,
            pretrained=pretrained or (file is not None and file.of_timm),
            model_args=table.model_args,
        )
        plan = plan_network(table, architecture)
        if file is not None:
            preprocess = replace(file.preprocess, input_size=architecture.input_size)
        elif pretrained or colours is None:
            preprocess = Preprocess(architecture.input_size, **pretrained_transform(create(architecture)))
        else:
            preprocess = Preprocess(architecture.input_size, *colours)
        names = classes or [str(number) for number in range(architecture.num_classes or UNNAMED_CLASSES)]
        return cls(architecture, plan, choose_heads(plan, table, len(names)), tuple(names), preprocess)

    @property
    def points(self) -> list[str]:
        """All points, shallowest first; `final` comes last."""
        return list(self.stages)

    @property
    def stages(self) -> dict[str, Stage]:
        """The stage of every point, shallowest first."""
        return stages_by_point(self.plan)

    @property
    def notes(self) -> list[str]:
        """One sentence for each unusual property of the model and its stages."""
        return [*self.architecture.notes, *self.plan.notes]

    def head_costs(self) -> dict[str, Cost]:
        """The cost of each exit's own head; for `final`, of everything after the last stage."""
        return dict(self._head_costs)

    @cached_property
    def _head_costs(self) -> dict[str, Cost]:
        # Heads are built and traced for this: slow, and asked for with every setting of early exit.
        costs = {FINAL: Cost(0, 0)}
        for point, kind in self.heads.items():
            stage = self.stages[point]
            if kind == BRANCH:
                costs[point] = Cost(self.plan.params - stage.params, self.plan.macs - stage.macs)
            else:
                costs[point] = Cost(*head_cost(kind, self.plan, stage, len(self.classes)))
        last, own = self.plan.stages[-1], costs.pop(FINAL)
        # After the last stage come the model's own norm, pooling and classifier; for an encoder, its head as well.
        end = Cost(own.params + self.plan.params - last.params, own.macs + self.plan.macs - last.macs)
        return costs | {FINAL: end}

    def costs(self, points: Sequence[str] | None = None) -> dict[str, Cost]:
        """The cost of each exit deployed alone, head included, and of the `ensemble` of `points`.

        The ensemble (of all points by default) needs the network up to the deepest point, and the head of each.
        """
        own, stages = self.head_costs(), self.stages
        alone = {p: Cost(stages[p].params + cost.params, stages[p].macs + cost.macs) for p, cost in own.items()}
        *others, deepest = list(own) if points is None else points
        params, macs = (sum(getattr(own[point], kind) for point in others) for kind in ("params", "macs"))
        return alone | {ENSEMBLE: Cost(alone[deepest].params + params, alone[deepest].macs + macs)}

    def passing(self, exits: Sequence[str]) -> dict[str, int]:
        """The MACs of an image that leaves at each of `exits` or at `final`, with early exit at these `exits`.

        An image pays for the head of every exit that it passes: at `final` that is more than the plain network.
        """
        own, stages = self.head_costs(), self.stages
        costs, heads = {}, 0
        for point in exits:
            heads += own[point].macs
            costs[point] = stages[point].macs + heads
        return costs | {FINAL: stages[FINAL].macs + own[FINAL].macs + heads}

    def summary(self) -> dict[str, Any]:
        """The output of `inspect --json`: each stage with the cost of its head, and of its exit deployed alone.

        `dominated_by` is the deepest of the deeper exits that cost no more MACs.
        """
        plan, heads = self.plan, {point: Cost(0, 0) for point in self.points} | self.head_costs()
        macs = {point: stage.macs + heads[point].macs for point, stage in self.stages.items()}
        stages = [
            {
                "point": point,
                **asdict(stage),
                "macs_fraction": self._share(stage.macs),
                "head": self.heads.get(point),
                "head_params": heads[point].params,
                "head_macs": heads[point].macs,
                "exit_params": stage.params + heads[point].params,
                "exit_macs": macs[point],
                "exit_macs_fraction": self._share(macs[point]),
                "dominated_by": _dominating(point, macs),
            }
            for point, stage in self.stages.items()
        ]
        return {
            "model": plan.model,
            "input_size": list(plan.input_size),
            "found_by": plan.found_by,
            "notes": [*self.notes, *self._cost_notes(macs)],
            "params": plan.params,
            "macs": plan.macs,
            "stages": stages,
        }

    def _share(self, macs: int) -> float:
        return macs / self.plan.macs if self.plan.macs else 0.0

    def _cost_notes(self, macs: Mapping[str, int]) -> Iterator[str]:
        """A note on each exit that is no cheaper than a deeper one, or than the whole network."""
        for point, own in macs.items():
            deeper = _dominating(point, macs)
            if deeper is None:
                continue
            if own > self.plan.macs:
                found = f"costs {self._share(own):.2f} times as many MACs as the whole network"
            else:
                found = f"costs at least as many MACs as the deeper {deeper}"
            yield f"{point}* {found}" + ("; --head linear is cheaper" if self.heads.get(point) != "linear" else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, which `checkpoint.py` reads back."""
        return {
            "architecture": self.architecture.to_dict(),
            "plan": self.plan.to_dict(),
            "heads": self.heads,
            "classes": list(self.classes),
            "preprocess": self.preprocess.to_dict(),
        }


UNNAMED_CLASSES = 1000
"""The number of classes of a model without a classifier, if none are given."""


def _dominating(point: str, macs: Mapping[str, int]) -> str | None:
    """The deepest exit after `point` that costs no more, if there is one; `macs` has all points, shallowest first."""
    names = list(macs)
    deeper = names[names.index(point) + 1 :]
    return next((other for other in reversed(deeper) if macs[other] <= macs[point]), None)


def exit_points(plan: StagePlan) -> list[str]:
    """`exit1`, `exit2`, … for every stage but the last, whose exit is the model's own classifier."""
    return [f"exit{number}" for number in range(1, len(plan.stages))]


def stages_by_point(plan: StagePlan) -> dict[str, Stage]:
    """The stage behind every point, shallowest first."""
    return dict(zip([*exit_points(plan), FINAL], plan.stages, strict=True))


def plan_network(network: Network, architecture: Architecture) -> StagePlan:
    """Plans where to cut the network, on the meta device, without weights or data."""
    backbone = create(architecture, device="meta")
    exits: int | list[str] | None = None
    if isinstance(network.exits, (int, list)):
        exits = network.exits
    elif network.exits == "none":
        exits = 1
    plan = find_stages(backbone, architecture.input_size, exits=exits, name=architecture.model)
    if network.branches is not None:
        if len(plan.stages) < 2:
            raise UserError(
                f"branches: {architecture.model} has only one stage",
                "two or more stages, because branches are copies of the last one",
                key="networks.student.branches",
            )
        # The stage before the last is repeated once per extra branch: all branches start from it.
        plan = replace(plan, stages=(*plan.stages[-2:-1] * (network.branches - 1), plan.stages[-1]))
    return plan


def choose_heads(plan: StagePlan, table: Network, num_classes: int) -> dict[str, str]:
    """The kind of head for each exit of `plan`, and for `final` of an encoder; raises UserError for an unknown head.

    `head = "none"` leaves exits without classifiers: only their maps can be compared. With `branches`, each exit's head
    is a copy of everything after its stage.
    """
    final = {FINAL: POOLED} if plan.encoder else {}
    if table.branches is not None:
        return dict.fromkeys(exit_points(plan), BRANCH)
    if table.head == "none":
        return final
    points = exit_points(plan)
    if table.head == "auto":
        return dict(zip(points, suitable_heads(plan, num_classes), strict=True)) | final
    find_head(table.head, "networks.student.head")
    return dict.fromkeys(points, table.head) | final
