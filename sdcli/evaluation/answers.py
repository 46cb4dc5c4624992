"""What every exit answers to each image of a split: enough for every metric, in a few numbers per image.

N images, B batch, K classes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sdcli.data.batch import Batch
from sdcli.evaluation.metrics import nll, topk_correct
from sdcli.method.signals import ensemble
from sdcli.network.blueprint import ENSEMBLE

Collect: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Gathers the tensors of all processes, each of which has every n-th: returns all of them in order, on the CPU."""

Beside: TypeAlias = Callable[[Batch, Mapping[str, Tensor]], None]
"""Sees every batch and the logits of its points [B, K]."""


def nothing(batch: Batch, logits: Mapping[str, Tensor]) -> None:
    """Looks at none of it."""


def only_one(own: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors of the only process."""
    return [tensor.cpu() for tensor in own]


@dataclass(frozen=True)
class Answered:
    """The answers of one point, on the CPU."""

    predicted: Tensor
    """Class indices [N]."""
    confidence: Tensor
    """The largest probability [N]."""
    nll: Tensor
    """Negative log-likelihood of the label [N], in nats."""
    top5: Tensor
    """Whether the label is among the five largest logits [N]."""


@dataclass(frozen=True)
class Answers:
    """The answers of all points to a split's images, in the order in which they were scored."""

    points: dict[str, Answered]
    """Shallowest first; the ensemble last, where there are several."""
    labels: Tensor
    """[N]"""
    index: Tensor
    """Each image's position in its split [N]."""

    def __len__(self) -> int:
        return len(self.labels)

    def correct(self, point: str) -> Tensor:
        """Which images a point classifies right [N]."""
        return self.points[point].predicted == self.labels


class Tally:
    """The answers of one point, batch after batch. They stay on the device: nothing waits for them until the end."""

    def __init__(self) -> None:
        self.columns: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Answers of a batch: logits [B, K], labels [B]."""
        confidence, predicted = torch.softmax(logits.float(), dim=1).max(dim=1)
        top5 = topk_correct(logits, labels, 5)
        # float32 holds class indices exactly up to 2 ** 24.
        self.columns.append(torch.stack([predicted.float(), confidence, nll(logits, labels), top5.float()]))

    def answered(self, collect: Collect = only_one) -> Answered:
        """All of them."""
        predicted, confidence, losses, top5 = torch.cat(list(collect(self.columns)), dim=1).unbind()
        return Answered(predicted.long(), confidence, losses, top5 > 0.5)


@torch.inference_mode()
def answer(
    network: nn.Module,
    batches: Iterable[Batch],
    *,
    points: Sequence[str],
    device: torch.device,
    progress: Callable[[int], None] = lambda images: None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    collect: Collect = only_one,
    beside: Beside = nothing,
) -> Answers:
    """One pass over the batches with the heads of `points` (shallowest first) and, if there are several, their
    ensemble: the mean of their logits.

    The network keeps its train or eval mode. `progress` is called with the number of images so far, and `beside` with
    every batch and the logits of its points [B, K]. If several processes each have a part of the batches, `collect`
    gathers the answers; no image is counted twice.
    """
    tallies = {point: Tally() for point in points}
    together = Tally()
    seen: list[Tensor] = []
    done = 0
    wanted = dict.fromkeys(points, True)
    was_training = network.training
    network.eval()
    try:
        for batch in batches:
            batch = batch.to(device)
            with autocast():
                signals = network(batch.images, wanted)
            logits = {point: signals[point].logits.float() for point in points}
            for point, tally in tallies.items():
                tally.add(logits[point], batch.labels)
            if len(points) > 1:
                together.add(ensemble(list(logits.values())), batch.labels)
            beside(batch, logits)
            seen.append(torch.stack([batch.labels, batch.index]))
            done += len(batch.labels)
            progress(done)
    finally:
        network.train(was_training)
    labels, index = torch.cat(list(collect(seen)), dim=1).unbind()
    answered = {point: tally.answered(collect) for point, tally in tallies.items()}
    if len(points) > 1:
        answered[ENSEMBLE] = together.answered(collect)
    return Answers(answered, labels, index)
