"""Signals: predictions made from the predictions of points, registered under the names that recipes use.

A kind is a function of (signals, batch), or of (signal, batch) if it is registered with `reads_one=True`; or a module
with such a `forward` that is built from a `SignalContext`. Its keyword-only arguments are its recipe keys. It returns
logits [B, K].

B batch, K classes, C channels, E signals
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from sdcli.data.batch import Batch
from sdcli.devices import everyones
from sdcli.method.losses.labels import hard_labels
from sdcli.method.losses.labels import votes as count_votes
from sdcli.method.losses.logits import confidence, gated
from sdcli.method.losses.relations import propagate
from sdcli.network.signals import Signal
from sdcli.registry import Registry

SIGNALS = Registry("signal")


@dataclass(frozen=True)
class SignalContext:
    """What a signal's module is built for."""

    num_chs: Sequence[int]
    """C of each point that it reads."""
    num_classes: int
    num_images: int
    """Size of the training split, which image indices refer to."""


def ensemble(logits: Iterable[Tensor]) -> Tensor:
    """The mean of the points' logits [B, K]: the ensemble of BYOT's authors (arXiv:1905.08094)."""
    return torch.stack(list(logits)).mean(dim=0)


def _logits(signal: Signal) -> Tensor:
    assert signal.logits is not None
    return signal.logits


@SIGNALS.register("mean")
def mean(signals: Sequence[Signal], batch: Batch) -> Tensor:
    """The mean of the points' logits, equally weighted: the ensemble that `sdcli eval` scores (arXiv:1905.08094).

        sum over E of z_e / |E|

    E are the points in `of`.
    """
    return ensemble(map(_logits, signals))


@SIGNALS.register("gated")
class Gated(nn.Module):
    """The points' logits, mixed by a gate that is trained with the network: ONE's teacher (Lan et al. 2018,
    arXiv:1806.04606).

        sum over E of g_e z_e,  g = softmax(ReLU(BN(W x))),  x = the first point's pooled map

    The gate reads the pooled map of the first point in `of` and computes a mix for each image: linear, batch norm,
    ReLU, softmax, as in the authors' code.
    """

    def __init__(self, setting: SignalContext) -> None:
        super().__init__()
        num = len(setting.num_chs)
        self.gate = nn.Sequential(nn.Linear(setting.num_chs[0], num), nn.BatchNorm1d(num), nn.ReLU())

    def forward(self, signals: Sequence[Signal], batch: Batch) -> Tensor:
        # The loss on the mix trains the gate and the shared layers before it.
        weights = self.gate(signals[0].features.mean(dim=(2, 3))).softmax(dim=1)
        return gated([_logits(signal) for signal in signals], weights)


@SIGNALS.register("confident")
def confident(signals: Sequence[Signal], batch: Batch, *, temperature: Annotated[float, Field(gt=0)] = 4.0) -> Tensor:
    """The points' predictions, each image's weighted by how well they know its label: the teacher of CA-MKD (Zhang et
    al. 2022, arXiv:2201.00007).

        T log sum over E of w_e softmax(z_e / T),  w = (1 - softmax over E of CE(z_e, y)) / (|E| - 1)

    E are the points in `of`, two or more. The loss that reads this signal needs the same `temperature`: at that
    temperature, a softmax of these logits gives the weighted mean of the predictions, and the cross entropy with it
    has the gradient of the weighted sum of divergences. The authors' code divides by |E| once more.
    """
    logits = [_logits(signal) for signal in signals]
    weights = confidence(logits, batch)
    tiny = torch.finfo(weights.dtype).tiny
    shares = [
        weight.clamp_min(tiny).log()[:, None] + (z / temperature).log_softmax(dim=1)
        for weight, z in zip(weights, logits, strict=True)
    ]
    return temperature * torch.stack(shares).logsumexp(dim=0)


@SIGNALS.register("propagated", reads_one=True, sees_batch=True, constant=True)
def propagated(
    signal: Signal,
    batch: Batch,
    *,
    omega: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    temperature: Annotated[float, Field(gt=0)] = 4.0,
) -> Tensor:
    """A prediction mixed with those of similar images in the batch: BAKE's targets (Ge et al. 2021, arXiv:2104.13298).

        T log((1 - omega) (I - omega A)^-1 softmax(z / T)),  A = softmax of the cosines, without the diagonal

    `omega` sets how far predictions spread between images. The loss that reads this signal needs the same
    `temperature`: at that temperature, a softmax of these logits gives BAKE's probabilities. Computed over the batch of
    one process.
    """
    shares = propagate(_logits(signal).detach(), signal.embedding.detach(), omega=omega, temperature=temperature)
    return temperature * shares.clamp_min(torch.finfo(shares.dtype).tiny).log()


@SIGNALS.register("memory", reads_one=True, hard_labels=True, constant=True)
class Memory(nn.Module):
    """The prediction for each training image at its last visit, and its label before the first: PS-KD's teacher (Kim et
    al. 2021, arXiv:2006.12000).

        z from the image's last visit; before the first, its label

    Stored in half precision, num_images x K x 2 bytes, and saved with the run's state. Needs one class per image.
    Processes exchange their predictions.
    """

    past: Tensor
    seen: Tensor

    def __init__(self, setting: SignalContext) -> None:
        super().__init__()
        self.register_buffer("past", torch.zeros(setting.num_images, setting.num_classes, dtype=torch.float16))
        self.register_buffer("seen", torch.zeros(setting.num_images, dtype=torch.bool))

    def forward(self, signal: Signal, batch: Batch) -> Tensor:
        logits = _logits(signal).detach().float()
        # Large enough for a float32 softmax to give the label all of the probability.
        sure = torch.zeros_like(logits).scatter_(1, hard_labels(batch)[:, None], 200.0)
        past = torch.where(self.seen[batch.index][:, None], self.past[batch.index].float(), sure)
        if self.training:
            # The same prediction, within half precision's range.
            index, said = everyones(batch.index), everyones(logits.log_softmax(dim=1).clamp(min=-6e4).half())
            self.past[index] = said
            self.seen[index] = True
        return past


@SIGNALS.register("votes", reads="dense", reads_one=True, constant=True)
def votes(signal: Signal, batch: Batch) -> Tensor:
    """The number of places in the last map that each class wins, with the classifier applied to one place at a time [B,
    K]: ranks the classes in Zipf's label smoothing (Liang et al. 2022, arXiv:2207.12980). Works on `final` only,
    without a gradient.

        for each class k, the number of the N places n with argmax_k z_kn = k
    """
    assert signal.dense is not None
    return count_votes(signal.dense)
