"""What a data set is: its splits, its classes, and where its images come from.

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
    """A data set that has a short name."""

    hub: str | None
    """Where it is on the Hugging Face hub; None where it comes with the package, as assets/NAME/NAME.npz."""
    hflip: bool = True
    """Whether a mirrored image still shows the same thing."""
    measured: tuple[Size, Colour, Colour] | None = None
    """Image size, mean and standard deviation of the training images, as published; None: measure them."""


NAMED = {
    "cifar10": Named("uoft-cs/cifar10", measured=((32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))),
    "cifar100": Named("uoft-cs/cifar100", measured=((32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))),
    "digits": Named(None, hflip=False),
}

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Our splits and the names that they go by elsewhere."""

LAYOUTS = (
    "a folder with one folder of images per class (train/CLASS/*.png), with parquet files that have a column of "
    "images, or made by Dataset.save_to_disk"
)


class Images(ABC):
    """Where a split's images come from."""

    @abstractmethod
    def read(self, row: int) -> Image.Image:
        """The image in RGB; raises UserError, naming the row or the file, where it cannot be read."""

    def identity(self) -> tuple[int, str] | None:
        """How many there are in all, and what changes when one of them does; None where nothing tells."""
        return None


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels, read one by one. Pickles, so that workers of any start method can have it."""

    name: str
    """The data set's own name for it ("val")."""
    images: Images
    labels: NDArray[np.int64]
    """Class numbers [N]."""
    index: NDArray[np.int64]
    """Each image's place in the split that the data set came with [N], whatever has been selected since."""

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> Image.Image:
        """The i-th image in RGB; raises UserError, naming the row or the file, where it cannot be read."""
        return self.images.read(int(self.index[i]))

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> Split:
        """The images at these places of this split; their `index` stays what it was."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Split(self.name, self.images, self.labels[chosen], self.index[chosen])


@dataclass(frozen=True)
class ImageData:
    """An opened data set."""

    name: str
    """As the user typed it."""
    source: str
    """What opens it again, from any working folder."""
    classes: tuple[str, ...]
    splits: dict[str, Split]
    """Those of "train", "validation" and "test" that there are. "test" is what is scored."""
    image_key: str | None = None
    """The column of images, None where there are no columns."""
    label_key: str | None = None
    hflip: bool = True
    """Whether a mirrored image still shows the same thing."""
    notes: tuple[str, ...] = ()
    """What the user should know about how it was read."""
    measured: tuple[Size, Colour, Colour] | None = None
    """Image size, mean and standard deviation where they are known without measuring."""

    def class_counts(self) -> dict[str, NDArray[np.int64]]:
        """For each split the number of images of every class [K]."""
        return {name: np.bincount(split.labels, minlength=len(self.classes)) for name, split in self.splits.items()}


def whole_split(name: str, images: Images, labels: NDArray[Any]) -> Split:
    return Split(name, images, labels.astype(np.int64), np.arange(len(labels), dtype=np.int64))


def short_name(data: ImageData) -> str:
    """What tables and notes call it: a folder by its last part, others as they were typed."""
    return printable(Path(data.source).name) if Path(data.source).is_absolute() else data.name


def printable(name: str) -> str:
    """A file's or folder's name with bytes that are no UTF-8 written out ("caf\\xe9"): such a name can be opened, but
    neither printed nor stored as text."""
    return os.fsencode(name).decode(errors="backslashreplace")


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def listed(names: Sequence[str], limit: int = 5) -> str:
    """The first names of a list as text; "…" stands for the others."""
    return ", ".join(map(printable, names[:limit])) + (", …" if len(names) > limit else "")
