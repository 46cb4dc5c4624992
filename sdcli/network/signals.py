"""The output of a network at one point.

B batch, K classes, C channels, H W map, D embedding, N places of the last map
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", Tensor, Tensor | None)


@dataclass
class Signal:
    """A network's output at one point (`exit1`, `exit2`, …, `final`)."""

    features: Tensor
    """The stage's map [B, C, H, W], whatever the model's own layout."""
    embedding: Tensor
    """The vector that the classifier reads [B, D]."""
    logits: Tensor | None
    """[B, K], before the softmax; None at a tap without a head."""
    dense: Tensor | None = None
    """The classifier's logits at each of N positions of the last map [B, K, N], without gradients; None unless asked
    for (`MultiExit.read_densely`)."""

    def at_least_float(self) -> Signal:
        """The same with half precision widened to float32, in which losses are computed."""
        return Signal(_widen(self.features), _widen(self.embedding), _widen(self.logits), _widen(self.dense))


def _widen(tensor: T) -> T:
    if isinstance(tensor, Tensor) and tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float()
    return tensor
