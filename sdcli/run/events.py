"""The events that `fit` yields while a run trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdcli.evaluation.evaluate import Report


@dataclass(frozen=True)
class Step:
    """Progress within an epoch, about four times a second."""

    epoch: int
    update: int
    updates: int
    images_per_s: float
    lr: float
    losses: dict[str, float]
    shares: dict[str, float] | None = None
    """Each loss's share of the gradient norm; None unless it has just been measured."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the user."""


@dataclass(frozen=True)
class Epoch:
    """A finished epoch."""

    epoch: int
    phase: str
    lr: float
    losses: dict[str, float]
    """Each loss's weighted contribution to the total, averaged over the images."""
    num_images: int
    seconds: float
    """Training time without validation; in a resumed epoch, only since it was resumed."""
    images_per_s: float
    shares: dict[str, float]
    validation: Report | None = None
    networks: dict[str, float] = field(default_factory=dict)
    """The top-1, in percent, of the other networks' own classifiers on the same images."""
    cpu_seconds: float | None = None
    """As `seconds`, in time of this process on all its cores: on a busy machine, the fairer measure. None where others
    work for the run: a GPU, further processes, those that load images."""
    macs: int = 0
    """Of training on these images: forward and backward passes of all networks, without validation."""
    skipped: int = 0
    """Updates skipped because a loss or the gradient was not finite."""
    weights: dict[str, float] = field(default_factory=dict)
    """The weights that find themselves, by loss, as they are now."""

    def to_log(self) -> dict[str, Any]:
        """A line of `log.jsonl`."""
        return {
            "epoch": self.epoch,
            "phase": self.phase,
            "lr": self.lr,
            "loss": sum(self.losses.values()),
            "losses": self.losses,
            "gradient_shares": self.shares,
            "weights": self.weights,
            "num_images": self.num_images,
            "macs": self.macs,
            "skipped": self.skipped,
            "validation": self.validation.to_dict() if self.validation else None,
            "networks": self.networks,
            "seconds": round(self.seconds, 3),
            "cpu_seconds": None if self.cpu_seconds is None else round(self.cpu_seconds, 3),
            "images_per_s": round(self.images_per_s, 1),
        }


@dataclass(frozen=True)
class Finished:
    """The run is finished: the checkpoint to use, its epoch and its scores."""

    checkpoint: Path
    epoch: int
    report: Report
    best_epochs: dict[str, int] = field(default_factory=dict)
    """The best epoch of each point on its own, in the last phase; empty without a validation split."""
    weights: dict[str, float] = field(default_factory=dict)
    """The weights that were found, by loss; of several phases, in the last that has the loss."""


@dataclass(frozen=True)
class Stopped:
    """The run has stopped on a signal; its state is saved and it can be resumed."""

    epoch: int
    update: int
    signal: int
