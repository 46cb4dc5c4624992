"""Options and arguments that several commands share, so that they have the same names and words everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

Run: TypeAlias = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="A run folder (its best checkpoint, or the last one where none was chosen), or a .safetensors file.",
    ),
]
ImageKey: TypeAlias = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="The column of images. [default: found by type and name]")
]
LabelKey: TypeAlias = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="The column of labels. [default: found by type and name]")
]
BatchSize: TypeAlias = Annotated[
    int, typer.Option("--batch-size", "-b", min=1, metavar="IMAGES", help="Images in a batch.")
]
Device: TypeAlias = Annotated[
    str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps. [default: the fastest available]")
]
Workers: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--workers", "-j", min=0, metavar="N", help="Processes that load images. [default: chosen by image size]"
    ),
]
Import: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option("--import", metavar="FILE.py", help="Your heads, if it was trained with them; repeatable."),
]
MeanCost: TypeAlias = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Early exit at this mean cost, as a share of the plain network's MACs: 0.5."),
]
Threshold: TypeAlias = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, metavar="T", help="Early exit: an image leaves at the first exit that is as sure as this."
    ),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")]
