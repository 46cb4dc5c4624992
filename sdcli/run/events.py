"""What a run tells on its way: `fit` gives these one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdcli.evaluation.evaluate import Report


@dataclass(frozen=True)
class Step:
    """Where training is: told every now and then."""

    epoch: int
    update: int
    updates: int
    images_per_s: float
    lr: float
    losses: dict[str, float]
    shares: dict[str, float] | None = None
    """Each loss's share of the gradient's norm, where it has just been measured."""


@dataclass(frozen=True)
class Epoch:
    """An epoch that is done."""

    epoch: int
    phase: str
    lr: float
    losses: dict[str, float]
    """What each loss of the recipe added to the sum, on average over the images."""
    num_images: int
    seconds: float
    """Of training; in a resumed epoch, since it was resumed."""
    images_per_s: float
    shares: dict[str, float]
    validation: Report | None = None
    skipped: int = 0
    """Updates that were left out, since a loss was not finite."""

    def to_log(self) -> dict[str, Any]:
        """A line of `log.jsonl`."""
        return {
            "epoch": self.epoch,
            "phase": self.phase,
            "lr": self.lr,
            "loss": sum(self.losses.values()),
            "losses": self.losses,
            "gradient_shares": self.shares,
            "num_images": self.num_images,
            "skipped": self.skipped,
            "validation": self.validation.to_dict() if self.validation else None,
            "seconds": round(self.seconds, 3),
            "images_per_s": round(self.images_per_s, 1),
        }


@dataclass(frozen=True)
class Finished:
    """The run is done: which checkpoint to take, of which epoch, and how it scores."""

    checkpoint: Path
    epoch: int
    report: Report
    best_epochs: dict[str, int] = field(default_factory=dict)
    """The best epoch of each point by itself, in the last phase; empty without a validation split."""


@dataclass(frozen=True)
class Stopped:
    """The run was told to stop, has saved its state and can be resumed."""

    epoch: int
    update: int
    signal: int
