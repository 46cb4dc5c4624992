"""`sdcli tune`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdcli.cli import choices
from sdcli.cli.options import Json
from sdcli.cli.stopping import stopping
from sdcli.cli.usage import Command, misplaced
from sdcli.errors import UserError, counted
from sdcli.toml import write_value

if TYPE_CHECKING:
    from sdcli.run.events import Stopped
    from sdcli.run.tune import Event, Search

FIRST = (
    "sdcli tune resnet18 --dataset digits --recipe quick --try losses.soft.weight=0.01..10 "
    "--try losses.soft.temperature=1,2,4,8 --budget 12"
)
EPILOG = f"""
Example:  {FIRST}
"""
SEARCH = "Search"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("tune", cls=Command, epilog=EPILOG)(tune)


def tune(
    ctx: typer.Context,
    model: choices.Model = None,
    dataset: choices.Dataset = None,
    recipe: choices.Recipe = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="A new folder for the search, or the one to continue. [default: runs/tune-MODEL-RECIPE]",
        ),
    ] = None,
    as_json: Json = False,
    try_: Annotated[
        list[str] | None,
        typer.Option(
            "--try",
            metavar="KEY=VALUES",
            help="A recipe key and its values: a range A..B, or values separated by commas; repeatable. A range of "
            "positive numbers is searched on a logarithmic scale if B is at least 10 times A.",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    budget: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="TRIALS",
            help="Trials in the whole search: those that are pruned count, and those of all processes and of earlier "
            "starts. Fewer if there are not as many combinations.",
            rich_help_panel=SEARCH,
        ),
    ] = 20,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL|FILE",
            help="Where the search is stored. All processes that name the same one share the search: a database URL, "
            "or a file on a shared drive. [default: FOLDER/search.db]",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    no_pruning: Annotated[
        bool,
        typer.Option(
            "--no-pruning",
            metavar="",
            help="Train every trial to its end. By default successive halving ends two thirds of them after a ninth "
            "and again after a third of their epochs.",
            rich_help_panel=SEARCH,
        ),
    ] = False,
    epochs: choices.Epochs = None,
    batch_size: choices.BatchSize = None,
    lr: choices.LearningRate = None,
    set_: choices.Set = None,
    unset: choices.Unset = None,
    import_: choices.Import = None,
    pretrained: choices.Pretrained = False,
    weights: choices.Weights = None,
    teacher: choices.Teacher = None,
    exits: choices.Exits = None,
    head: choices.Head = None,
    stem: choices.Stem = None,
    image_size: choices.ImageSize = None,
    image_key: choices.ImageKey = None,
    label_key: choices.LabelKey = None,
    val_fraction: choices.ValFraction = 0.1,
    limit_train: choices.LimitTrain = None,
    limit_val: choices.LimitVal = None,
    split_seed: choices.SplitSeed = 42,
    workers: choices.Workers = None,
    save_every: choices.SaveEvery = None,
    keep_every: choices.KeepEvery = None,
    seed: choices.Seed = 42,
    device: choices.Device = None,
    precision: choices.Precision = "fp32",
    compile_: choices.Compile = False,
    memory_format: choices.MemoryFormat = "auto",
    grad_accum_steps: choices.GradAccumSteps = 1,
    grad_checkpointing: choices.GradCheckpointing = False,
) -> None:
    """Search for good values of recipe keys.

    Each trial is a run of its own, scored on the validation split by the recipe key best; the test split is not used.
    Ends with a table, a plot (tune.png) and best.toml, which extends the recipe with the values that were found. The
    same command continues a search that was stopped or killed, and shares it with other processes.
    """
    given = dict(locals())
    if model is not None and (error := misplaced(model, ctx.command, "sdcli tune")):
        raise error
    model, _ = choices.model_and_dataset(given, FIRST)
    if find_spec("optuna") is None:
        raise UserError(
            "a search needs optuna, which is not installed", "the extra 'tune'", "pip install 'sdcli[tune]'"
        )

    from sdcli.cli.talk import note, only_results, stages
    from sdcli.recipe.load import read_recipe
    from sdcli.recipe.space import Tried

    names, overrides = recipe or ["default"], choices.overrides_of(given, recipe)
    space = [Tried.parse(text) for text in try_ or []]
    # What the tables alone show comes before torch is loaded.
    read_recipe(names, overrides)
    with stages(), only_results():
        from sdcli.devices import accelerator_for, keep_freed_memory
        from sdcli.run.settings import Settings
        from sdcli.run.tune import Search, begin
        from sdcli.run.tune import tune as run_trials

        settings = Settings(**choices.settings_of(given))
        folder = output or Path("runs") / f"tune-{choices.label_of(model, recipe)}"
        search = begin(Search(settings, names, overrides, space, folder, budget, not no_pruning, storage))
        keep_freed_memory(accelerator_for(device).device)
    with stopping() as told_to_stop, only_results():
        stopped = _follow(search, run_trials(search, told_to_stop))
    if stopped is not None:
        note("the search is stopped and its runs are saved; the same command continues it")
        raise typer.Exit(128 + stopped.signal)

    _show(search, import_ or [], as_json)


def _follow(search: Search, events: Iterable[Event]) -> Stopped | None:
    """Shows the trials as they begin and end."""
    from rich.progress import BarColumn, Progress, TextColumn

    from sdcli.cli.talk import is_watched, message, note, talk
    from sdcli.run.events import Epoch, Step, Stopped
    from sdcli.run.tune import Began, Ended

    message(("search", "bold"), f" of {counted(search.budget, 'trial')}; folder: {search.output}")
    seen: set[str] = set()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), console=talk(), transient=True, disable=not is_watched()
    ) as bar:
        task = bar.add_task("", total=None)
        for event in events:
            if isinstance(event, Stopped):
                return event
            if isinstance(event, Began):
                trial, epochs = event.trial, event.epochs
                for text in event.notes:
                    if text not in seen:
                        note(text)
                seen.update(event.notes)
                values = ", ".join(f"{key} = {write_value(value)}" for key, value in trial.values.items())
                resumed = (event.epoch, event.update) != (1, 0)
                where = f"; resumed in epoch {event.epoch} after update {event.update}" if resumed else ""
                message(f"trial {trial.number}: {values}{where}")
            elif isinstance(event, Ended):
                trial = event.trial
                score = f", validation top-1 {trial.top1:.2f} %" if trial.top1 is not None else ""
                why = f": {event.reason}" if event.reason else ""
                message(f"trial {trial.number}: {trial.state} after {counted(trial.epochs, 'epoch')}{score}{why}")
            elif isinstance(event, Step | Epoch):
                done = event.epoch - 1 + (event.update / event.updates if isinstance(event, Step) else 1)
                text = f"trial {trial.number}, epoch {event.epoch}/{epochs}"
                bar.update(task, description=text, total=epochs, completed=done)
    return None


def _show(search: Search, imports: list[Path], as_json: bool) -> None:
    """What the search has found, and what it has cost."""
    from sdcli.cli.plots import has_matplotlib, save_search
    from sdcli.cli.tables import search_table
    from sdcli.cli.talk import message, note, output, print_json

    found, picture = search.found(), search.output / "tune.png"
    file = search.write_best()
    drawn = has_matplotlib() and any(trial.top1 is not None for trial in found.trials)
    if drawn:
        save_search(search, found.trials, picture)
    if as_json:
        paths = {"recipe": str(file) if file else None, "plot": str(picture) if drawn else None}
        print_json(found.to_dict() | paths)
    else:
        output().print(search_table(search, found.trials))
    hours = f"{found.hours:.2f} hours" if found.hours >= 1 else f"{60 * found.hours:.1f} minutes"
    message(
        f"cost of the search: {counted(found.images, 'image')} trained on in {hours}, as much as {found.full_runs:.1f} "
        f"full runs of {counted(found.epochs, 'epoch')}"
    )
    if drawn:
        message(f"plot: {picture}")
    running = sum(trial.state == "running" for trial in found.trials)
    if running:
        note(f"{counted(running, 'trial')} of other processes not finished; the same command shows the rest afterwards")
    if file is None or found.best is None:
        note("no trial is complete: there is no best.toml")
        return
    run, using = search.folder(found.best), [f"--import {shlex.quote(str(path))}" for path in imports]
    command = f"sdcli train {search.settings.model} --dataset {shlex.quote(search.settings.dataset)} --recipe {file}"
    message(
        (f"best: trial {found.best.number}", "bold"), f" (validation top-1 {found.best.top1:.2f} %); recipe: {file}"
    )
    # A trial of another machine has its run there.
    message("next: ", (f"sdcli eval {run}" if run.is_dir() else " ".join([command, *using]), "bold"))
