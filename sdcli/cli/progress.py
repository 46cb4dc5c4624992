"""Live progress on stderr; plain lines where it is not a terminal."""

from __future__ import annotations

import contextlib
import datetime
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from sdcli.cli.plots import has_matplotlib, save_curves
from sdcli.cli.talk import end_stage, is_watched, message, note, talk
from sdcli.errors import UserError, counted
from sdcli.evaluation.evaluate import Report
from sdcli.run.best import COARSE, quality
from sdcli.run.events import Epoch, Finished, Step, Stopped
from sdcli.run.folder import FOUND, read_log
from sdcli.run.training import Training

PLAIN_EVERY_S = 30.0
"""How often a long epoch reports where it is in a file or a pipe."""

IMBALANCE = 10
"""A note is due where the largest class has more than this many times the images of the smallest."""

Event: TypeAlias = Step | Epoch | Finished | Stopped


def follow(training: Training, events: Iterable[Event]) -> Stopped | None:
    """Shows a run until it is done, or stopped. Of several processes only the first one prints."""
    if not training.is_first:
        return next((event for event in events if isinstance(event, Stopped)), None)
    message(*_heading(training), prose=True)
    for text in [*_imbalance(training), *training.notes]:
        note(text)
    end = (_follow_live if is_watched() else _follow_plain)(training, events)
    folder = training.run.folder
    if has_matplotlib() and read_log(folder):
        try:
            save_curves(folder, folder / "curves.png")
        except UserError as error:
            # The run itself is done, or saved.
            note(error.wrong)
    resume = (f"sdcli train --resume {shlex.quote(str(folder))}", "bold")
    if isinstance(end, Stopped):
        message(f"stopped in epoch {end.epoch} after update {end.update}; the state is saved. Resume with: ", resume)
        return end
    if end is not None:
        for line in _summary(training, end):
            message(*line)
    return None


def _heading(training: Training) -> list[str | tuple[str, str]]:
    """What is trained on what, and for how long."""
    about, position, splits = training.description, training.position, training.splits
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    where = f"{counted(training.epochs, 'epoch')} of {counted(training.updates_per_epoch, 'update')}"
    if position.epoch > training.epochs:
        where = f"all {counted(training.epochs, 'epoch')} are done; --epochs N extends the run"
    elif (position.epoch, position.update) != (1, 0):
        where += f", resumed in epoch {position.epoch} after update {position.update}"
    return [
        (about.blueprint.architecture.model, "bold"),
        f" on {about.dataset.name}: {counted(len(about.blueprint.classes), 'class', 'classes')}; images: {sizes}",
        *([] if training.num_val else ["; no validation split: the last epoch is kept"]),
        f"\n{where}, on {training.accelerator.device}; run folder: {training.run.folder}",
    ]


def _imbalance(training: Training) -> list[str]:
    """A remark on classes of very different sizes."""
    classes = training.description.blueprint.classes
    counts = np.bincount(training.splits["train"].labels, minlength=len(classes))
    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[most] <= IMBALANCE * counts[least]:
        return []
    sizes = [f"{counted(int(counts[number]), 'image')} of '{classes[number]}'" for number in (least, most)]
    return [f"imbalanced classes: from {sizes[0]} to {sizes[1]} in the training split; top-1 favours the large ones"]


def _follow_plain(training: Training, events: Iterable[Event]) -> Finished | Stopped | None:
    shown = started = time.monotonic()
    steps, position = training.updates_per_epoch, training.position
    total, before = training.epochs * steps, (position.epoch - 1) * steps + position.update

    def left(done: int) -> str:
        """The time left at the pace so far."""
        seconds = (time.monotonic() - started) * (total - done) / max(done - before, 1)
        return f", {_time(seconds)} left" if done < total else ""

    for event in events:
        if isinstance(event, Stopped | Finished):
            return event
        now = time.monotonic()
        if isinstance(event, Step):
            if event.shares:
                message(_shares(event))
            for note in event.notes:
                message(f"note: {note}")
            if now - shown >= PLAIN_EVERY_S:
                shown = now
                speed = f"{event.images_per_s:,.0f} images/s{left((event.epoch - 1) * steps + event.update)}"
                message(f"epoch {event.epoch}/{training.epochs}, update {event.update}/{event.updates}"
                        f"  |  {_losses(event.losses)}  |  {speed}")  # fmt: skip
        else:
            shown = now
            scores = f"  |  {_scores(event.validation, event.networks)}" if event.validation or event.networks else ""
            speed = f"{event.images_per_s:,.0f} images/s{left(event.epoch * steps)}"
            message(f"epoch {event.epoch}/{training.epochs}  |  {_losses(event.losses)}{_skipped(event)}{scores}"
                    f"  |  {speed}")  # fmt: skip
    return None


def _text(text: str) -> TextColumn:
    return TextColumn(text, markup=False, table_column=Column(no_wrap=True))


class _TimeColumn(ProgressColumn):
    """The time left, then the time taken."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(f"{_time(task.finished_time or 0)} in all")
        left = task.time_remaining
        return Text("-:--:-- left" if left is None else f"{_time(left)} left")


def _follow_live(training: Training, events: Iterable[Event]) -> Finished | Stopped | None:
    console = talk()
    # Bar and percentage are the whole run's.
    bar = Progress(
        _text("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        BarColumn(bar_width=None),
        _text("{task.percentage:.0f} %"),
        _text("update {task.fields[update]}/{task.fields[updates]}"),
        _text("{task.fields[speed]:,.0f} images/s"),
        _TimeColumn(Column(no_wrap=True)),
        console=console,
    )
    steps, position = training.updates_per_epoch, training.position
    task = bar.add_task(
        "",
        total=training.epochs * steps,
        completed=(position.epoch - 1) * steps + position.update,
        epoch=min(position.epoch, training.epochs),
        epochs=training.epochs,
        update=position.update,
        updates=steps,
        speed=0.0,
    )
    epochs: list[Epoch] = []
    losses, shares = Text(), Text()
    with Live(Group(bar), console=console, refresh_per_second=8) as live:
        for event in events:
            if isinstance(event, Stopped | Finished):
                live.update(Group(*_epoch_tables(epochs, console, training.recipe.best), bar))
                return event
            if isinstance(event, Step):
                done = (event.epoch - 1) * steps + event.update
                for note in event.notes:
                    console.print(f"note: {note}", markup=False, highlight=False)
                bar.update(task, completed=done, epoch=event.epoch, update=event.update, speed=event.images_per_s)
                losses = Text(f"{_losses(event.losses)}  |  learning rate {event.lr:.2g}", style="dim")
                shares = Text(_shares(event), style="dim") if event.shares else shares
            else:
                epochs.append(event)
                shares = Text(f"epoch {event.epoch}{_skipped(event)}", style="bold") if event.skipped else shares
                bar.update(task, completed=event.epoch * steps, speed=event.images_per_s)
            live.update(Group(*_epoch_tables(epochs, console, training.recipe.best), shares, losses, bar))
    return None


ROWS = 8
"""Epochs that the table shows."""


def _epoch_tables(epochs: list[Epoch], console: Console, by: str) -> list[Table]:
    """The table of the last epochs, without the losses where the terminal is too narrow for them; none before the first
    epoch is done."""
    if not epochs:
        return []
    table = _epoch_table(epochs, by)
    fits = Measurement.get(console, console.options.update(max_width=1000), table).maximum <= console.width
    return [table if fits else _epoch_table(epochs, by, with_losses=False)]


def _epoch_table(epochs: list[Epoch], by: str, with_losses: bool = True) -> Table:
    """The last epochs: losses by name, accuracy by exit; the best epoch in bold."""
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("epoch", justify="right", no_wrap=True)
    # Phases may have losses of their own.
    names = list(dict.fromkeys(name for epoch in epochs[-ROWS:] for name in epoch.losses)) if with_losses else []
    for name in names:
        table.add_column(f"{name}\nloss", justify="right", style="dim", no_wrap=True)
    scored = epochs[-1].validation.rows if epochs[-1].validation else []
    for result in scored:
        table.add_column(f"{result.point}\ntop-1 %", justify="right", no_wrap=True)
    others = list(epochs[-1].networks)
    for name in others:
        table.add_column(f"{name}\ntop-1 %", justify="right", style="dim", no_wrap=True)
    compared = [e for e in epochs if e.validation and e.phase == epochs[-1].phase]
    best = max(compared, key=lambda e: quality(e.validation, by) if e.validation else (0.0, 0.0), default=None)
    for epoch in epochs[-ROWS:]:
        cells = [f"{epoch.losses[name]:.4f}" if name in epoch.losses else "" for name in names]
        cells += [f"{result.top1:.2f}" for result in (epoch.validation.rows if epoch.validation else [])]
        cells += [f"{epoch.networks[name]:.2f}" if name in epoch.networks else "" for name in others]
        table.add_row(str(epoch.epoch), *cells, style="bold" if epoch is best else "")
    return table


def _summary(training: Training, end: Finished) -> list[list[str | tuple[str, str]]]:
    """The result, and a command that works next."""
    which = "best" if end.checkpoint.name.startswith("best") else "last"
    command = f"sdcli eval {shlex.quote(str(training.run.folder))}"
    if "test" not in training.splits:
        command += " --split validation"
    lines: list[list[str | tuple[str, str]]] = []
    if len(set(end.best_epochs.values())) > 1:
        lines.append([f"best epoch of each: {', '.join(f'{point} {n}' for point, n in end.best_epochs.items())}"])
    if end.weights:
        found = ", ".join(f"losses.{name} {weight:.3g}" for name, weight in end.weights.items())
        lines.append([f"weights found: {found}; {training.run.folder / FOUND} repeats the run with them"])
    if which == "best" and training.num_val < COARSE:
        share = 100 / training.num_val
        lines.append(
            [f"caution: one of {training.num_val} validation images is {share:.1f} points; epochs may differ by chance"]
        )
    return [
        [(f"{which} epoch: {end.epoch}", "bold"), f" ({end.checkpoint.name})  |  {_scores(end.report)}"],
        *lines,
        ["next: ", (command, "bold")],
    ]


def _shares(step: Step) -> str:
    """How much each loss pulls at the student's weights."""
    shares = ", ".join(f"{name} {share:.1%}" for name, share in (step.shares or {}).items())
    return f"share of the gradient (epoch {step.epoch}, update {step.update}): {shares}"


def _skipped(epoch: Epoch) -> str:
    """How many updates were skipped, where the recipe asks for it."""
    return f"  |  {counted(epoch.skipped, 'update')} skipped: loss not finite" if epoch.skipped else ""


def _losses(losses: dict[str, float]) -> str:
    return "loss: " + " + ".join(f"{name} {value:.3g}" for name, value in losses.items())


def _scores(report: Report | None, others: Mapping[str, float] | None = None) -> str:
    """Top-1 of the student, if it was scored, and of other networks; those are scored on the same split."""
    own = [(result.point, result.top1) for result in report.rows] if report else []
    return f"{report.split if report else 'validation'} top-1 %: " + ", ".join(
        f"{name} {top1:.2f}" for name, top1 in [*own, *(others or {}).items()]
    )


def _time(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


@contextlib.contextmanager
def scoring(what: str = "scoring", *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar while images are scored, on a terminal; nothing elsewhere, and nothing where `quiet`."""
    if quiet or not is_watched():
        yield lambda done, total: None
        return
    bar = Progress(
        _text(what),
        BarColumn(),
        _text("{task.completed:,}/{task.total:,} images"),
        _TimeColumn(Column(no_wrap=True)),
        console=talk(),
        transient=True,
    )
    task = bar.add_task("", total=1)

    def progress(done: int, total: int) -> None:
        end_stage()
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield progress
    finally:
        bar.stop()
