"""`sdcli train`."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from sdcli.cli import choices
from sdcli.cli.stopping import stopping
from sdcli.cli.usage import Command, misplaced
from sdcli.errors import UserError

if TYPE_CHECKING:
    from sdcli.recipe.merge import Override
    from sdcli.recipe.schema import Recipe
    from sdcli.run.events import Stopped

EPILOG = """
Example:  sdcli train resnet18 --dataset digits --recipe quick -o runs/first

Example:  sdcli train --resume runs/first
"""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("train", cls=Command, epilog=EPILOG)(train)


def train(
    ctx: typer.Context,
    model: choices.Model = None,
    dataset: choices.Dataset = None,
    recipe: choices.Recipe = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="A new folder for the run. [default: runs/TIME-MODEL-RECIPE]"
        ),
    ] = None,
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
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Resume the run in this folder; auto: resume the run in --output, or start it.",
            rich_help_panel=choices.RUN,
        ),
    ] = None,
    save_every: choices.SaveEvery = None,
    keep_every: choices.KeepEvery = None,
    seed: choices.Seed = 42,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Train this many runs in turn, with seeds from --seed on and the same split, as OUTPUT/seed42, …",
            rich_help_panel=choices.RUN,
        ),
    ] = None,
    track: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Log to tensorboard, trackio, wandb or mlflow as well.", rich_help_panel=choices.RUN
        ),
    ] = None,
    device: choices.Device = None,
    precision: choices.Precision = "fp32",
    compile_: choices.Compile = False,
    memory_format: choices.MemoryFormat = "auto",
    grad_accum_steps: choices.GradAccumSteps = 1,
    grad_checkpointing: choices.GradCheckpointing = False,
) -> None:
    """Train a model and its exits.

    If the data set has no validation split, a tenth of the training images is held out to choose the best epoch. The
    test split is left for sdcli eval. Ctrl-C saves the state of the run before it stops.
    """
    given = dict(locals())
    if model is not None and (error := misplaced(model, ctx.command, "sdcli train")):
        raise error
    chosen = choices.settings_of(given)
    typed = {name for name in chosen if _was_given(ctx, choices.PARAMETERS.get(name, name))}
    if seeds is not None and seed + seeds - 1 > choices.LARGEST_SEED:
        raise UserError(
            f"--seed {seed} --seeds {seeds} ends at seed {seed + seeds - 1}", f"seeds up to {choices.LARGEST_SEED}"
        )
    if seeds is not None and resume not in (None, "auto"):
        raise UserError("--seeds and --resume RUN exclude each other", "--resume auto, which resumes each of the runs")
    to_resume = None if seeds else _run_to_resume(resume, output)

    from sdcli.recipe.load import read_recipe

    overrides = choices.overrides_of(given, recipe)
    whole, origins = read_recipe(recipe or ["default"], overrides) if recipe or not to_resume else (None, {})
    folder = to_resume or output
    if folder is None:
        model, _ = choices.model_and_dataset(given, "sdcli train resnet18 --dataset cifar100")
        folder = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{choices.label_of(model, recipe)}"
    if not to_resume:
        choices.model_and_dataset(given, "sdcli train resnet18 --dataset cifar100")
    changed = {name: chosen[name] for name in typed}
    asked = Asked(chosen, changed, whole, origins, overrides, choices.recipe_label(recipe, overrides))
    if seeds is None:
        stopped = _train(asked, folder, resumes=to_resume is not None)
    else:
        stopped = _train_seeds(asked, folder, range(seed, seed + seeds), resumes=resume == "auto")
    if stopped is not None:
        raise typer.Exit(128 + stopped.signal)


class Asked(NamedTuple):
    """What the command line asks for."""

    settings: dict[str, Any]
    typed: dict[str, Any]
    """Those settings that were given."""
    recipe: Recipe | None
    """None: that of the run which is resumed."""
    origins: dict[str, str]
    overrides: list[Override]
    label: str


def _train(asked: Asked, folder: Path, *, resumes: bool) -> Stopped | None:
    """Trains one run to its end; returns how it was stopped."""
    from sdcli.cli.talk import only_results, stages
    from sdcli.recipe.explain import blaming

    with stages(), only_results():
        from sdcli.cli.progress import follow
        from sdcli.devices import keep_freed_memory
        from sdcli.run.prepare import prepare
        from sdcli.run.resume import resume as resume_run
        from sdcli.run.resume import resumed
        from sdcli.run.settings import Settings
        from sdcli.run.train import fit

        if resumes:
            settings, loaded = resumed(folder, asked.typed, asked.recipe, asked.overrides)
            training = resume_run(folder, settings, loaded)
        else:
            assert asked.recipe is not None
            with blaming(asked.origins):
                training = prepare(Settings(**asked.settings, label=asked.label), asked.recipe, folder)
        keep_freed_memory(training.accelerator.device)
    with stopping() as told_to_stop:
        return follow(training, fit(training, told_to_stop))


def _train_seeds(asked: Asked, folder: Path, seeds: Sequence[int], *, resumes: bool) -> Stopped | None:
    """Trains a run for each seed, in folders of their own; those that are finished are left as they are."""
    from sdcli.cli.talk import message

    if (folder / "run.json").exists():
        raise UserError(
            f"output '{folder}' is a run itself",
            "a folder for the runs of --seeds, each in a folder of its own",
            f"--output {folder}-seeds",
        )
    if not resumes and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"output '{folder}' is not an empty folder",
            "a new or empty folder",
            "--resume auto, if it holds these runs: finished ones are kept, others are resumed or started",
        )
    for number, seed in enumerate(seeds, start=1):
        run = folder / f"seed{seed}"
        own = asked._replace(settings={**asked.settings, "seed": seed}, typed={**asked.typed, "seed": seed})
        if resumes and (run / "report.json").exists() and not _wants_more(own, run):
            continue
        message(f"run {number} of {len(seeds)}: seed {seed}")
        stopped = _train(own, run, resumes=resumes and (run / "state" / "last.pt").exists())
        if stopped is not None:
            message("the same command with --resume auto continues with these runs")
            return stopped
    message("next: ", (f"sdcli compare {shlex.quote(str(folder))}", "bold"))
    return None


def _wants_more(asked: Asked, run: Path) -> bool:
    """Whether a finished run has fewer epochs than are asked for now; raises UserError for a different run."""
    from sdcli.run.folder import read_log
    from sdcli.run.resume import read_state, resumed

    settings, recipe = resumed(run, asked.typed, asked.recipe, asked.overrides)
    if (run / "state" / "last.pt").exists():
        read_state(run, settings, recipe)
    return sum(recipe.phase_epochs) > len(read_log(run))


def _was_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _run_to_resume(resume: str | None, output: Path | None) -> Path | None:
    """The folder of the run to resume; None where a new one starts."""
    if resume is None:
        return None
    if resume != "auto":
        if output is not None and output != Path(resume):
            raise UserError("--resume RUN and --output exclude each other", "one of them: a run stays in its folder")
        return Path(resume)
    if output is None:
        raise UserError("--resume auto needs the folder of the run", "--output RUN", "--resume auto --output runs/mine")
    return output if (output / "state" / "last.pt").exists() else None
