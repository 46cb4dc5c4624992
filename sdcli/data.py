"""Data sets: opened by name or path, shared out into splits, varied, and served as loaders of `Batch`.

B batch, C channels, H W an image's height and width in pixels, N images of a split, K classes
"""

from __future__ import annotations

import logging
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from sdcli.errors import UserError, did_you_mean, unknown
from sdcli.signals import Batch

Size: TypeAlias = tuple[int, int]
"""Height and width."""
Colour: TypeAlias = tuple[float, float, float]
"""One value per channel, where 1 is the brightest."""
Transform: TypeAlias = Callable[[Image.Image], Tensor]


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

SMALL = 96
"""Images of at most this many pixels a side are shown whole: cropping would cost too much of them."""

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

POLICIES = {
    "cifar10": "AutoAugment's policy for CIFAR-10 (Cubuk et al. 2019, arXiv:1805.09501), torchvision's",
    "trivial": "TrivialAugment Wide (Müller and Hutter 2021, arXiv:2103.10158), torchvision's",
}
TIMM_POLICIES = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class _Images(Protocol):
    """Where a split's images come from."""

    def read(self, row: int) -> Image.Image:
        """The image in RGB; raises UserError, naming the row or the file, where it cannot be read."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels, read one by one. Pickles, so that workers of any start method can have it."""

    name: str
    """The data set's own name for it ("val")."""
    images: _Images
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
class _Pixels:
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


def _whole(name: str, images: _Images, labels: NDArray[Any]) -> Split:
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
class _Files:
    """Images in files of their own."""

    paths: NDArray[np.bytes_]
    """An array, not a list: a forked worker that reads a list of strings copies all of it, by counting references."""

    def read(self, row: int) -> Image.Image:
        path = os.fsdecode(self.paths[row])
        return read_image(path, f"'{path}'")


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
class _Rows:
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


@dataclass(frozen=True)
class Preprocess:
    """How images are brought to a model, in the words of timm's data config. Stored in the checkpoint."""

    input_size: tuple[int, int, int]
    """Channels, height, width."""
    mean: Colour
    std: Colour
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    """Which part of a large image's shorter side is seen in evaluation."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """What `to_dict` gave, also after a way through JSON."""
        return cls(
            input_size=tuple(values["input_size"]),
            mean=tuple(values["mean"]),
            std=tuple(values["std"]),
            interpolation=values["interpolation"],
            crop_pct=values["crop_pct"],
        )

    @property
    def size(self) -> Size:
        """Height and width."""
        return self.input_size[1], self.input_size[2]


@dataclass(frozen=True)
class _BySize:
    """One transform for small images (`SMALL`), another for large ones."""

    small: Transform
    large: Transform

    def __call__(self, image: Image.Image) -> Any:
        return (self.small if max(image.size) <= SMALL else self.large)(image)


class Cutout:
    """Paints a square grey, with its centre anywhere in the image (DeVries and Taylor 2017, arXiv:1708.04552).

    It is cut off at the border, so it mostly covers less than `side` pixels a side. Comes after normalisation: 0 is the
    data's mean.
    """

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Tensor) -> Tensor:
        _, height, width = image.shape
        top = random.randrange(height) - self.side // 2
        left = random.randrange(width) - self.side // 2
        image[:, max(top, 0) : max(top + self.side, 0), max(left, 0) : max(left + self.side, 0)] = 0
        return image


def eval_transform(preprocess: Preprocess) -> Transform:
    """Image to normalised tensor [C, H, W], the same each time.

    Large images as timm does: the shorter side to size / `crop_pct`, then the centre. Small ones (`SMALL`) whole,
    brought to the input size where they do not have it.
    """
    from timm.data import create_transform
    from torchvision import transforms

    large = create_transform(
        preprocess.input_size,
        is_training=False,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=preprocess.crop_pct,
    )
    return _BySize(transforms.Compose([_squash(preprocess), *_to_tensor(preprocess)]), large)


def train_transform(
    preprocess: Preprocess,
    *,
    crop: Literal["auto", "pad", "resized", "none"] = "auto",
    mirror: float = 0.5,
    policy: str = "none",
    cutout: int = 0,
    erase: float = 0.0,
    fill: int = 0,
) -> Transform:
    """Image to normalised tensor [C, H, W], different each time: crop, mirror, policy, cutout, erase.

    crop     "pad": a border of an eighth of the size, then a crop of the size; "resized": a part of 8 to 100 % of the
             area, resized (timm's default); "auto": "pad" for small images (`SMALL`), else "resized"; "none": what
             evaluation sees of small images, the centre of large ones
    mirror   how often left and right are swapped, 0 to 1
    policy   "none", one of `POLICIES`, or timm's `--aa`: "rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original", "v0", "3a"
    cutout   the square's side in pixels of the input size; 0: none
    erase    how often a rectangle is replaced by noise (Zhong et al. 2017, arXiv:1708.04896; timm's `--reprob`), 0 to 1
    fill     the grey of borders, 0 to 255; for timm's policies too, which themselves would take the data's mean

    Raises UserError for a policy that there is not.
    """
    from timm.data.random_erasing import RandomErasing
    from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio
    from torchvision import transforms

    height, width = preprocess.size
    squash = _squash(preprocess)
    shorter = ResizeKeepRatio((height, width), longest=0.0, interpolation=preprocess.interpolation)
    window = transforms.RandomCrop((height, width), padding=(width // 8, height // 8), fill=fill)
    pad = transforms.Compose([squash, window]), transforms.Compose([shorter, window])
    resized = RandomResizedCropAndInterpolation((height, width), interpolation=preprocess.interpolation)
    crops: dict[str, Transform] = {
        "auto": _BySize(pad[0], resized),
        "pad": _BySize(*pad),
        "resized": resized,
        "none": _BySize(squash, transforms.Compose([shorter, transforms.CenterCrop((height, width))])),
    }
    if crop not in crops:
        raise unknown("crop", crop, crops)
    steps: list[Any] = [crops[crop]]
    if mirror:
        steps.append(transforms.RandomHorizontalFlip(mirror))
    steps += [*_policy(policy, preprocess, fill), *_to_tensor(preprocess)]
    if cutout:
        steps.append(Cutout(cutout))
    if erase:
        steps.append(RandomErasing(erase, mode="pixel", device="cpu"))
    transform: Transform = transforms.Compose(steps)
    return transform


def check_policy(policy: str) -> None:
    """Raises UserError for an augmentation policy that there is not; before any data are opened."""
    _policy(policy, Preprocess((3, 32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), fill=0)


def _policy(policy: str, preprocess: Preprocess, fill: int) -> list[Any]:
    from timm.data import create_transform
    from torchvision import transforms

    if policy == "none":
        return []
    if policy == "cifar10":
        return [transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=[fill] * 3)]
    if policy == "trivial":
        return [transforms.TrivialAugmentWide(fill=[fill] * 3)]
    kind, *options = policy.split("-")
    # timm passes over an option without a number and over an unknown set of operations: what is misspelt has no effect.
    wrong = [option for option in options if not re.fullmatch(r"[a-z]+\d[\d.]*|t(weights|3aw?)", option)]
    if kind in TIMM_POLICIES and not wrong:
        try:
            # The middle one of timm's three parts; it takes its fill from the mean.
            _, augment, _ = create_transform(
                preprocess.input_size,
                is_training=True,
                auto_augment=policy,
                color_jitter=None,
                interpolation=preprocess.interpolation,
                mean=(fill / 255,) * 3,
                separate=True,
            )
            _mend_posterize(augment.transforms[0])
            return [augment]
        except (AssertionError, ValueError):
            pass  # an unknown option or a number that is none: the error below says what there is
    raise UserError(
        f"unknown augmentation policy '{policy}'",
        f"none, {', '.join(POLICIES)}, or timm's {', '.join(TIMM_POLICIES)} with their options (rand-m9-mstd0.5-inc1)",
        did_you_mean(policy, ["none", *POLICIES, *TIMM_POLICIES]) or "see --aa in timm's documentation",
    )


def _mend_posterize(augment: Any) -> None:
    """Lets timm's policies posterize to no bits at all, as "rand-m9-mstd0.5-inc1" does with one image in a thousand.

    It makes an image black; Pillow 13 raises instead.
    """
    from timm.data import auto_augment

    nested = augment.policy if isinstance(augment, auto_augment.AutoAugment) else [augment.ops]
    for operation in (operation for operations in nested for operation in operations):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Any:
    from timm.data import auto_augment

    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **options)


def _squash(preprocess: Preprocess) -> Any:
    from timm.data.transforms import str_to_interp_mode
    from torchvision import transforms

    return transforms.Resize(preprocess.size, interpolation=str_to_interp_mode(preprocess.interpolation))


def _to_tensor(preprocess: Preprocess) -> list[Any]:
    from torchvision import transforms

    return [transforms.ToTensor(), transforms.Normalize(preprocess.mean, preprocess.std)]


def make_loader(
    split: Split,
    transform: Transform,
    *,
    batch_size: int,
    train: bool,
    seed: int,
    workers: int,
    drop_last: bool = False,
) -> Loader:
    """Batches of a split. With `train` shuffled and varied, anew in each epoch: call `set_epoch` before each.

    An epoch's order depends on `seed` and the epoch alone, an image's variation on `seed`, the epoch and its `index`:
    the number of workers changes nothing, a run can go on in the middle of an epoch, and torch's, NumPy's and Python's
    generators are left as they were. A last training batch of one image is left out, since batch normalisation cannot
    train on it. An image that cannot be read raises its UserError while iterating, whichever process read it.

    Raises UserError where no batch would be left.
    """
    length = len(split)
    if drop_last:
        length -= length % batch_size
    elif train and batch_size > 1 and length % batch_size == 1:
        length -= 1
    if length == 0:
        at_least = batch_size if drop_last else 2 if train else 1
        raise UserError(
            f"split '{split.name}' has too few images: {len(split)}", f"at least {at_least}", "use more of the data set"
        )
    return Loader(
        _Served(split, transform, seed if train else None),
        sampler=EpochSampler(len(split), length, seed if train else None),
        batch_size=batch_size,
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        # Without its own it draws from torch's global one at the start of each epoch.
        generator=torch.Generator(),
    )


class Loader(DataLoader[Batch]):
    """A DataLoader whose epochs are told apart by their number; until `set_epoch` is called it is 0."""

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        """The next pass is this epoch's, without its first batches where a run goes on in the middle of it."""
        assert isinstance(self.sampler, EpochSampler) and self.batch_size is not None
        self.sampler.set_epoch(epoch, skip_batches * self.batch_size)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        error = None
        for batch in super().__iter__():
            if isinstance(batch, _Failed):
                error = batch.error
                break
            yield batch
        if error is not None:
            # Ends the workers while they listen. An error holds on to the frames that it went through; if the workers'
            # queues go with these, they may be closed first, and ending takes five seconds a worker.
            self._iterator = None
            raise error


@dataclass(frozen=True)
class _Failed:
    """What a worker sends in place of a batch. Raised there, the error would arrive as the text of its traceback."""

    error: UserError

    def to(self, device: torch.device) -> Batch:
        """Raises the error for those who read without our `Loader`: accelerate moves what it gets to a device."""
        raise self.error


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, place in the split) of each image of an epoch, in random order where there is a seed.

    The epoch goes with each image, since persistent workers do not hear of a new one.
    """

    def __init__(self, num_images: int, length: int, seed: int | None) -> None:
        self.num_images, self.length, self.seed = num_images, length, seed
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next pass is this epoch's, from its `start`-th image on. Called by accelerate too."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        places = np.arange(self.num_images)
        if self.seed is not None:
            places = np.random.RandomState(_key(self.seed, self.epoch) % 2**32).permutation(self.num_images)
        for place in places[self.start : self.length].tolist():
            yield self.epoch, place


class _Served(Dataset[Batch]):
    """A split as a DataLoader asks for it: a whole batch at a time. Without a seed the transform draws nothing."""

    def __init__(self, split: Split, transform: Transform, seed: int | None) -> None:
        self.split, self.transform, self.seed = split, transform, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, places: list[tuple[int, int]]) -> Batch | _Failed:
        chosen = np.array([place for _, place in places])
        index = self.split.index[chosen]
        images = []
        try:
            with _generators_kept():
                for (epoch, place), number in zip(places, index.tolist(), strict=True):
                    if self.seed is not None:
                        _seed_generators(_key(self.seed, epoch, number))
                    images.append(self.transform(self.split.image(place)))
        except UserError as error:
            if get_worker_info() is None:
                raise
            return _Failed(error)
        return Batch(torch.stack(images), torch.from_numpy(self.split.labels[chosen]), torch.from_numpy(index))


def _as_it_is(batch: Any) -> Any:
    return batch


def _key(*numbers: int) -> int:
    """64 bits that look random and are the same for the same numbers, everywhere and for good."""
    return int.from_bytes(blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")


def _seed_generators(key: int) -> None:
    """Seeds all that transforms draw from: torchvision's use torch, timm's use Python and NumPy."""
    random.seed(key)
    np.random.seed(key % 2**32)
    # torch.manual_seed would seed the GPU's generator too, which dropout draws from.
    torch.default_generator.manual_seed(key)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Puts the generators back: in the main process others draw from them too."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
