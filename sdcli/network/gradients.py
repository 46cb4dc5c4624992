"""How loud the exits are in the trunk: what of their gradients passes on to the stages before them.

K points that teach, shallowest first
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Scaled(torch.autograd.Function):
    """The tensor itself, whose gradient is multiplied by a factor on its way back."""

    @staticmethod
    def forward(tensor: Tensor, factor: float) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """`tensor`, whose gradient is multiplied by `factor` on its way back."""
    result: Tensor = _Scaled.apply(tensor, factor)
    return result


class Equilibrium:
    """Visits the taps of one forward pass so that every stage gets the mean of the gradients of the exits behind it.

    Gradient equilibrium (Li et al., "Improved Techniques for Training Adaptive Deep Networks", ICCV 2019,
    arXiv:1908.06294): after stage i of K, the head's gradient is multiplied by 1 / (K - i + 1) and the next stage's by
    (K - i) / (K - i + 1). With h_j the gradient of point j at its tap, stage i gets

        G_i = (1 / (K - i + 1)) * sum over j >= i of h_j

    instead of the sum. The heads themselves keep their whole gradients. Costs nothing; K = 1 changes nothing.
    """

    def __init__(self, points: Sequence[str]) -> None:
        """`points` teach, shallowest first; the last one is the network's end."""
        self.points = list(points)
        self.read: dict[str, Tensor] = {}
        """What the heads read."""

    def visit(self, point: str, tensor: Tensor) -> Tensor:
        """The tensor that the next stage reads."""
        # A stage's module and those inside it return the same tensor: the first one to return it is visited.
        if point not in self.points[:-1] or point in self.read:
            return tensor
        left = len(self.points) - self.points.index(point)
        self.read[point] = scaled(tensor, 1 / left)
        return scaled(tensor, (left - 1) / left)
