"""Files that `eval` writes besides its table: what every exit answers to each image, and the confusion matrix."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcli.errors import UserError
from sdcli.files import check_writable, replacing

if TYPE_CHECKING:
    from sdcli.evaluation.scoring import Scored


def check_output(option: str, file: Path, endings: Sequence[str]) -> None:
    """Raises UserError for a file of another kind, or one that cannot be written, before anything is computed."""
    if file.suffix.lower() not in endings:
        raise UserError(
            f"{option} {file} has another ending",
            "a file whose name ends in " + ", ".join(endings),
            f"{option} {file.stem}{endings[0]}",
        )
    try:
        check_writable(file)
    except OSError as error:
        raise cannot_write(option, file, error) from None


def cannot_write(option: str, file: Path, error: OSError) -> UserError:
    """The error for a file that cannot be written."""
    return UserError(f"{option} {file} cannot be written: {error.strerror or error}", "a file in a folder that exists")


def save_predictions(scored: Scored, file: Path) -> None:
    """A Parquet file with a row per image, in the order of the data set: the image (its file, below the data set's
    folder, or else its place in the split), its label, and each point's class and confidence."""
    import numpy as np
    import pyarrow
    from pyarrow import parquet

    answers, classes = scored.answers, np.array(scored.classes, dtype=object)
    order = np.argsort(answers.index.numpy(), kind="stable")
    index = answers.index.numpy()[order]
    files = [scored.images.images.file(row) for row in index.tolist()]
    columns: dict[str, Any] = {
        "image": index if None in files else [str(name) for name in files],
        "label": classes[answers.labels.numpy()[order]],
    }
    for point, own in answers.points.items():
        columns[point] = classes[own.predicted.numpy()[order]]
        columns[f"{point}_confidence"] = own.confidence.numpy()[order]
    try:
        with replacing(file) as beside:
            parquet.write_table(pyarrow.table(columns), beside)
    except OSError as error:
        raise cannot_write("--predictions", file, error) from None


def save_matrix(matrix: Any, classes: Sequence[str], file: Path) -> None:
    """A confusion matrix as CSV: a row for each true class, a column for each answer."""
    try:
        with replacing(file) as beside, beside.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened, lineterminator="\n")
            writer.writerow(["class", *classes])
            writer.writerows([name, *row] for name, row in zip(classes, matrix.tolist(), strict=True))
    except OSError as error:
        raise cannot_write("--confusion", file, error) from None
