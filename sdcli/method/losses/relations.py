"""Losses on how the images of a batch relate to each other, and targets made from such relations.

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
    """Mean squared difference between the student's and the target's B x B matrices of similarities within the batch, a
    scalar.

        mean over B x B of (G(s) - G(t))^2,  G(A) = A A^T, each row with length 1,  A = the maps as rows

    `of` "features" compares whole maps: similarity-preserving KD (Tung and Mori 2019, arXiv:1907.09682), with weight
    3000 in its code. "attention" compares attention maps, with `power` as in `attention`: SCD (Wan et al. 2023),
    reconstructed from its abstract. The shapes of the two sides may differ. Computed over the batch of one process: its
    value and strength change with the batch size, and with a single image it is zero.
    """
    maps = [attention_map(m, power) if of == "attention" else m.flatten(1) for m in (student, teacher)]
    one, other = (F.normalize(m @ m.T, dim=1) for m in maps)
    return (one - other).square().mean()


@torch.no_grad()
def propagate(logits: Tensor, embeddings: Tensor, *, omega: float, temperature: float) -> Tensor:
    """Soft targets [B, K], mixed with those of similar images in the batch: BAKE (Ge et al. 2021, arXiv:2104.13298).

    Probabilities at `temperature`; rows sum to 1. `omega` sets how far predictions spread between images: 0 keeps each
    image's own, 0.5 and 0.9 are the paper's values. Uses the batch of one process (on ImageNet the authors gather those
    of all processes). Computed in float32 or better, without gradients.
    """
    same = torch.eye(len(logits), device=logits.device, dtype=torch.bool)
    unit = F.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=1)
    affinity = (unit @ unit.T).masked_fill(same, -1e9).softmax(dim=1).masked_fill(same, 0.0)
    p = F.softmax(logits.to(unit.dtype) / temperature, dim=1)
    targets: Tensor = (1 - omega) * torch.linalg.solve(same.to(unit.dtype) - omega * affinity, p)
    return targets
