"""`sdcli plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = "Example:  sdcli plot runs/first --output curves.png"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("plot", epilog=EPILOG)(plot)


def plot(
    run: Annotated[Path, typer.Argument(help="A run folder of sdcli train, finished or not.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .png, .svg or .pdf. [default: RUN/curves.png]")
    ] = None,
) -> None:
    """Draw a run's losses and accuracies by epoch."""
    from sdcli.cli.plots import save_curves

    file = output or run / "curves.png"
    save_curves(run, file)
    typer.echo(file)
