"""Losses against the labels, and softened labels.

B images, K classes, H W map
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sdcli.data.batch import Batch
from sdcli.method.losses import LOSSES


@LOSSES.register("cross_entropy", reads="logits")
def cross_entropy(
    student: Tensor,
    batch: Batch,
    *,
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    smooth_over: Literal["all", "others"] = "all",
    standardize: bool = False,
) -> Tensor:
    """Cross entropy with the labels (class indices [B], or class probabilities [B, K]), per image [B].

        -sum_k y'_k log p_k,  p = softmax(s)
        y' = (1 - e) y + e / K,            smooth_over "all"
        y' = (1 - e) y + e (1 - y) / (K - 1),  smooth_over "others"

    `smoothing` moves this fraction of the label's probability to other classes: with `smooth_over` "all", evenly to all
    K classes (Szegedy et al. 2016, arXiv:1512.00567; torch and timm); with "others", to the K-1 wrong classes only (the
    code of Tf-KD and of Zipf's label smoothing), which takes slightly more from the label. `standardize` first divides
    each image's logits by their standard deviation (MIX-KD, Choi et al. 2023, arXiv:2211.03946).
    """
    logits = standardized(student) if standardize else student
    if smooth_over == "all":
        return F.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=smoothing)
    share = smoothing * logits.shape[1] / (logits.shape[1] - 1)
    hard = F.cross_entropy(logits, batch.labels, reduction="none")
    return (1 - share) * hard - share * F.log_softmax(logits, dim=1).mean(dim=1)


@LOSSES.register("virtual_teacher", reads="logits", hard_labels=True)
def virtual_teacher(
    student: Tensor,
    batch: Batch,
    *,
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.99,
    temperature: Annotated[float, Field(gt=0)] = 20.0,
) -> Tensor:
    """KL divergence from a virtual teacher that is always right: Tf-KD's regularisation (Yuan et al. 2020,
    arXiv:1909.11723), per image [B].

        KL(q || p),  p = softmax(s),  q = softmax(v / T)
        v_k = confidence at the label, (1 - confidence) / (K - 1) elsewhere

    The teacher gives the label the probability `confidence` and divides the rest evenly among the other classes;
    `temperature` then flattens this distribution. Needs hard labels: raises UserError with mixup or cutmix.

    Follows the authors' code: it divides the teacher's probabilities (not logits) by the temperature and applies a
    softmax, so at 20 the result is nearly uniform; the student has no temperature, and the loss no factor T^2. Their
    `KLDivLoss` also divides by K, and on CIFAR-100 their multiplier of 100 cancels that; this code has neither.
    """
    labels, num_classes = hard_labels(batch), student.shape[1]
    teacher = torch.full_like(student, (1 - confidence) / (num_classes - 1))
    teacher.scatter_(1, labels[:, None], confidence)
    log_q = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(F.log_softmax(student, dim=1), log_q, reduction="none", log_target=True).sum(dim=1)


@LOSSES.register("tf_nkd", reads="logits", sees_batch=True, hard_labels=True)
def tf_nkd(student: Tensor, batch: Batch) -> Tensor:
    """Cross entropy weighted by the network's own confidence in the label, relative to the batch's mean: teacher-free
    NKD (Yang et al. 2022, arXiv:2208.10139), per image [B].

        -(p_y + 1 - mean over B of p_y) log p_y,  p = softmax(s), y the label

    The weight p[label] + 1 - mean p[label] gets no gradient. Its mean is taken over the batch of one process, so the
    weights change with the number of processes. Meant to be used together with ordinary cross entropy. Needs hard
    labels: raises UserError with mixup or cutmix (where the authors' code uses the two most probable labels).
    """
    log_p = label_column(F.log_softmax(student, dim=1), hard_labels(batch))
    p = log_p.detach().exp()
    return -(p + 1 - p.mean()) * log_p


@LOSSES.register("zipf", reads="logits", sees_batch="mask", hard_labels=True)
def zipf(
    student: Tensor, teacher: Tensor, batch: Batch, *, power: Annotated[float, Field(gt=0)] = 1.0, mask: bool = False
) -> Tensor:
    """KL divergence from Zipf's law to the predicted wrong classes, ranked by votes: Zipf's label smoothing (Liang et
    al. 2022, arXiv:2207.12980), per image [B].

        KL(q || p'),  p' = softmax of s over the wrong classes,  q_k in proportion to rank_k^-power

    The target can be anything that ranks the classes [B, K]: the signal `votes`, or logits. A class of rank r gets a
    probability proportional to r^-`power`. Classes with equal votes share the smaller rank; the label is ranked too and
    then left out. `mask` trains only on the images that the student classifies correctly (off in the paper), and the
    fewer there are in the batch of one process, the more each one counts. The ranks get no gradient. Needs hard labels:
    raises UserError with mixup or cutmix.
    """
    labels = hard_labels(batch)
    q = zipf_label(teacher, labels, power)
    log_p = F.log_softmax(other_columns(student, labels), dim=1)
    loss = F.kl_div(log_p, q, reduction="none").sum(dim=1)
    if not mask:
        return loss
    right = (student.argmax(dim=1) == labels).to(loss.dtype)
    return loss * right / right.mean().clamp(min=1 / len(right))


def zipf_label(scores: Tensor, labels: Tensor, power: float = 1.0) -> Tensor:
    """Target probabilities of the K-1 wrong classes [B, K-1], in class order, from the ranks of their scores [B, K]."""
    # Counts the classes with a higher score by searching the sorted row, which avoids a B x K x K tensor.
    lowness = -scores.contiguous()
    above = torch.searchsorted(lowness.sort(dim=1).values, lowness)
    return F.normalize(other_columns((above + 1).to(scores.dtype).pow(-power), labels), p=1.0, dim=1)


def votes(dense: Tensor) -> Tensor:
    """The number of the N places that each class wins [B, K], from the classifier's logits at every place [B, K, N]."""
    winners = dense.argmax(dim=1)
    return dense.new_zeros(dense.shape[:2]).scatter_add_(1, winners, torch.ones_like(winners, dtype=dense.dtype))


def standardized(logits: Tensor) -> Tensor:
    """Logits [B, K] divided by their standard deviation over the classes."""
    # Added inside the root, so that equal logits give zeros and a finite gradient.
    return logits / (logits.var(dim=1, keepdim=True) + 1e-12).sqrt()


def label_column(values: Tensor, labels: Tensor) -> Tensor:
    """Each image's value at its label [B]."""
    return values.gather(1, labels[:, None]).squeeze(1)


def other_columns(values: Tensor, labels: Tensor) -> Tensor:
    """Each image's values [B, K] without the one at its label [B, K-1]."""
    # Not a boolean mask, which would wait for the GPU to learn how many values remain.
    columns = torch.arange(values.shape[1] - 1, device=values.device).expand(len(values), -1)
    return values.gather(1, columns + (columns >= labels[:, None]))


def hard_labels(batch: Batch) -> Tensor:
    """The class indices [B], for losses registered with `hard_labels`: an objective refuses such losses where labels
    are mixed."""
    assert batch.labels.ndim == 1
    return batch.labels
