"""How good predictions are: functions of logits and labels.

B images, K classes
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ECE_BINS = 15


def topk_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the label is among the k largest logits, as booleans [B]; k above K counts as K."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == labels[:, None]).any(dim=1)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of the label per image [B], in nats."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def ece(confidence: Tensor, correct: Tensor, num_bins: int = ECE_BINS) -> float:
    """Expected calibration error in [0, 1]: the mean gap between confidence and accuracy over equal bins of confidence.

    `confidence` is the largest probability of each image and `correct` whether it was right, both [B]. Bins are
    (low, high] as in Guo et al. 2017 (arXiv:1706.04599), weighted by the images in them.
    """
    # The library's own multi-class form wants all probabilities; its binary one bins the same two columns, but counts
    # an image as a positive where we count it as right: the same number.
    from torchmetrics.functional.classification import binary_calibration_error

    return float(binary_calibration_error(confidence.float(), correct.long(), n_bins=num_bins, norm="l1"))


def confidence_and_correct(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The largest probability and whether it is the label's, both [B]: what `ece` reads."""
    probability, predicted = torch.softmax(logits.float(), dim=1).max(dim=1)
    return probability, predicted == labels
