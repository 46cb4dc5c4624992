"""Live progress on stderr; plain lines where it is no terminal."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sdcli.cli.plots import has_matplotlib, save_curves
from sdcli.cli.tables import report_rows
from sdcli.cli.talk import note, talk
from sdcli.errors import UserError
from sdcli.evaluation.evaluate import Report
from sdcli.run.events import Epoch, Finished, Step, Stopped
from sdcli.run.folder import read_log
from sdcli.run.training import Training

PLAIN_EVERY_S = 30.0
"""How often a long epoch says where it is when nobody watches a terminal."""


Event: TypeAlias = Step | Epoch | Finished | Stopped


def follow(training: Training, events: Iterable[Event]) -> Stopped | None:
    """Shows a run until it is done, or stopped. Of several processes only the first one talks."""
    if not training.is_first:
        return next((event for event in events if isinstance(event, Stopped)), None)
    console = talk()
    for text in training.notes:
        note(text)
    console.print(_heading(training))
    stopped = (_follow_live if console.is_terminal else _follow_plain)(training, events)
    if has_matplotlib() and read_log(training.run.folder):
        try:
            save_curves(training.run.folder, training.run.folder / "curves.png")
        except UserError as error:
            # The run itself is done, or saved.
            note(error.wrong)
    if stopped is not None:
        console.print(
            Text.assemble(
                f"stopped in epoch {stopped.epoch} after update {stopped.update}, all is saved; to go on: ",
                (f"sdcli train --resume {training.run.folder}", "bold"),
            ),
            soft_wrap=True,
        )
    return stopped


def _heading(training: Training) -> Text:
    about = training.description
    position = training.position
    where = ""
    if (position.epoch, position.update) != (1, 0):
        where = f", going on in epoch {position.epoch} after update {position.update}"
        if position.epoch > training.epochs:
            where = ", all of them done: --epochs N goes on"
    return Text.assemble(
        (about.blueprint.architecture.model, "bold"),
        f" on {about.dataset.name}: {training.num_train:,} training images, "
        + (f"{training.num_val:,} held out to choose by" if training.num_val else "none held out, so no best is chosen")
        + f"; {training.epochs} epochs of {training.updates_per_epoch} updates{where} on {training.accelerator.device}"
        f" -> {training.run.folder}",
    )


def _follow_plain(training: Training, events: Iterable[Event]) -> Stopped | None:
    console = talk()
    told = started = time.monotonic()
    steps, position = training.updates_per_epoch, training.position
    total, before = training.epochs * steps, (position.epoch - 1) * steps + position.update

    def left(done: int) -> str:
        """The time left, as if all went on at the pace so far."""
        seconds = (time.monotonic() - started) * (total - done) / max(done - before, 1)
        return f"  {datetime.timedelta(seconds=round(seconds))} left"

    for event in events:
        if isinstance(event, Stopped):
            return event
        if isinstance(event, Step):
            if event.shares:
                console.print(_shares(event), soft_wrap=True)
            if time.monotonic() - told >= PLAIN_EVERY_S:
                told = time.monotonic()
                console.print(
                    f"epoch {event.epoch}/{training.epochs}  update {event.update}/{event.updates}  "
                    f"{event.images_per_s:,.0f} images/s{left((event.epoch - 1) * steps + event.update)}  "
                    f"{_losses(event.losses)}",
                    soft_wrap=True,
                )
        elif isinstance(event, Epoch):
            told = time.monotonic()
            line = f"epoch {event.epoch}/{training.epochs}  {event.images_per_s:,.0f} images/s"
            line += left(event.epoch * steps) if event.epoch < training.epochs else ""
            line += f"  {_losses(event.losses)}" + _skipped(event)
            console.print(line + (f"  |  {_scores(event.validation)}" if event.validation else ""), soft_wrap=True)
        else:
            _finish(event)
    return None


def _follow_live(training: Training, events: Iterable[Event]) -> Stopped | None:
    console = talk()
    bar = Progress(
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:,.0f} images/s"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )
    steps = training.updates_per_epoch
    position = training.position
    done = (position.epoch - 1) * steps + position.update
    task = bar.add_task(
        "", total=training.epochs * steps, completed=done, epoch=position.epoch, epochs=training.epochs, speed=0.0
    )
    epochs: list[Epoch] = []
    losses, shares = Text(), Text()
    with Live(Group(bar), console=console, refresh_per_second=8) as live:
        for event in events:
            if isinstance(event, Stopped):
                return event
            if isinstance(event, Step):
                done = (event.epoch - 1) * steps + event.update
                bar.update(task, completed=done, epoch=event.epoch, speed=event.images_per_s)
                losses = Text(f"lr {event.lr:.2g}   {_losses(event.losses)}", style="dim")
                shares = Text(_shares(event), style="dim") if event.shares else shares
            elif isinstance(event, Epoch):
                epochs.append(event)
                shares = Text(f"epoch {event.epoch}{_skipped(event)}", style="yellow") if event.skipped else shares
                bar.update(task, completed=event.epoch * steps, speed=event.images_per_s)
            else:
                live.update(Group(_epoch_table(epochs), bar) if epochs else Group(bar))
                live.stop()
                _finish(event)
                return None
            live.update(Group(*([_epoch_table(epochs)] if epochs else []), shares, losses, bar))
    return None


ROWS = 8
"""Epochs that the table shows."""


def _epoch_table(epochs: list[Epoch]) -> Table:
    """The last epochs: losses by name, accuracy by exit."""
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("epoch", justify="right")
    # Phases may have losses of their own.
    names = list(dict.fromkeys(name for epoch in epochs[-ROWS:] for name in epoch.losses))
    for name in names:
        table.add_column(f"{name} loss", justify="right", style="dim")
    scored = report_rows(epochs[-1].validation) if epochs[-1].validation else []
    for result in scored:
        table.add_column(result.point, justify="right")
    best = max((e.validation.best.top1 for e in epochs if e.validation and e.phase == epochs[-1].phase), default=None)
    for epoch in epochs[-ROWS:]:
        cells = [f"{epoch.losses[name]:.4f}" if name in epoch.losses else "" for name in names]
        cells += [f"{result.top1:.2f}" for result in (report_rows(epoch.validation) if epoch.validation else [])]
        is_best = (
            epoch.validation is not None and epoch.phase == epochs[-1].phase and epoch.validation.best.top1 == best
        )
        table.add_row(str(epoch.epoch), *cells, style="bold" if is_best else "")
    return table


def _finish(event: Finished) -> None:
    report = event.report
    console = talk()
    which = f"{event.checkpoint.name} is of epoch {event.epoch}"
    console.print(f"{which}: top-1 on {report.split}: {_scores(report)}", soft_wrap=True)
    console.print(Text.assemble("next: ", (f"sdcli eval {event.checkpoint} --exits all", "bold")), soft_wrap=True)


def _shares(step: Step) -> str:
    """How much each loss pulls at the student's weights."""
    shares = ", ".join(f"{name} {share:.1%}" for name, share in (step.shares or {}).items())
    return f"gradient at epoch {step.epoch}, update {step.update}: {shares}"


def _skipped(epoch: Epoch) -> str:
    """How many updates were left out, where the recipe says so."""
    return f"  {epoch.skipped} update{'s' * (epoch.skipped > 1)} left out: not finite" if epoch.skipped else ""


def _losses(losses: dict[str, float]) -> str:
    return "loss " + " + ".join(f"{name} {value:.3g}" for name, value in losses.items())


def _scores(report: Report) -> str:
    return "  ".join(f"{result.point} {result.top1:.2f}" for result in report_rows(report))


@contextlib.contextmanager
def scoring() -> Iterator[Callable[[int, int], None]]:
    """A bar while images are scored, on a terminal; nothing elsewhere."""
    console = talk()
    if not console.is_terminal:
        yield lambda done, total: None
        return
    bar = Progress(TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), console=console, transient=True)
    task = bar.add_task("", total=None)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total)
