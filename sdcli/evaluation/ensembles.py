"""Ensembles of exits beside the mean of their logits: the mean of their probabilities, and a weighted mean of logits.

N images, B images of a batch, K classes, E exits
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdcli.data.batch import Batch
from sdcli.evaluation.answers import Answered, Tally
from sdcli.evaluation.evaluate import ExitResult
from sdcli.evaluation.outputs import Outputs

PROBABILITIES, WEIGHTED = "mean of probs", "weighted"
LEAST = 0.001
"""Weights below this are 0: the exit's head is not needed."""


@dataclass(frozen=True)
class Ensembles:
    """Further ensembles, scored."""

    results: tuple[ExitResult, ...]
    weights: dict[str, float]
    """Of every point in the weighted one; they sum to 1."""
    num_images: int
    """Validation images that the weights were fitted on."""


class Mixed:
    """What both ensembles answer, batch after batch."""

    def __init__(self, weights: Mapping[str, float], num_images: int) -> None:
        self.weights, self.num_images = dict(weights), num_images
        self.tallies = {PROBABILITIES: Tally(), WEIGHTED: Tally()}

    def __call__(self, batch: Batch, logits: Mapping[str, Tensor]) -> None:
        self.tallies[PROBABILITIES].add(mean_of_probabilities(list(logits.values())), batch.labels)
        self.tallies[WEIGHTED].add(weighted(logits, self.weights), batch.labels)

    def answered(self) -> dict[str, Answered]:
        """All answers, by ensemble."""
        return {name: tally.answered() for name, tally in self.tallies.items()}


def mean_of_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Log of the mean of the points' probabilities [B, K]."""
    return torch.logsumexp(torch.log_softmax(torch.stack(list(logits)), dim=2), dim=0) - math.log(len(logits))


def weighted(logits: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted mean of the points' logits [B, K]."""
    return torch.stack([weight * logits[point] for point, weight in weights.items()]).sum(dim=0)


def fit_weights(outputs: Outputs) -> dict[str, float]:
    """The weights of the points' logits, from 0 and with sum 1, with the least NLL on these outputs.

    The NLL is convex in the weights: there is one minimum, whatever the start. ZTW fits weights per exit and class to
    log-probabilities on the training images (Wolczyk et al. 2021, arXiv:2106.05409); here it is one weight per exit, on
    images held out of training, so that few of them are enough.
    """
    from scipy.optimize import minimize

    points, labels = list(outputs.logits), outputs.labels
    # Log-probabilities differ from logits by a constant per image, which no softmax sees, and are of like size.
    stacked = torch.stack([torch.log_softmax(outputs.logits[point], dim=1) for point in points])

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        mixed = torch.tensordot(torch.from_numpy(weights).to(stacked), stacked, dims=1)
        logs = torch.log_softmax(mixed, dim=1)
        off = logs.exp()
        off[torch.arange(len(labels)), labels] -= 1
        slope = torch.einsum("nk,enk->e", off, stacked) / len(labels)
        return float(-logs[torch.arange(len(labels)), labels].double().mean()), slope.double().numpy()

    equal = np.full(len(points), 1 / len(points))
    found = minimize(
        loss,
        equal,
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * len(points),
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-7},
    )
    weights = np.where(found.x < LEAST, 0.0, found.x)
    return {point: float(weight) for point, weight in zip(points, weights / weights.sum(), strict=True)}
