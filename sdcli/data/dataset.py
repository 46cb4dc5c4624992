"""A data set: its splits, its classes, and the source of its images.

K classes, N images of a split
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdcli.data.transforms import Colour, Size


@dataclass(frozen=True)
class Named:
    """A data set with a short name."""

    hub: str | None
    """Its id on the Hugging Face hub; None if it comes with the package, as assets/NAME/NAME.npz."""
    hflip: bool = True
    """Whether classes are mirror-invariant, so that a horizontal flip keeps the label."""
    measured: tuple[Size, Colour, Colour] | None = None
    """Image size, mean and standard deviation of the training images, as published or measured; None: measure them."""


NAMED = {
    "cifar10": Named("uoft-cs/cifar10", measured=((32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))),
    "cifar100": Named("uoft-cs/cifar100", measured=((32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))),
    "digits": Named(None, hflip=False, measured=((8, 8), (0.305, 0.305, 0.305), (0.3765, 0.3765, 0.3765))),
}

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Each split and the names that data sets use for it."""

LAYOUTS = (
    "a folder with one folder of images per class (train/CLASS/*.png), with parquet files that have a column of "
    "images, or written by Dataset.save_to_disk"
)


class Images(ABC):
    """The source of a split's images."""

    @abstractmethod
    def read(self, row: int) -> Image.Image:
        """The image in RGB. Raises UserError, naming the row or the file, if it cannot be read."""

    def file(self, row: int) -> str | None:
        """The file of the image, below the data set's folder; None if it has no file of its own."""
        return None

    def identity(self) -> tuple[int, str] | None:
        """How many images there are in all, and a fingerprint that changes with any of them; None if unknown."""
        return None


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels, read one by one. Can be pickled, for workers of any start method."""

    name: str
    """The data set's own name for it ("val")."""
    images: Images
    labels: NDArray[np.int64]
    """Class indices [N]."""
    index: NDArray[np.int64]
    """Each image's index in the data set's own split [N]; a selection keeps it."""

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> Image.Image:
        """The i-th image in RGB. Raises UserError, naming the row or the file, if it cannot be read."""
        return self.images.read(int(self.index[i]))

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> Split:
        """The images at these positions; each keeps its `index`."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Split(self.name, self.images, self.labels[chosen], self.index[chosen])


@dataclass(frozen=True)
class ImageData:
    """An opened data set."""

    name: str
    """As the user typed it."""
    source: str
    """The name or path that opens it again, from any working folder."""
    classes: tuple[str, ...]
    splits: dict[str, Split]
    """"train", "validation" and "test", as far as they exist. "test" is for the final score."""
    image_key: str | None = None
    """The column of images; None if there are no columns."""
    label_key: str | None = None
    hflip: bool = True
    """Whether classes are mirror-invariant, so that a horizontal flip keeps the label."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how it was read."""
    measured: tuple[Size, Colour, Colour] | None = None
    """Image size, mean and standard deviation if they are known without measuring."""

    def class_counts(self) -> dict[str, NDArray[np.int64]]:
        """For each split the number of images of every class [K]."""
        return {name: np.bincount(split.labels, minlength=len(self.classes)) for name, split in self.splits.items()}


def whole_split(name: str, images: Images, labels: NDArray[Any]) -> Split:
    return Split(name, images, labels.astype(np.int64), np.arange(len(labels), dtype=np.int64))


def short_name(data: ImageData) -> str:
    """Its name in tables and notes: the last part of a folder's path, other names as typed."""
    return printable(Path(data.source).name) if Path(data.source).is_absolute() else data.name


def printable(name: str) -> str:
    """The name of a file or folder with bytes that are not UTF-8 escaped ("caf\\xe9"): such a name can be opened, but
    neither printed nor stored as text."""
    return os.fsencode(name).decode(errors="backslashreplace")


def listed(names: Sequence[str], limit: int = 5) -> str:
    """The first names of a list as text; "…" stands for the others."""
    return ", ".join(map(printable, names[:limit])) + (", …" if len(names) > limit else "")
