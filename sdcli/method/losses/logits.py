"""Losses between two predictions, and the mixing of several predictions.

B images, K classes, E branches
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sdcli.data.batch import Batch
from sdcli.method.losses import LOSSES
from sdcli.method.losses.labels import hard_labels, label_column, other_columns, standardized

Temperature = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0)]


@LOSSES.register("kl", reads="logits")
def kl(
    student: Tensor,
    teacher: Tensor,
    batch: Batch,
    *,
    temperature: Temperature = 4.0,
    rescale: bool = True,
    direction: Literal["forward", "reverse"] = "forward",
    standardize: bool = False,
) -> Tensor:
    """KL divergence from the softened teacher to the softened student (Hinton et al. 2015, arXiv:1503.02531), per image
    [B].

        T^2 KL(q || p),  q = softmax(t / T),  p = softmax(s / T)

    A higher `temperature` gives the wrong classes more weight. `rescale` multiplies by temperature^2, so that the
    gradient keeps its size when the temperature changes. `direction` "forward" makes the student cover every class that
    the teacher considers possible; "reverse", KL(student || teacher), keeps it away from classes that the teacher
    considers impossible.

    `standardize` first divides each image's logits, on both sides, by their standard deviation over the classes, so
    that the student need not copy how large the target's logits are: logit standardization (Sun et al. 2024,
    arXiv:2403.01427; MIX-KD, arXiv:2211.03946, does the same). Its authors also subtract the mean, which cancels in the
    softmax. They report 1.3 points more than plain KD on CIFAR-100 (mean over seven pairs of one family), but changed
    two more numbers with it: from temperature 4 and weight 0.9 to temperature 2 and weight 9. Compare at equal weight
    and temperature.
    """
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    log_p = F.log_softmax(student / temperature, dim=1)
    log_q = F.log_softmax(teacher / temperature, dim=1)
    if direction == "reverse":
        log_p, log_q = log_q, log_p
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=1) * (temperature**2 if rescale else 1.0)


@LOSSES.register("soft_cross_entropy", reads="logits")
def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    batch: Batch,
    *,
    temperature: Temperature = 4.0,
    rescale: bool = True,
    standardize: bool = False,
) -> Tensor:
    """Cross entropy of the softened student under the softened teacher, per image [B].

        -T^2 sum_k q_k log p_k,  q = softmax(t / T),  p = softmax(s / T)

    Equal to `kl` plus the teacher's entropy, a constant: the gradient is the same, the logged value is not. The BYOT
    authors' code uses this form. `temperature`, `rescale` and `standardize` as in `kl`.
    """
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    q = F.softmax(teacher / temperature, dim=1)
    log_p = F.log_softmax(student / temperature, dim=1)
    return -(q * log_p).sum(dim=1) * (temperature**2 if rescale else 1.0)


@LOSSES.register("balanced_kl", reads="logits")
def balanced_kl(
    student: Tensor,
    teacher: Tensor,
    batch: Batch,
    *,
    nu: Annotated[float, Field(ge=0)] = 2.0,
    temperature: Temperature = 1.0,
    rescale: bool = True,
    standardize: bool = False,
) -> Tensor:
    """Both directions of the KL divergence, weighted for each image: BD-KD (Amara et al. 2022, arXiv:2212.12965), per
    image [B].

        T^2 (nu KL(q || p) + KL(p || q))  where p has the lower entropy
        T^2 (KL(q || p) + nu KL(p || q))  elsewhere

    Where the student is more confident than the teacher (its entropy is lower), the forward divergence counts `nu`
    times; elsewhere the reverse one does. `temperature`, `rescale` and `standardize` as in `kl`; entropies are computed
    from the softened predictions. A reconstruction: we could not read the paper's own weights, and the rule and `nu`
    are our reading of its summary.
    """
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    log_p = F.log_softmax(student / temperature, dim=1)
    log_q = F.log_softmax(teacher / temperature, dim=1)
    # A comparison, so the weights get no gradient.
    surer = (log_p.exp() * log_p).sum(dim=1) > (log_q.exp() * log_q).sum(dim=1)
    forward = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=1)
    reverse = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)
    return torch.where(surer, nu * forward + reverse, forward + nu * reverse) * (temperature**2 if rescale else 1.0)


@LOSSES.register("wttm", reads="logits")
def wttm(student: Tensor, teacher: Tensor, batch: Batch, *, gamma: Annotated[float, Field(gt=0, le=1)] = 0.2) -> Tensor:
    """KL divergence from the teacher, flattened by a power, to the student as it is: weighted transformed teacher
    matching (Zheng and Yang 2024, arXiv:2402.11148), per image [B].

        Z KL(q' || p),  p = softmax(s),  q = softmax(t)
        q'_k = q_k^gamma / Z,  Z = sum over k of q_k^gamma

    A smaller `gamma` gives the wrong classes more weight: q' is the teacher at temperature 1 / gamma, while the student
    has no temperature. Z weighs images by the teacher's doubt: it is 1 where the teacher is certain, and up to
    K^(1 - gamma) where it has no idea, so that the right weight for this loss depends on the number of classes. Not
    zero where the student equals the teacher, except with gamma 1, which is `kl` at temperature 1. The authors'
    examples on CIFAR-100 use `gamma` 0.1 and 0.2.
    """
    log_q = gamma * F.log_softmax(teacher, dim=1)
    log_z = log_q.logsumexp(dim=1, keepdim=True)
    log_p = F.log_softmax(student, dim=1)
    divergence = F.kl_div(log_p, log_q - log_z, reduction="none", log_target=True).sum(dim=1)
    return log_z.squeeze(1).exp() * divergence


@LOSSES.register("dkd", reads="logits", hard_labels=True)
def dkd(
    student: Tensor,
    teacher: Tensor,
    batch: Batch,
    *,
    alpha: Share = 1.0,
    beta: Share = 8.0,
    temperature: Temperature = 4.0,
    standardize: bool = False,
) -> Tensor:
    """Decoupled KD: the label's class and the other classes are matched separately (Zhao et al. 2022,
    arXiv:2203.08679), per image [B].

        T^2 (alpha KL(b(q) || b(p)) + beta KL(q' || p'))
        b(p) = (p_y, 1 - p_y) for the label y,  p' = p over the wrong classes, made to sum to 1

    `alpha` weighs the teacher's confidence in the label, `beta` its distribution over the wrong classes, which `kl`
    weighs by the teacher's doubt about the label. Includes the factor temperature^2; `standardize` as in `kl`. Needs
    hard labels: raises UserError with mixup or cutmix. The authors' code warms this loss up over 20 epochs.
    """
    labels = hard_labels(batch)
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    student, teacher = student / temperature, teacher / temperature
    log_b, log_c = _label_or_not(student, labels), _label_or_not(teacher, labels)
    target = F.kl_div(log_b, log_c, reduction="none", log_target=True).sum(dim=1)
    log_p = F.log_softmax(other_columns(student, labels), dim=1)
    log_q = F.log_softmax(other_columns(teacher, labels), dim=1)
    others = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=1)
    return (alpha * target + beta * others) * temperature**2


def _label_or_not(logits: Tensor, labels: Tensor) -> Tensor:
    """Log probabilities of the label and of all other classes together [B, 2]."""
    both = [label_column(logits, labels), other_columns(logits, labels).logsumexp(dim=1)]
    return F.log_softmax(torch.stack(both, dim=1), dim=1)


@LOSSES.register("nkd", reads="logits", hard_labels=True)
def nkd(
    student: Tensor, teacher: Tensor, batch: Batch, *, gamma: Share = 1.5, temperature: Temperature = 1.0
) -> Tensor:
    """Normalised KD: the label weighted by the teacher's confidence in it, and the wrong classes separately (Yang et
    al. 2023, arXiv:2303.13005; first in arXiv:2208.10139), per image [B].

        -q_y log p_y - gamma T^2 sum over k != y of q'_k log p'_k
        p, q at T = 1;  p', q' at T over the wrong classes alone

    `gamma` weighs the wrong classes; `temperature`, and its square as a factor, applies only to them. Both parts are
    cross entropies, so the loss is not zero where the student equals the teacher. Meant to be used together with
    ordinary cross entropy. Needs hard labels: raises UserError with mixup or cutmix (where the authors' code uses the
    most probable label).
    """
    labels = hard_labels(batch)
    trust = label_column(F.softmax(teacher, dim=1), labels)
    target = -trust * label_column(F.log_softmax(student, dim=1), labels)
    q = F.softmax(other_columns(teacher, labels) / temperature, dim=1)
    log_p = F.log_softmax(other_columns(student, labels) / temperature, dim=1)
    return target - gamma * temperature**2 * (q * log_p).sum(dim=1)


@LOSSES.register("dist", reads="logits", sees_batch=True)
def dist(
    student: Tensor,
    teacher: Tensor,
    batch: Batch,
    *,
    beta: Share = 1.0,
    gamma: Share = 1.0,
    temperature: Temperature = 4.0,
) -> Tensor:
    """Correlation instead of equality between predictions: DIST (Huang et al. 2022, arXiv:2205.10536), a scalar that
    includes the factor temperature^2.

        T^2 (beta mean over B of (1 - r(p_b, q_b)) + gamma mean over K of (1 - r(p_k, q_k))),  r Pearson's correlation

    `beta` weighs how the classes relate within an image, `gamma` how the images relate within a class. The second part
    is computed over the batch of one process, so it changes with the batch size and has no gradient with a single
    image. The authors use `temperature` 4 on CIFAR-100, 1 on ImageNet, and weight 2 in both.
    """
    p, q = F.softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    inter, intra = 1 - _correlation(p, q), 1 - _correlation(p.T, q.T)
    return (beta * inter.mean() + gamma * intra.mean()) * temperature**2


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's correlation between the rows of the two tensors, 0 for a constant row."""
    one, other = one - one.mean(dim=1, keepdim=True), other - other.mean(dim=1, keepdim=True)
    norms: Tensor = torch.linalg.vector_norm(one, dim=1) * torch.linalg.vector_norm(other, dim=1)
    return (one * other).sum(dim=1) / (norms + 1e-8)


def confidence(logits: Sequence[Tensor], batch: Batch) -> Tensor:
    """CA-MKD's weights of several predictions of an image [E, B], which sum to 1 over E: the better one knows the
    label, the more it weighs. Logits [B, K] of each of E points, two or more."""
    wrong = torch.stack([F.cross_entropy(z, batch.labels, reduction="none") for z in logits])
    return (1 - wrong.softmax(dim=0)) / (len(logits) - 1)


def gated(logits: list[Tensor], gate: Tensor) -> Tensor:
    """The branches' logits [B, K], mixed with each image's gate weights [B, E]: ONE's teacher (Lan et al. 2018,
    arXiv:1806.04606).

    The gate is a softmax: its rows sum to 1. Gradients reach both branches and gate; the loss that teaches the branches
    detaches this mix, the cross entropy that teaches the gate does not.
    """
    return torch.einsum("ebk,be->bk", torch.stack(logits), gate)
