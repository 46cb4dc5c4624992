"""Predictions as a table, JSON lines, CSV or a Parquet file."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from sdcli.cli.tables import plain_table
from sdcli.cli.talk import line, output
from sdcli.data.dataset import printable
from sdcli.errors import UserError
from sdcli.files import check_writable, replacing
from sdcli.network.blueprint import Blueprint
from sdcli.network.policies import Policy
from sdcli.network.predict import Prediction

Row: TypeAlias = tuple[str, Prediction]
"""A file, as the user named it, and what the network says about it."""
Write: TypeAlias = Callable[[Sequence[Row]], None]
"""Takes the rows of one batch."""

DIGITS = 6
"""Of probabilities."""


@contextmanager
def as_table() -> Iterator[Write]:
    """One table, printed at the end, also of what was done before an error."""
    rows: list[Row] = []
    try:
        yield rows.extend
    finally:
        if rows:
            output().print(predictions_table(rows, output()))


def predictions_table(rows: Sequence[Row], console: Console) -> Table:
    """A row per image; the next likeliest classes only where there is room for them."""
    table = _predictions_table(rows, with_others=True)
    fits = Measurement.get(console, console.options.update(max_width=1000), table).maximum <= console.width
    return table if fits else _predictions_table(rows, with_others=False)


def _predictions_table(rows: Sequence[Row], *, with_others: bool) -> Table:
    with_others = with_others and any(len(found.top) > 1 for _, found in rows)
    table = plain_table("")
    table.title = None
    # A long path is broken, so that it can be read whole.
    table.add_column("file", overflow="fold")
    table.add_column("label", style="bold", overflow="fold")
    table.add_column("confidence", justify="right", no_wrap=True)
    table.add_column("exit", no_wrap=True)
    if with_others:
        table.add_column("next", style="dim", no_wrap=True)
    for file, found in rows:
        others = ", ".join(f"{label} {share:.1%}" for label, share in found.top[1:])
        cells = [printable(file), found.label, f"{found.confidence:.1%}", found.exit]
        table.add_row(*cells, *([others] if with_others else []))
    return table


@contextmanager
def as_json_lines() -> Iterator[Write]:
    """One JSON object per line and image, written when its batch is done."""

    def write(rows: Sequence[Row]) -> None:
        for row in rows:
            line(json.dumps(record(*row), allow_nan=False))
        sys.stdout.flush()

    yield write


def record(file: str, found: Prediction) -> dict[str, Any]:
    """One image as JSON and Parquet have it."""
    return {
        "file": printable(file),
        "label": found.label,
        "confidence": round(found.confidence, DIGITS),
        "exit": found.exit,
        "top": [{"label": label, "confidence": round(share, DIGITS)} for label, share in found.top],
    }


@contextmanager
def as_csv(num_top: int) -> Iterator[Write]:
    """A header and one line per image, with `num_top` classes: label2 and confidence2 are the second likeliest."""
    more = [name for place in range(2, num_top + 1) for name in (f"label{place}", f"confidence{place}")]
    line(_csv_line(["file", "label", "confidence", "exit", *more]))

    def write(rows: Sequence[Row]) -> None:
        for file, found in rows:
            others = [cell for label, share in found.top[1:] for cell in (label, round(share, DIGITS))]
            line(_csv_line([printable(file), found.label, round(found.confidence, DIGITS), found.exit, *others]))
        sys.stdout.flush()

    yield write


def _csv_line(cells: Sequence[Any]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()


def check_parquet(path: Path) -> None:
    """Raises UserError for a file that cannot be written, before anything is computed."""
    if path.suffix != ".parquet":
        # A pattern that the shell has expanded may have put a photo here.
        raise UserError(f"--parquet {path}", "a file whose name ends in .parquet", f"--parquet {path.stem}.parquet")
    if path.is_dir() or not path.parent.is_dir():
        wrong = "is a folder" if path.is_dir() else f"there is no folder '{path.parent}'"
        raise UserError(f"--parquet {path}: {wrong}", "a file in a folder that exists")


@contextmanager
def as_parquet(path: Path) -> Iterator[Write]:
    """A Parquet file, written as batches are done, which appears when all of them are; none where nothing is written.

    Raises UserError for a file that cannot be written.
    """
    import pyarrow
    from pyarrow import parquet

    likely = pyarrow.struct([("label", pyarrow.string()), ("confidence", pyarrow.float64())])
    schema = pyarrow.schema(
        [
            ("file", pyarrow.string()),
            ("label", pyarrow.string()),
            ("confidence", pyarrow.float64()),
            ("exit", pyarrow.string()),
            ("top", pyarrow.list_(likely)),
        ]
    )
    try:
        check_writable(path)
        with ExitStack() as stack:
            writer = None

            def write(rows: Sequence[Row]) -> None:
                nonlocal writer
                if writer is None:
                    writer = stack.enter_context(parquet.ParquetWriter(stack.enter_context(replacing(path)), schema))
                writer.write_table(pyarrow.Table.from_pylist([record(*row) for row in rows], schema))

            yield write
    except OSError as error:
        raise UserError(f"--parquet {path} cannot be written: {error}", "a folder that can be written to") from None


def leaving(exits: Counter[str], policy: Policy, blueprint: Blueprint) -> str:
    """Where images have left, and what that has cost, in a sentence."""
    total, passing = exits.total(), blueprint.passing(policy.exits)
    shares = ", ".join(f"{exits[point] / total:.1%} at {point}" for point in passing if exits[point])
    macs = sum(passing[point] * count for point, count in exits.items()) / total
    return f"answered {shares}: {macs / blueprint.plan.macs:.2f} times the plain network's MACs"
