"""Losses between two features.

B images, C channels, H W map, D embedding
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sdcli.data.batch import Batch
from sdcli.errors import UserError
from sdcli.method.losses import LOSSES

Power = Annotated[float, Field(ge=1)]


@LOSSES.register("hint", reads="embedding")
class Hint(nn.Module):
    """L2 distance of the embeddings: BYOT's hint (Zhang et al. 2019, arXiv:1905.08094; after FitNets, arXiv:1412.6550).

        squared  sum over D of (W s - t)^2, times B
        l2       sqrt of the sum over B and D of (W s - t)^2
        mean     mean over D of (W s - t)^2

    `norm` "squared" sums the squares over the whole batch, as the authors' SCAN code does, so it grows with the batch,
    and is given as its share per image [B]; "l2" takes the root of that sum, as their journal code does, a scalar that
    sees the batch of one process; "mean" takes the mean of the squares, as most other code does, per image [B].
    `adapt` "linear" first sends the student's embedding through a linear layer that is trained along and thrown away.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        *,
        norm: Literal["squared", "l2", "mean"] = "squared",
        adapt: Literal["none", "linear"] = "none",
    ) -> None:
        super().__init__()
        if adapt == "none" and student_width != teacher_width:
            raise UserError(
                f"a hint compares embeddings of {student_width} and {teacher_width} values",
                "two of the same width",
                'adapt = "linear", or a head whose embedding has the target\'s width, such as head = "bottleneck"',
            )
        self.norm = norm
        self.sees_batch = norm == "l2"
        self.adapt = nn.Linear(student_width, teacher_width) if adapt == "linear" else nn.Identity()

    def forward(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        difference: Tensor = self.adapt(student) - teacher
        if self.norm == "mean":
            return difference.square().mean(dim=1)
        if self.norm == "squared":
            # The objective takes the mean over the images, and processes and parts of a batch are averaged.
            return difference.square().sum(dim=1) * batch.whole
        # vector_norm has a zero, not a nan, as its gradient where both are equal.
        root: Tensor = torch.linalg.vector_norm(difference)
        return root


@LOSSES.register("fitnet", reads="features")
class FitNet(nn.Module):
    """Mean squared difference of the maps: FitNets' hint (Romero et al. 2015, arXiv:1412.6550), per image [B].

        mean over C, H, W of (W s - t)^2

    `adapt` "conv" first sends the student's map through a 1x1 convolution that is trained along and thrown away; "none"
    compares the maps as they are, and both need as many channels. Where the resolutions differ the larger map is
    average-pooled to the smaller one's size; the usual code learns that too, with a larger or strided convolution.
    """

    def __init__(self, student_width: int, teacher_width: int, *, adapt: Literal["none", "conv"] = "conv") -> None:
        super().__init__()
        if adapt == "none" and student_width != teacher_width:
            raise UserError(
                f"fitnet compares maps of {student_width} and {teacher_width} channels",
                "two with as many channels",
                'adapt = "conv", which is the default',
            )
        self.adapt = nn.Conv2d(student_width, teacher_width, 1) if adapt == "conv" else nn.Identity()

    def forward(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        student, teacher = pooled_alike(student, teacher)
        difference: Tensor = self.adapt(student) - teacher
        return difference.square().flatten(1).mean(dim=1)


@LOSSES.register("attention", reads="features")
def attention(
    student: Tensor,
    teacher: Tensor,
    batch: Batch,
    *,
    power: Power = 2.0,
    norm: Literal["mean", "squared", "l2"] = "mean",
) -> Tensor:
    """Distance of the attention maps, which are the channels' mean |A|^`power` with length 1: attention transfer
    (Zagoruyko and Komodakis 2017, arXiv:1612.03928), per image [B].

        mean over H, W of (a(s) - a(t))^2,  a(A) = f / |f|,  f = mean over C of |A|^power

    A higher `power` looks more at the strongest places. `norm` "mean" is the authors' code (mean of the squares over
    the places, weight 1000), "squared" their sum, "l2" the root of that, as the paper writes it. Any number of
    channels; where the resolutions differ the larger map is average-pooled to the smaller one's size first, as in
    mdistiller. The paper's second form, of gradients, is not here.
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
    """Mean squared difference of attention maps that are a softmax over the places: self attention distillation (Hou et
    al. 2019, arXiv:1908.00821), per image [B].

        mean over H, W of (a(s) - a(t))^2,  a(A) = softmax over H, W of f,  f = sum over C of |A|^power

    The softmax is of the channels' summed |A|^`power`. The target's sum is brought to the student's resolution
    bilinearly first; `align_corners` as the authors' Lua code does, false as most ports do. Large activations turn such
    a softmax into a single place, and the loss has no gradient then.
    """
    size = student.shape[-2:]
    energies = [m.abs().pow(power).sum(dim=1, keepdim=True) for m in (student, teacher)]
    if energies[1].shape[-2:] != size:
        energies[1] = F.interpolate(energies[1], size=size, mode="bilinear", align_corners=align_corners)
    one, other = (energy.flatten(1).softmax(dim=1) for energy in energies)
    return (one - other).square().mean(dim=1)


@LOSSES.register("mmd", reads="embedding", sees_batch=True)
def mmd(student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
    """Squared distance of the batch's mean embeddings, a scalar: maximum mean discrepancy with a linear kernel, DDGSD's
    third term (Xu and Liu 2019, AAAI 33).

        |mean over B of s - mean over B of t|^2

    Sees the batch of one process. Only the student is moved: for both views as in the paper, state the loss once in
    each direction, with the paper's weight on both (what is logged is then twice the paper's value). A reconstruction:
    no code of the authors' was found, and the kernel is our reading.
    """
    if student.shape != teacher.shape:
        raise UserError(
            f"mmd compares embeddings of {student.shape[1]} and {teacher.shape[1]} values", "two of the same width"
        )
    return (student.mean(dim=0) - teacher.mean(dim=0)).square().sum()


def attention_map(features: Tensor, power: float) -> Tensor:
    """Where the channels of a map [B, C, H, W] are large: the mean of |A|^`power` over them, each image's with length 1
    [B, H*W]."""
    return F.normalize(features.abs().pow(power).mean(dim=1).flatten(1), dim=1)


def pooled_alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps, the larger one average-pooled to the smaller one's size."""
    size = (min(one.shape[-2], other.shape[-2]), min(one.shape[-1], other.shape[-1]))
    return F.adaptive_avg_pool2d(one, size), F.adaptive_avg_pool2d(other, size)
