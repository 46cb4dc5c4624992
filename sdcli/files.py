"""Files that are complete or absent."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that replaces it when the block ends, so that readers never see half a file.

    If the block fails, the temporary file is removed and `path` stays as it was. Its name is unique, so that two
    processes can replace the same file. A symbolic link stays one: the file that it points to is replaced. A device, a
    pipe or a folder is never replaced: raises OSError.
    """
    path = _file_at(path)
    beside = _temporary(path)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        # In a folder that has become read-only this fails too, but then the block has raised the error to report.
        with suppress(OSError):
            beside.unlink()


def check_writable(path: Path) -> None:
    """Raises OSError where `path` cannot be written, before anything is computed for it; leaves nothing behind."""
    beside = _temporary(_file_at(path))
    beside.touch()
    beside.unlink()


def _file_at(path: Path) -> Path:
    """The file that a symbolic link points to, whether it exists or not; any other path as it is."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _temporary(path: Path) -> Path:
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "it is not a regular file", str(path))
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def remove_temporary(folder: Path) -> None:
    """Removes the temporary files of killed processes; only for folders that no other process writes to."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            path.unlink()
