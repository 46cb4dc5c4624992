"""`sdcli eval`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from sdcli.cli.options import BatchSize, Device, ImageKey, Import, Json, LabelKey, Run, Workers
from sdcli.cli.usage import Command
from sdcli.errors import UserError
from sdcli.extensions import load_imports

EPILOG = """
Example:  sdcli eval runs/first

Example:  sdcli eval runs/first --exits exit1,final --split val --json

Example:  sdcli eval runs/first --dynamic
"""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("eval", cls=Command, epilog=EPILOG)(evaluate)


def evaluate(
    checkpoint: Run,
    exits: Annotated[str, typer.Option(metavar="NAMES", help="all, final, or some of the exits: exit1,exit3.")] = "all",
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Another data set with the same classes. [default: the one it was trained on]"
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="test, validation (val) or train. [default: test, else validation]"),
    ] = None,
    image_key: ImageKey = None,
    label_key: LabelKey = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="IMAGES", help="Score only this many images, the same share of each class."),
    ] = None,
    batch_size: BatchSize = 256,
    device: Device = None,
    workers: Workers = None,
    import_: Import = None,
    dynamic: Annotated[
        bool,
        typer.Option("--dynamic", metavar="", help="Score early exit too, as sdcli calibrate has set it up."),
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="SHARE", help="With --dynamic: mean MACs of at most this share of the plain model."
        ),
    ] = None,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", metavar="", help="Print CSV.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", metavar="", help="Print a Markdown table.")] = False,
) -> None:
    """Score every exit and their ensemble, and early exit.

    A checkpoint holds all that is needed: model, exits, preprocessing and the name of its data set. The ensemble is
    the mean of the scored exits' logits. A speed-up compares the MACs of the plain model with those up to an exit.
    """
    if as_json + as_csv + as_markdown > 1:
        raise UserError("--json, --csv and --markdown exclude each other", "one of them")
    if budget is not None and not dynamic:
        raise UserError("--budget needs --dynamic", "both, or neither", "--dynamic")
    points = parse_points(exits)

    from sdcli.cli.talk import line, note, only_results, output, print_json, stages

    with stages(), only_results():
        from sdcli.cli import tables
        from sdcli.cli.progress import scoring
        from sdcli.evaluation.scoring import score_checkpoint
        from sdcli.network.checkpoint import find_checkpoint

        path = find_checkpoint(checkpoint)
        load_imports(import_ or [])
        with scoring() as progress:
            scored = score_checkpoint(
                path,
                points=points,
                dataset=dataset,
                split=split,
                image_key=image_key,
                label_key=label_key,
                limit=limit,
                batch_size=batch_size,
                device=device,
                workers=workers,
                dynamic=dynamic,
                budget=budget,
                progress=progress,
            )
    report, num_classes, leaving = scored.report, len(scored.classes), scored.dynamic
    if as_json:
        print_json(report.to_dict() | ({"early_exit": asdict(leaving)} if leaving else {}))
    elif as_csv:
        line(tables.report_csv(report, leaving))
    elif as_markdown:
        line(tables.report_markdown(report, num_classes, leaving))
    else:
        output().print(tables.report_table(report, num_classes, leaving))
        if leaving:
            output().print(tables.leaving_table(leaving))
            output().print(tables.leaving_time(leaving), soft_wrap=True)
    if path != checkpoint:
        note(f"checkpoint: {path}, epoch {scored.epoch}")
    for text in scored.notes:
        note(text)


def parse_points(text: str) -> list[str] | None:
    """`--exits` as a list of points; None for all."""
    points = [part.strip() for part in text.split(",") if part.strip()]
    if not points:
        raise UserError("--exits names no exit", "all, final, or some of them: exit1,exit3")
    return None if "all" in points else points
