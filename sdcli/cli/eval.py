"""`sdcli eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sdcli.errors import UserError
from sdcli.extensions import load_imports

EPILOG = "Example:  sdcli eval runs/first/best.safetensors --exits all"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("eval", epilog=EPILOG)(evaluate)


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A .safetensors file that sdcli train wrote.")],
    exits: Annotated[str, typer.Option(help="all, final, or some of them: exit1,exit3")] = "all",
    dataset: Annotated[
        str | None, typer.Option(help="A data set with the same classes. [default: the one it was trained on]")
    ] = None,
    split: Annotated[str, typer.Option(help="test, validation or train.")] = "test",
    image_key: Annotated[str | None, typer.Option(help="The column of images. [default: found]")] = None,
    label_key: Annotated[str | None, typer.Option(help="The column of labels. [default: found]")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score this many images only.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images scored at a time.")] = 256,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, … [default: the best there is]")] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", "-j", min=0, help="Processes that load images. [default: what suits]")
    ] = None,
    import_: Annotated[
        list[Path] | None,
        typer.Option("--import", metavar="FILE.py", help="Your own heads, where it was trained with them; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Score every exit and their ensemble in one pass.

    The checkpoint is all it takes: model, exits, transforms and data set come from it. The ensemble is the mean of the
    scored exits' logits; speed-ups are MACs of the plain model over those of an exit shipped alone.
    """
    if as_json + as_csv + as_markdown > 1:
        raise UserError("--json, --csv and --markdown exclude each other", "one of them")

    from sdcli.cli import tables
    from sdcli.cli.progress import scoring
    from sdcli.cli.talk import note, output
    from sdcli.evaluation.scoring import score_checkpoint

    load_imports(import_ or [])
    with scoring() as progress:
        report, notes = score_checkpoint(
            checkpoint,
            points=parse_points(exits),
            dataset=dataset,
            split=split,
            image_key=image_key,
            label_key=label_key,
            limit=limit,
            batch_size=batch_size,
            device=device,
            workers=workers,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    elif as_csv:
        typer.echo(tables.report_csv(report))
    elif as_markdown:
        typer.echo(tables.report_markdown(report))
    else:
        output().print(tables.report_table(report))
    for text in notes:
        note(text)


def parse_points(text: str) -> list[str] | None:
    """`--exits` as a list of points; None for all."""
    points = [part.strip() for part in text.split(",") if part.strip()]
    if not points:
        raise UserError("--exits names no exit", "all, final, or some of them: exit1,exit3")
    return None if "all" in points else points
