"""`sdcli recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

EPILOG = "Example:  sdcli recipes show byot"


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    recipes = typer.Typer(
        no_args_is_help=True, help="List the recipes that come with sdcli, or print one.", epilog=EPILOG
    )
    recipes.command("list", epilog="Example:  sdcli recipes list")(list_)
    recipes.command("show", epilog=EPILOG)(show)
    app.add_typer(recipes, name="recipes")


def list_() -> None:
    """List the recipes: name, title, paper."""
    from rich import box
    from rich.table import Table

    from sdcli.cli.talk import output
    from sdcli.recipe import load_recipe, recipe_names

    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for title in ("recipe", "title", "paper"):
        table.add_column(title, style="bold" if title == "recipe" else "", no_wrap=title == "recipe")
    for name in recipe_names():
        recipe = load_recipe([name])
        table.add_row(name, recipe.title, recipe.paper)
    output().print(table)


def show(name: Annotated[str, typer.Argument(help="A recipe's name or file.")]) -> None:
    """Print a recipe with all that it extends and all defaults, as one file."""
    from sdcli.recipe import load_recipe, to_toml

    typer.echo(to_toml(load_recipe([name])), nl=False)
