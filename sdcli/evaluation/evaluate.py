"""The scores of every exit and their ensemble, from their answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sdcli.data.batch import Batch
from sdcli.evaluation.answers import Answers, answer
from sdcli.evaluation.metrics import auroc, ece, wilson
from sdcli.network.blueprint import ENSEMBLE, Cost
from sdcli.recipe.address import FINAL


@dataclass(frozen=True)
class ExitResult:
    """The scores of one exit, and its costs when it is deployed alone."""

    point: str
    top1: float
    """In percent, as in timm."""
    top5: float
    nll: float
    """Mean negative log-likelihood, in nats."""
    ece: float
    """Expected calibration error over 15 bins, between 0 and 1."""
    params: int
    macs: int
    speedup: float
    """MACs of the plain model divided by these."""
    auroc: float | None = None
    """How often a right answer is surer than a wrong one; None where all are right or wrong."""
    agreement: float | None = None
    """The share of images, in percent, with the same class as `final`; None where that was not scored."""
    latency_ms: float | None = None
    """Median time of one image on this device, in milliseconds; None where it was not measured."""

    def interval(self, num_images: int) -> tuple[float, float]:
        """Wilson's 95 % interval of top-1, in percent: the noise of the images, not of the training."""
        low, high = wilson(round(self.top1 / 100 * num_images), num_images)
        return 100 * low, 100 * high


@dataclass(frozen=True)
class Report:
    """The scores of every exit on one split. `ensemble` is None if only one point was scored."""

    model: str
    dataset: str
    split: str
    num_images: int
    exits: tuple[ExitResult, ...]
    ensemble: ExitResult | None

    @property
    def rows(self) -> tuple[ExitResult, ...]:
        """All exits, and the ensemble if there is one."""
        return self.exits + ((self.ensemble,) if self.ensemble else ())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "exits": [asdict(result) for result in self.exits]}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Report:
        """The report from the output of `to_dict`."""
        ensemble = ExitResult(**table["ensemble"]) if table["ensemble"] else None
        exits = tuple(ExitResult(**result) for result in table["exits"])
        return cls(**{**table, "exits": exits, "ensemble": ensemble})


def report_of(answers: Answers, costs: Mapping[str, Cost], *, model: str, dataset: str, split: str) -> Report:
    """The scores of answers. `costs` holds those of every point, of the `ensemble`, and of `final`, the reference for
    speed-ups."""
    results = {point: result_of(answers, point, costs[point], costs[FINAL].macs) for point in answers.points}
    together = results.pop(ENSEMBLE, None)
    return Report(model, dataset, split, len(answers), tuple(results.values()), together)


def result_of(answers: Answers, point: str, cost: Cost, plain_macs: int) -> ExitResult:
    """The scores of one point."""
    own, correct = answers.points[point], answers.correct(point)
    same = own.predicted == answers.points[FINAL].predicted if FINAL in answers.points else None
    return ExitResult(
        point=point,
        top1=100.0 * correct.double().mean().item(),
        top5=100.0 * own.top5.double().mean().item(),
        nll=own.nll.double().mean().item(),
        ece=ece(own.confidence, correct),
        params=cost.params,
        macs=cost.macs,
        speedup=plain_macs / cost.macs if cost.macs else float("nan"),
        auroc=auroc(own.confidence, correct),
        agreement=100.0 * same.double().mean().item() if same is not None else None,
    )


def evaluate(
    network: nn.Module,
    batches: Iterable[Batch],
    *,
    points: Sequence[str],
    costs: Mapping[str, Cost],
    device: torch.device,
    model: str,
    dataset: str,
    split: str,
    **options: Any,
) -> Report:
    """Scores `points` (shallowest first) and, if there are several, their ensemble; `options` are those of `answer`."""
    answers = answer(network, batches, points=points, device=device, **options)
    return report_of(answers, costs, model=model, dataset=dataset, split=split)
