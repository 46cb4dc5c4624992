"""Losses between two feature maps or embeddings.

B images, C channels, H W map, D embedding
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sdcli.data.batch import Batch
from sdcli.errors import UserError
from sdcli.method.losses import LOSSES
from sdcli.method.losses.logits import confidence
from sdcli.network.signals import Signal

Power = Annotated[float, Field(ge=1)]


@LOSSES.register("hint", reads="embedding")
class Hint(nn.Module):
    """L2 distance between embeddings: BYOT's hint (Zhang et al. 2019, arXiv:1905.08094; after FitNets,
    arXiv:1412.6550).

        squared  sum over D of (W s - t)^2, times B
        l2       sqrt of the sum over B and D of (W s - t)^2
        mean     mean over D of (W s - t)^2

    `norm` "squared" sums the squares over the whole batch, as the authors' SCAN code does, so it grows with the batch
    size; each image's share of it is returned [B]. "l2" takes the square root of that sum, as their journal code does:
    a scalar, computed over the batch of one process. "mean" averages the squares, as most other code does, per image
    [B]. `adapt` "linear" first maps the student's embedding through a linear layer, which is trained with the network
    and then discarded; "auto" does so where the widths differ.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        *,
        norm: Literal["squared", "l2", "mean"] = "squared",
        adapt: Literal["none", "linear", "auto"] = "none",
    ) -> None:
        super().__init__()
        if adapt == "auto":
            adapt = "none" if student_width == teacher_width else "linear"
        if adapt == "none" and student_width != teacher_width:
            raise UserError(
                f"the embeddings have different widths: {student_width} and {teacher_width}",
                "embeddings of the same width",
                'adapt = "auto", or a head whose embedding has the target\'s width, such as head = "bottleneck"',
            )
        self.norm = norm
        self.sees_batch = norm == "l2"
        self.adapt = nn.Linear(student_width, teacher_width) if adapt == "linear" else nn.Identity()

    def forward(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        difference: Tensor = self.adapt(student) - teacher
        if self.norm == "mean":
            return difference.square().mean(dim=1)
        if self.norm == "squared":
            # The objective averages over images, and then over processes and micro-batches.
            return difference.square().sum(dim=1) * batch.whole
        # Where both sides are equal, the gradient of vector_norm is zero, not NaN.
        root: Tensor = torch.linalg.vector_norm(difference)
        return root


@LOSSES.register("fitnet", reads="features")
class FitNet(nn.Module):
    """Mean squared difference between feature maps: FitNets' hint (Romero et al. 2015, arXiv:1412.6550), per image [B].

        mean over C, H, W of (W s - t)^2

    `adapt` "conv" first maps the student's features through a 1x1 convolution, which is trained with the network and
    then discarded; "none" compares the maps directly and needs equal channel counts. If the resolutions differ, the
    larger map is average-pooled to the size of the smaller one; most implementations learn this step too, with a larger
    or strided convolution.
    """

    def __init__(self, student_width: int, teacher_width: int, *, adapt: Literal["none", "conv"] = "conv") -> None:
        super().__init__()
        if adapt == "none" and student_width != teacher_width:
            raise UserError(
                f"the feature maps have different channel counts: {student_width} and {teacher_width}",
                "feature maps with equal channel counts",
                'adapt = "conv" (the default)',
            )
        self.adapt = nn.Conv2d(student_width, teacher_width, 1) if adapt == "conv" else nn.Identity()

    def forward(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        student, teacher = pooled_alike(student, teacher)
        difference: Tensor = self.adapt(student) - teacher
        return difference.square().flatten(1).mean(dim=1)


@LOSSES.register("confident_hint", reads="signal")
class ConfidentHint(nn.Module):
    """Mean squared difference from the last maps of several teachers, each image's weighted by how well the teacher's
    own classifier knows its label from the student's map: the second loss of CA-MKD (Zhang et al. 2022,
    arXiv:2201.00007), per image [B].

        sum over E of v_e mean over C, H, W of (r_e(s) - t_e)^2
        v = (1 - softmax over E of CE(classifier_e(r_e(s)), y)) / (|E| - 1)

    E are the points that the target, a signal of kind "confident", is made from; each ends a network whose classifier
    reads its pooled last map. r_e is a 1x1 convolution, batch norm and ReLU, trained with the network and then
    discarded; the student's map is first average-pooled to the size of the teacher's, if that is smaller. As in the
    authors' code, gradients also pass through the weights v; it divides by |E| once more, and leaves this loss out in
    the first epoch.
    """

    def __init__(self, student_width: int, sources: Sequence[tuple[int, int]]) -> None:
        """`sources` are the widths of map and embedding of each of E."""
        super().__init__()
        if len(sources) < 2 or any(width != dim for width, dim in sources):
            raise UserError(
                "the target is not made from two or more ends of networks whose classifiers read their last maps",
                "a signal of two or more teachers such as ResNets",
                'kind = "confident", of = ["teacher.final", "second.final"]; or leave this loss out',
            )
        self.adapt = nn.ModuleList(
            nn.Sequential(nn.Conv2d(student_width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            for width, _ in sources
        )

    def forward(self, student: Signal, teacher: Signal, batch: Batch) -> Tensor:
        distances, said = [], []
        for adapt, source in zip(self.adapt, teacher.sources, strict=True):
            own, other = pooled_alike(student.features, source.features)
            mapped = adapt(own)
            assert source.classify is not None
            distances.append((mapped - other).square().flatten(1).mean(dim=1))
            said.append(source.classify(mapped.mean(dim=(2, 3))).float())
        return (confidence(said, batch) * torch.stack(distances)).sum(dim=0)


@LOSSES.register("attention", reads="features")
def attention(
    student: Tensor,
    teacher: Tensor,
    batch: Batch,
    *,
    power: Power = 2.0,
    norm: Literal["mean", "squared", "l2"] = "mean",
) -> Tensor:
    """Distance between attention maps, the channels' mean |A|^`power` scaled to length 1: attention transfer (Zagoruyko
    and Komodakis 2017, arXiv:1612.03928), per image [B].

        mean over H, W of (a(s) - a(t))^2,  a(A) = f / |f|,  f = mean over C of |A|^power

    A higher `power` emphasises the strongest positions. `norm` "mean" follows the authors' code (mean of the squares
    over positions, weight 1000), "squared" is their sum, "l2" the square root of the sum, as in the paper. The channel
    counts may differ. If the resolutions differ, the larger map is first average-pooled to the size of the smaller one,
    as in mdistiller. The paper's second form, on gradients, is not implemented.
    """
    student, teacher = pooled_alike(student, teacher)
    difference = attention_map(student, power) - attention_map(teacher, power)
    if norm == "l2":
        length: Tensor = torch.linalg.vector_norm(difference, dim=1)
        return length
    squares = difference.square()
    return squares.mean(dim=1) if norm == "mean" else squares.sum(dim=1)


@LOSSES.register("sad", reads="features")
def sad(student: Tensor, teacher: Tensor, batch: Batch, *, power: Power = 2.0, align_corners: bool = True) -> Tensor:
    """Mean squared difference between attention maps, each a softmax over positions: self attention distillation (Hou
    et al. 2019, arXiv:1908.00821), per image [B].

        mean over H, W of (a(s) - a(t))^2,  a(A) = softmax over H, W of f,  f = sum over C of |A|^power

    The target's sum f is first resized bilinearly to the student's resolution: `align_corners` true follows the
    authors' Lua code, false most ports. Large activations make the softmax collapse to a single position, and the loss
    then has no gradient.
    """
    size = student.shape[-2:]
    energies = [m.abs().pow(power).sum(dim=1, keepdim=True) for m in (student, teacher)]
    if energies[1].shape[-2:] != size:
        energies[1] = F.interpolate(energies[1], size=size, mode="bilinear", align_corners=align_corners)
    one, other = (energy.flatten(1).softmax(dim=1) for energy in energies)
    return (one - other).square().mean(dim=1)


@LOSSES.register("mmd", reads="embedding", sees_batch=True)
def mmd(student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
    """Squared distance between the batch's mean embeddings, a scalar: maximum mean discrepancy with a linear kernel,
    the third term of DDGSD (Xu and Liu 2019, AAAI 33).

        |mean over B of s - mean over B of t|^2

    Computed over the batch of one process. Only the student gets a gradient: to train both views, as in the paper, add
    the loss in both directions, each with the paper's weight (the logged value is then twice the paper's). A
    reconstruction: we found no code by the authors, and the kernel is our reading of the paper.
    """
    if student.shape != teacher.shape:
        raise UserError(
            f"mmd: the embeddings have different widths: {student.shape[1]} and {teacher.shape[1]}",
            "embeddings of the same width",
        )
    return (student.mean(dim=0) - teacher.mean(dim=0)).square().sum()


def attention_map(features: Tensor, power: float) -> Tensor:
    """The attention map of features [B, C, H, W]: their mean |A|^`power` over the channels, scaled to length 1 per
    image [B, H*W]."""
    return F.normalize(features.abs().pow(power).mean(dim=1).flatten(1), dim=1)


def pooled_alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the size of the smaller one; the larger one is average-pooled."""
    size = (min(one.shape[-2], other.shape[-2]), min(one.shape[-1], other.shape[-1]))
    return F.adaptive_avg_pool2d(one, size), F.adaptive_avg_pool2d(other, size)
