"""How sharp the minimum is that training has found: the Hessian of the loss around the network's weights.

P parameters, B images of a batch
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdcli.data.batch import Batch
from sdcli.errors import UserError
from sdcli.network.multi_exit import MultiExit
from sdcli.recipe.address import FINAL

_LOG = logging.getLogger(__name__)

IMAGES, BATCH = 256, 32
"""Images that the loss is taken over, and how many at once: a Hessian product keeps several times the memory of a
training step."""
DRAWS = 30
"""Random vectors of the trace."""
KEPT, TOLERANCE, RESTARTS = 8, 1e-3, 30
"""Of the eigenvalue: vectors of length P that are kept at once, the relative error, and how often the search begins
anew from the best of them."""


@dataclass(frozen=True)
class Sharpness:
    """The Hessian of the cross-entropy of the final exit, in two numbers."""

    trace: float
    trace_error: float
    """Standard error of the estimate."""
    largest_eigenvalue: float | None
    """None where the search did not converge."""
    loss: float
    """The loss itself, in nats."""
    num_images: int
    num_vectors: int
    num_parameters: int


def measure_sharpness(
    network: MultiExit, batches: Sequence[Batch], device: torch.device, *, draws: int = DRAWS, seed: int = 0
) -> Sharpness:
    """Trace and largest eigenvalue of the Hessian of the mean cross-entropy of `final` on these images, with respect to
    the parameters of the plain network: backbone and classifier, without the exits' heads.

    Flatter minima are what self-distillation is thought to find (Pham et al. 2022, arXiv:2206.08491). The network is in
    eval mode: batch norms keep their statistics, and the loss has neither augmentation nor weight decay. Both numbers
    change when weights are scaled in ways that the output does not show: compare networks of one architecture and
    recipe. Raises UserError where the model has an operation that cannot be differentiated twice.
    """
    network.eval()
    heads = [network.heads[FINAL]] if FINAL in network.heads else []
    parameters = [p for module in (network.backbone, *heads) for p in module.parameters() if p.requires_grad]
    product = HessianProduct(network.plain, parameters, batches, device)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            trace, error = hutchinson(product, draws, seed)
            largest = largest_eigenvalue(product, seed)
    except (RuntimeError, NotImplementedError) as problem:
        if "derivative" not in str(problem) and "double backward" not in str(problem):
            raise
        raise UserError(
            f"--sharpness: {network.plan.model} cannot be differentiated twice: {' '.join(str(problem).split())[:200]}",
            "a model all of whose operations have second derivatives",
            "leave --sharpness out",
        ) from None
    return Sharpness(trace, error, largest, product.loss, product.num_images, draws, product.size)


class HessianProduct:
    """v -> H v for vectors [P], by differentiating the gradient once more (Pearlmutter 1994).

    H is the Hessian of the mean cross-entropy of `forward` on all batches with respect to `parameters`.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        parameters: Sequence[nn.Parameter],
        batches: Sequence[Batch],
        device: torch.device,
    ) -> None:
        self.forward, self.parameters, self.batches, self.device = forward, parameters, batches, device
        self.size = sum(parameter.numel() for parameter in parameters)
        self.num_images = sum(len(batch.labels) for batch in batches)
        self.like = parameters[0]
        """Of the type and on the device that vectors have."""
        self.loss = 0.0
        self._count = 0

    def __call__(self, vector: Tensor) -> Tensor:
        self._count += 1
        _LOG.debug("measuring sharpness: Hessian product %d", self._count)
        sizes = [parameter.numel() for parameter in self.parameters]
        parts = [
            part.view_as(parameter) for part, parameter in zip(torch.split(vector, sizes), self.parameters, strict=True)
        ]
        summed, losses = torch.zeros_like(vector), []
        for batch in self.batches:
            batch = batch.to(self.device)
            with torch.enable_grad():
                loss = F.cross_entropy(self.forward(batch.images), batch.labels, reduction="sum") / self.num_images
                slopes = torch.autograd.grad(loss, self.parameters, create_graph=True, materialize_grads=True)
                # A slope that depends on no weight has no graph, and adds nothing.
                bent = [(slope, part) for slope, part in zip(slopes, parts, strict=True) if slope.requires_grad]
                curved = torch.autograd.grad(
                    [slope for slope, _ in bent],
                    self.parameters,
                    grad_outputs=[part for _, part in bent],
                    materialize_grads=True,
                )
            losses.append(loss.detach())
            summed += torch.cat([part.flatten() for part in curved])
        self.loss = float(torch.stack(losses).double().sum())
        return summed


def hutchinson(product: HessianProduct, draws: int, seed: int) -> tuple[float, float]:
    """The trace as the mean of v'Hv over random vectors of signs, and the standard error of that mean (Hutchinson
    1989)."""
    like, size = product.like, product.size
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(draws):
        signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8)
        vector = (2 * signs - 1).to(like)
        values.append(float(torch.dot(vector.double(), product(vector).double())))
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(draws))


def largest_eigenvalue(product: HessianProduct, seed: int) -> float | None:
    """The largest eigenvalue by Lanczos iterations; None where they do not converge."""
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    like, size = product.like, product.size
    kind = np.float64 if like.dtype == torch.float64 else np.float32

    def multiply(vector: NDArray[Any]) -> NDArray[Any]:
        found = product(torch.from_numpy(np.ascontiguousarray(vector, dtype=kind)).flatten().to(like))
        return np.asarray(found.cpu(), dtype=kind)

    start = np.random.default_rng(seed).standard_normal(size).astype(kind)
    operator = LinearOperator((size, size), matvec=multiply, dtype=kind)
    try:
        found = eigsh(
            operator, k=1, which="LA", v0=start, ncv=min(KEPT, size), tol=TOLERANCE, maxiter=RESTARTS,
            return_eigenvectors=False,
        )  # fmt: skip
    except ArpackNoConvergence:
        return None
    return float(found[0])
