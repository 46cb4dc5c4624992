"""Losses against the labels.

B images, K classes
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sdcli.losses import LOSSES
from sdcli.signals import Batch


@LOSSES.register("cross_entropy", reads="logits")
def cross_entropy(student: Tensor, batch: Batch, *, smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0) -> Tensor:
    """Cross entropy with the labels, per image [B].

    `smoothing` moves that share of the label's probability to all K classes alike (Szegedy et al. 2016,
    arXiv:1512.00567).
    """
    return F.cross_entropy(student, batch.labels, reduction="none", label_smoothing=smoothing)
