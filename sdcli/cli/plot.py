"""`sdcli plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdcli.cli.usage import Command

EPILOG = "Example:  sdcli plot runs/first --output curves.png"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("plot", cls=Command, epilog=EPILOG)(plot)


def plot(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="A .png, .svg or .pdf file. [default: RUN/curves.png]"),
    ] = None,
) -> None:
    """Draw a run's losses and accuracies by epoch."""
    from sdcli.cli.plots import save_curves
    from sdcli.cli.talk import line

    file = output or run / "curves.png"
    save_curves(run, file)
    line(str(file))
