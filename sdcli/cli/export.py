"""`sdcli export`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from sdcli.cli.options import Import, Json, Run
from sdcli.cli.usage import Command
from sdcli.errors import UserError
from sdcli.extensions import load_imports

EPILOG = """
Example:  sdcli export runs/first --to onnx --exit staged --output first-onnx

Example:  sdcli export runs/first --to timm --output first-timm --license apache-2.0
"""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("export", cls=Command, epilog=EPILOG)(export)


def export(
    checkpoint: Run,
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="timm, safetensors, pt2, onnx, openvino or executorch.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PATH", help="The file or folder to write; a new one.")
    ],
    exit: Annotated[
        str,
        typer.Option(
            "--exit",
            metavar="NAME",
            help="The exit to end at; all: one graph with every exit's logits; staged: one graph per section.",
        ),
    ] = "final",
    dataset: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Images to compare on. [default: the data it was trained on]"),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(metavar="ID", help="The licence that timm's card states. [default: of the pretrained weights]"),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload timm's folder to this repository of the Hugging Face hub."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", metavar="", help="Create that repository as a private one.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", metavar="", help="Replace an earlier export.")] = False,
    import_: Import = None,
    as_json: Json = False,
) -> None:
    """Write a network, or one of its exits, in the format of another program.

    What was written is read back and compared with the checkpoint, on images of its data and on noise, in batches of
    several sizes; a file that differs by more than rounding is removed. A staged ONNX export is a folder with a runner
    that needs onnxruntime and numpy only, and in which each image leaves at the first exit that is sure.
    """
    _check_options(to, license, push, private)

    from sdcli.cli.talk import message, note, only_results, print_json, stages
    from sdcli.cli.talk import output as console
    from sdcli.export.formats import check_exit, find_format

    # Before torch is loaded, which takes seconds.
    find_format(to)
    check_exit(to, exit)
    with stages(), only_results():
        from sdcli.export import export as exporting
        from sdcli.network.checkpoint import find_checkpoint

        path = find_checkpoint(checkpoint)
        load_imports(import_ or [])
        exported = exporting.export(path, to, exit, output, dataset=dataset, license=license or "", force=force)
    if as_json:
        print_json(exported.to_dict())
    else:
        from sdcli.cli.tables import export_table, routed_table

        console().print(export_table(exported))
        if exported.routed:
            console().print(routed_table(exported))
    if path != checkpoint:
        note(f"checkpoint: {path}")
    for text in exported.notes:
        note(text)
    if exported.usage:
        message(exported.usage)
    if push:
        from sdcli.export.push import push as upload

        with stages(), only_results():
            address = upload(output, push, private=private)
        message(f"uploaded to {address}")


def _check_options(to: str, license: str | None, push: str | None, private: bool) -> None:
    if to != "timm":
        for flag, given in (("--push", push), ("--license", license)):
            if given is not None:
                raise UserError(f"{flag} {given}: only timm's folder has a card", "--to timm", f"leave {flag} out")
    if private and push is None:
        raise UserError("--private without effect: nothing is uploaded", "--push OWNER/NAME", "leave --private out")
    if push is not None and not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", push):
        raise UserError(f"--push '{push}'", "the name of a repository: OWNER/NAME")
    if license is not None and not re.fullmatch(r"[\w.-]{1,60}", license):
        raise UserError(f"--license '{license}'", "an id of the Hugging Face hub: apache-2.0, mit, cc-by-4.0, other")
