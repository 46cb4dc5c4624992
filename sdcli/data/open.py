"""Data sets opened by short name, path or hub id."""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdcli.data.dataset import LAYOUTS, NAMED, ImageData, Images, Named, whole_split
from sdcli.data.folders import open_class_folders, split_folders
from sdcli.data.hub import load_from_disk, load_from_folder, load_from_hub, unreadable
from sdcli.data.tables import open_tables
from sdcli.errors import UserError, did_you_mean, unknown

_LOG = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def open_dataset(name: str, *, image_key: str | None = None, label_key: str | None = None) -> ImageData:
    """A data set by its short name, as a local folder (see `LAYOUTS`), or by its id on the Hugging Face hub.

    `image_key` and `label_key` name the columns where the usual names and types do not tell. Where there is no test
    split with labels, the validation split is what is scored, as "test", as is usual for ImageNet; what to choose by is
    then to be held out of "train". Splits without labels are left out. Classes are numbered as the data set says, else
    in the order of the training split's sorted labels or folder names.

    Raises UserError for an unknown name, a path that does not exist or holds no images, a hub that cannot be reached, a
    column that is missing or does not fit, and a label that is missing or unknown. No image is read yet.
    """
    _LOG.info("opening %s", name)
    data = _open(name, image_key, label_key)
    # Arrow keeps what it needed to bring a table into its own format, as much as a large file of it holds.
    if arrow := sys.modules.get("pyarrow"):
        arrow.default_memory_pool().release_unused()
    if len(data.classes) < 2:
        raise UserError(
            f"'{name}' has a single class, '{data.classes[0]}'",
            "two classes or more",
            "give the folder of class folders",
        )
    return data


def _open(name: str, image_key: str | None, label_key: str | None) -> ImageData:
    if name in NAMED:
        known = NAMED[name]
        if known.hub is None:
            refuse_columns(name, image_key, label_key)
            return _open_shipped(name, known)
        return open_tables(name, name, load_from_hub(name, known.hub), image_key, label_key, known)
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_folder(name, path.resolve(), image_key, label_key)
    if path.exists():
        raise UserError(f"'{name}' is a file", LAYOUTS, f"give its folder, '{path.parent}'")
    # "data/cifar" has the form of a hub id; where there is a folder "data" it is a mistyped path.
    if _HUB_ID.fullmatch(name) and not path.parent.is_dir():
        return open_tables(name, name, load_from_hub(name, name), image_key, label_key, Named(name))
    if len(path.parts) > 1 or name.startswith((".", "~")):
        raise _missing_path(name, path)
    raise unknown("data set", name, NAMED, "give a folder as ./FOLDER, or a hub id as OWNER/NAME")


def refuse_columns(name: str, image_key: str | None, label_key: str | None) -> None:
    """Raises UserError where a column is asked for and there are none: the option would have no effect."""
    for flag, key in (("--image-key", image_key), ("--label-key", label_key)):
        if key is not None:
            raise UserError(f"{flag} {key}: '{name}' has no columns", "a data set of tables", f"leave {flag} out")


def _missing_path(name: str, path: Path) -> UserError:
    parent = next(parent for parent in path.absolute().parents if parent.is_dir())
    missing = path.absolute().relative_to(parent).parts[0]
    try:
        there = [entry.name for entry in parent.iterdir()]
    except OSError:
        there = []
    fix = did_you_mean(missing, there) or "check the path"
    return UserError(f"the path '{name}' does not exist: there is no '{missing}' in '{parent}'", LAYOUTS, fix)


@dataclass(frozen=True, eq=False)
class _Pixels(Images):
    """Images that are in memory, grey [N, H, W]."""

    pixels: NDArray[np.uint8]

    def read(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[row]).convert("RGB")


def _open_shipped(name: str, known: Named) -> ImageData:
    with files("sdcli").joinpath("assets", name, f"{name}.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        splits = {}
        for split in ("train", "test"):
            # Ink is counted from 0 to 16: see the file's README.
            pixels = (arrays[f"{split}_images"].astype(np.uint16) * 255 // 16).astype(np.uint8)
            splits[split] = whole_split(split, _Pixels(pixels), arrays[f"{split}_labels"])
    classes = tuple(str(label) for label in range(int(splits["train"].labels.max()) + 1))
    return ImageData(name, name, classes, splits, hflip=known.hflip)


def _open_folder(name: str, path: Path, image_key: str | None, label_key: str | None) -> ImageData:
    if any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        return open_tables(name, str(path), load_from_disk(name, path), image_key, label_key, Named(None))
    # Tables first: a hub repository may hold a few pictures beside them. Two levels are what the hub's layouts use.
    patterns = ("*.parquet", "*/*.parquet", "*.arrow", "*/*.arrow")
    try:
        has_tables = any(next(path.glob(pattern), None) for pattern in patterns)
        if not has_tables and (folders := split_folders(path)):
            refuse_columns(name, image_key, label_key)
            return open_class_folders(name, path, folders)
    except OSError as error:
        raise unreadable(name, error) from None
    return open_tables(name, str(path), load_from_folder(name, path), image_key, label_key, Named(None))
