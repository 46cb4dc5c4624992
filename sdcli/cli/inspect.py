"""`sdcli inspect`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import filter as matching
from typing import Annotated, Any, Literal

import typer

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


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("inspect", epilog=EPILOG)(inspect)


def inspect(
    model: Annotated[
        str,
        typer.Argument(help="A timm model, such as resnet101 or vit_small_patch16_224; or a pattern: 'convnext*'."),
    ],
    exits: Annotated[
        str | None,
        typer.Option(help="auto, none, how many with the final one, or modules: blocks.3,blocks.7."),
    ] = None,
    head: Annotated[
        str, typer.Option(help="What each exit's head is: auto, bottleneck, sepconv, linear, tokens, …")
    ] = "auto",
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Input height and width. [default: the model's own]")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Classes of the classifiers. [default: the model's own]")
    ] = None,
    stem: Annotated[str, typer.Option(help="auto, imagenet or cifar: what small images get.")] = "auto",
    sort: Annotated[Sort | None, typer.Option(help="Order of a pattern's models, the least first.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show where a model can be cut into exits, and what each costs; of a pattern's models, one row each.

    Builds each model without weights or memory (on torch's meta device) and traces one forward pass. Parameters and
    MACs are counted from the input up to each stage, for one image; a head's own come on top.
    """
    from sdcli.cli.tables import inspect_table, models_table
    from sdcli.cli.talk import note, output
    from sdcli.network.blueprint import Blueprint
    from sdcli.network.heads import HEADS
    from sdcli.recipe.schema import Network

    if head not in ("auto", "none"):
        HEADS.find(head, "--head")
    # Not validated as a recipe's table is: what builds the network says what is wrong with an option.
    table = Network.model_construct(exits=parse_exits(exits), head=head, stem=stem)
    classes = [str(number) for number in range(num_classes)] if num_classes else None

    def describe(name: str) -> dict[str, Any]:
        blueprint = Blueprint.draft(table, name, classes, image_size=image_size)
        return {**blueprint.summary(), "family": blueprint.architecture.family}

    console = output()
    if not set(model) & set("*?["):
        if sort is not None:
            raise UserError(
                f"--sort {sort} without effect: '{model}' is one model", "a pattern", f"sdcli inspect '{model}*'"
            )
        shown = describe(model)
        if as_json:
            typer.echo(json.dumps(shown, indent=2))
            return
        console.print(inspect_table(shown, console))
        for text in shown["notes"]:
            note(text)
        return

    rows, refused = [], []
    with _progress(_names(model)) as names:
        for name in names:
            try:
                rows.append(describe(name))
            except UserError as error:
                refused.append((name, error))
    if not rows:
        raise refused[0][1]
    rows.sort(key=SORT_KEYS[sort or "model"])
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        console.print(models_table(rows, console))
    for name, refusal in refused:
        note(f"{name} is left out: {refusal.wrong}" + (f" ({refusal.fix})" if refusal.fix else ""))


def _names(pattern: str) -> list[str]:
    """timm's models that match, in natural order; raises UserError where none does."""
    import timm

    known = timm.list_models()
    if names := matching(known, pattern):
        return names
    near = did_you_mean(pattern.strip("*?"), {name.split("_")[0] for name in known})
    raise UserError(f"no model matches '{pattern}'", "a pattern of timm's names, such as 'resnet*'", near)


@contextmanager
def _progress(names: Sequence[str]) -> Iterator[Iterator[str]]:
    """The names one by one, with a bar on a terminal: half a second each."""
    from rich.progress import track

    from sdcli.cli.talk import talk

    console = talk()
    yield iter(track(names, "inspecting", console=console, transient=True, disable=not console.is_terminal))


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
        raise UserError(f"--exits {text!r}", "how many, 1 or more; modules to tap, separated by commas; auto or none")
    return modules
