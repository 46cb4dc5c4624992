"""Small images decoded once, into a memory-mapped file for this run and all later ones.

The files are in `cache_folder`, one for each table and input size, named by a hash of their content. They can be
deleted at any time; sdcli never deletes them.

C channels, H W the input's height and width in pixels, M images of a file, N images of a split
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TypeAlias

import numpy as np
import PIL
from numpy.lib import format as npy
from numpy.typing import NDArray

from sdcli.data.dataset import Images, Split
from sdcli.data.images import all_of
from sdcli.data.transforms import SMALL, Preprocess, squash
from sdcli.errors import UserError

_LOG = logging.getLogger(__name__)

FORMAT = 2
"""Increased when the same data set would give other bytes than before."""
MEMORY = 2 * 2**30
"""Bytes that may be held in memory if there is no file."""
CHUNK = 1024
"""Images decoded before they are written."""

_Chunk: TypeAlias = tuple[int, NDArray[np.uint8]]
"""Its start, and images [≤ CHUNK, C, H, W]."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """A split's images as bytes, at the input size."""

    array: NDArray[np.uint8]
    """[M, C, H, W], mapped from a file or in memory."""
    rows: NDArray[np.int64]
    """Each image's row in `array` [N]."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Copies of the images at these positions in the split [B, C, H, W]."""
        return self.array[self.rows[positions]]


def cache_folder() -> Path:
    """The folder of decoded images: `SDCLI_CACHE`, else sdcli in `XDG_CACHE_HOME`, else ~/.cache/sdcli."""
    if own := os.environ.get("SDCLI_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sdcli"


def cached_pixels(split: Split, preprocess: Preprocess) -> tuple[Pixels | None, list[str]]:
    """The split's images as bytes, decoded at most once per data set and input size, and notes for the user.

    None if images or the input are larger than `SMALL`, or if they need more than `MEMORY` bytes and no file can be
    written: images are then read one by one. A large image late in the table is found late. The bytes are those that
    `transforms.eval_transform` normalises: images of another size are resized to the input size the same way.

    The file holds the whole table that the split is part of, so that training and validation share it. Less than an
    eighth of a table is decoded into memory instead. Raises one UserError for all images that cannot be read.
    """
    if max(preprocess.size) > SMALL or _begins_large(split):
        return None, []
    notes: list[str] = []
    num_bytes = len(split) * math.prod(preprocess.input_size)
    try:
        identity = split.images.identity()
        if identity:
            worth_a_file = 8 * len(split) >= identity[0] or num_bytes > MEMORY
            array = _from_file(split.images, *identity, preprocess, notes, make=worth_a_file)
            if array is not None:
                return Pixels(array, split.index), notes
        if num_bytes > MEMORY:
            return None, notes
        array = np.empty((len(split), *preprocess.input_size), dtype=np.uint8)
        for start, chunk in _decoded(split.images, split.index, preprocess):
            array[start : start + len(chunk)] = chunk
    except _LargeImage:
        return None, []
    return Pixels(array, np.arange(len(split))), notes


def _begins_large(split: Split) -> bool:
    try:
        return max(split.image(0).size) > SMALL
    except UserError:
        return False  # decoding reports it, together with all others


def _from_file(
    images: Images, num_images: int, fingerprint: str, preprocess: Preprocess, notes: list[str], *, make: bool
) -> NDArray[np.uint8] | None:
    """All images of a table from its file, written first if `make` is set; None, with a note, if that fails."""
    path = cache_folder() / f"{_file_name(fingerprint, num_images, preprocess)}.npy"
    shape = (num_images, *preprocess.input_size)
    array = _opened(path, shape)
    if array is None and make:
        try:
            _write(path, shape, _decoded(images, np.arange(num_images), preprocess))
        except OSError as error:
            notes.append(f"failed to cache decoded images: {error} (SDCLI_CACHE sets the folder)")
        # Also after a failure: another process may have written it.
        array = _opened(path, shape)
    return array


class _LargeImage(Exception):
    """An image is larger than `SMALL`: it is cropped anew each time, so it cannot be cached."""


def _file_name(fingerprint: str, num_images: int, preprocess: Preprocess) -> str:
    # Pillow releases decode and resize slightly differently.
    parts = (FORMAT, PIL.__version__, fingerprint, num_images, preprocess.input_size, preprocess.interpolation)
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _decoded(images: Images, rows: NDArray[np.int64], preprocess: Preprocess) -> Iterator[_Chunk]:
    """The images at these rows, `CHUNK` at a time. Single-threaded: small images mostly cost Python's time."""
    whole = squash(preprocess)
    _LOG.info("decoding %s images", f"{len(rows):,}")
    errors = []
    for start in range(0, len(rows), CHUNK):
        chosen = rows[start : start + CHUNK].tolist()
        chunk = np.empty((len(chosen), *preprocess.input_size), dtype=np.uint8)
        for position, row in enumerate(chosen):
            try:
                image = images.read(row)
            except UserError as error:
                errors.append(error)
                continue
            if max(image.size) > SMALL:
                raise _LargeImage
            chunk[position] = np.asarray(whole(image)).transpose(2, 0, 1)
        _LOG.debug("decoding images: %s of %s", f"{start + len(chosen):,}", f"{len(rows):,}")
        if not errors:
            yield start, chunk
    if errors:
        raise all_of(errors)


def _opened(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """The file, memory-mapped; None if it is missing, truncated or holds something else."""
    try:
        array = npy.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError):
        return None
    whole = array.shape == shape and array.dtype == np.uint8 and array.flags.c_contiguous
    return array if whole else None


def _write(path: Path, shape: tuple[int, ...], chunks: Iterator[_Chunk]) -> None:
    """Writes the file under a temporary name and then renames it, so that several processes may write it at once.

    Raises OSError on failure. Written, not mapped: on a full disk, writing to a mapped file kills the process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(path.parent)
    temporary = path.with_name(f"{path.stem}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for _, chunk in chunks:
                file.write(chunk.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _remove_left_over(folder: Path) -> None:
    """Deletes temporary files that killed runs left more than a day ago."""
    for path in folder.glob("*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > 24 * 60 * 60:
                path.unlink()
