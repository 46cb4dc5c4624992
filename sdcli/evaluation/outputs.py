"""What every exit says about every image of a split, kept for questions that are asked later.

N images, K classes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdcli.data.batch import Batch
from sdcli.network.multi_exit import MultiExit


@dataclass(frozen=True)
class Outputs:
    logits: dict[str, Tensor]
    """[N, K] of every point, shallowest first, on the CPU."""
    labels: Tensor
    """[N]"""

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, images: Tensor) -> Outputs:
        """Those of some images, by their positions."""
        return Outputs({point: logits[images] for point, logits in self.logits.items()}, self.labels[images])

    def halves(self) -> tuple[Outputs, Outputs]:
        """Every second image, and the others: both halves have like shares of every class."""
        return self.select(torch.arange(0, len(self), 2)), self.select(torch.arange(1, len(self), 2))


@torch.inference_mode()
def collect(
    network: MultiExit,
    batches: Iterable[Batch],
    points: Sequence[str],
    device: torch.device,
    progress: Callable[[int], None] = lambda images: None,
) -> Outputs:
    """One full pass over the batches in eval mode; leaves the network in eval mode."""
    network.eval()
    kept: dict[str, list[Tensor]] = {point: [] for point in points}
    labels: list[Tensor] = []
    index: list[Tensor] = []
    done = 0
    for batch in batches:
        batch = batch.to(device)
        signals = network(batch.images)
        for point, parts in kept.items():
            logits = signals[point].logits
            assert logits is not None
            parts.append(logits.float().cpu())
        labels.append(batch.labels.cpu())
        index.append(batch.index.cpu())
        done += len(batch.labels)
        progress(done)
    # In the data set's own order, whatever the loader's.
    order = torch.from_numpy(np.argsort(torch.cat(index).numpy(), kind="stable"))
    return Outputs(
        {point: torch.cat(parts)[order].clone() for point, parts in kept.items()}, torch.cat(labels)[order].clone()
    )
