"""`sdcli report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from sdcli.cli.options import BatchSize, Device, ImageKey, Import, LabelKey, Workers
from sdcli.cli.usage import Command
from sdcli.errors import UserError
from sdcli.extensions import load_imports
from sdcli.files import check_writable

EPILOG = """
Example:  sdcli report runs/first

Example:  sdcli report runs/first runs/second --output both.html
"""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("report", cls=Command, epilog=EPILOG)(report)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Run folders (the best checkpoint of each, or the last one where none was chosen), or .safetensors "
            "files.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The page, a .html file. [default: report.html in the run folder; of several runs, in this folder]",
        ),
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The model card of a single run. [default: README.md beside the checkpoint]"),
    ] = None,
    no_card: Annotated[bool, typer.Option("--no-card", metavar="", help="Write no model card.")] = False,
    license: Annotated[
        str | None,
        typer.Option(metavar="ID", help="The licence that the card states. [default: of the pretrained weights]"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", metavar="", help="Replace files that sdcli report has not written.")
    ] = False,
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
) -> None:
    """Write a page about a run, or about several, and a run's model card.

    The page is one HTML file that needs nothing else: scores, curves, calibration, cost, classes, and images on which
    the exits disagree or that leave early and late. The card is a README.md as the Hugging Face hub reads it.
    """
    _check_card(runs, card, no_card, license)

    from sdcli.cli.talk import line, note, only_results, stages

    with stages(), only_results():
        from sdcli.cli.progress import scoring
        from sdcli.devices import accelerator_for, keep_freed_memory
        from sdcli.network.checkpoint import find_checkpoint
        from sdcli.report.card import card as card_of
        from sdcli.report.card import is_card
        from sdcli.report.findings import examine
        from sdcli.report.page import is_page, render

        paths = [find_checkpoint(run) for run in runs]
        page = output or (paths[0].parent if len(runs) == 1 else Path()) / "report.html"
        readme = None if no_card or len(runs) > 1 else card or paths[0].parent / "README.md"
        _check_output("--output", page, is_page, force, ".html")
        if readme:
            _check_output("--card", readme, is_card, force, ".md")
        load_imports(import_ or [])
        keep_freed_memory(accelerator_for(device).device)
        with scoring() as progress:
            found = [
                examine(
                    run,
                    path,
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
                for run, path in zip(runs, paths, strict=True)
            ]
        written = {page: render(found)} | ({readme: card_of(found[0], license or "")} if readme else {})
    _write(written)
    for path in written:
        line(str(path))
    for text in dict.fromkeys(text for one in found for text in one.notes):
        note(text)


def _check_card(runs: Sequence[Path], card: Path | None, no_card: bool, license: str | None) -> None:
    """Raises UserError for options of a card that is not written."""
    given = [flag for flag, value in {"--card": card, "--license": license}.items() if value is not None]
    if given and len(runs) > 1:
        raise UserError(
            f"{given[0]} with {len(runs)} runs", "one run: a card is about one model", f"leave out {given[0]}"
        )
    if given and no_card:
        raise UserError(f"{given[0]} and --no-card exclude each other", "one of them")


def _check_output(flag: str, path: Path, is_ours: Callable[[Path], bool], force: bool, suffix: str) -> None:
    """Raises UserError, before anything is scored, for a file that cannot or should not be written."""
    if path.suffix != suffix:
        raise UserError(
            f"{flag} {path}: its name does not end in {suffix}", f"a {suffix} file", f"{flag} {path}{suffix}"
        )
    if not path.absolute().parent.is_dir():
        raise UserError(f"{flag} {path}: its folder does not exist", "a folder that exists")
    if path.exists() and not path.is_file():
        raise UserError(f"{flag} {path} is not a regular file", f"a new {suffix} file", f"another {flag}")
    if path.exists() and not force and not is_ours(path):
        raise UserError(
            f"{path} exists, and sdcli report has not written it",
            "a new file, or one of an earlier report",
            f"another {flag}, or --force to replace it",
        )
    try:
        check_writable(path)
    except OSError as error:
        raise _cannot_write(path, error) from None


def _write(texts: dict[Path, str]) -> None:
    """Writes each file whole or not at all."""
    from sdcli.files import replacing

    for path, text in texts.items():
        try:
            with replacing(path) as beside:
                beside.write_bytes(text.encode())
        except OSError as error:
            raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be written: {error.strerror or error}", "a folder with room that you may write to")
