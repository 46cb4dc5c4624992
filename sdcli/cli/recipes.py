"""`sdcli recipes`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdcli.cli.inspect import LARGEST_IMAGE
from sdcli.cli.usage import Command, Group, misplaced
from sdcli.errors import UserError, counted, unknown
from sdcli.method.catalogue import SHELVES, Shelf, completed

if TYPE_CHECKING:
    from sdcli.recipe.merge import Override

COPY = "Example:  sdcli recipes copy byot mine.toml"
CHECK = "Example:  sdcli recipes check mine.toml --model resnet18"
EPILOG = f"""
Example:  sdcli recipes show byot

{COPY}

{CHECK}
"""
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change any value, such as losses.soft.weight=0.5; repeatable."),
]
Unset = Annotated[
    list[str] | None,
    typer.Option("--unset", metavar="KEY", help="Remove a table or value, such as losses.hint; repeatable."),
]
Import = Annotated[
    list[Path] | None,
    typer.Option("--import", metavar="FILE.py", help="A file with your losses and heads; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    recipes = typer.Typer(
        cls=Group,
        no_args_is_help=True,
        help="List, show, copy, check and compare recipes, and list what they can use.",
        epilog=EPILOG,
    )
    recipes.command("list", cls=Command, epilog="Example:  sdcli recipes list")(list_)
    recipes.command("show", cls=Command, epilog="Example:  sdcli recipes show byot --set epochs=30")(show)
    recipes.command("copy", cls=Command, epilog=COPY)(copy)
    recipes.command("check", cls=Command, epilog=CHECK)(check)
    recipes.command("diff", cls=Command, epilog="Example:  sdcli recipes diff byot byot-scan")(diff)
    for name, shelf in SHELVES.items():
        example = f"Example:  sdcli recipes {name}" + ("\n\nExample:  sdcli recipes losses kl" * (name == "losses"))
        recipes.command(name, cls=Command, help=shelf.help, epilog=example)(_printing(name, shelf))
    app.add_typer(recipes, name="recipes")


def list_(as_json: Json = False) -> None:
    """List the recipes: what each is, its paper, what it needs beyond one network, and what has been measured."""
    from sdcli.cli.tables import recipes_table
    from sdcli.cli.talk import note, output, print_json
    from sdcli.recipe.about import overview
    from sdcli.recipe.load import recipe_names

    recipes = [overview(name) for name in recipe_names()]
    if as_json:
        print_json([recipe.to_dict() for recipe in recipes])
        return
    console = output()
    console.print(recipes_table(recipes, console))
    note("sdcli recipes show NAME prints a recipe with all its values")


def show(
    ctx: typer.Context,
    names: Annotated[
        list[str],
        typer.Argument(help="A recipe's name or .toml file; each further one refines those before it.", metavar="NAME"),
    ],
    set_: Set = None,
    unset: Unset = None,
    import_: Import = None,
    plain: Annotated[bool, typer.Option("--plain", metavar="", help="Leave out the source of each value.")] = False,
) -> None:
    """Print a recipe with all values: its own, those of the recipes that it extends, and defaults.

    The output is a recipe file. A comment behind each value names its source: a recipe, a file, --set or default.
    """
    from sdcli.cli.talk import line, only_results, output, printable
    from sdcli.extensions import load_imports
    from sdcli.recipe import about
    from sdcli.recipe.explain import blaming
    from sdcli.recipe.load import read_recipe

    refuse_misplaced(names, ctx, "sdcli recipes show")
    recipe, origins = read_recipe(names, overrides(set_, unset))
    with only_results():
        load_imports(import_ or [])
    with blaming(origins):
        text = about.show(completed(recipe), origins, comments=not plain)
    console = output()
    if not console.is_terminal:
        line(text.removesuffix("\n"))
        return
    from pygments.token import Comment, Keyword, Number, String
    from rich.style import Style
    from rich.syntax import ANSISyntaxTheme, Syntax

    # Legible on dark and on light backgrounds.
    colours = {Comment: "dim", Keyword: "bold", Keyword.Constant: "magenta", Number: "magenta", String: "green"}
    theme = ANSISyntaxTheme({token: Style.parse(style) for token, style in colours.items()})
    coloured = Syntax("", "toml", theme=theme).highlight(printable(text))
    coloured.rstrip()
    console.print(coloured, soft_wrap=True)


def refuse_misplaced(names: list[str], ctx: typer.Context, command: str) -> None:
    """Raises UserError for KEY=VALUE among the names of recipes."""
    for name in names:
        if error := misplaced(name, ctx.command, command):
            raise error


def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe's name or .toml file.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The new file, such as mine.toml.")],
) -> None:
    """Copy a recipe's file, comments included, to edit it. Never overwrites a file."""
    from sdcli.cli.talk import note
    from sdcli.recipe.load import copy_recipe

    copy_recipe(name, file)
    path = shlex.quote(_path(file))
    note(f"edit {file}, check it with sdcli recipes check {path}, train with --recipe {path}")


def check(
    ctx: typer.Context,
    files: Annotated[list[str], typer.Argument(help="Recipes' .toml files or names.", metavar="FILE")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Check exits and widths with this timm model too.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, max=LARGEST_IMAGE, metavar="PIXELS", help="Input height and width. [default: the model's]"),
    ] = None,
    set_: Set = None,
    unset: Unset = None,
    import_: Import = None,
) -> None:
    """Check recipes without data: names, keys, types and ranges; with --model its exits and widths too.

    Stops at the first error, with exit code 2.
    """
    from sdcli.recipe.load import read_recipe

    if image_size is not None and model is None:
        raise UserError("--image-size without effect: no --model is named", "both", "--model resnet18")
    refuse_misplaced(files, ctx, "sdcli recipes check")
    # What the tables alone show comes before torch is loaded.
    found = []
    for file in files:
        with _in_file(file):
            found.append((file, *read_recipe([file], overrides(set_, unset))))

    from sdcli.cli.talk import end_stage, line, note, only_results, stages
    from sdcli.extensions import load_imports

    with stages(plain=False):
        from sdcli.method.check import check_files, check_names, check_with_model, left_open, remarks
        from sdcli.network.backbones import resolve
        from sdcli.network.weights import read_weights_file

        with only_results():
            load_imports(import_ or [])
        if model is not None:
            resolve(model, num_classes=None, image_size=image_size)
        for file, recipe, origins in found:
            exits, notes = "", left_open(recipe) + remarks(recipe, model)
            with _in_file(file, origins):
                check_names(recipe)
                check_files(recipe)
                if model is not None:
                    weights = read_weights_file(recipe.student, model)
                    checked = check_with_model(recipe, model, image_size=image_size, file=weights)
                    exits = f"; {model}: {', '.join(checked.student.points)}"
                    notes += checked.notes
            end_stage()
            line(f"{file}: ok  {_summary(recipe)}{exits}")
            for text in notes:
                note(f"{file}: {text}")


@contextmanager
def _in_file(file: str, origins: Mapping[str, str] | None = None) -> Iterator[None]:
    """Adds to an error the file that is checked, and the source of the value where that is another."""
    from sdcli.recipe.explain import blaming

    try:
        with blaming(origins or {}):
            yield
    except UserError as error:
        if str(Path(file)) in error.headline:
            raise
        raise error.but(source=f"{file}: {error.source}" if error.source else file) from None


def diff(
    one: Annotated[
        str,
        typer.Argument(
            help="A recipe's name or .toml file, or several joined by +, which refine each other from left to right: "
            "baseline+schedules/cosine.",
            metavar="A",
        ),
    ],
    other: Annotated[str, typer.Argument(help="Another one.", metavar="B")],
    as_set: Annotated[
        bool, typer.Option("--as-set", metavar="", help="Print the --set options that turn A into B.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show which values differ between recipes A and B, with all that they extend and all defaults."""
    from sdcli.cli.tables import difference_table
    from sdcli.cli.talk import line, note, output, print_json
    from sdcli.recipe.about import difference
    from sdcli.recipe.load import load_recipe

    if as_set and as_json:
        raise UserError("--as-set and --json exclude each other", "one of them")
    # The name of a file may have a + in it.
    recipes = [load_recipe([name] if Path(name).is_file() else name.split("+")) for name in (one, other)]
    # Of what both have, keys at their defaults count too: a run's recipe.toml has them, its source has not.
    named = [{*recipe.losses, *recipe.signals} for recipe in recipes]
    both = named[0] & named[1]
    found = difference(*(completed(recipe, both) for recipe in recipes))
    if as_json:
        print_json(found.to_dict())
        return
    if not found.rows():
        note(f"{one} and {other} do not differ")
        return
    if not as_set:
        output().print(difference_table(one, other, found))
        return
    sets, unsets = found.overrides()
    for flag, values in (("--set", sets), ("--unset", unsets)):
        for text in values:
            line(f"{flag} {shlex.quote(text)}")


def _printing(title: str, shelf: Shelf) -> Any:
    """The command that prints one kind of names that a recipe can use."""

    def command(
        names: Annotated[
            list[str] | None,
            typer.Argument(help="Print only these, in detail. [default: a table of all]", metavar="NAME"),
        ] = None,
        import_: Import = None,
        as_json: Json = False,
    ) -> None:
        from sdcli.cli.talk import only_results, output, print_json, stages
        from sdcli.extensions import load_imports

        with stages(plain=False), only_results():
            from sdcli.cli.tables import catalogue_details, catalogue_table

            load_imports(import_ or [])
            items = shelf.items()
        known = {item.name: item for item in items}
        for name in names or []:
            if name not in known:
                raise unknown(shelf.one, name, known, lists=f"sdcli recipes {title}")
        chosen = [known[name] for name in names] if names else items
        if as_json:
            print_json([item.to_dict() for item in chosen])
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
    return (
        f"{counted(len(recipe.losses), 'loss', 'losses')} ({losses}), {counted(recipe.epochs, 'epoch')}, batch size "
        f"{recipe.batch.size}, {recipe.optimizer.opt}, learning rate {recipe.optimizer.lr:g}, {recipe.schedule.sched}"
    )


def _path(file: Path) -> str:
    """A path that --recipe and check take for one."""
    return str(file) if file.suffix == ".toml" or file.is_absolute() else f"./{file}"
