"""`sdcli train`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sdcli.cli.inspect import parse_exits
from sdcli.errors import UserError

EPILOG = "Example:  sdcli train resnet18 --dataset digits --recipe quick --output runs/first"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("train", epilog=EPILOG)(train)


RECIPE, MODEL, DATA, RUN = "Recipe", "Model", "Data", "Run"


def train(
    model: Annotated[str, typer.Argument(help="A timm model, such as resnet18.")],
    dataset: Annotated[
        str,
        typer.Option(
            help="digits, cifar10, cifar100, a hub id (owner/name), or a folder: parquet, or one folder per class.",
            rich_help_panel=DATA,
        ),
    ],
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help="A recipe's name or file; several refine each other from left to right. [default: default]",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change any value: losses.soft.weight=0.5", rich_help_panel=RECIPE
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Short for --set epochs=N.", rich_help_panel=RECIPE)] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "-b", min=1, help="Short for --set batch.size=N.", rich_help_panel=RECIPE),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Short for --set optimizer.lr=X.", rich_help_panel=RECIPE)] = None,
    exits: Annotated[
        str | None,
        typer.Option(
            help="auto, none, how many with the final one, or modules: blocks.3,blocks.7.", rich_help_panel=MODEL
        ),
    ] = None,
    stem: Annotated[
        str | None,
        typer.Option(help="auto, imagenet or cifar; cifar keeps small images' resolution.", rich_help_panel=MODEL),
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from timm's pretrained weights.", rich_help_panel=MODEL)
    ] = False,
    weights: Annotated[
        Path | None, typer.Option(help="Start from a .safetensors file, ours or timm's.", rich_help_panel=MODEL)
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Input height and width. [default: the data's, or the pretrained model's]",
            rich_help_panel=MODEL,
        ),
    ] = None,
    image_key: Annotated[
        str | None, typer.Option(help="The column of images. [default: found]", rich_help_panel=DATA)
    ] = None,
    label_key: Annotated[
        str | None, typer.Option(help="The column of labels. [default: found]", rich_help_panel=DATA)
    ] = None,
    val_fraction: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.9,
            help="Share of train held out where there is no validation split; 0 trains on everything.",
            rich_help_panel=DATA,
        ),
    ] = 0.1,
    limit_train: Annotated[
        int | None, typer.Option(min=1, help="Use this many training images.", rich_help_panel=DATA)
    ] = None,
    limit_val: Annotated[
        int | None, typer.Option(min=1, help="Use this many validation images.", rich_help_panel=DATA)
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", "-j", min=0, help="Processes that load images. [default: what suits]", rich_help_panel=DATA
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The run folder. [default: runs/TIME-MODEL-RECIPE]", rich_help_panel=RUN),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and augmentation.", rich_help_panel=RUN)] = 42,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, mps, … [default: the best there is]", rich_help_panel=RUN),
    ] = None,
) -> None:
    """Train a model and its exits by a recipe.

    Where the data have no validation split, a tenth of the training images is held out to choose the best epoch by; the
    test split is left for `sdcli eval`.
    """
    from sdcli.recipe import load_recipe

    names = recipe or ["default"]
    overrides = list(set_ or [])
    if pretrained and weights:
        raise UserError("--pretrained and --weights exclude each other", "one of them")
    short = {"epochs": epochs, "batch.size": batch_size, "optimizer.lr": lr, "networks.student.stem": stem}
    short |= {"networks.student.weights": "pretrained" if pretrained else (str(weights) if weights else None)}
    chosen = [f"{key}={_toml(value)}" for key, value in short.items() if value is not None]
    if exits is not None:
        chosen.append(f"networks.student.exits={_toml(parse_exits(exits))}")
    loaded = load_recipe(names, [*overrides, *chosen])
    label = Path(names[-1]).stem
    folder = output or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{model.replace('/', '_')}-{label}"

    from sdcli.cli.progress import follow
    from sdcli.train import Settings, fit, prepare

    settings = Settings(
        model=model,
        dataset=dataset,
        image_key=image_key,
        label_key=label_key,
        image_size=image_size,
        val_fraction=val_fraction,
        limit_train=limit_train,
        limit_val=limit_val,
        seed=seed,
        device=device,
        workers=workers,
    )
    training = prepare(settings, loaded, folder)
    follow(training, fit(training))


def _toml(value: Any) -> str:
    """A flag's value as `--set` reads it."""
    import json

    return json.dumps(value)
