"""Losses that look at how the images of a batch relate to each other, and what is made from such relations.

B images, K classes, C channels, H W map, D embedding, A anchors, M mates
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sdcli.data.batch import Batch
from sdcli.method.losses import LOSSES
from sdcli.method.losses.features import attention_map


@LOSSES.register("similarity", reads="features", sees_batch=True)
def similarity(
    student: Tensor,
    teacher: Tensor,
    batch: Batch,
    *,
    of: Literal["features", "attention"] = "features",
    power: Annotated[float, Field(ge=1)] = 2.0,
) -> Tensor:
    """Which images of the batch are alike: the B x B matrices of both sides, mean squared difference, a scalar.

        mean over B x B of (G(s) - G(t))^2,  G(A) = A A^T, each row with length 1,  A = the maps as rows

    `of` "features" compares whole maps: similarity-preserving KD (Tung and Mori 2019, arXiv:1907.09682), weight 3000 in
    its code. "attention" compares where the images' channels are large, with `power` as in `attention`: SCD (Wan et al.
    2023), a reconstruction from its abstract. Both sides may have any shape. Sees the batch of one process: its value
    and its strength change with the batch size, and with a single image it is zero.
    """
    maps = [attention_map(m, power) if of == "attention" else m.flatten(1) for m in (student, teacher)]
    one, other = (F.normalize(m @ m.T, dim=1) for m in maps)
    return (one - other).square().mean()


@torch.no_grad()
def propagate(logits: Tensor, embeddings: Tensor, *, omega: float, temperature: float) -> Tensor:
    """Soft targets [B, K] that borrow from similar images of the batch: BAKE (Ge et al. 2021, arXiv:2104.13298).

    Probabilities at `temperature`; rows sum to 1. `omega` is how far a prediction may be carried: 0 keeps one's own,
    0.5 and 0.9 are the paper's. Sees the batch of one process (the authors gather all on ImageNet). Worked out in
    float32 or better; no gradient passes.
    """
    same = torch.eye(len(logits), device=logits.device, dtype=torch.bool)
    unit = F.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=1)
    affinity = (unit @ unit.T).masked_fill(same, -1e9).softmax(dim=1).masked_fill(same, 0.0)
    p = F.softmax(logits.to(unit.dtype) / temperature, dim=1)
    targets: Tensor = (1 - omega) * torch.linalg.solve(same.to(unit.dtype) - omega * affinity, p)
    return targets
