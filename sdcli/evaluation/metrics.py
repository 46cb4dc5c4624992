"""Metrics of predictions: functions of logits and labels.

B images, K classes
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ECE_BINS = 15


def topk_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the label is among the k largest logits, as booleans [B]; k is limited to K."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == labels[:, None]).any(dim=1)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of the label per image [B], in nats."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def ece(confidence: Tensor, correct: Tensor, num_bins: int = ECE_BINS) -> float:
    """Expected calibration error in [0, 1]: the mean gap between confidence and accuracy over equal bins of confidence.

    `confidence` is the largest probability of each image and `correct` whether the prediction is right, both [B]. Bins
    are (low, high] as in Guo et al. 2017 (arXiv:1706.04599), weighted by their number of images. torchmetrics puts
    confidences of exactly 1.0, which confident networks have in single precision, into a bin of their own; here they
    are in the last one, as in the diagram.
    """
    return sum(own.images * abs(own.accuracy - own.confidence) for own in bins(confidence, correct, num_bins)) / max(
        len(confidence), 1
    )


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability diagram."""

    low: float
    high: float
    accuracy: float
    confidence: float
    """Mean, of the images in this bin."""
    images: int


def bins(confidence: Tensor, correct: Tensor, num_bins: int = ECE_BINS) -> list[Bin]:
    """The bins of `ece` that hold images, lowest confidence first."""
    places = (confidence.double() * num_bins).ceil().long().sub(1).clamp(0, num_bins - 1)
    counts = torch.bincount(places, minlength=num_bins)
    right = torch.bincount(places, correct.double(), minlength=num_bins)
    sure = torch.bincount(places, confidence.double(), minlength=num_bins)
    return [
        Bin(b / num_bins, (b + 1) / num_bins, float(right[b] / n), float(sure[b] / n), n)
        for b, n in enumerate(counts.tolist())
        if n
    ]


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """How many images of each class (rows) are taken for each class (columns) [K, K]."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def class_accuracies(matrix: Tensor) -> Tensor:
    """The share of each class's images that are right, from a confusion matrix [K]; NaN for a class without images."""
    return matrix.diag().double() / matrix.sum(dim=1)


def balanced_accuracy(matrix: Tensor) -> float:
    """The mean of the accuracies of all classes that have images, in [0, 1]: small classes count as much as large."""
    return float(class_accuracies(matrix).nanmean())


def confidence_and_correct(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The largest probability and whether its class is the label, both [B]: the inputs of `ece`."""
    probability, predicted = torch.softmax(logits.float(), dim=1).max(dim=1)
    return probability, predicted == labels


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share, in [0, 1] (Wilson 1927): right for small numbers and for shares near 0 and 1."""
    from scipy.stats import binomtest

    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def auroc(confidence: Tensor, correct: Tensor) -> float | None:
    """How often a right answer is surer than a wrong one, in [0, 1]; 0.5 is chance, None where all are right or wrong.

    `confidence` and `correct` [B], as for `ece`: failure prediction as in Hendrycks and Gimpel 2017 (arXiv:1610.02136).
    """
    if bool(correct.all()) or not bool(correct.any()):
        return None
    from torchmetrics.functional.classification import binary_auroc

    return float(binary_auroc(confidence.double(), correct.long()))
