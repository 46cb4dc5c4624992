"""Data sets of image files: one folder per class."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdcli.data.dataset import SPLITS, ImageData, Images, whole_split
from sdcli.data.images import read_image
from sdcli.data.splits import scored_as_test, standard_splits
from sdcli.errors import UserError, did_you_mean


@dataclass(frozen=True, eq=False)
class _Files(Images):
    """Images in files of their own."""

    paths: NDArray[np.bytes_]
    """An array, not a list: a forked worker that reads a list of strings copies all of it, by counting references."""

    def read(self, row: int) -> Image.Image:
        path = os.fsdecode(self.paths[row])
        return read_image(path, f"'{path}'")

    def identity(self) -> tuple[int, str] | None:
        told = blake2b()
        for path in self.paths.tolist():
            try:
                status = os.stat(path)
            except OSError:
                return None  # who reads it says so better
            told.update(repr((path, status.st_size, status.st_mtime_ns)).encode())
        return len(self.paths), told.hexdigest()


def split_folders(path: Path) -> dict[str, Path]:
    """The folder of class folders for each of a set's own split names; {} where there is none."""
    own_names = [own for names in SPLITS.values() for own in names]
    named = {
        folder.name: folder for folder in _folders(path) if folder.name.lower() in own_names and _has_classes(folder)
    }
    return named or ({"train": path} if _has_classes(path) else {})


def _folders(path: Path) -> list[Path]:
    # Hidden ones (".ipynb_checkpoints") are never classes.
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _has_classes(path: Path) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return any(
        file.lower().endswith(IMG_EXTENSIONS) and not file.startswith(".")
        for folder in _folders(path)
        for file in os.listdir(folder)
    )


def open_class_folders(name: str, path: Path, folders: Mapping[str, Path]) -> ImageData:
    chosen, notes = standard_splits(name, list(folders))
    found = {split: _class_files(folders[own]) for split, own in chosen.items()}
    first = folders[next(iter(chosen.values()))]
    classes = tuple(sorted({label for label, _ in next(iter(found.values()))}))
    numbers = {label: number for number, label in enumerate(classes)}
    splits = {}
    for split, pairs in found.items():
        extra = sorted({label for label, _ in pairs} - set(classes))
        if extra:
            raise UserError(
                f"'{folders[chosen[split]] / extra[0]}': there is no such class in '{first}'",
                "the same folder names in every split",
                did_you_mean(extra[0], classes) or "rename or remove the folder",
            )
        labels = np.array([numbers[label] for label, _ in pairs], dtype=np.int64)
        paths = np.array([os.fsencode(file) for _, file in pairs])
        splits[split] = whole_split(chosen[split], _Files(paths), labels)
    splits, more_notes = scored_as_test(splits)
    return ImageData(name, str(path), classes, splits, notes=(*notes, *more_notes))


def _class_files(path: Path) -> list[tuple[str, str]]:
    """(class, file) of every image, sorted by both."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    labels = [folder.name for folder in _folders(path)]
    samples = make_dataset(path, {label: i for i, label in enumerate(labels)}, IMG_EXTENSIONS, allow_empty=True)
    # macOS leaves "._photo.jpg" beside photos; they are not images.
    return [(labels[number], file) for file, number in samples if not os.path.basename(file).startswith(".")]
