"""The output of a network at one point.

B batch, K classes, C channels, H W map, D embedding, N places of the last map
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from sdcli.network.stages import Stage, prefix_tokens, to_map
from sdcli.network.tail import Branch

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
    classify: Callable[[Tensor], Tensor] | None = None
    """At a network's own end, its classifier: embeddings [B, D] to logits [B, K]."""
    sources: tuple[Signal, ...] = ()
    """What a derived signal is made from."""

    def at_least_float(self) -> Signal:
        """The same with half precision widened to float32, in which losses are computed."""
        return replace(
            self,
            features=_widen(self.features),
            embedding=_widen(self.embedding),
            logits=_widen(self.logits),
            dense=_widen(self.dense),
            sources=tuple(source.at_least_float() for source in self.sources),
        )

    def detached(self) -> Signal:
        """The same without a way back for gradients."""
        return replace(
            self,
            features=self.features.detach(),
            embedding=self.embedding.detach(),
            logits=None if self.logits is None else self.logits.detach(),
            sources=tuple(source.detached() for source in self.sources),
        )


def signal_at(stage: Stage, head: nn.Module | None, tensor: Tensor) -> Signal:
    """The signal of an exit from its stage's tensor, which is in the model's own layout."""
    features = to_map(tensor, stage)
    if isinstance(head, Branch):
        return Signal(features, *head(tensor))
    if head is None:
        return Signal(features, features.mean(dim=(2, 3)), None)
    return Signal(features, *head(features, prefix_tokens(tensor, stage)))


def _widen(tensor: T) -> T:
    if isinstance(tensor, Tensor) and tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float()
    return tensor
