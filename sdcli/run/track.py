"""Logs a run to the tracker of `--track`."""

from __future__ import annotations

from sdcli.run.events import Epoch
from sdcli.run.training import Training


def track_epoch(training: Training, epoch: Epoch) -> None:
    """Logs the losses, gradient shares and validation results of an epoch."""
    if training.settings.track is None:
        return
    values = {f"train/{name}": value for name, value in epoch.losses.items()}
    values |= {f"gradient_share/{name}": value for name, value in epoch.shares.items()}
    if epoch.validation:
        results = [*epoch.validation.exits, *([epoch.validation.ensemble] if epoch.validation.ensemble else [])]
        values |= {f"validation/top1_{result.point}": result.top1 for result in results}
        values |= {f"validation/nll_{result.point}": result.nll for result in results}
    training.accelerator.log(values, step=epoch.epoch * training.updates_per_epoch)


def track_step(training: Training, losses: dict[str, float]) -> None:
    """Logs the losses of an update."""
    if training.settings.track is not None:
        position = training.position
        values = {f"step/{name}": value for name, value in losses.items()} | {"step/lr": position.lr}
        done = (position.epoch - 1) * training.updates_per_epoch + position.update
        training.accelerator.log(values, step=done)
