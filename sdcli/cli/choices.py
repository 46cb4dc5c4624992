"""The options of a training run, for the commands that start one, and what they choose."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from sdcli.cli.inspect import LARGEST_IMAGE, parse_exits
from sdcli.cli.recipes import overrides
from sdcli.errors import UserError
from sdcli.extensions import find_imports

if TYPE_CHECKING:
    from sdcli.recipe.merge import Override

RECIPE, MODEL, DATA, RUN, SPEED = "Recipe", "Model", "Data", "Run", "Speed and memory"

Model: TypeAlias = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A timm model, such as resnet18.", show_default=False)
]
Dataset: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="digits, cifar10, cifar100, a data set of the Hugging Face hub (OWNER/NAME), or a local folder: one "
        "folder per class, or parquet files.",
        show_default=False,
    ),
]
Recipe: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A recipe's name (sdcli recipes list) or .toml file; each further one refines those before it. "
        "[default: default]",
    ),
]
Epochs: TypeAlias = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Short for --set epochs=N.", rich_help_panel=RECIPE)
]
BatchSize: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--batch-size", "-b", min=1, metavar="N", help="Short for --set batch.size=N.", rich_help_panel=RECIPE
    ),
]
LearningRate: TypeAlias = Annotated[
    float | None, typer.Option(metavar="RATE", help="Short for --set optimizer.lr=RATE.", rich_help_panel=RECIPE)
]
Set: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change any value of the recipe, such as losses.soft.weight=0.5; repeatable.",
        rich_help_panel=RECIPE,
    ),
]
Unset: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        help="Remove a table or value of the recipe, such as losses.hint; repeatable.",
        rich_help_panel=RECIPE,
    ),
]
Import: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option(
        "--import", metavar="FILE.py", help="A file with your losses and heads; repeatable.", rich_help_panel=RECIPE
    ),
]
Pretrained: TypeAlias = Annotated[
    bool,
    typer.Option("--pretrained", metavar="", help="Start from timm's pretrained weights.", rich_help_panel=MODEL),
]
Weights: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Start from a run or a .safetensors file, of sdcli or of timm, with its preprocessing.",
        rich_help_panel=MODEL,
    ),
]
Teacher: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="RUN",
        help="The network that teaches, in recipes with one: a run, a checkpoint, or a timm model with pretrained "
        "weights.",
        rich_help_panel=MODEL,
    ),
]
Exits: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="EXITS",
        help="auto, none, a number (with the final exit), or the modules to tap: blocks.3,blocks.7.",
        rich_help_panel=MODEL,
    ),
]
Head: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="The head of each exit: auto, or one of sdcli recipes heads.", rich_help_panel=MODEL
    ),
]
Stem: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="auto, imagenet or cifar; cifar keeps the resolution of small images.",
        rich_help_panel=MODEL,
    ),
]
ImageSize: TypeAlias = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=LARGEST_IMAGE,
        metavar="PIXELS",
        help="Input height and width. [default: that of the weights, or of images up to 96 pixels, else the model's]",
        rich_help_panel=MODEL,
    ),
]
ImageKey: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN", help="The column of images. [default: found by type and name]", rich_help_panel=DATA
    ),
]
LabelKey: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN", help="The column of labels. [default: found by type and name]", rich_help_panel=DATA
    ),
]
ValFraction: TypeAlias = Annotated[
    float,
    typer.Option(
        min=0,
        max=0.9,
        metavar="FRACTION",
        help="Fraction of the training split to hold out for validation if there is no validation split; 0: none.",
        rich_help_panel=DATA,
    ),
]
LimitTrain: TypeAlias = Annotated[
    int | None,
    typer.Option(min=1, metavar="IMAGES", help="Train on this many images only.", rich_help_panel=DATA),
]
LimitVal: TypeAlias = Annotated[
    int | None,
    typer.Option(min=1, metavar="IMAGES", help="Validate on this many images only.", rich_help_panel=DATA),
]
Workers: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--workers",
        "-j",
        min=0,
        metavar="N",
        help="Processes that load images. [default: chosen by image size and device]",
        rich_help_panel=DATA,
    ),
]
SaveEvery: TypeAlias = Annotated[
    int | None,
    typer.Option(min=1, metavar="UPDATES", help="Save the state after this many updates too.", rich_help_panel=RUN),
]
KeepEvery: TypeAlias = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="EPOCHS", help="Keep the checkpoint of every Nth epoch too, as epochN.", rich_help_panel=RUN
    ),
]
LARGEST_SEED = 2**31 - 1
Seed: TypeAlias = Annotated[
    int,
    typer.Option(
        min=0,
        max=LARGEST_SEED,
        metavar="N",
        help="Seed of the weights, the order of the images and their augmentation.",
        rich_help_panel=RUN,
    ),
]
SplitSeed: TypeAlias = Annotated[
    int,
    typer.Option(
        min=0,
        max=2**31 - 1,
        metavar="N",
        help="Seed of the choice of images: those held out for validation, and those of a limit.",
        rich_help_panel=DATA,
    ),
]
Device: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="cpu, cuda, cuda:1, mps. [default: the fastest available]", rich_help_panel=SPEED
    ),
]
Precision: TypeAlias = Annotated[
    Literal["fp32", "bf16", "fp16"],
    typer.Option(help="Precision of the networks; losses are always fp32.", rich_help_panel=SPEED),
]
Compile: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--compile", metavar="", help="Compile networks and losses with torch.compile.", rich_help_panel=SPEED
    ),
]
MemoryFormat: TypeAlias = Annotated[
    Literal["auto", "contiguous", "channels-last"],
    typer.Option(
        help="How maps lie in memory; auto: channels-last on a CPU for networks of convolutions.",
        rich_help_panel=SPEED,
    ),
]
GradAccumSteps: TypeAlias = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Split each batch into this many micro-batches to save memory.",
        rich_help_panel=SPEED,
    ),
]
GradCheckpointing: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--grad-checkpointing",
        metavar="",
        help="Compute activations twice instead of keeping them, to save memory.",
        rich_help_panel=SPEED,
    ),
]

SETTINGS = (
    "model", "dataset", "image_key", "label_key", "image_size", "val_fraction", "limit_train", "limit_val",
    "split_seed", "seed", "device", "workers", "precision", "compile", "memory_format", "grad_checkpointing",
    "grad_accum_steps", "save_every", "keep_every", "track", "imports",
)  # fmt: skip
PARAMETERS = {"compile": "compile_", "imports": "import_"}
"""The parameters of the commands that are not called like their setting."""


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run by name; `given` are a command's parameters, which may lack some."""
    chosen = {name: given[at] for name in SETTINGS if (at := PARAMETERS.get(name, name)) in given}
    return chosen | {"imports": find_imports(given["import_"] or [])}


def overrides_of(given: Mapping[str, Any], names: Sequence[str] | None) -> list[Override]:
    """What the options change in the recipe of these names: `--set`, `--unset`, and those that are short for a key."""
    from sdcli.recipe.merge import Override

    if given["pretrained"] and given["weights"]:
        raise UserError("--pretrained and --weights exclude each other", "one of them")
    short = {
        "--epochs": ("epochs", given["epochs"]),
        "--batch-size": ("batch.size", given["batch_size"]),
        "--lr": ("optimizer.lr", given["lr"]),
        "--head": ("networks.student.head", given["head"]),
        "--stem": ("networks.student.stem", given["stem"]),
        "--weights": ("networks.student.weights", given["weights"] and _weights_file(given["weights"])),
        "--exits": ("networks.student.exits", given["exits"] and parse_exits(given["exits"])),
    }
    found = overrides(given["set_"], given["unset"])
    for flag, (key, value) in short.items():
        if twice := [own for own in found if own.key == key and value is not None]:
            raise UserError(f"{twice[0].source} and {flag} are about the same key, {key}", "one of them")
    found += [
        Override(key, value, f"{flag} {_shown(value)}") for flag, (key, value) in short.items() if value is not None
    ]
    if given["pretrained"]:
        found.append(Override("networks.student.weights", "pretrained", "--pretrained"))
    if given["teacher"]:
        found += _teacher(given["teacher"], names, found)
    return found


def _teacher(named: str, names: Sequence[str] | None, others: list[Override]) -> list[Override]:
    """What `--teacher` changes: a path names weights, any other word a model of timm, pretrained unless the recipe
    trains it. Raises UserError for a recipe without a teacher."""
    from sdcli.recipe.load import read_recipe
    from sdcli.recipe.merge import Override

    source = f"--teacher {Path(named).name}"
    recipe = read_recipe(names or ["default"], others)[0]
    table = recipe.others.get("teacher")
    if table is None:
        raise UserError(
            f"{source}: this recipe has no network 'teacher'",
            "a recipe in which a trained network teaches; `sdcli recipes list` has a group of them",
            "--recipe kd",
        )
    trained_here = table.learns and table.trains == "all"
    # Names of timm have dots too: resnet18.a1_in1k.
    if os.path.exists(named) or set("/~") & set(named) or named.endswith((".safetensors", ".pth", ".pt", ".bin")):
        if trained_here:
            raise UserError(
                f"{source}: this recipe trains its teacher itself",
                "the name of the teacher's model",
                "--teacher MODEL, or a recipe for a trained teacher: --recipe kd",
            )
        return [Override("networks.teacher.weights", _weights_file(Path(named)), source)]
    model = Override("networks.teacher.model", named, source)
    return [model] if trained_here else [model, Override("networks.teacher.weights", "pretrained", source)]


def _weights_file(path: Path) -> str:
    """A file of weights as a recipe names it; of a run folder its best checkpoint, else the last."""
    from sdcli.network.checkpoint import find_checkpoint
    from sdcli.recipe.schema import weights_file

    # Not Path.is_dir, which raises for a name that is too long.
    file = find_checkpoint(path) if os.path.isdir(path) else path
    return weights_file(file)


def model_and_dataset(given: Mapping[str, Any], example: str) -> tuple[str, str]:
    """What every run needs; raises UserError where it is missing."""
    for name, what in (("model", "MODEL"), ("dataset", "--dataset")):
        if given[name] is None:
            raise UserError(f"{what} is missing", "a model and a data set", example)
    return given["model"], given["dataset"]


def recipe_label(names: list[str] | None, overrides: Sequence[Override]) -> str:
    """What tables call a recipe: its title where `--set title=` gives one, else its names and what options change.

    Left out is what is not a matter of the method: the number of epochs, and keys of the model.
    """
    for override in overrides:
        if override.key == "title" and isinstance(override.value, str):
            return override.value
    own = [o for o in overrides if o.key not in ("epochs", "networks.student.weights", "networks.student.stem")]
    changed = [re.sub(r"^--set ", "", o.source) for o in own if not o.key.startswith("networks.student.model_args")]
    return ", ".join(
        [" + ".join(Path(name).stem if name.endswith(".toml") else name for name in names or ["default"]), *changed]
    )


def label_of(model: str, recipes: list[str] | None) -> str:
    """Model and recipe in the name of a folder."""
    return f"{model.replace('/', '_')}-{Path((recipes or ['default'])[-1]).stem}"


def _shown(value: Any) -> str:
    """An option's value as it is typed."""
    return ",".join(value) if isinstance(value, list) else str(value)
