"""Data sets opened by short name, path or hub id."""

from __future__ import annotations

import logging
import os
import re
import sys
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdcli.data.dataset import LAYOUTS, NAMED, ImageData, Images, Named, listed, whole_split
from sdcli.data.folders import open_class_folders
from sdcli.data.hub import load_from_disk, load_from_folder, load_from_hub, unreadable
from sdcli.data.images import reason_of
from sdcli.data.tables import open_tables
from sdcli.errors import UserError, unknown

_LOG = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def open_dataset(name: str, *, image_key: str | None = None, label_key: str | None = None) -> ImageData:
    """Opens a data set by its short name, a local folder (see `LAYOUTS`), or its id on the Hugging Face hub.

    `image_key` and `label_key` name the columns if their usual names and types are ambiguous. Without a labelled test
    split, the validation split is scored as "test", as is usual for ImageNet, and validation images are held out of
    "train". Splits without labels are left out. Classes are numbered as in the data set, else in the order of the
    training split's sorted labels or folder names.

    Raises UserError for an unknown name, a path that does not exist or holds no images, a hub that does not answer,
    files that cannot be images, a column that is missing or does not fit, and a label that is missing or unknown. Does
    not decode any image.
    """
    _LOG.info("opening %s", name)
    data = _open(name, image_key, label_key)
    # Arrow keeps the memory in which it converted a table, as much as a large file of it needs.
    if arrow := sys.modules.get("pyarrow"):
        arrow.default_memory_pool().release_unused()
    if len(data.classes) < 2:
        raise UserError(
            f"'{name}' has a single class, '{data.classes[0]}'",
            "two classes or more",
            "give the folder that holds the class folders",
        )
    return replace(data, notes=(*data.notes, *_missing_classes(data)))


def _missing_classes(data: ImageData) -> list[str]:
    notes = []
    for split, counts in data.class_counts().items():
        if missing := [name for name, count in zip(data.classes, counts, strict=True) if not count]:
            which = f"{len(missing)} of {len(data.classes)} classes"
            notes.append(f"split '{data.splits[split].name}' has no images of {which}: {listed(missing)}")
    return notes


def _open(name: str, image_key: str | None, label_key: str | None) -> ImageData:
    if name in NAMED:
        known = NAMED[name]
        if known.hub is None:
            refuse_columns(name, image_key, label_key)
            return _open_shipped(name, known)
        return open_tables(name, name, load_from_hub(name, known.hub), image_key, label_key, known)
    try:
        path = Path(name).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:
        shown = name if len(name) <= 100 else f"{name[:100]}… ({len(name)} characters)"
        raise UserError(f"the path '{shown}' cannot be opened: {reason_of(error)}", LAYOUTS, "check the path") from None
    if is_folder:
        return _open_folder(name, path.resolve(), image_key, label_key)
    if exists:
        raise UserError(f"'{name}' is a file", LAYOUTS, _instead_of_file(path))
    # "data/cifar" could be a hub id; if there is a folder "data", it is a mistyped path.
    if _HUB_ID.fullmatch(name) and not path.parent.is_dir():
        return open_tables(name, name, load_from_hub(name, name), image_key, label_key, Named(name))
    if len(path.parts) > 1 or name.startswith((".", "~")):
        raise _missing_path(name, path)
    raise unknown("data set", name, NAMED, "give a folder as ./FOLDER, or a hub id as OWNER/NAME")


def refuse_columns(name: str, image_key: str | None, label_key: str | None) -> None:
    """Raises UserError for an option that names a column of data without columns: it would have no effect."""
    for flag, key in (("--image-key", image_key), ("--label-key", label_key)):
        if key is not None:
            raise UserError(f"{flag} {key}: '{name}' has no columns", "a data set of tables", f"leave {flag} out")


def _missing_path(name: str, path: Path) -> UserError:
    parent = next(parent for parent in path.absolute().parents if parent.is_dir())
    missing = path.absolute().relative_to(parent).parts[0]
    try:
        folders = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    except OSError:
        folders = []
    near = get_close_matches(missing, folders, n=1, cutoff=0.75)
    fix = f"did you mean '{near[0]}'?" if near else "check the path"
    return UserError(f"the path '{name}' does not exist: there is no '{missing}' in '{parent}'", LAYOUTS, fix)


def _instead_of_file(path: Path) -> str:
    if path.suffix in (".parquet", ".arrow"):
        return f"give its folder, '{path.parent}'"
    if path.suffix in (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"):
        return "unpack it and give the folder"
    return "put the images of each class into a folder of their own, and give the folder above"


@dataclass(frozen=True, eq=False)
class _Pixels(Images):
    """Grayscale images in memory [N, H, W]."""

    pixels: NDArray[np.uint8]

    def read(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[row]).convert("RGB")


def _open_shipped(name: str, known: Named) -> ImageData:
    with files("sdcli").joinpath("assets", name, f"{name}.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        splits = {}
        for split in ("train", "test"):
            # Values range from 0 to 16: see the README beside the file.
            pixels = (arrays[f"{split}_images"].astype(np.uint16) * 255 // 16).astype(np.uint8)
            splits[split] = whole_split(split, _Pixels(pixels), arrays[f"{split}_labels"])
    classes = tuple(str(label) for label in range(int(splits["train"].labels.max()) + 1))
    return ImageData(name, name, classes, splits, hflip=known.hflip, measured=known.measured)


def _open_folder(name: str, path: Path, image_key: str | None, label_key: str | None) -> ImageData:
    home = Path(os.path.expanduser("~"))
    if path == Path(path.anchor) or path == home or path in home.parents:
        # Reading it would walk the whole disk.
        raise UserError(f"'{name}' is not the folder of a data set", LAYOUTS, "give the data set's own folder")
    if any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        return open_tables(name, str(path), load_from_disk(name, path), image_key, label_key, Named(None))
    # Tables first: a hub repository may hold a few pictures beside them. The hub's layouts use two levels.
    patterns = ("*.parquet", "*/*.parquet", "*.arrow", "*/*.arrow")
    try:
        has_tables = any(next(path.glob(pattern), None) for pattern in patterns)
        if not has_tables and (data := open_class_folders(name, path)):
            refuse_columns(name, image_key, label_key)
            return data
    except OSError as error:
        raise unreadable(name, error) from None
    if str(path).encode(errors="replace") != os.fsencode(path):
        raise UserError(f"'{name}': the path is not valid UTF-8", "UTF-8, for data sets of tables", "rename the folder")
    tables, parts = load_from_folder(name, path)
    return open_tables(name, str(path), tables, image_key, label_key, Named(None), parts)
