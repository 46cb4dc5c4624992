"""Scores every exit and their ensemble on one data set, in one pass.

B batch, K classes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sdcli.data.batch import Batch
from sdcli.evaluation.metrics import confidence_and_correct, ece, nll, topk_correct
from sdcli.method.signals import ensemble
from sdcli.network.blueprint import ENSEMBLE, Cost


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


@dataclass(frozen=True)
class Report:
    """The scores of every exit on one split. `ensemble` is None if only one point was scored."""

    model: str
    dataset: str
    split: str
    num_images: int
    exits: tuple[ExitResult, ...]
    ensemble: ExitResult | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "exits": [asdict(result) for result in self.exits]}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Report:
        """The report from the output of `to_dict`."""
        ensemble = ExitResult(**table["ensemble"]) if table["ensemble"] else None
        exits = tuple(ExitResult(**result) for result in table["exits"])
        return cls(**{**table, "exits": exits, "ensemble": ensemble})


Collect: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Gathers the tensors of all processes, each of which has every n-th: returns all of them in order, on the CPU."""


def _only_one(own: Sequence[Tensor]) -> Sequence[Tensor]:
    return [tensor.cpu() for tensor in own]


class _Tally:
    """The results of one point, per image. They stay on the device: nothing waits for them until the last batch."""

    def __init__(self) -> None:
        self.columns: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        confidence, correct = confidence_and_correct(logits, labels)
        top5 = topk_correct(logits, labels, 5)
        self.columns.append(torch.stack([correct.float(), top5.float(), nll(logits, labels), confidence]))

    def result(self, point: str, cost: Cost, plain_macs: int, collect: Collect) -> ExitResult:
        top1, top5, losses, confidence = torch.cat(list(collect(self.columns)), dim=1).unbind()
        return ExitResult(
            point=point,
            top1=100.0 * top1.double().mean().item(),
            top5=100.0 * top5.double().mean().item(),
            nll=losses.double().mean().item(),
            ece=ece(confidence, top1 > 0.5),
            params=cost.params,
            macs=cost.macs,
            speedup=plain_macs / cost.macs if cost.macs else float("nan"),
        )


@torch.inference_mode()
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
    progress: Callable[[int], None] = lambda images: None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    collect: Collect = _only_one,
) -> Report:
    """Scores `points` (shallowest first) and, if there are several, their ensemble.

    `costs` holds the costs of every point, of the `ensemble`, and of `final`, the reference for speed-ups. The network
    keeps its train or eval mode. `progress` is called with the number of images scored so far. If several processes
    each score a part of the batches, `collect` gathers the results; no image is counted twice.
    """
    tallies = {point: _Tally() for point in points}
    together = _Tally()
    num_images = 0
    was_training = network.training
    network.eval()
    try:
        for batch in batches:
            batch = batch.to(device)
            with autocast():
                signals = network(batch.images)
            for point, tally in tallies.items():
                tally.add(signals[point].logits.float(), batch.labels)
            if len(points) > 1:
                together.add(ensemble([signals[point].logits.float() for point in points]), batch.labels)
            num_images += len(batch.labels)
            progress(num_images)
    finally:
        network.train(was_training)
    plain = costs["final"].macs
    return Report(
        model=model,
        dataset=dataset,
        split=split,
        num_images=int(sum(collect([torch.tensor(num_images)]))),
        exits=tuple(tally.result(point, costs[point], plain, collect) for point, tally in tallies.items()),
        ensemble=together.result(ENSEMBLE, costs[ENSEMBLE], plain, collect) if len(points) > 1 else None,
    )
