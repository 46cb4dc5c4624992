"""Outputs that are complete or absent: written into a folder beside them, and moved into place at the end."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path

from sdcli.errors import UserError
from sdcli.export.formats import Format

MARKS = ("manifest.json", "config.json")
"""Files by which a folder is known to be an export: one of them, and nothing that an export would not write."""
PARTS = (".onnx", ".pt2", ".xml", ".bin", ".safetensors", ".json", ".md", ".py", ".pte")


def check_output(output: Path, format: Format, exit: str, *, force: bool) -> None:
    """Raises UserError for an output of the wrong kind, one that exists, and a folder that cannot be written to."""
    folder = format.is_folder(exit)
    if not folder and output.suffix != format.suffix:
        raise UserError(
            f"--output {output} is a single file, whose name does not end in {format.suffix}",
            f"a name that ends in {format.suffix}",
            f"--output {output.with_name(output.name + format.suffix)}",
        )
    if output.exists() or output.is_symlink():
        _check_replaced(output, folder, force)
    parent = output.absolute().parent
    if not parent.is_dir():
        raise UserError(
            f"--output {output}: the folder '{parent}' does not exist", "an existing folder", f"mkdir -p {parent}"
        )
    with _explained(output):
        _beside(output).rmdir()


def _check_replaced(output: Path, folder: bool, force: bool) -> None:
    if folder and not _is_export(output):
        raise UserError(
            f"--output {output} exists and is not an exported folder", "a new folder", "choose another --output"
        )
    if not folder and (not output.is_file() or output.is_symlink()):
        raise UserError(f"--output {output} exists and is not a regular file", "a new file", "choose another --output")
    if not folder and not _is_exported_file(output):
        raise UserError(
            f"--output {output} exists and is not an exported file", "a new file", "choose another --output"
        )
    if not force:
        raise UserError(f"--output {output} exists", "a new name", "another --output, or --force to replace it")


def _is_export(folder: Path) -> bool:
    """Whether a folder holds what an export writes, and nothing else."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    inside = list(folder.iterdir())
    known = all(path.is_file() and path.suffix in PARTS for path in inside)
    return known and any(_is_ours(folder / mark) for mark in MARKS)


def _is_exported_file(file: Path) -> bool:
    """Whether a file has the description that an export has; a checkpoint's tensors are those of a whole network."""
    mark = b"sdcli_exit" if file.suffix == ".safetensors" else b"sdcli"
    if not file.stat().st_size:
        return False
    with file.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as content:
        return content.find(mark) >= 0


def _is_ours(mark: Path) -> bool:
    try:
        return "sdcli" in json.loads(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


@contextmanager
def placing(output: Path) -> Iterator[Path]:
    """Where to write: a path of the same name in a temporary folder beside `output`.

    It is moved to `output` when the block ends, and removed if the block fails. Raises UserError where the disk is
    full or not writable.
    """
    with _explained(output):
        beside = _beside(output)
    new, old = beside / output.name, beside / f"{output.name}.old"
    try:
        with _explained(output):
            yield new
            if output.is_dir():
                os.replace(output, old)
            os.replace(new, output)
    finally:
        if old.exists() and not output.exists():
            os.replace(old, output)
        shutil.rmtree(beside, ignore_errors=True)


def _beside(output: Path) -> Path:
    beside = output.absolute().parent / f".{output.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    beside.mkdir()
    return beside


@contextmanager
def _explained(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output {output} cannot be written: {error.strerror or error}",
            "a folder with room that you may write to",
        ) from error
