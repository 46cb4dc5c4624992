"""The training loop, the same for every recipe: epochs, updates, scoring, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from sdcli.data.batch import Batch
from sdcli.data.loaders import Loader
from sdcli.devices import interleaved
from sdcli.errors import UserError
from sdcli.evaluation.answers import answer
from sdcli.evaluation.evaluate import Report, evaluate
from sdcli.method.optimizer import base_rate
from sdcli.method.shares import is_measured_at
from sdcli.network.multi_exit import MultiExit
from sdcli.recipe.address import FINAL, STUDENT
from sdcli.recipe.load import to_toml
from sdcli.recipe.schema import with_weights
from sdcli.run.best import Best
from sdcli.run.events import Epoch, Finished, Step, Stopped
from sdcli.run.folder import read_log
from sdcli.run.state import Position
from sdcli.run.still import Stillness
from sdcli.run.track import track_epoch, track_step
from sdcli.run.training import Training, enter_phase, save, share_buffers
from sdcli.run.watch import (
    Watch,
    check_weights,
    explained,
    finite,
    gave_up,
    gradient_norms,
    gradient_shares,
    has_to_give_up,
    is_measured,
    measure_shares,
)

LOG_EVERY_S = 0.25
"""Seconds between reads of the losses: each read waits for the device."""

AGREE_EVERY = 10
"""Updates between the checks whether any process has received a signal: each check waits for all processes."""


class _Stop(Exception):
    """A signal has arrived during scoring."""


def fit(
    training: Training, told_to_stop: Callable[[], int | None] = lambda: None
) -> Generator[Step | Epoch | Finished | Stopped, None, None]:
    """Trains to the end and writes the run folder; yields an event now and then.

    The best epoch is chosen on the validation split by the recipe's `best` key; BYOT's authors choose by the ensemble,
    and on the test split. Without a validation split there is no choice: the last epoch is scored once, on the test
    split.

    The state is saved after every epoch, every `save_every` updates, when `told_to_stop` returns a signal's number, and
    when images cannot be loaded. Closed between two epochs, it leaves a run that can be resumed.
    """
    if training.is_first:
        training.run.lock()
    try:
        yield from _fit(training, told_to_stop)
    except UserError:
        raise
    except Exception as error:
        if (explanation := explained(error, training)) is None:
            raise
        raise explanation from error
    finally:
        for loader in (training.loader, training.scored_loader):
            if isinstance(loader, Loader):
                loader.close()
        training.run.unlock()


def _fit(training: Training, told_to_stop: Callable[[], int | None]) -> Iterator[Step | Epoch | Finished | Stopped]:
    best = _best_so_far(training)
    position = training.position
    while position.epoch <= training.epochs:
        if training.phase_of != training.phase:
            enter_phase(training, training.phase_of)
            best = Best(training.recipe.best)
        epoch: Epoch | None = None
        for event in train_epoch(training, told_to_stop):
            if isinstance(event, Epoch):
                epoch = event
            else:
                yield event
                if isinstance(event, Stopped):
                    return
        assert epoch is not None
        if training.num_val:
            if training.accelerator.num_processes > 1:
                # On a signal they cannot stop in the middle of scoring, and a launcher may not wait until it ends.
                save(training)
            try:
                report = score(training, told_to_stop) if STUDENT not in training.learner.frozen else None
            except _Stop as stop:
                save(training)
                yield Stopped(position.epoch, position.update, stop.args[0])
                return
            except UserError as error:
                raise _saved(training, error) from None
            others = score_others(training)
            epoch = replace(epoch, validation=report and finite(report, training), networks=others)
        if training.is_first:
            training.run.log_epoch(epoch.to_log())
            _save_checkpoint(training, "last", epoch)
            if (every := training.settings.keep_every) and epoch.epoch % every == 0:
                _save_checkpoint(training, f"epoch{epoch.epoch}", epoch)
        if epoch.validation and best.see(epoch.epoch, epoch.validation) and training.is_first:
            _save_checkpoint(training, "best", epoch)
        position = training.position = Position(epoch.epoch + 1)
        save(training)
        track_epoch(training, epoch)
        yield epoch
    if best.report is not None:
        name, number, report = "best", best.epoch, best.report
    else:
        try:
            report = finite(score(training, told_to_stop), training)
        except _Stop as stop:
            yield Stopped(training.epochs, training.updates_per_epoch, stop.args[0])
            return
        name, number = "last", training.epochs
    found: dict[str, float] = {}
    for line in read_log(training.run.folder):
        found |= line.get("weights", {})
    if training.is_first:
        if found:
            training.run.write_found(to_toml(with_weights(training.recipe, found)))
        training.run.write_report(report, f"{name}.safetensors", number, best.epochs)
    if training.settings.track is not None:
        training.accelerator.end_training()
    checkpoint = training.run.folder / f"{name}.safetensors"
    yield Finished(checkpoint, number, report, best.epochs, found)


def score(training: Training, told_to_stop: Callable[[], int | None] = lambda: None) -> Report:
    """Scores all classifiers of the current network on the split that is scored."""
    about = training.description
    share_buffers(training)

    def progress(images: int) -> None:
        signal = told_to_stop()
        # With several processes, the others would wait forever for the one that stopped.
        if signal is not None and training.accelerator.num_processes == 1:
            raise _Stop(signal)

    return evaluate(
        training.network,
        training.scored_loader,
        points=training.network.classifiers,
        costs=about.blueprint.costs(),
        device=training.accelerator.device,
        model=about.blueprint.architecture.model,
        dataset=about.dataset.name,
        split=training.scored_split,
        progress=progress,
        autocast=training.accelerator.autocast,
        collect=lambda own: interleaved(training.accelerator, [tensor.cpu() for tensor in own]),
    )


def score_others(training: Training) -> dict[str, float]:
    """The top-1 in percent of every other network that takes part, on the split that is scored: a bad teacher is seen
    in the first epoch. Those that do not learn are scored once."""
    learner, found = training.learner, {}
    for name in training.recipe.others:
        network = learner.networks[name]
        assert isinstance(network, MultiExit)
        if not learner.answers(name):
            continue
        if name not in training.known_scores or name not in learner.frozen:
            said = answer(
                learner.seen(name),
                training.scored_loader,
                points=[FINAL],
                device=training.accelerator.device,
                autocast=training.accelerator.autocast,
                collect=lambda own: interleaved(training.accelerator, [tensor.cpu() for tensor in own]),
            )
            training.known_scores[name] = 100.0 * said.correct(FINAL).double().mean().item()
        found[name] = training.known_scores[name]
    return found


def train_step(training: Training, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """One update: the networks see the batches, every loss compares their outputs, and the weights take a step.

    `batches` are this process's micro-batches. Returns each loss's contribution to the total, averaged over them
    [losses], and the gradient norm before clipping [].
    """
    training.learner.resting()
    if training.recipe.updates == "sequential":
        return _in_turn(training, batches)
    skips = training.recipe.optimizer.nonfinite == "skip"
    buffers = [buffer.clone() for buffer in training.learner.buffers()] if skips else []
    losses = backward(training, batches)
    norm = clip_gradient(training)
    if skips and not all_finite(training, losses, norm):
        skip_update(training, batches, buffers)
    else:
        take_step(training, training.optimizers)
    for optimizer in training.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    return losses, norm


def _in_turn(training: Training, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """One update in which the networks take their steps one after the other, each after new predictions of all."""
    losses, norms = [], []
    for name, optimizer in training.optimizers.items():
        training.learner.only = name
        losses.append(backward(training, batches))
        norms.append(clip_gradient(training))
        take_step(training, [name])
        optimizer.zero_grad(set_to_none=True)
    training.learner.only = None
    return torch.stack(losses).sum(dim=0), torch.stack(norms).norm()


def backward(training: Training, batches: list[Batch]) -> Tensor:
    """Accumulates the gradient of the micro-batches; returns each loss's contribution, averaged over them [losses]."""
    accelerator, module = training.accelerator, training.module
    parts = []
    for number, batch in enumerate(batches, start=1):
        # Processes exchange gradients once, after the last micro-batch.
        with nullcontext() if number == len(batches) else accelerator.no_sync(module):
            total, named = module(batch)
            accelerator.backward(total / len(batches))
        parts.append(torch.stack(list(named.values())).detach())
    return torch.stack(parts).mean(dim=0)


def clip_gradient(training: Training) -> Tensor:
    """Clips the norm of each network's whole gradient to its `optimizer.clip_grad`; returns the norm of all before
    clipping []."""
    training.accelerator.unscale_gradients()
    norms = []
    for name in training.optimizers:
        trained = [p for part in training.learner.parts_of(name) for p in part.parameters() if p.grad is not None]
        if not trained:
            continue
        norms.append(nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
        if (limit := training.recipe.optimizer_of(name).clip_grad) is not None:
            nn.utils.clip_grads_with_norm_(trained, limit, norms[-1])
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def all_finite(training: Training, losses: Tensor, norm: Tensor) -> bool:
    """Whether losses and gradient are finite in all processes. Waits for the device."""
    # The gradient is the same in all processes, the losses are not.
    return bool(training.accelerator.reduce(losses.clone()).isfinite().all() & norm.isfinite())


def take_step(training: Training, names: Collection[str]) -> None:
    """Updates the weights of these networks, but of those that a rule lets rest, and the student's moving average."""
    resting = training.learner.resting()
    for name in names:
        if name not in resting:
            training.optimizers[name].step()
            training.learner.mask(name, training.learner.networks[name])
    if training.ema is not None and STUDENT in names and STUDENT not in training.learner.frozen:
        training.ema.update(training.learner.student, step=training.updates_averaged + 1)
        training.learner.mask(STUDENT, training.ema.module)
    training.position.in_a_row = 0


def skip_update(training: Training, batches: list[Batch], buffers: list[Tensor]) -> None:
    """Counts the update as skipped and restores `buffers`, copied before the forward passes changed them."""
    if training.accelerator.scaler:
        # Lowers the scale where fp16 could not hold the gradient.
        training.accelerator.scaler.update()
    for buffer, before in zip(training.learner.buffers(), buffers, strict=True):
        buffer.copy_(before)
    training.position.skipped += 1
    training.position.skipped_images += batches[0].whole
    training.position.in_a_row += 1


def _is_helped(training: Training) -> bool:
    """Whether this process's own time is not all that training takes."""
    loaders = training.loader.num_workers if isinstance(training.loader, Loader) else 0
    return training.accelerator.device.type != "cpu" or training.accelerator.num_processes > 1 or loaders > 0


def train_epoch(
    training: Training, told_to_stop: Callable[[], int | None] = lambda: None
) -> Iterator[Step | Epoch | Stopped]:
    """Trains the rest of the current epoch; yields a `Step` now and then, and the `Epoch` at its end.

    Raises UserError with the name of the loss if one is not finite.
    """
    position, settings = training.position, training.settings
    training.module.train()
    training.loader.set_epoch(position.epoch, position.update)
    watch = Watch(training)
    start = logged = time.monotonic()
    cpu_start = time.process_time()
    before, seconds_before, cpu_before = position.num_images, position.seconds, position.cpu_seconds
    loaded = iter(training.loader)
    losses: Tensor | None = None
    while position.update < training.updates_per_epoch:
        try:
            batches = next_update(training, loaded)
        except UserError as error:
            if losses is not None:
                watch.check(losses)
                check_weights(training)
            error = _saved(training, error)
            if training.accelerator.num_processes == 1 and (signal := told_to_stop()) is not None:
                # The signal may have ended the workers too. A real error will come again after resuming.
                yield Stopped(position.epoch, position.update, signal)
                return
            raise error from None
        epochs = training.recipe.phase_epochs[training.phase]
        objective, done = training.learner.objective, training.updates_done
        objective.set_time(done / training.updates_per_epoch, epochs)
        if objective.shares is not None and is_measured_at(done + 1, epochs * training.updates_per_epoch):
            measure_shares(training, batches[0])
            objective.set_time(done / training.updates_per_epoch, epochs)
        shares, notes = _measured(training, batches[0])
        notes, training.news = [*training.news, *notes], []
        position.shares = shares or position.shares
        position.lr = base_rate(next(iter(training.optimizers.values())))
        losses, norm = train_step(training, batches)
        # Skipped updates do not count.
        own = 0 if position.in_a_row else sum(len(batch.labels) for batch in batches)
        counted = losses * own if own else torch.zeros_like(losses)
        position.sums = counted if position.sums is None else position.sums + counted
        position.num_images += batches[0].whole
        position.update += 1
        if training.accelerator.num_processes > 1:
            # With the same losses everywhere, all processes report the same loss and update as not finite.
            losses = training.accelerator.reduce(losses, "mean")
        watch.see(losses, norm, position)
        if training.stillness is not None:
            training.stillness.see(losses)
        if has_to_give_up(training):
            raise gave_up(training, batches[0])
        for schedule in training.schedules.values():
            schedule.step(training.updates_done)
        now = time.monotonic()
        position.seconds = seconds_before + now - start
        position.cpu_seconds = cpu_before + time.process_time() - cpu_start
        if now - logged >= LOG_EVERY_S or position.update == 1 or shares or notes:
            logged = now
            speed = (position.num_images - before) / (now - start)
            named = watch.check(losses)
            track_step(training, named)
            yield Step(
                position.epoch,
                position.update,
                training.updates_per_epoch,
                speed,
                position.lr,
                named,
                shares,
                notes=notes,
            )
        signal = _agreed(training, told_to_stop())
        # After the last update the state is saved anyway, at the end of the epoch.
        is_due = settings.save_every and position.update % settings.save_every == 0
        if signal is not None or (is_due and position.update < training.updates_per_epoch):
            watch.check(losses)
            check_weights(training)
            save(training)
        if signal is not None:
            yield Stopped(position.epoch, position.update, signal)
            return
    speed = position.num_images / max(position.seconds, 1e-9)
    assert position.sums is not None
    sums = training.accelerator.reduce(position.sums.clone())
    named = watch.check(sums / max(1, position.num_images - position.skipped_images))
    check_weights(training)
    phase = training.recipe.all_phases[training.phase].name
    yield Epoch(
        position.epoch,
        phase,
        position.lr,
        named,
        position.num_images,
        position.seconds,
        speed,
        position.shares,
        cpu_seconds=None if _is_helped(training) else position.cpu_seconds,
        macs=training.learner.training_macs * position.num_images,
        skipped=position.skipped,
        weights=training.found_weights,
    )


def _measured(training: Training, batch: Batch) -> tuple[dict[str, float] | None, list[str]]:
    """Before an update: each loss's share of the gradient if it is time to measure it, and remarks on losses that
    teach nothing."""
    objective, done = training.learner.objective, training.updates_done
    if done == 0:
        updates = training.recipe.phase_epochs[training.phase] * training.updates_per_epoch
        training.stillness = Stillness(objective.names, updates)
    still, notes = training.stillness, []
    ends = still is not None and done + 1 == still.last
    if not (ends or is_measured(training)):
        return None, []
    norms = gradient_norms(training, batch)
    if still is not None and ends:
        notes = still.remarks(norms, objective.resting)
        training.stillness = None
    return (gradient_shares(norms) if is_measured(training) else None), notes


def next_update(training: Training, loaded: Iterator[Batch]) -> list[Batch]:
    """This process's micro-batches of the next update, on its device."""
    batches = [batch.to(training.accelerator.device) for batch in islice(loaded, training.settings.grad_accum_steps)]
    own = sum(len(batch.labels) for batch in batches)
    for batch in batches:
        if training.mixing is not None:
            # All views are mixed in the same way, because they share the labels.
            shown = [batch.images, *batch.views.values()]
            shown, batch.labels = training.mixing(shown, batch.labels, batch.index, training.position.epoch)
            batch.images, batch.views = shown[0], dict(zip(batch.views, shown[1:], strict=True))
        batch.whole = own * training.accelerator.num_processes
        if training.settings.memory_format == "channels-last":
            batch.images = batch.images.contiguous(memory_format=torch.channels_last)
            batch.views = {n: t.contiguous(memory_format=torch.channels_last) for n, t in batch.views.items()}
    return batches


def _saved(training: Training, error: UserError) -> UserError:
    """Saves the state when images cannot be loaded; returns the error with the command that resumes."""
    if training.accelerator.num_processes > 1:
        # Saving needs all processes, and the others are already at their next update.
        return error
    save(training)
    resume = f"sdcli train --resume {training.run.folder}"
    return error.but(fix=f"{error.fix}; the state is saved; resume with: {resume}")


def _agreed(training: Training, signal: int | None) -> int | None:
    """The signal that any process has received; with several processes, None between the updates that check."""
    if training.accelerator.num_processes == 1:
        return signal
    if training.position.update % AGREE_EVERY and training.position.update < training.updates_per_epoch:
        return None
    signals = interleaved(training.accelerator, [signal])
    return next((signal for signal in signals if signal is not None), None)


def _best_so_far(training: Training) -> Best:
    """The best epoch of the current phase, from the log of a resumed run."""
    best = Best(training.recipe.best)
    before = sum(training.recipe.phase_epochs[: training.phase])
    for line in read_log(training.run.folder)[before : training.position.epoch - 1]:
        if line["validation"]:
            best.see(line["epoch"], Report.from_dict(line["validation"]))
    return best


def _save_checkpoint(training: Training, name: str, epoch: Epoch) -> None:
    scores = epoch.validation.to_dict() if epoch.validation else {}
    description = replace(training.description, epoch=epoch.epoch, scores=scores)
    training.run.save(name, training.network.state_dict(), description)
