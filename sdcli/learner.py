"""All networks of a run and their objective as one module: a batch goes in, the loss comes out.

One module is what DistributedDataParallel, torch.compile and a state dict want.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from sdcli.exits import MultiExit
from sdcli.objective import Objective, address
from sdcli.recipe import STUDENT
from sdcli.signals import Batch, Signal


class Learner(nn.Module):
    """Networks and what they are taught by."""

    def __init__(self, networks: Mapping[str, MultiExit], objective: Objective, frozen: Collection[str] = ()) -> None:
        """`frozen` names the networks that do not learn: they run in eval mode and without gradients."""
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self.objective = objective
        self.frozen = frozenset(frozen)
        for name in self.frozen:
            self.networks[name].requires_grad_(False)

    @property
    def student(self) -> MultiExit:
        """The network that the run is for."""
        student = self.networks[STUDENT]
        assert isinstance(student, MultiExit)
        return student

    def train(self, mode: bool = True) -> Learner:
        """Frozen networks stay in eval mode: in train mode their batch norms would go on changing."""
        super().train(mode)
        for name in self.frozen:
            self.networks[name].eval()
        return self

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Every network sees the batch, every loss compares what they say: the loss (a scalar) and its parts by name.

        The parts are graphs too, so that each one's own gradient can be asked for.
        """
        signals: dict[str, Signal] = {}
        for name, network in self.networks.items():
            with torch.set_grad_enabled(torch.is_grad_enabled() and name not in self.frozen):
                said = network(batch.images)
            signals |= {address(name, point): signal for point, signal in said.items()}
        total, parts = self.objective(signals, batch)
        return total, parts
