"""What a network says at one point, and what it was shown.

B batch, K classes, C channels, H W map, D embedding, P prefix tokens
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Signal:
    """What a network says at one point (`exit1`, `exit2`, …, `final`)."""

    features: Tensor
    """The stage's map [B, C, H, W], whatever the model's own layout."""
    embedding: Tensor
    """The vector that the classifier reads [B, D]."""
    logits: Tensor
    """[B, K], before the softmax."""

    def at_least_float(self) -> Signal:
        """The same with half precision widened to float32: losses are never worked out in less."""
        return Signal(_widen(self.features), _widen(self.embedding), _widen(self.logits))


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@dataclass
class Batch:
    """What the networks were shown."""

    images: Tensor
    """[B, 3, H, W], normalised."""
    labels: Tensor
    """Class numbers [B]."""
    index: Tensor
    """Each image's place in its split [B]: for what is remembered per training image."""
    whole: int = 0
    """Images of the whole update, over all processes and parts: what a loss that sums over the batch is scaled by."""

    def __post_init__(self) -> None:
        self.whole = self.whole or len(self.images)

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        images, labels, index = (t.to(device, non_blocking=True) for t in (self.images, self.labels, self.index))
        return Batch(images, labels, index, self.whole)
