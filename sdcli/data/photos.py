"""Image files that a user names, without labels: found, and read in batches.

C channels, H W the input's height and width in pixels
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from sdcli.data.dataset import listed
from sdcli.data.folders import EXTENSIONS, walk
from sdcli.data.images import as_rgb, read_image, why_unreadable
from sdcli.data.loaders import Loader, batches_as_they_are, leave_signals_to_parent
from sdcli.data.transforms import Preprocess, Transform, eval_transform
from sdcli.errors import UserError, counted

PHOTOS = (*EXTENSIONS, ".apng", ".avif", ".gif", ".jfif", ".jpe")
"""What is taken from a folder, which may hold other files too; a file that is named is read whatever its name."""

FEW = 64
"""Images that are read by the process itself: starting others would take longer."""


@dataclass(frozen=True)
class Prepared:
    """A checkpoint's own preprocessing: a PIL image, upright and in RGB, to the normalised tensor [C, H, W]."""

    transform: Transform

    @classmethod
    def of(cls, preprocess: Preprocess) -> Prepared:
        """As `sdcli eval` prepares images."""
        return cls(eval_transform(preprocess))

    def __call__(self, image: Image.Image) -> Tensor:
        """Raises ValueError for an image whose values have no known range, or that is nothing but a line."""
        return self.transform(as_rgb(image))


@dataclass(frozen=True)
class Found:
    """The files that a user's paths stand for, in their order."""

    files: list[str]
    problems: list[UserError]
    """Paths that do not exist, and folders or patterns without an image."""
    notes: list[str]


def find_photos(paths: Iterable[str]) -> Found:
    """Files as they are named, the images below folders, and what patterns match; each as often as it is named.

    Folders are walked in the order of their names, and hidden files in them are left out. A file that has `*?[` in its
    name is that file.
    """
    found = Found([], [], [])
    for path in paths:
        own = os.path.expanduser(path)
        if glob.has_magic(own) and not os.path.lexists(own):
            # No path has a NUL: a list of find -print0, say.
            matches = sorted(glob.glob(own, recursive=True)) if "\0" not in own else []
            if not matches:
                found.problems.append(
                    UserError(f"'{path}' matches no file", "a pattern such as 'photos/*.jpg'", "check the pattern")
                )
            for match in matches:
                _add(found, match)
        else:
            _add(found, own)
    return found


def _add(found: Found, path: str) -> None:
    if not os.path.isdir(path):
        if os.path.lexists(path):
            found.files.append(path)
        else:
            found.problems.append(_missing(path))
        return
    files: list[str] = []
    others: list[str] = []
    try:
        # By the order of folders, not of os.walk, whose next folder may be the last one's.
        for folder, names in sorted(walk(path)):
            for name in sorted(names):
                (files if name.lower().endswith(PHOTOS) else others).append(os.path.join(folder, name))
    except OSError as error:
        found.problems.append(
            UserError(f"'{error.filename or path}' cannot be read: {error.strerror}", "a folder that can be read")
        )
        return
    if others and files:
        found.notes.append(
            f"'{path}': skipped {counted(len(others), 'file')} without the extension of an image: {listed(others, 3)}"
        )
    if not files:
        inside = f", only {counted(len(others), 'other file')}: {listed(others, 3)}" if others else ""
        found.problems.append(UserError(f"folder '{path}' has no images{inside}", f"files such as {', '.join(PHOTOS)}"))
    found.files.extend(files)


def _missing(path: str) -> UserError:
    folder, name = os.path.split(path.rstrip(os.sep))
    try:
        near = get_close_matches(name, os.listdir(folder or "."), n=1)
    except (OSError, ValueError):
        near = []
    return UserError(
        f"'{path}' does not exist",
        "an image, a folder of images, a pattern such as 'photos/*.jpg', or - for a list on standard input",
        f"did you mean '{os.path.join(folder, near[0])}'?" if near else "check the path",
    )


@dataclass(frozen=True)
class PhotoBatch:
    """Some of the files, in their order."""

    files: list[str]
    """Those that could be read."""
    images: Tensor | None
    """[B, C, H, W]; None if none of them could be."""
    errors: list[UserError]
    """One for each of the others."""

    def pin_memory(self) -> PhotoBatch:
        """What DataLoader calls for a GPU."""
        return replace(self, images=None if self.images is None else self.images.pin_memory())


def read_photos(
    files: Sequence[str], prepare: Prepared, *, batch_size: int, workers: int | None, pin: bool = False
) -> Iterator[PhotoBatch]:
    """The files in batches, each read and prepared on its own by `workers` processes, beside the network.

    None: for a GPU (`pin`) by as many as there are cores, up to 8; beside a network on the CPU by a quarter of that;
    by none where there are few files.
    """
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # On a CPU the network has the other cores.
        workers = 0 if len(files) <= FEW else max(1, min(8, cores) if pin else cores // 4)
    rows = [list(range(start, min(start + batch_size, len(files)))) for start in range(0, len(files), batch_size)]
    loader = Loader(
        _Photos(files, prepare),  # type: ignore[arg-type]
        batch_sampler=rows,
        collate_fn=batches_as_they_are,
        num_workers=min(workers, len(rows)),
        worker_init_fn=leave_signals_to_parent,
        pin_memory=pin,
        generator=torch.Generator(),
    )
    try:
        yield from loader  # type: ignore[misc]
    finally:
        loader.close()


class _Photos(Dataset[PhotoBatch]):
    """The files as DataLoader reads them: a whole batch at a time."""

    def __init__(self, files: Sequence[str], prepare: Prepared) -> None:
        self.files, self.prepare = files, prepare

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, rows: list[int]) -> PhotoBatch:
        files, images, errors = [], [], []
        for row in rows:
            file = self.files[row]
            try:
                images.append(read_photo(file, self.prepare))
                files.append(file)
            except UserError as error:
                errors.append(error)
        return PhotoBatch(files, torch.stack(images) if images else None, errors)


def read_photo(file: str | os.PathLike[str], prepare: Prepared) -> Tensor:
    """One file as the network's input [C, H, W]; raises UserError, which names it, if it cannot be read."""
    file = os.fspath(file)
    if reason := why_unreadable(file):
        raise UserError(f"'{file}': the image cannot be read ({reason})", "an image file", "replace or remove it")
    image = read_image(file, f"'{file}'")
    try:
        return prepare(image)
    except (ValueError, MemoryError) as error:
        raise UserError(
            f"'{file}': the image cannot be read ({error or 'out of memory'})", "an image file", "replace or remove it"
        ) from None
