"""One batch of images, as the networks see it.

B batch, H W an image's height and width in pixels
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Batch:
    """Images, labels and where they come from."""

    images: Tensor
    """[B, 3, H, W], normalised."""
    labels: Tensor
    """Class indices [B]."""
    index: Tensor
    """Each image's position in its split [B]: the key of all state that is kept per training image."""
    views: dict[str, Tensor] = field(default_factory=dict)
    """The recipe's views of these images [B, 3, H, W], by name."""
    whole: int = 0
    """Images of the whole update, over all processes and micro-batches: the scale of losses that sum over the batch."""

    def __post_init__(self) -> None:
        self.whole = self.whole or len(self.images)

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        images, labels, index = (t.to(device, non_blocking=True) for t in (self.images, self.labels, self.index))
        views = {name: images.to(device, non_blocking=True) for name, images in self.views.items()}
        return Batch(images, labels, index, views, self.whole)

    def pin_memory(self) -> Batch:
        """The same in pinned memory; called by the DataLoader."""
        views = {name: images.pin_memory() for name, images in self.views.items()}
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.index.pin_memory(), views, self.whole)
