"""`sdcli recipes`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdcli.errors import UserError, unknown

if TYPE_CHECKING:
    from sdcli.recipe.merge import Override
from sdcli.method.catalogue import SHELVES, Shelf, completed

COPY = "Example:  sdcli recipes copy byot mine.toml"
CHECK = "Example:  sdcli recipes check mine.toml --model resnet18"
EPILOG = f"""
Example:  sdcli recipes show byot

{COPY}

{CHECK}
"""
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change any value: losses.soft.weight=0.5")
]
Unset = Annotated[list[str] | None, typer.Option("--unset", metavar="KEY", help="Remove a table or value: losses.hint")]
Import = Annotated[
    list[Path] | None, typer.Option("--import", metavar="FILE.py", help="Your own losses and heads; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    recipes = typer.Typer(
        no_args_is_help=True, help="List, show, copy, check and compare recipes, and what they may name.", epilog=EPILOG
    )
    recipes.command("list", epilog="Example:  sdcli recipes list")(list_)
    recipes.command("show", epilog="Example:  sdcli recipes show byot --set epochs=30")(show)
    recipes.command("copy", epilog=COPY)(copy)
    recipes.command("check", epilog=CHECK)(check)
    recipes.command("diff", epilog="Example:  sdcli recipes diff byot byot-scan")(diff)
    for name, shelf in SHELVES.items():
        example = f"Example:  sdcli recipes {name}" + ("\n\nExample:  sdcli recipes losses kl" * (name == "losses"))
        recipes.command(name, help=shelf.help, epilog=example)(_printing(name, shelf))
    app.add_typer(recipes, name="recipes")


def list_(as_json: Json = False) -> None:
    """List the recipes: title, paper, what each needs beyond one network, and what has been measured."""
    from sdcli.cli.tables import recipes_table
    from sdcli.cli.talk import output
    from sdcli.recipe.about import overview
    from sdcli.recipe.load import recipe_names

    recipes = [overview(name) for name in recipe_names()]
    if as_json:
        typer.echo(json.dumps([recipe.to_dict() for recipe in recipes], indent=2))
        return
    console = output()
    console.print(recipes_table(recipes, console))


def show(
    names: Annotated[
        list[str], typer.Argument(help="Recipes' names or files; they refine each other.", metavar="NAME")
    ],
    set_: Set = None,
    unset: Unset = None,
    import_: Import = None,
    plain: Annotated[bool, typer.Option("--plain", help="Leave out who brought each value.")] = False,
) -> None:
    """Print a recipe with all that it extends and all defaults, as one file that --recipe takes.

    Behind each value stands who brought it: a recipe, a file, --set, or default.
    """
    from sdcli.cli.talk import output
    from sdcli.extensions import load_imports
    from sdcli.recipe import about
    from sdcli.recipe.explain import blaming
    from sdcli.recipe.load import read_recipe

    recipe, origins = read_recipe(names, overrides(set_, unset))
    load_imports(import_ or [])
    with blaming(origins):
        text = about.show(completed(recipe), origins, comments=not plain)
    console = output()
    if not console.is_terminal:
        typer.echo(text, nl=False)
        return
    from rich.syntax import Syntax

    coloured = Syntax("", "toml", theme="ansi_dark").highlight(text)
    coloured.rstrip()
    console.print(coloured, soft_wrap=True)


def copy(
    name: Annotated[str, typer.Argument(help="A recipe's name or file.")],
    file: Annotated[Path, typer.Argument(help="Where the copy goes, such as mine.toml.")],
) -> None:
    """Copy a recipe's file as it is, comments included, to change it. Never overwrites."""
    from sdcli.cli.talk import note
    from sdcli.recipe.load import copy_recipe

    copy_recipe(name, file)
    note(f"{file} is yours to change; sdcli recipes check {shlex.quote(_path(file))} tells whether it is right")


def check(
    files: Annotated[list[str], typer.Argument(help="Recipe files, or names of ours.", metavar="FILE")],
    model: Annotated[str | None, typer.Option(help="Check exits and widths with this timm model too.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Input height and width. [default: the model's own]")
    ] = None,
    set_: Set = None,
    unset: Unset = None,
    import_: Import = None,
) -> None:
    """Check recipes without data: names, keys, types, ranges; with --model its exits and widths too.

    Stops at the first mistake, with exit code 2.
    """
    from sdcli.recipe.load import read_recipe

    if image_size is not None and model is None:
        raise UserError("--image-size without effect: no --model is named", "both", "--model resnet18")
    # What the tables alone show comes before torch is loaded.
    found = []
    for file in files:
        with _in_file(file):
            found.append((file, *read_recipe([file], overrides(set_, unset))))

    from sdcli.cli.talk import note
    from sdcli.extensions import load_imports
    from sdcli.method.check import check_names, check_with_model, remarks
    from sdcli.network.backbones import resolve

    load_imports(import_ or [])
    if model is not None:
        resolve(model, num_classes=None, image_size=image_size)
    for file, recipe, origins in found:
        exits = ""
        with _in_file(file, origins):
            check_names(recipe)
            if model is not None:
                student = check_with_model(recipe, model, image_size=image_size)
                exits = f"; {model}: {', '.join(student.points)}"
        typer.echo(f"{file}: ok  {_summary(recipe)}{exits}")
        for text in remarks(recipe):
            note(f"{file}: {text}")


@contextmanager
def _in_file(file: str, origins: Mapping[str, str] | None = None) -> Iterator[None]:
    """Adds to an error the file that is checked, and the source of the value where that is another."""
    from sdcli.recipe.explain import blaming

    try:
        with blaming(origins or {}):
            yield
    except UserError as error:
        if file in error.headline:
            raise
        raise error.but(source=f"{file}: {error.source}" if error.source else file) from None


def diff(
    one: Annotated[str, typer.Argument(help="A recipe's name or file.", metavar="A")],
    other: Annotated[str, typer.Argument(help="Another.", metavar="B")],
    as_set: Annotated[bool, typer.Option("--as-set", help="Print the --set options that lead from A to B.")] = False,
    as_json: Json = False,
) -> None:
    """Show what one would change to get from recipe A to recipe B, with all that they extend and all defaults."""
    from sdcli.cli.tables import difference_table
    from sdcli.cli.talk import note, output
    from sdcli.recipe.about import difference
    from sdcli.recipe.load import load_recipe

    if as_set and as_json:
        raise UserError("--as-set and --json exclude each other", "one of them")
    recipes = [load_recipe([one]), load_recipe([other])]
    # Of what both have, keys at their defaults count too: a run's recipe.toml has them, its source has not.
    named = [{*recipe.losses, *recipe.signals} for recipe in recipes]
    both = named[0] & named[1]
    found = difference(*(completed(recipe, both) for recipe in recipes))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    if not found.rows():
        note(f"{one} and {other} train the same")
        return
    if not as_set:
        output().print(difference_table(one, other, found))
        return
    sets, unsets = found.overrides()
    for flag, values in (("--set", sets), ("--unset", unsets)):
        for text in values:
            typer.echo(f"{flag} {shlex.quote(text)}")


def _printing(title: str, shelf: Shelf) -> Any:
    """The command that prints one of the catalogue's shelves."""

    def command(
        names: Annotated[list[str] | None, typer.Argument(help="Tell all about these alone.", metavar="NAME")] = None,
        import_: Import = None,
        as_json: Json = False,
    ) -> None:
        from sdcli.cli.tables import catalogue_details, catalogue_table
        from sdcli.cli.talk import output
        from sdcli.extensions import load_imports

        load_imports(import_ or [])
        items = shelf.items()
        known = {item.name: item for item in items}
        for name in names or []:
            if name not in known:
                raise unknown(shelf.one, name, known, limit=len(known))
        chosen = [known[name] for name in names] if names else items
        if as_json:
            typer.echo(json.dumps([item.to_dict() for item in chosen], indent=2))
            return
        console = output()
        console.print(catalogue_details(chosen) if names else catalogue_table(title, shelf.one, chosen))

    return command


def overrides(set_: list[str] | None, unset: list[str] | None) -> list[Override]:
    """What `--set` and `--unset` change, in this order."""
    from sdcli.recipe.merge import Override

    return [*map(Override.parse, set_ or []), *map(Override.unset, unset or [])]


def _summary(recipe: Any) -> str:
    """A recipe in one line."""
    losses = ", ".join(dict.fromkeys(loss.kind for loss in recipe.losses.values()))
    epochs = f"{recipe.epochs} epoch{'s' * (recipe.epochs > 1)}"
    return (
        f"{len(recipe.losses)} loss{'es' * (len(recipe.losses) > 1)} ({losses}), {epochs} of batches of "
        f"{recipe.batch.size}, {recipe.optimizer.opt} {recipe.optimizer.lr:g}, {recipe.schedule.sched}"
    )


def _path(file: Path) -> str:
    """A path that --recipe and check take for one."""
    return str(file) if file.suffix == ".toml" or file.is_absolute() else f"./{file}"
