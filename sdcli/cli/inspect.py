"""`sdcli inspect`."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

EPILOG = "Example:  sdcli inspect resnet18 --image-size 32 --num-classes 100"


DEFAULT_CLASSES = 1000
"""Of the heads on a model that has no classifier of its own."""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("inspect", epilog=EPILOG)(inspect)


def inspect(
    model: Annotated[str, typer.Argument(help="A timm model, such as resnet101 or vit_small_patch16_224.")],
    exits: Annotated[
        str | None,
        typer.Option(help="How many exits, the final one included; or modules to tap, such as blocks.3,blocks.7."),
    ] = None,
    head: Annotated[
        str, typer.Option(help="What each exit's head is: auto, bottleneck, sepconv, linear, tokens, …")
    ] = "auto",
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Input height and width [default: the model's own].")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Classes of the classifiers [default: the model's own].")
    ] = None,
    stem: Annotated[str, typer.Option(help="auto, imagenet or cifar: what small images get.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show where a model can be cut into exits, and what each costs.

    Builds the model without weights or memory (on torch's meta device) and traces one forward pass. Parameters and MACs
    are counted from the input up to each stage, for one image; a head's own come on top.
    """
    from sdcli.backbones import resolve
    from sdcli.cli.tables import inspect_table
    from sdcli.cli.talk import note, output
    from sdcli.exits import choose_heads, plan_json
    from sdcli.networks import plan_network
    from sdcli.recipe import Network

    architecture = resolve(model, num_classes=num_classes, image_size=image_size, stem=stem)
    plan = plan_network(Network(exits=parse_exits(exits)), architecture)
    shown = plan_json(plan, choose_heads(plan, head), num_classes or architecture.num_classes or DEFAULT_CLASSES)
    shown["notes"] = [*architecture.notes, *plan.notes]
    if as_json:
        typer.echo(json.dumps(shown, indent=2))
        return
    console = output()
    console.print(inspect_table(shown, console))
    for text in shown["notes"]:
        note(text)


def parse_exits(text: str | None) -> Literal["auto", "none"] | int | list[str]:
    """`--exits` as a recipe has it: a number, a list of modules, `auto` or `none`."""
    if text is None or text == "auto":
        return "auto"
    if text == "none":
        return "none"
    if text.isdigit():
        return int(text)
    return [part.strip() for part in text.split(",") if part.strip()]
