"""Losses that teach nothing, noticed once in each phase."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

MOVED_BY = 100
"""The update of a phase by which a loss has to have taught something."""
FEWEST = 10
"""Updates of a phase that is shorter, below which a value that has not changed says nothing."""


class Stillness:
    """Watches the first updates of a phase for losses whose gradient is 0 at its 100th, or whose value never changes
    until then."""

    def __init__(self, names: Sequence[str], updates: int) -> None:
        """`names` are the losses of a phase of so many `updates`."""
        self.names = list(names)
        self.last = min(MOVED_BY, updates)
        """The update at which `remarks` is asked, counted from 1."""
        self.first: Tensor | None = None
        self.moved: Tensor | None = None

    def see(self, losses: Tensor) -> None:
        """Takes the losses [losses] of an update, without waiting for the device."""
        if self.first is None or self.moved is None:
            self.first, self.moved = losses, torch.zeros_like(losses, dtype=torch.bool)
        else:
            self.moved |= losses != self.first

    def remarks(self, norms: Mapping[str, float], resting: Collection[str]) -> list[str]:
        """One sentence for each loss that teaches nothing; `norms` are those of their gradients, and `resting` losses
        have a weight of 0 now."""
        watched = self.moved is not None and self.last >= FEWEST
        moved = self.moved.tolist() if watched and self.moved is not None else [True] * len(self.names)
        found = []
        for name, has_moved in zip(self.names, moved, strict=True):
            if name in resting:
                continue
            if norms.get(name) == 0:
                found.append(f"losses.{name} teaches nothing: its gradient is 0 at update {self.last}")
            elif not has_moved:
                found.append(f"losses.{name} teaches nothing: its value has not changed by update {self.last}")
        return found
