"""Data sets: opened by name or path, measured, and shared out into splits.

B batch, C channels, H W an image's height and width in pixels, N images of a split, K classes
"""

from __future__ import annotations

import logging
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from sdcli.errors import UserError, did_you_mean, unknown
from sdcli.transforms import SMALL, Colour, Size


@dataclass(frozen=True)
class Named:
    """A data set that has a short name."""

    hub: str | None
    """Where it is on the Hugging Face hub; None where it comes with the package, as assets/NAME/NAME.npz."""
    mirror: bool = True
    """Whether a mirrored image still shows the same thing."""
    measured: tuple[Size, Colour, Colour] | None = None
    """Image size, mean and standard deviation of the training images, as published; None: measure them."""


NAMED = {
    "cifar10": Named("uoft-cs/cifar10", measured=((32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))),
    "cifar100": Named("uoft-cs/cifar100", measured=((32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))),
    "digits": Named(None, mirror=False),
}

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Our splits and the names that they go by elsewhere."""

IMAGE_COLUMNS = ("image", "img", "images", "picture", "photo", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "category")

LAYOUTS = (
    "a folder with one folder of images per class (train/CLASS/*.png), with parquet files that have a column of "
    "images, or made by Dataset.save_to_disk"
)

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


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
    mirror: bool = True
    """Whether a mirrored image still shows the same thing."""
    notes: tuple[str, ...] = ()
    """What the user should know about how it was read."""
    measured: tuple[Size, Colour, Colour] | None = None
    """Image size, mean and standard deviation where they are known without measuring."""


def open_dataset(name: str, *, image_key: str | None = None, label_key: str | None = None) -> ImageData:
    """A data set by its short name, as a local folder (see `LAYOUTS`), or by its id on the Hugging Face hub.

    `image_key` and `label_key` name the columns where the usual names and types do not tell. Where there is no test
    split with labels, the validation split is what is scored, as "test", as is usual for ImageNet; what to choose by is
    then to be held out of "train". Splits without labels are left out. Classes are numbered as the data set says, else
    in the order of the training split's sorted labels or folder names.

    Raises UserError for an unknown name, a path that does not exist or holds no images, a hub that cannot be reached, a
    column that is missing or does not fit, and a label that is missing or unknown. No image is read yet.
    """
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
            _no_columns(name, image_key, label_key)
            return _open_shipped(name, known)
        return _open_tables(name, name, _load_from_hub(name, known.hub), image_key, label_key, known)
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_folder(name, path.resolve(), image_key, label_key)
    if path.exists():
        raise UserError(f"'{name}' is a file", LAYOUTS, f"give its folder, '{path.parent}'")
    # "data/cifar" has the form of a hub id; where there is a folder "data" it is a mistyped path.
    if _HUB_ID.fullmatch(name) and not path.parent.is_dir():
        return _open_tables(name, name, _load_from_hub(name, name), image_key, label_key, Named(name))
    if len(path.parts) > 1 or name.startswith((".", "~")):
        raise _missing_path(name, path)
    raise unknown("data set", name, NAMED, "give a folder as ./FOLDER, or a hub id as OWNER/NAME")


def _no_columns(name: str, image_key: str | None, label_key: str | None) -> None:
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
            splits[split] = _whole(split, _Pixels(pixels), arrays[f"{split}_labels"])
    classes = tuple(str(label) for label in range(int(splits["train"].labels.max()) + 1))
    return ImageData(name, name, classes, splits, mirror=known.mirror)


def _whole(name: str, images: Images, labels: NDArray[Any]) -> Split:
    return Split(name, images, labels.astype(np.int64), np.arange(len(labels), dtype=np.int64))


def _open_folder(name: str, path: Path, image_key: str | None, label_key: str | None) -> ImageData:
    if any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        return _open_tables(name, str(path), _load_from_disk(name, path), image_key, label_key, Named(None))
    # Tables first: a hub repository may hold a few pictures beside them. Two levels are what the hub's layouts use.
    patterns = ("*.parquet", "*/*.parquet", "*.arrow", "*/*.arrow")
    try:
        has_tables = any(next(path.glob(pattern), None) for pattern in patterns)
        if not has_tables and (folders := _split_folders(path)):
            _no_columns(name, image_key, label_key)
            return _open_class_folders(name, path, folders)
    except OSError as error:
        raise _unreadable(name, error) from None
    return _open_tables(name, str(path), _load_from_folder(name, path), image_key, label_key, Named(None))


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


def _split_folders(path: Path) -> dict[str, Path]:
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


def _open_class_folders(name: str, path: Path, folders: Mapping[str, Path]) -> ImageData:
    chosen, notes = _standard_splits(name, list(folders))
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
        splits[split] = _whole(chosen[split], _Files(paths), labels)
    splits, more_notes = _scored_as_test(splits)
    return ImageData(name, str(path), classes, splits, notes=(*notes, *more_notes))


def _class_files(path: Path) -> list[tuple[str, str]]:
    """(class, file) of every image, sorted by both."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    labels = [folder.name for folder in _folders(path)]
    samples = make_dataset(path, {label: i for i, label in enumerate(labels)}, IMG_EXTENSIONS, allow_empty=True)
    # macOS leaves "._photo.jpg" beside photos; they are not images.
    return [(labels[number], file) for file, number in samples if not os.path.basename(file).startswith(".")]


@contextmanager
def _quiet(show_progress: bool = False) -> Iterator[None]:
    """Keeps `datasets` and the hub's client from talking on stderr: what goes wrong comes as an exception anyway."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    levels = datasets.logging.get_verbosity(), hub_logging.get_verbosity()
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(logging.ERROR)
    hub_logging.set_verbosity(logging.ERROR)
    if not show_progress:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if had_bars:
            datasets.enable_progress_bars()


def _load_from_disk(name: str, path: Path) -> dict[str, Any]:
    import datasets

    with _quiet():
        try:
            loaded = datasets.load_from_disk(str(path))
        except (OSError, ValueError, LookupError) as error:
            raise _unreadable(name, error) from None
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _load_from_folder(name: str, path: Path) -> dict[str, Any]:
    import datasets
    from datasets.exceptions import DatasetsError

    with _quiet():
        try:
            return dict(datasets.load_dataset(str(path)))
        except FileNotFoundError:
            raise UserError(f"'{name}' holds no images", LAYOUTS, "check the path") from None
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise _unreadable(name, error) from None


def _load_from_hub(name: str, hub: str) -> dict[str, Any]:
    """Downloads a data set, or takes it from the cache where the hub does not answer."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    answers = _hub_answers(hub)
    went_offline = datasets.config.HF_HUB_OFFLINE
    with _quiet(show_progress=True):
        try:
            # Without this it tries for half a minute before it looks into the cache.
            datasets.config.HF_HUB_OFFLINE = went_offline or not answers
            return dict(datasets.load_dataset(hub))
        except ConnectionError:
            raise UserError(
                f"'{name}' has not been downloaded yet, and the Hugging Face hub cannot be reached",
                "a network connection, or a local folder",
                f"elsewhere: hf download --repo-type dataset {hub} --local-dir FOLDER; then here: --dataset FOLDER",
            ) from None
        except DatasetNotFoundError:
            raise UserError(
                f"'{name}' is neither a folder nor a data set on the Hugging Face hub that you may read",
                "a folder, or the id of a data set as OWNER/NAME",
                f"look at https://huggingface.co/datasets/{hub}; where it asks for a login: hf auth login",
            ) from None
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise _unreadable(name, error) from None
        finally:
            datasets.config.HF_HUB_OFFLINE = went_offline


def _hub_answers(hub: str) -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(hub, timeout=10)
    except HfHubHTTPError:
        return True  # what it has against the name, load_dataset says better
    except Exception:  # which HTTP library is behind it, and what that raises, changes from release to release
        return False
    return True


def _unreadable(name: str, error: Exception) -> UserError:
    cause = error.__cause__ or error
    reason = str(cause).strip().partition("\n")[0] or type(cause).__name__
    return UserError(f"'{name}' cannot be opened: {reason}", LAYOUTS, "repair it or give another folder")


@dataclass(eq=False)
class _Rows(Images):
    """Images in a column of a table."""

    place: str
    table: Any
    key: str

    @cached_property
    def _column(self) -> Any:
        # The column itself: a row of `datasets` costs a third of a millisecond, of this a few microseconds.
        return self.table.with_format("arrow")[:].column(self.key)

    def __getstate__(self) -> dict[str, Any]:
        # The table pickles as the name of the file that it is mapped from, its column as all the bytes.
        return {name: value for name, value in self.__dict__.items() if name != "_column"}

    def read(self, row: int) -> Image.Image:
        where = f"{self.place}, row {row}"
        value = self._column[row].as_py()
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not value:
            raise UserError(f"{where}: there is no image", "an image in every row", "remove the row")
        return read_image(value, where)

    def identity(self) -> tuple[int, str] | None:
        return self.table.num_rows, f"{self.table._fingerprint} {self.key}"


def _open_tables(
    name: str, source: str, tables: dict[str, Any], image_key: str | None, label_key: str | None, known: Named
) -> ImageData:
    """Finds splits, columns and classes in the tables of `datasets`."""
    chosen, notes = _standard_splits(name, list(tables))
    features = tables[next(iter(chosen.values()))].features
    image_key = _find_column(name, "image", image_key, features, IMAGE_COLUMNS)
    label_key = _find_column(name, "label", label_key, features, LABEL_COLUMNS)
    values = {}
    for split, own in chosen.items():
        for key in (image_key, label_key):
            if key not in tables[own].column_names:
                raise UserError(f"{_place(name, own)}: no column '{key}'", "the same columns in every split")
        values[split] = tables[own].select_columns([label_key]).with_format("arrow")[:].column(label_key).to_pylist()
    for split in list(values):
        # A training split without labels is a mistake, which is shown below; a test split without them is usual.
        if split != "train" and all(map(_is_missing, values[split])):
            notes.append(f"split '{chosen[split]}' is left out: it has no labels")
            del values[split]
    if not values:
        raise UserError(f"{name}: there is no image with a '{label_key}'", "labelled images", "try another --label-key")
    classes, numbers = _classes(name, label_key, features[label_key], next(iter(values.values())))
    splits = {}
    for split, own_values in values.items():
        place = _place(name, chosen[split])
        rows = _Rows(place, tables[chosen[split]].select_columns([image_key]), image_key)
        splits[split] = _whole(chosen[split], rows, _class_numbers(place, label_key, own_values, numbers))
    splits, more_notes = _scored_as_test(splits)
    return ImageData(
        name,
        source,
        classes,
        splits,
        image_key=image_key,
        label_key=label_key,
        mirror=known.mirror,
        notes=(*notes, *more_notes),
        measured=known.measured,
    )


def _place(name: str, split: str) -> str:
    return f"{name}, split '{split}'"


def _standard_splits(name: str, names: list[str]) -> tuple[dict[str, str], list[str]]:
    """Which of a data set's own splits is "train", "validation" and "test", in this order, and what is left out."""
    lower = {own.lower(): own for own in names}
    chosen = {}
    for split, aliases in SPLITS.items():
        if own := next((lower[alias] for alias in aliases if alias in lower), None):
            chosen[split] = own
    if not chosen and len(names) == 1:
        chosen = {"train": names[0]}
    if not chosen:
        known = ", ".join(alias for aliases in SPLITS.values() for alias in aliases)
        raise UserError(f"'{name}' has the splits {', '.join(names)}", f"among them one of {known}", "rename them")
    return chosen, [f"split '{own}' is not used" for own in names if own not in chosen.values()]


def _scored_as_test(splits: dict[str, Split]) -> tuple[dict[str, Split], list[str]]:
    """A labelled validation split stands in for a test split that is not there."""
    if "test" in splits or "validation" not in splits:
        return splits, []
    own = splits["validation"].name
    renamed = {"test" if split == "validation" else split: part for split, part in splits.items()}
    return renamed, [f"there is no test split with labels: split '{own}' takes its place"]


def _find_column(name: str, what: str, key: str | None, features: Mapping[str, Any], usual: Sequence[str]) -> str:
    """The column that the user names, else one with a usual name, else the only one that can be meant."""
    kinds = {column: _holds(feature) for column, feature in features.items()}
    fitting = [column for column, held in kinds.items() if what in held]
    if key is not None:
        if key in fitting:
            return key
        wrong = f"column '{key}' does not hold {what}s" if key in kinds else f"there is no column '{key}'"
        near = did_you_mean(key, fitting if key not in kinds else [])
        raise UserError(f"{name}: {wrong}", _columns(kinds, fitting), near or f"leave --{what}-key out")
    named = [column for alias in usual for column in fitting if column.lower() == alias]
    # Text is a label only where its name says so: it might as well be a file name or a caption.
    certain = [column for column in fitting if "text" not in kinds[column]]
    if named or len(certain) == 1:
        return (named or certain)[0]
    if not certain:
        fix = f"choose one with --{what}-key" if fitting else "choose another data set"
        raise UserError(f"{name}: no column of {what}s was found", _columns(kinds, fitting), fix)
    raise UserError(
        f"{name}: {' and '.join(certain)} may each be the column of {what}s", "one", f"--{what}-key {certain[0]}"
    )


def _columns(kinds: Mapping[str, str], fitting: Sequence[str]) -> str:
    return f"one of {', '.join(fitting)}" if fitting else f"another column than {', '.join(kinds)}"


def _holds(feature: Any) -> str:
    """What a column can be: "image", "label", "label text" or nothing."""
    import datasets

    is_image = isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)
    if is_image or getattr(feature, "dtype", "") in ("binary", "large_binary"):
        return "image"
    if isinstance(feature, datasets.ClassLabel):
        return "label"
    if isinstance(feature, datasets.Value):
        if feature.dtype in ("string", "large_string"):
            return "label text"
        if re.fullmatch(r"u?int\d+|bool", feature.dtype):
            return "label"
    return ""


def _is_missing(value: Any) -> bool:
    # The hub marks labels that are kept secret with -1.
    return value is None or (isinstance(value, int) and value < 0)


def _classes(name: str, key: str, feature: Any, values: Sequence[Any]) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Class names, and the class number of each value in the column of labels."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names), {number: number for number in range(len(feature.names))}
    distinct = sorted({value for value in values if not _is_missing(value)})
    if len(distinct) == len(values) > 2:
        raise UserError(
            f"{name}: every image has another '{key}'", "a column of labels, shared by many images", "give --label-key"
        )
    return tuple(str(value) for value in distinct), {value: number for number, value in enumerate(distinct)}


def _class_numbers(place: str, key: str, values: Sequence[Any], numbers: Mapping[Any, int]) -> NDArray[np.int64]:
    labels = np.array([numbers.get(value, -1) for value in values], dtype=np.int64)
    if (wrong := np.flatnonzero(labels < 0)).size:
        row = int(wrong[0])
        what = "the label is missing" if _is_missing(values[row]) else f"'{values[row]}' is none of the classes"
        more = f" ({wrong.size} such rows in all)" if wrong.size > 1 else ""
        raise UserError(
            f"{place}, row {row}: {key} = {values[row]!r}: {what}{more}",
            f"one of the {len(numbers)} classes in every row",
            "remove the row, or choose another column with --label-key",
        )
    return labels


def read_image(source: bytes | str | Path, where: str) -> Image.Image:
    """An image file, or its bytes, in RGB and turned upright as its EXIF data say.

    Grey and palettes become RGB, 16 bits become 8, and transparency is dropped, as timm does. Raises UserError, which
    begins with `where`, for what cannot be read.
    """
    # Pillow would ask six other formats first, which takes as long as it takes to decode 32x32 pixels.
    formats = ("WEBP",) if isinstance(source, bytes) and source[8:12] == b"WEBP" else None
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as opened:
            # exif_transpose alone would read the metadata of every image, with or without EXIF.
            upright = ImageOps.exif_transpose(opened) if "exif" in opened.info else opened
            return _to_rgb(upright)
    except Exception as error:  # Pillow's decoders raise anything on broken bytes
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else _reason(error)
        raise UserError(
            f"{where}: the image cannot be read ({reason})", "a JPEG, PNG, WebP or the like", "replace or remove it"
        ) from None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # convert() would cut 16 bits off at 255 instead of scaling them.
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit values without a known range")
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("32-bit values without a known range")
    if "transparency" in image.info:
        # Straight to RGB, Pillow warns about palettes with transparency.
        image = image.convert("RGBA")
    return image.convert("RGB")


def training_splits(data: ImageData, fraction: float, seed: int) -> tuple[Split, Split | None]:
    """What to train on and what to choose by: the data set's own validation split, else one held out of train.

    Raises UserError where there is no split to train on, or where nothing would be left to score.
    """
    if "train" not in data.splits:
        raise UserError(
            f"'{data.name}' has no training split",
            "a split named " + " or ".join(SPLITS["train"]),
            "give another data set",
        )
    if "validation" in data.splits:
        return data.splits["train"], data.splits["validation"]
    train, validation = hold_out(data.splits["train"], fraction, seed)
    if validation is None and "test" not in data.splits:
        raise UserError(f"'{data.name}' has nothing to score", "a test split, or a part of train", "--val-fraction 0.1")
    return train, validation


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split | None]:
    """Takes the same fraction of every class out of `split`, for validation; None where the fraction is 0.

    A class with two images or more keeps one on each side at least, one with a single image is for training. The same
    `seed` always gives the same splits. Raises UserError where `fraction` is not in [0, 1) or holds nothing out.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"validation fraction {fraction:g}", "at least 0 and less than 1", "--val-fraction 0.1")
    if fraction == 0:
        return split, None
    _, counts = np.unique(split.labels, return_counts=True)
    quotas = _quotas(counts, round(fraction * len(split)))
    quotas = np.clip(quotas, np.minimum(counts - 1, 1), counts - 1)
    held = _draw(split.labels, quotas, seed)
    if not held.any():
        raise UserError(
            f"split '{split.name}': no class has two images, so that one could be held out for validation",
            "two images of a class",
            "--val-fraction 0",
        )
    return split.select(np.flatnonzero(~held)), split.select(np.flatnonzero(held))


def limit(split: Split, n: int | None, seed: int) -> Split:
    """A random choice of `n` images with the same share of every class; all where there are no more or `n` is None."""
    if n is None or n >= len(split):
        return split
    if n < 1:
        raise UserError(f"a limit of {n} images", "at least 1", "leave the limit out to use them all")
    _, counts = np.unique(split.labels, return_counts=True)
    return split.select(np.flatnonzero(_draw(split.labels, _quotas(counts, n), seed)))


def _quotas(counts: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """`total` shared out in proportion to `counts`, by largest remainders."""
    shares = total * counts / counts.sum()
    quotas: NDArray[np.int64] = np.floor(shares).astype(np.int64)
    largest = np.argsort(quotas - shares, kind="stable")
    quotas[largest[: total - quotas.sum()]] += 1
    return quotas


def _draw(labels: NDArray[np.int64], quotas: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Marks as many images of each class as its quota says, chosen at random."""
    drawn = np.zeros(len(labels), dtype=np.bool_)
    # Of NumPy's generators the one whose stream is frozen for good: a test image must not become a training image
    # because a library was updated.
    generator = np.random.RandomState(seed % 2**32)
    for label, quota in zip(np.unique(labels), quotas, strict=True):
        drawn[generator.permutation(np.flatnonzero(labels == label))[:quota]] = True
    return drawn


def measure(data: ImageData) -> tuple[Size | None, Colour, Colour]:
    """Image size (None where images differ), mean and standard deviation per channel of the training images.

    For CIFAR the published figures; else measured on up to 2,000 images, evenly spaced, and fewer where they are large:
    about 50 million pixels, which takes a second or two.
    """
    if data.measured:
        return data.measured
    split = data.splits.get("train") or next(iter(data.splits.values()))
    first = split.image(0)
    count = min(len(split), 2000, max(100, 50_000_000 // (first.width * first.height)))
    sizes = set()
    pixels, total, squares = 0, np.zeros(3), np.zeros(3)
    for i in np.linspace(0, len(split) - 1, count).round().astype(int):
        image = split.image(i)
        sizes.add((image.height, image.width))
        values = np.asarray(image, dtype=np.float32).reshape(-1, 3) / 255
        pixels += len(values)
        total += values.sum(axis=0, dtype=np.float64)
        squares += np.square(values).sum(axis=0, dtype=np.float64)
    mean = total / pixels
    # An image set of one colour has no spread to divide by.
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 1e-6))
    size = sizes.pop() if len(sizes) == 1 else None
    return size, _colour(mean), _colour(std)


def _colour(values: NDArray[np.float64]) -> Colour:
    red, green, blue = (round(float(value), 4) for value in values)
    return red, green, blue


def natural_size(size: Size | None) -> int | None:
    """The input size for images of this size when nothing pretrained asks for another; None: the model's own.

    Small images keep theirs: enlarging them would cost much and show nothing new.
    """
    return None if size is None or max(size) > SMALL else max(size)


def short_name(data: ImageData) -> str:
    """What tables and notes call it: a folder by its last part, others as they were typed."""
    return Path(data.source).name if Path(data.source).is_absolute() else data.name
