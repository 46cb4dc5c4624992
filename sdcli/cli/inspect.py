"""`sdcli inspect`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import filter as matching
from typing import Annotated, Any, Literal

import typer

from sdcli.cli.usage import Command
from sdcli.errors import UserError, did_you_mean

EPILOG = """
Example:  sdcli inspect resnet18 --image-size 32 --num-classes 100

Example:  sdcli inspect 'convnext*' --sort macs
"""

Sort = Literal["model", "family", "params", "macs", "size", "stages"]
SORT_KEYS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "model": lambda row: 0,  # timm lists them in natural order: resnet18 before resnet101
    "family": lambda row: row["family"],
    "params": lambda row: row["params"],
    "macs": lambda row: row["macs"],
    "size": lambda row: row["input_size"][1:],
    "stages": lambda row: len(row["stages"]),
}

LARGEST_IMAGE = 4096
"""Of `--image-size`: the maps of larger images fit into no memory."""

MOST_CLASSES = 100_000


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("inspect", cls=Command, epilog=EPILOG)(inspect)


def inspect(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A timm model, such as resnet101, or a pattern for several: 'convnext*'."),
    ],
    exits: Annotated[
        str | None,
        typer.Option(
            metavar="EXITS",
            help="auto, none, a number (with the final exit), or the modules to tap: blocks.3,blocks.7.",
        ),
    ] = None,
    head: Annotated[
        str, typer.Option(metavar="NAME", help="The head of each exit: auto, or one of sdcli recipes heads.")
    ] = "auto",
    image_size: Annotated[
        int | None,
        typer.Option(min=1, max=LARGEST_IMAGE, metavar="PIXELS", help="Input height and width. [default: the model's]"),
    ] = None,
    num_classes: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_CLASSES, metavar="N", help="Number of classes. [default: the model's]"),
    ] = None,
    stem: Annotated[
        str,
        typer.Option(metavar="NAME", help="auto, imagenet or cifar; cifar keeps the resolution of small images."),
    ] = "auto",
    sort: Annotated[Sort | None, typer.Option(help="Sort the models of a pattern, smallest first.")] = None,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")] = False,
) -> None:
    """Show the exits of a model and what each costs; for a pattern, one row per model.

    Nothing is downloaded: a model is built without weights, and one forward pass is traced. Parameters and MACs are
    counted for one image, from the input up to each stage; the head comes on top, and the share includes it.
    """
    from sdcli.cli.talk import note, only_results, output, print_json, stages

    is_pattern = bool(set(model) & set("*?["))
    if sort is not None and not is_pattern:
        raise UserError(
            f"--sort {sort} without effect: '{model}' is one model", "a pattern", f"sdcli inspect '{model}*'"
        )
    wanted = parse_exits(exits)
    classes = [str(number) for number in range(num_classes)] if num_classes else None
    shown: list[dict[str, Any]] = []
    refused: list[tuple[str, UserError]] = []
    with stages(plain=False), only_results():
        from sdcli.cli.tables import inspect_table, models_table
        from sdcli.network.blueprint import Blueprint
        from sdcli.network.heads import find_head
        from sdcli.recipe.schema import Network

        if head not in ("auto", "none"):
            find_head(head, "--head")
        # Not validated as a recipe's table is: what builds the network says what is wrong with an option.
        table = Network.model_construct(exits=wanted, head=head, stem=stem)

        def describe(name: str) -> dict[str, Any]:
            blueprint = Blueprint.draft(table, name, classes, image_size=image_size)
            return {**blueprint.summary(), "family": blueprint.architecture.family}

        if not is_pattern:
            shown = [describe(model)]
        else:
            with _progress(_names(model)) as names:
                for name in names:
                    try:
                        shown.append(describe(name))
                    except UserError as error:
                        refused.append((name, error))
            if not shown:
                raise refused[0][1]
            shown.sort(key=SORT_KEYS[sort or "model"])
    console = output()
    if as_json:
        print_json(shown if is_pattern else shown[0])
    elif is_pattern:
        console.print(models_table(shown, console))
    else:
        console.print(inspect_table(shown[0], console))
        for text in shown[0]["notes"]:
            note(text)
    for name, refusal in refused:
        note(f"{name} is left out: {refusal.wrong}" + (f" ({refusal.fix})" if refusal.fix else ""))


def _names(pattern: str) -> list[str]:
    """timm's models and those of the zoo that match, in natural order; raises UserError where none does."""
    from sdcli.network.backbones import models

    known = models().list_models()
    if names := matching(known, pattern):
        return names
    near = did_you_mean(pattern.strip("*?"), {name.split("_")[0] for name in known})
    raise UserError(f"no model matches '{pattern}'", "a pattern of timm's names, such as 'resnet*'", near)


@contextmanager
def _progress(names: Sequence[str]) -> Iterator[Iterator[str]]:
    """The names one by one, with a bar on a terminal: each takes half a second."""
    from rich.progress import track

    from sdcli.cli.talk import end_stage, is_watched, talk

    end_stage()
    yield iter(track(names, "inspecting", console=talk(), transient=True, disable=not is_watched()))


def parse_exits(text: str | None) -> Literal["auto", "none"] | int | list[str]:
    """`--exits` as a recipe has it: a number, a list of modules, `auto` or `none`."""
    if text is None or text == "auto":
        return "auto"
    if text == "none":
        return "none"
    if text.isdigit() and int(text) > 0:
        return int(text)
    modules = [part.strip() for part in text.split(",") if part.strip()]
    if not modules or text.isdigit():
        raise UserError(f"--exits {text!r}", "auto, none, a number of 1 or more, or modules to tap: blocks.3,blocks.7")
    return modules
