"""Monitoring of a run: checks for non-finite numbers, each loss's share of the gradient, explanations of errors."""

from __future__ import annotations

import errno
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sdcli.data.batch import Batch
from sdcli.devices import memory_wanted
from sdcli.errors import UserError
from sdcli.evaluation.evaluate import Report
from sdcli.extensions import line_in
from sdcli.run.state import Position
from sdcli.run.still import MOVED_BY
from sdcli.run.training import Training

MOST_SKIPS = 100
"""The run gives up after this many skipped updates in a row."""


class NotFinite(UserError):
    """A run that cannot go on with these settings: losses, gradients or weights are not finite."""


class Unfit(UserError):
    """A run that cannot be trained with these settings: too little memory, or too few images for a batch norm."""


class Watch:
    """Detects losses and gradients that are not finite, without waiting for the device at every update."""

    def __init__(self, training: Training) -> None:
        self.names = training.learner.objective.names
        self.rates: list[tuple[int, float]] = []
        self.first_bad: Tensor | None = None
        self.epoch = training.position.epoch
        self.skips = training.recipe.optimizer.nonfinite == "skip"
        self.scales = training.accelerator.scaler is not None

    def see(self, losses: Tensor, norm: Tensor, position: Position) -> None:
        """Records the first update at which each loss [losses] and the gradient norm [] were not finite."""
        # fp16 gradients overflow now and then: the scaler skips those updates and lowers its scale.
        values = losses if self.scales else torch.cat([losses, norm.to(losses.dtype)[None]])
        if self.first_bad is None:
            self.first_bad = torch.zeros_like(values)
        self.rates.append((position.update, position.lr))
        bad = ~values.isfinite() & (self.first_bad == 0)
        self.first_bad = torch.where(bad, float(position.update), self.first_bad)

    def check(self, losses: Tensor) -> dict[str, float]:
        """The losses by name. Waits for the device. Raises UserError if a loss or the gradient has not been finite."""
        values = losses.tolist()
        if self.first_bad is not None and not self.skips:
            found = [update for update in self.first_bad.tolist() if update]
            if found:
                raise self._not_finite(self.first_bad.tolist(), int(min(found)))
        self.rates = self.rates[-1:]
        return dict(zip(self.names, values, strict=True))

    def _not_finite(self, first_bad: list[float], update: int) -> NotFinite:
        """The error for the first bad update."""
        # The gradient is listed after the losses, so that it is only blamed if all of them were finite.
        number = first_bad.index(update)
        where = f"in epoch {self.epoch}, update {update}, at learning rate {dict(self.rates)[update]:g}"
        skip = 'optimizer.nonfinite = "skip" skips such updates'
        if number == len(self.names):
            return NotFinite(
                f"the gradient of {_listed(self.names)} was not finite {where}, but all losses were",
                "a finite gradient",
                f"a lower --lr, or losses whose gradient is always finite; {skip}",
            )
        name = self.names[number]
        return NotFinite(
            f"losses.{name} was not finite {where}",
            "a finite number",
            f"a lower --lr, a smaller losses.{name}.weight, or --set optimizer.clip_grad=1.0; {skip}",
        )


def has_to_give_up(training: Training) -> bool:
    """Whether a run has skipped too many updates to continue: `MOST_SKIPS` in a row, or a whole epoch."""
    position = training.position
    # With a gradient scaler, the initial scale may be too high for all updates of a short epoch.
    whole_epoch = position.skipped == training.updates_per_epoch and training.accelerator.scaler is None
    return position.in_a_row >= MOST_SKIPS or whole_epoch


def gave_up(training: Training, batch: Batch) -> NotFinite:
    """The error for a run that skips too many updates; names the losses to blame, measured on `batch`."""
    updates = training.position.in_a_row
    norms = gradient_norms(training, batch)
    to_blame = [name for name, norm in norms.items() if not math.isfinite(norm)]
    skipped = f"{updates} updates in a row were skipped" if updates > 1 else "the only update of an epoch was skipped"
    return NotFinite(
        f"{skipped}: {_listed(to_blame or list(norms))} or its gradient was not finite",
        f"finite losses and gradients; a run ends after {MOST_SKIPS} skipped updates in a row or a whole skipped epoch",
        "a lower --lr or a smaller weight for that loss, in a new run",
    )


def _listed(losses: list[str]) -> str:
    return ", ".join(f"losses.{name}" for name in losses)


def check_weights(training: Training) -> None:
    """Raises UserError if the weights are no longer finite, so that they do not replace the last good state."""
    weights = [parameter.detach().isfinite().all() for parameter in training.learner.parameters()]
    if not bool(torch.stack(weights).all()):
        position = training.position
        raise NotFinite(
            f"weights were not finite after epoch {position.epoch}, update {position.update}, at learning rate "
            f"{position.lr:g}",
            "finite numbers",
            "a lower --lr, or --set optimizer.clip_grad=1.0, in a new run; the checkpoints saved before are intact",
        )


def finite(report: Report, training: Training) -> Report:
    """The report itself; raises UserError if a classifier's NLL is not finite."""
    for result in report.exits:
        if not math.isfinite(result.nll):
            position = training.position
            raise NotFinite(
                f"{result.point} has an NLL of {result.nll} on the {report.split} split after epoch {position.epoch}, "
                f"at learning rate {position.lr:g}",
                "a finite number",
                "a lower --lr, or --set optimizer.clip_grad=1.0, in a new run; the checkpoints saved before are intact",
            )
    return report


def is_measured(training: Training) -> bool:
    """Whether the gradient shares are measured at the next update: the first, tenth and hundredth of each phase, and
    the first of its epochs 2, 4, 8, …"""
    epoch, update = training.epoch_in_phase, training.position.update
    return training.updates_done + 1 in (1, 10, MOVED_BY) or (update == 0 and epoch & (epoch - 1) == 0)


def gradient_shares(norms: Mapping[str, float]) -> dict[str, float]:
    """Each loss's share of the gradient: the norm of its own gradient over the sum of all these norms.

    Empty if one of them is not finite.
    """
    total = sum(norms.values())
    if not math.isfinite(total):
        return {}
    return {name: norm / total if total else 0.0 for name, norm in norms.items()}


def measure_shares(training: Training, batch: Batch) -> None:
    """Lets weights that find themselves follow the gradients of the next update, measured on the student's backbone.

    Several processes take the mean of the squares, so that all find the same weights.
    """
    shares = training.learner.objective.shares
    assert shares is not None
    backbone = [p for p in training.learner.student.backbone.parameters() if p.requires_grad]
    with training.learner.objective.unweighted():
        norms = gradient_norms(training, batch, backbone)
    own = torch.tensor(list(norms.values()), dtype=torch.float64).square().to(shares.norms)
    own = training.accelerator.reduce(own, "mean").sqrt()
    shares.see(dict(zip(norms, own.tolist(), strict=True)))


def gradient_norms(training: Training, batch: Batch, weights: list[nn.Parameter] | None = None) -> dict[str, float]:
    """The norm of each loss's own gradient with respect to `weights`, by default those of all networks
    that learn.

    Costs one forward pass, and one backward pass per loss. Leaves weights, gradients, buffers and random generators
    unchanged.
    """
    learner = training.learner
    if weights is None:
        weights = [p for name in learner.learning for p in learner.networks[name].parameters() if p.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in learner.named_buffers()}
    devices = [training.accelerator.device] if training.accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        with training.accelerator.autocast():
            _, parts = learner.forward(batch)
        norms = {}
        for name, part in parts.items():
            gradients: Sequence[Tensor | None] = []
            if weights and part.requires_grad:
                gradients = torch.autograd.grad(part, weights, retain_graph=True, allow_unused=True)
            own = [gradient for gradient in gradients if gradient is not None]
            norms[name] = torch.nn.utils.get_total_norm(own) if own else part.new_zeros(())
    for name, buffer in learner.named_buffers():
        buffer.copy_(buffers[name])
    return dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True))


def explained(error: Exception, training: Training) -> UserError | None:
    """The UserError for an error in the middle of a run that the user can fix; None for any other error."""
    text = str(error)
    if (wanted := memory_wanted(error)) is not None:
        settings, shared = training.settings, training.accelerator.num_processes
        batch, parts = min(training.recipe.batch.size, training.num_train) // shared, settings.grad_accum_steps
        more = next((n for n in range(2 * parts, batch + 1) if batch % n == 0), None)
        fix = f"--grad-accum-steps {more} (same batch, smaller micro-batches); " if more else ""
        fix += "in a new run " + ("--precision bf16, " if settings.precision == "fp32" else "")
        fix += "--grad-checkpointing or a smaller --batch-size"
        return Unfit(
            f"out of memory on {training.accelerator.device} with {batch // parts} images at a time{wanted}",
            "a network and a batch that fit",
            fix,
        )
    if "Expected more than 1 value per channel" in text:
        needed = 2 * training.settings.grad_accum_steps * training.accelerator.num_processes
        few = training.num_train < needed
        return Unfit(
            "a batch norm received a single image",
            "two or more images per micro-batch in each process",
            f"train on {needed} images or more" if few else f"--batch-size {needed}",
        )
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left on device" in text:
        return UserError(
            f"no space left on the disk of '{training.run.folder}'; the last saved state is intact",
            "free space for the run's files",
            f"free some space and resume: sdcli train --resume {training.run.folder}",
        )
    for file in training.settings.imports:
        if line := line_in(Path(file), error):
            return UserError(
                f"{file}{line}: {type(error).__name__}: {text}",
                "losses, signals and heads that run on what this network returns",
                f"correct it, then: sdcli train --resume {training.run.folder} --import {file}",
            )
    return None
