"""`sdcli train`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sdcli.cli.inspect import LARGEST_IMAGE, parse_exits
from sdcli.cli.recipes import overrides as changes
from sdcli.cli.usage import Command, misplaced
from sdcli.errors import UserError
from sdcli.extensions import find_imports

EPILOG = """
Example:  sdcli train resnet18 --dataset digits --recipe quick -o runs/first

Example:  sdcli train --resume runs/first
"""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("train", cls=Command, epilog=EPILOG)(train)


RECIPE, MODEL, DATA, RUN, SPEED = "Recipe", "Model", "Data", "Run", "Speed and memory"


def train(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A timm model, such as resnet18.", show_default=False)
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="digits, cifar10, cifar100, a data set of the Hugging Face hub (OWNER/NAME), or a local folder: one "
            "folder per class, or parquet files.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A recipe's name (sdcli recipes list) or .toml file; each further one refines those before it. "
            "[default: default]",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="A new folder for the run. [default: runs/TIME-MODEL-RECIPE]"
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Short for --set epochs=N.", rich_help_panel=RECIPE)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", "-b", min=1, metavar="N", help="Short for --set batch.size=N.", rich_help_panel=RECIPE
        ),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(metavar="RATE", help="Short for --set optimizer.lr=RATE.", rich_help_panel=RECIPE)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change any value of the recipe, such as losses.soft.weight=0.5; repeatable.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    unset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Remove a table or value of the recipe, such as losses.hint; repeatable.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    import_: Annotated[
        list[Path] | None,
        typer.Option(
            "--import", metavar="FILE.py", help="A file with your losses and heads; repeatable.", rich_help_panel=RECIPE
        ),
    ] = None,
    pretrained: Annotated[
        bool,
        typer.Option("--pretrained", metavar="", help="Start from timm's pretrained weights.", rich_help_panel=MODEL),
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Start from a .safetensors file, a checkpoint of sdcli or of timm, with its preprocessing.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    exits: Annotated[
        str | None,
        typer.Option(
            metavar="EXITS",
            help="auto, none, a number (with the final exit), or the modules to tap: blocks.3,blocks.7.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The head of each exit: auto, or one of sdcli recipes heads.", rich_help_panel=MODEL
        ),
    ] = None,
    stem: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="auto, imagenet or cifar; cifar keeps the resolution of small images.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=LARGEST_IMAGE,
            metavar="PIXELS",
            help="Input height and width. [default: that of the weights, or of images up to 96 pixels, else the "
            "model's]",
            rich_help_panel=MODEL,
        ),
    ] = None,
    image_key: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="The column of images. [default: found by type and name]", rich_help_panel=DATA
        ),
    ] = None,
    label_key: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="The column of labels. [default: found by type and name]", rich_help_panel=DATA
        ),
    ] = None,
    val_fraction: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.9,
            metavar="FRACTION",
            help="Fraction of the training split to hold out for validation if there is no validation split; 0: none.",
            rich_help_panel=DATA,
        ),
    ] = 0.1,
    limit_train: Annotated[
        int | None,
        typer.Option(min=1, metavar="IMAGES", help="Train on this many images only.", rich_help_panel=DATA),
    ] = None,
    limit_val: Annotated[
        int | None,
        typer.Option(min=1, metavar="IMAGES", help="Validate on this many images only.", rich_help_panel=DATA),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            "-j",
            min=0,
            metavar="N",
            help="Processes that load images. [default: chosen by image size and device]",
            rich_help_panel=DATA,
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Resume the run in this folder; auto: resume the run in --output, or start it.",
            rich_help_panel=RUN,
        ),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(min=1, metavar="UPDATES", help="Save the state after this many updates too.", rich_help_panel=RUN),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=2**31 - 1,
            metavar="N",
            help="Seed of the weights, the order of the images and their augmentation.",
            rich_help_panel=RUN,
        ),
    ] = 42,
    track: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Log to tensorboard, trackio, wandb or mlflow as well.", rich_help_panel=RUN),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="cpu, cuda, cuda:1, mps. [default: the fastest available]", rich_help_panel=SPEED
        ),
    ] = None,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"],
        typer.Option(help="Precision of the networks; losses are always fp32.", rich_help_panel=SPEED),
    ] = "fp32",
    compile_: Annotated[
        bool,
        typer.Option(
            "--compile", metavar="", help="Compile networks and losses with torch.compile.", rich_help_panel=SPEED
        ),
    ] = False,
    memory_format: Annotated[
        Literal["auto", "contiguous", "channels-last"],
        typer.Option(
            help="How maps lie in memory; auto: channels-last on a CPU for networks of convolutions.",
            rich_help_panel=SPEED,
        ),
    ] = "auto",
    grad_accum_steps: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Split each batch into this many micro-batches to save memory.",
            rich_help_panel=SPEED,
        ),
    ] = 1,
    grad_checkpointing: Annotated[
        bool,
        typer.Option(
            "--grad-checkpointing",
            metavar="",
            help="Compute activations twice instead of keeping them, to save memory.",
            rich_help_panel=SPEED,
        ),
    ] = False,
) -> None:
    """Train a model and its exits.

    If the data set has no validation split, a tenth of the training images is held out to choose the best epoch. The
    test split is left for sdcli eval. Ctrl-C saves the state of the run before it stops.
    """
    if model is not None and (error := misplaced(model, ctx.command, "sdcli train")):
        raise error
    if pretrained and weights:
        raise UserError("--pretrained and --weights exclude each other", "one of them")
    short: dict[str, tuple[str, Any]] = {
        "--epochs": ("epochs", epochs),
        "--batch-size": ("batch.size", batch_size),
        "--lr": ("optimizer.lr", lr),
        "--head": ("networks.student.head", head),
        "--stem": ("networks.student.stem", stem),
        "--weights": ("networks.student.weights", weights and str(weights)),
        "--exits": ("networks.student.exits", exits and parse_exits(exits)),
    }
    chosen: dict[str, Any] = {
        "model": model,
        "dataset": dataset,
        "image_key": image_key,
        "label_key": label_key,
        "image_size": image_size,
        "val_fraction": val_fraction,
        "limit_train": limit_train,
        "limit_val": limit_val,
        "seed": seed,
        "device": device,
        "workers": workers,
        "precision": precision,
        "compile": compile_,
        "memory_format": memory_format,
        "grad_checkpointing": grad_checkpointing,
        "grad_accum_steps": grad_accum_steps,
        "save_every": save_every,
        "track": track,
        "imports": find_imports(import_ or []),
    }
    parameter = {"compile": "compile_", "imports": "import_"}
    typed = {name for name in chosen if _was_given(ctx, parameter.get(name, name))}
    to_resume = _run_to_resume(resume, output)

    from sdcli.recipe.explain import blaming
    from sdcli.recipe.load import read_recipe
    from sdcli.recipe.merge import Override

    overrides = changes(set_, unset)
    overrides += [
        Override(key, value, f"{flag} {_shown(value)}") for flag, (key, value) in short.items() if value is not None
    ]
    if pretrained:
        overrides.append(Override("networks.student.weights", "pretrained", "--pretrained"))
    whole, origins = read_recipe(recipe or ["default"], overrides) if recipe or not to_resume else (None, {})
    if not to_resume:
        if model is None or dataset is None:
            missing = "MODEL" if model is None else "--dataset"
            raise UserError(
                f"{missing} is missing", "a model and a data set", "sdcli train resnet18 --dataset cifar100"
            )
        label = Path((recipe or ["default"])[-1]).stem
        folder = output or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{model.replace('/', '_')}-{label}"

    from sdcli.cli.talk import only_results, stages

    with stages(), only_results():
        from sdcli.cli.progress import follow
        from sdcli.devices import keep_freed_memory
        from sdcli.run.prepare import prepare
        from sdcli.run.resume import resume as resume_run
        from sdcli.run.resume import resumed
        from sdcli.run.settings import Settings
        from sdcli.run.train import fit

        if to_resume:
            given = {name: chosen[name] for name in typed}
            settings, loaded = resumed(to_resume, given, whole, overrides)
            training = resume_run(to_resume, settings, loaded)
        else:
            assert whole is not None
            with blaming(origins):
                training = prepare(Settings(**chosen), whole, folder)
        keep_freed_memory(training.accelerator.device)
    with _signals() as told_to_stop:
        stopped = follow(training, fit(training, told_to_stop))
    if stopped is not None:
        raise typer.Exit(128 + stopped.signal)


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


TOGETHER_S = 1.0
"""A launcher, or timeout(1), passes a signal on that its processes have got from the terminal or as a group already."""


@contextmanager
def _signals() -> Iterator[Callable[[], int | None]]:
    """Has Ctrl-C, SIGTERM and SIGHUP (a terminal that is closed) noted, so that the run can save its state and leave.

    Only a second Ctrl-C leaves at once: the last saved state is complete, whatever it interrupts.
    """
    got: list[tuple[int, float]] = []

    def note(number: int, frame: Any) -> None:
        if got and number == signal.SIGINT and time.monotonic() - got[0][1] > TOGETHER_S:
            _leave()
        if not got and number == signal.SIGINT and os.isatty(2):
            _write(b"\nstopping after this update, to save the state; Ctrl-C again stops at once\n")
        got.append((number, time.monotonic()))

    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # nohup has SIGHUP ignored.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        former[signal.SIGHUP] = signal.getsignal(signal.SIGHUP)
    for number in former:
        signal.signal(number, note)
    try:
        yield lambda: got[0][0] if got else None
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _leave() -> None:
    """Ends this process and its workers without unwinding, which libraries may delay or turn into an error."""
    for child in multiprocessing.active_children():
        child.kill()
    # Progress on a terminal hides the cursor.
    _write(b"\x1b[?25h\nstopped\n" if os.isatty(2) else b"stopped\n")
    os._exit(128 + signal.SIGINT)


def _write(message: bytes) -> None:
    """Writes to standard error from within a signal handler, which may have interrupted any writer."""
    with suppress(OSError):
        os.write(2, message)


def _shown(value: Any) -> str:
    """An option's value as it is typed."""
    return ",".join(value) if isinstance(value, list) else str(value)
