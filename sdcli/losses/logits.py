"""Losses between two predictions.

B images, K classes
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sdcli.losses import LOSSES
from sdcli.signals import Batch

Temperature = Annotated[float, Field(gt=0)]


@LOSSES.register("kl", reads="logits")
def kl(
    student: Tensor, teacher: Tensor, batch: Batch, *, temperature: Temperature = 4.0, rescale: bool = True
) -> Tensor:
    """KL divergence from the softened teacher to the softened student (Hinton et al. 2015, arXiv:1503.02531), per
    image [B].

    A higher `temperature` lets the wrong classes count for more. `rescale` multiplies by temperature^2, so that the
    gradient keeps its size when the temperature changes.
    """
    log_p = F.log_softmax(student / temperature, dim=1)
    log_q = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=1) * (temperature**2 if rescale else 1.0)


@LOSSES.register("soft_cross_entropy", reads="logits")
def soft_cross_entropy(
    student: Tensor, teacher: Tensor, batch: Batch, *, temperature: Temperature = 4.0, rescale: bool = True
) -> Tensor:
    """Cross entropy of the softened student under the softened teacher, per image [B].

    `kl` plus the teacher's entropy, which is a constant: the gradient is the same, the logged value is not. The form of
    the BYOT authors' code. `temperature` and `rescale` as in `kl`.
    """
    q = F.softmax(teacher / temperature, dim=1)
    log_p = F.log_softmax(student / temperature, dim=1)
    return -(q * log_p).sum(dim=1) * (temperature**2 if rescale else 1.0)
