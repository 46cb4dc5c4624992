"""Small images decoded once: their bytes in one file that is mapped into memory, for this run and all later ones.

Files lie in `cache_folder`, one for each table and input size, named by a hash of what they hold. They can be deleted
at any time; nothing else removes them.

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

FORMAT = 1
"""Raised when the same data set would give other bytes than before."""
MEMORY = 2 * 2**30
"""How many bytes may be held in memory where there is no file."""
CHUNK = 1024
"""How many images are decoded before they are written."""

_Chunk: TypeAlias = tuple[int, NDArray[np.uint8]]
"""Where it starts, and images [≤ CHUNK, C, H, W]."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """A split's images as bytes, at the input size."""

    array: NDArray[np.uint8]
    """[M, C, H, W], mapped from a file or in memory."""
    rows: NDArray[np.int64]
    """Each image's row in `array` [N]."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Copies of the images at these places of the split [B, C, H, W]."""
        return self.array[self.rows[places]]


def cache_folder() -> Path:
    """Where decoded images are kept: `SDCLI_CACHE`, else the folder sdcli in `XDG_CACHE_HOME`, else ~/.cache/sdcli."""
    if own := os.environ.get("SDCLI_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sdcli"


def cached_pixels(split: Split, preprocess: Preprocess) -> tuple[Pixels | None, list[str]]:
    """The split's images as bytes, decoded at most once per data set and input size, and what to tell the user.

    None where images or the input are larger than `SMALL`, and where there are more than `MEMORY` bytes and no file can
    be written: then images are to be read one by one. A large image late in the table is found late. Bytes are those
    that `transforms.eval_transform` normalises: images of another size are brought to the input size the same way.

    The file holds the whole table that the split is part of, so that training and validation share it. Less than an
    eighth of a table is not worth a file: it is decoded into memory. Raises UserError for an image that cannot be read.
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
        return False  # decoding reports it, along with all others


def _from_file(
    images: Images, num_images: int, fingerprint: str, preprocess: Preprocess, notes: list[str], *, make: bool
) -> NDArray[np.uint8] | None:
    """All images of a table, from the file that there is, or that is made where it should be; else None and a note."""
    path = cache_folder() / f"{_file_name(fingerprint, num_images, preprocess)}.npy"
    shape = (num_images, *preprocess.input_size)
    array = _opened(path, shape)
    if array is None and make:
        try:
            _write(path, shape, _decoded(images, np.arange(num_images), preprocess))
        except OSError as error:
            notes.append(f"decoded images are not kept for the next run: {error} (see SDCLI_CACHE)")
        # Even then: another process may have made it.
        array = _opened(path, shape)
    return array


class _LargeImage(Exception):
    """An image is larger than `SMALL`: it is to be cropped anew each time, not kept."""


def _file_name(fingerprint: str, num_images: int, preprocess: Preprocess) -> str:
    # Pillow's releases decode and resize a little differently.
    parts = (FORMAT, PIL.__version__, fingerprint, num_images, preprocess.input_size, preprocess.interpolation)
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _decoded(images: Images, rows: NDArray[np.int64], preprocess: Preprocess) -> Iterator[_Chunk]:
    """The images at these rows, `CHUNK` at a time. In one thread: so small an image is mostly Python's work."""
    whole = squash(preprocess)
    _LOG.info("decoding %s images", f"{len(rows):,}")
    errors = []
    for start in range(0, len(rows), CHUNK):
        chosen = rows[start : start + CHUNK].tolist()
        chunk = np.empty((len(chosen), *preprocess.input_size), dtype=np.uint8)
        for place, row in enumerate(chosen):
            try:
                image = images.read(row)
            except UserError as error:
                errors.append(error)
                continue
            if max(image.size) > SMALL:
                raise _LargeImage
            chunk[place] = np.asarray(whole(image)).transpose(2, 0, 1)
        _LOG.debug("decoding images: %s of %s", f"{start + len(chosen):,}", f"{len(rows):,}")
        if not errors:
            yield start, chunk
    if errors:
        raise all_of(errors)


def _opened(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """The file, mapped; None where there is none, or one that was cut off or holds something else."""
    try:
        array = npy.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError):
        return None
    whole = array.shape == shape and array.dtype == np.uint8 and array.flags.c_contiguous
    return array if whole else None


def _write(path: Path, shape: tuple[int, ...], chunks: Iterator[_Chunk]) -> None:
    """Makes the file under a name of its own, then gives it the right one: whoever else makes it does no harm.

    Raises OSError where it cannot be written. Written, not mapped: on a full disk a mapped file ends the process.
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
    """What runs that were killed while they wrote have left, a day later."""
    for path in folder.glob("*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > 24 * 60 * 60:
                path.unlink()
