"""Rules: whether a network learns from a batch.

B images, K classes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sdcli.recipe.schema import Rule


@torch.no_grad()
def switokd(
    teacher: Tensor, student: Tensor, labels: Tensor, *, condition: Literal["code", "paper"] = "code"
) -> Tensor:
    """Whether the teacher learns from this batch, a boolean []: SwitOKD's switch (Qian et al. 2022, arXiv:2204.00793).

        learns unless G > s - exp(-t / (s + t)) t  (and, with "code", t < s)
        s = mean |p - y|_1,  t = mean |q - y|_1,  G = mean |p - q|_1

    p and q are the predictions [B, K] of student and teacher, y the labels (indices [B] or probabilities [B, K]). The
    teacher rests while it is so far ahead that the student could not follow. All authors' code has the second
    condition, the paper does not. Several processes decide together, from the means over all of them.
    """
    p, q = F.softmax(student.float(), dim=1), F.softmax(teacher.float(), dim=1)
    y = F.one_hot(labels, p.shape[1]).to(p) if labels.ndim == 1 else labels.to(p)
    means = torch.stack([(a - b).abs().sum(dim=1).mean() for a, b in ((p, y), (q, y), (p, q))])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(means)
        means = means / torch.distributed.get_world_size()
    s, t, gap = means.unbind()
    rests = gap > s - torch.exp(-t / (s + t)) * t
    return ~(rests & (t < s)) if condition == "code" else ~rests


def rule_of(table: Rule) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The rule of a `[rules]` table: (the network's logits, those it must not leave behind, labels) to whether it
    learns."""
    return lambda own, behind, labels: switokd(own, behind, labels, condition=table.condition)
