"""Weights that find themselves: a loss is held at a stated share of another one's gradient.

S losses with a share
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdcli.recipe.schema import WeightSchedule

FIRST = (1, 10, 25, 50)
"""The first updates of a phase at which gradients are measured, counted from 1."""
EVERY = 200
"""Updates between the measurements after those."""
UNTIL = 0.5
"""The part of a phase after which the weights stay as they are."""
KEEP = 0.9
"""How much of the average of the logarithms a measurement keeps."""
STEP = 2.0
"""The most by which a measurement multiplies or divides a weight."""
RANGE = (1e-8, 1e8)


class Shares(nn.Module):
    """The weights of a phase's losses with `weight = { share = …, of = … }`, from measured gradients.

    With n the norm of a loss's own gradient on the backbone of the student, without its weight, and m its average,

        m <- exp(0.9 log m + 0.1 log n),  w = share * m_of / m

    where m_of is the average of the other loss's gradient, its own weight included. So the loss pulls at the backbone
    `share` times as much as the other one, whatever its scale. This is the rule of adaptive weights in image generation
    (Esser et al. 2021, arXiv:2012.09841), averaged, with the whole backbone in the place of one layer; GradNorm
    (arXiv:1711.02257) without its rates. A weight is 0 until it has been measured.
    """

    norms: Tensor
    """The averages' logarithms, of the losses with a share and of those that they are a share of; NaN: not measured."""
    weights: Tensor
    """[S]"""

    def __init__(self, shares: Mapping[str, WeightSchedule]) -> None:
        """`shares` are the losses with a share, by name."""
        super().__init__()
        self.shares = dict(shares)
        self.names = list(dict.fromkeys([*shares, *(str(share.of) for share in shares.values())]))
        self.register_buffer("norms", torch.full((len(self.names),), math.nan))
        self.register_buffer("weights", torch.zeros(len(shares)))
        self.found = dict.fromkeys(shares, 0.0)
        """The weight of each loss, without its ramps: what `weights` holds, without asking the device."""

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        super()._load_from_state_dict(*arguments, **named)
        self._remember()

    def _remember(self) -> None:
        self.found = dict(zip(self.shares, self.weights.tolist(), strict=True))

    def see(self, norms: Mapping[str, float]) -> None:
        """Takes a measurement: the norm of each gradient, without the weights of losses with a share.

        A norm that is 0 or not finite is left out.
        """
        averages = dict(zip(self.names, self.norms.tolist(), strict=True))
        for name, former in averages.items():
            if (norm := norms.get(name, 0.0)) > 0 and math.isfinite(norm):
                averages[name] = math.log(norm) if math.isnan(former) else KEEP * former + (1 - KEEP) * math.log(norm)
        weights = dict(self.found)
        for name, share in self.shares.items():
            difference = averages[str(share.of)] - averages[name]
            if math.isnan(difference):
                continue
            weight = float(share.share or 0.0) * math.exp(min(difference, 700.0))
            if weights[name]:
                weight = min(max(weight, weights[name] / STEP), weights[name] * STEP)
            weights[name] = min(max(weight, RANGE[0]), RANGE[1])
        self.norms.copy_(torch.tensor([averages[name] for name in self.names], dtype=self.norms.dtype))
        self.weights.copy_(torch.tensor(list(weights.values()), dtype=self.weights.dtype))
        self._remember()


def is_measured_at(update: int, total: int) -> bool:
    """Whether gradients are measured before an update of a phase with `total` updates, counted from 1."""
    if update in FIRST:
        return True
    return update > FIRST[-1] and (update - FIRST[-1]) % EVERY == 0 and update <= UNTIL * total
