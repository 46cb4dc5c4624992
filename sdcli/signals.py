"""What a network says at one point, and what it was shown.

B batch, K classes, C channels, H W map, D embedding, P prefix tokens
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", Tensor, Tensor | None)


@dataclass
class Signal:
    """What a network says at one point (`exit1`, `exit2`, …, `final`)."""

    features: Tensor
    """The stage's map [B, C, H, W], whatever the model's own layout."""
    embedding: Tensor
    """The vector that the classifier reads [B, D]."""
    logits: Tensor | None
    """[B, K], before the softmax; None at a tap without a head."""
    dense: Tensor | None = None
    """What the classifier makes of each of N places of the last map [B, K, N], without gradients; None where nobody
    asks (`MultiExit.watch_places`)."""

    def at_least_float(self) -> Signal:
        """The same with half precision widened to float32: losses are never worked out in less."""
        return Signal(_widen(self.features), _widen(self.embedding), _widen(self.logits), _widen(self.dense))


def _widen(tensor: T) -> T:
    if isinstance(tensor, Tensor) and tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float()
    return tensor


@dataclass
class Batch:
    """What the networks were shown."""

    images: Tensor
    """[B, 3, H, W], normalised."""
    labels: Tensor
    """Class numbers [B]."""
    index: Tensor
    """Each image's place in its split [B]: for what is remembered per training image."""
    also: dict[str, Tensor] = field(default_factory=dict)
    """Images beside these [B, 3, H, W], by the recipe's names for them."""
    whole: int = 0
    """Images of the whole update, over all processes and parts: what a loss that sums over the batch is scaled by."""

    def __post_init__(self) -> None:
        self.whole = self.whole or len(self.images)

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        images, labels, index = (t.to(device, non_blocking=True) for t in (self.images, self.labels, self.index))
        also = {name: images.to(device, non_blocking=True) for name, images in self.also.items()}
        return Batch(images, labels, index, also, self.whole)

    def pin_memory(self) -> Batch:
        """The same where a GPU can copy it from while it works; DataLoader asks for it."""
        also = {name: images.pin_memory() for name, images in self.also.items()}
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.index.pin_memory(), also, self.whole)
