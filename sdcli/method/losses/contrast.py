"""Losses that tell an image's own embedding from those of other images, remembered in banks.

B images, N training images, K negatives, D embedding
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sdcli.data.batch import Batch
from sdcli.devices import everyones
from sdcli.method.losses import LOSSES

EPS = 1e-7


@LOSSES.register("crd", reads="embedding")
class Crd(nn.Module):
    """Noise-contrastive estimation between a student's and a teacher's embeddings: contrastive representation
    distillation (Tian et al. 2020, arXiv:1910.10699), per image [B].

        -log(x+ / (x+ + K/N)) - sum over K of log((K/N) / (x- + K/N)),  x = exp(a . b / temperature) / Z
        a = one side's embedding, b = what a bank remembers of the other side's, both of length 1; for both sides

    The positive x+ is the image itself, the `negatives` are drawn from images of other classes, anew for each image
    (all of them, if there are fewer). Both sides are first mapped to `dim` numbers by linear layers, which are trained,
    the teacher's too. The banks remember every training image, N x `dim` numbers for each side, follow with `momentum`,
    and are saved with the run's state. Z comes from the first batch: N times the mean of exp(…) over its pairs. As in
    the authors' code ("exact"), but that a bank's first values are random for each image.
    """

    memory_s: Tensor
    memory_t: Tensor
    z: Tensor

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        labels: Tensor,
        *,
        negatives: Annotated[int, Field(ge=1, le=1_000_000)] = 16384,
        temperature: Annotated[float, Field(gt=0)] = 0.07,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5,
        dim: Annotated[int, Field(ge=1, le=100_000)] = 128,
    ) -> None:
        """`labels` are those of the training images [N], by their index; -1 where an index is not used."""
        super().__init__()
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        self.embed_s, self.embed_t = nn.Linear(student_width, dim), nn.Linear(teacher_width, dim)
        bound = math.sqrt(3.0 / dim)
        for side in ("memory_s", "memory_t"):
            self.register_buffer(side, torch.empty(len(labels), dim).uniform_(-bound, bound))
        self.register_buffer("z", torch.zeros(2))
        # Images by class: those of other classes than c are all places but a run of them.
        order = labels.argsort(stable=True)
        order = order[int((labels < 0).sum()) :]
        counts = labels[order].bincount() if len(order) else labels.new_zeros(1)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("first", counts.cumsum(0) - counts, persistent=False)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("labels", labels, persistent=False)

    order: Tensor
    first: Tensor
    counts: Tensor
    labels: Tensor

    def forward(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        one = F.normalize(self.embed_s(student), dim=1)
        other = F.normalize(self.embed_t(teacher), dim=1)
        places = torch.cat([batch.index[:, None], self.others(batch.index)], dim=1)
        losses = [
            self.contrast(a, bank, places, number)
            for number, (a, bank) in enumerate(((one, self.memory_t), (other, self.memory_s)))
        ]
        if self.training:
            for bank, new in ((self.memory_s, one), (self.memory_t, other)):
                index, seen = everyones(batch.index), everyones(new.detach())
                bank[index] = F.normalize(bank[index].lerp(seen.to(bank), 1 - self.momentum), dim=1)
        return losses[0] + losses[1]

    def others(self, index: Tensor) -> Tensor:
        """Places of images of other classes [B, K], without repetition within a row."""
        labels = self.labels[index]
        first, count = self.first[labels], self.counts[labels]
        left = len(self.order) - count
        num = int(min(self.negatives, int(left.min()))) if len(left) else 0
        rows = []
        for start, own, total in zip(first.tolist(), count.tolist(), left.tolist(), strict=True):
            drawn = torch.randperm(total, device=index.device)[:num]
            rows.append(self.order[drawn + own * (drawn >= start)])
        return torch.stack(rows) if num else index.new_zeros(len(index), 0)

    def contrast(self, anchors: Tensor, bank: Tensor, places: Tensor, side: int) -> Tensor:
        """One side's loss [B]: anchors [B, D], what is remembered [N, D], and whose [B, 1 + K], the positive first."""
        # All N products are a small part of what a copy of the remembered rows would take: [B, 1 + K, D] numbers. The
        # bank is about to change, and the backward pass needs it as it is.
        products = (anchors @ bank.detach().to(anchors, copy=True).T).gather(1, places)
        x = products.div(self.temperature).exp()
        if self.training and not bool(self.z[side]):
            self.z[side] = x.detach().mean() * len(self.labels)
        x = x / self.z[side].clamp_min(torch.finfo(x.dtype).tiny).to(x)
        noise = (places.shape[1] - 1) / len(self.labels)
        positive = (x[:, 0] / (x[:, 0] + noise + EPS)).log()
        negative = (noise / (x[:, 1:] + noise + EPS)).log().sum(dim=1)
        return -(positive + negative)
