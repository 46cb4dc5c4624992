"""Data sets of tables: their columns of images and labels, and their classes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdcli.data.dataset import ImageData, Images, Named, listed, whole_split
from sdcli.data.hub import Part
from sdcli.data.images import read_image, why_unreadable
from sdcli.data.splits import scored_as_test, standard_splits
from sdcli.errors import UserError, counted, did_you_mean

IMAGE_COLUMNS = ("image", "img", "images", "picture", "photo", "pixel_values")

LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "category")

HELD = {"image": "a column of images or of their bytes", "label": "a column of whole numbers, ClassLabel or text"}
"""What a column has to hold."""


@dataclass(eq=False)
class Rows(Images):
    """Images in a column of a table."""

    where: str
    table: Any
    key: str
    folders: tuple[str, ...] = ()
    """Real paths. A row may name a file in one of them instead of holding an image, relative to the first."""

    @cached_property
    def _column(self) -> Any:
        # The Arrow column: reading a row of it takes a few microseconds, of `datasets` a third of a millisecond.
        return self.table.with_format("arrow")[:].column(self.key)

    def __getstate__(self) -> dict[str, Any]:
        # Pickled, the table is the name of the file that it is mapped from, the column all of its bytes.
        return {name: value for name, value in self.__dict__.items() if name != "_column"}

    def read(self, row: int) -> Image.Image:
        value = self._column[row].as_py()
        image = value.get("bytes") if isinstance(value, dict) else value
        return read_image(image or self._file(value["path"]), f"{self.where}, row {row}")

    def check(self) -> None:
        """Raises UserError for rows that hold no image, or name a file that cannot be read or is not the data set's."""
        wrong = [
            f"row {row} ({reason})" for row, path in self._without_bytes() if (reason := self._why_unreadable(path))
        ]
        if wrong:
            raise UserError(
                f"{self.where}: {counted(len(wrong), 'row')} without an image that can be read: {listed(wrong)}",
                "an image in every row, or the path of one inside the folder of the data set",
                "repair or remove them",
            )

    def _without_bytes(self) -> Iterator[tuple[int, str | None]]:
        """The rows that do not hold their image, and the files that they name."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column, is_struct = self._column, pa.types.is_struct(self._column.type)
        held = pc.struct_field(column, "bytes") if is_struct else column
        for row in pc.indices_nonzero(pc.fill_null(pc.equal(pc.binary_length(held), 0), True)).to_pylist():
            yield row, (column[row].as_py() or {}).get("path") if is_struct else None

    def _file(self, path: str) -> str:
        return os.path.join(self.folders[0], path) if self.folders else path

    def _why_unreadable(self, path: str | None) -> str:
        if not path or "\0" in path:
            return "no image"
        file = os.path.realpath(self._file(path))
        if not any(os.path.commonpath([folder, file]) == folder for folder in self.folders):
            return f"'{path}' is outside of the data set"
        return f"'{path}': {reason}" if (reason := why_unreadable(file)) else ""

    def identity(self) -> tuple[int, str] | None:
        digest = None
        for _, path in self._without_bytes():
            digest = digest or blake2b()
            try:
                status = os.stat(self._file(path or ""))
            except (OSError, ValueError):
                return None  # reading it reports the reason
            digest.update(repr((path, status.st_size, status.st_mtime_ns)).encode())
        files = f" {digest.hexdigest()}" if digest else ""
        return self.table.num_rows, f"{self.table._fingerprint} {self.key}{files}"


def open_tables(
    name: str,
    source: str,
    tables: dict[str, Any],
    image_key: str | None,
    label_key: str | None,
    known: Named,
    parts: Mapping[str, Sequence[Part]] | None = None,
) -> ImageData:
    """Finds splits, columns and classes in the tables of `datasets`.

    `parts` are the files of each split, where they may name their classes in another order than the tables do.
    """
    chosen, notes = standard_splits(name, list(tables))
    features = tables[next(iter(chosen.values()))].features
    image_key = _find_column(name, "image", image_key, features, IMAGE_COLUMNS)
    label_key = _find_column(name, "label", label_key, features, LABEL_COLUMNS)
    values = {}
    for split, own in chosen.items():
        for key in (image_key, label_key):
            if key not in tables[own].column_names:
                raise UserError(f"{_where(name, own)}: no column '{key}'", "the same columns in every split")
        values[split] = tables[own].select_columns([label_key]).with_format("arrow")[:].column(label_key).to_pylist()
    for split in list(values):
        # Test splits often have no labels; a training split without them is a mistake, reported below.
        if split != "train" and all(map(_is_missing, values[split])):
            notes.append(f"split '{chosen[split]}' is left out: it has no labels")
            del values[split]
    if not values:
        raise UserError(f"{name}: no image has a '{label_key}'", "labelled images", "try another --label-key")
    parts = parts or {own: [Part.of(table.num_rows, table.features)] for own, table in tables.items()}
    if declared := Part.of(0, features).classes.get(label_key):
        classes, order = _class_order(declared, label_key, parts, parts[next(iter(chosen.values()))][0])
        numbers: dict[Any, int] = {number: number for number in range(len(classes))}
        for split, labels in values.items():
            own = chosen[split]
            values[split] = _by_name(_where(name, own), label_key, labels, parts[own], order)
    else:
        classes, numbers = _distinct(name, label_key, next(iter(values.values())))
    splits, folders = {}, _image_folders(source)
    for split, own_values in values.items():
        where = _where(name, chosen[split])
        rows = Rows(where, tables[chosen[split]].select_columns([image_key]), image_key, folders)
        rows.check()
        splits[split] = whole_split(chosen[split], rows, _class_numbers(where, label_key, own_values, numbers))
    splits, more_notes = scored_as_test(splits)
    return ImageData(
        name,
        source,
        classes,
        splits,
        image_key=image_key,
        label_key=label_key,
        hflip=known.hflip,
        notes=(*notes, *more_notes),
        measured=known.measured,
    )


def _image_folders(source: str) -> tuple[str, ...]:
    """The folders that may hold images of a data set: its own, and the caches of downloads and unpacked archives."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
    own = (source,) if os.path.isabs(source) else ()
    return tuple(os.path.realpath(folder) for folder in (*own, *caches))


def _where(name: str, split: str) -> str:
    return f"{name}, split '{split}'"


def _find_column(name: str, what: str, key: str | None, features: Mapping[str, Any], usual: Sequence[str]) -> str:
    """The column that the user names, else one with a usual name, else the only candidate."""
    kinds = {column: _holds(feature) for column, feature in features.items()}
    fitting = [column for column, held in kinds.items() if what in held]
    if key is not None:
        if key in fitting:
            return key
        wrong = f"there is no column '{key}'"
        if key in kinds:
            wrong = f"column '{key}' ({_type(features[key])}) does not hold {what}s"
        near = did_you_mean(key, fitting if key not in kinds else [])
        raise UserError(f"{name}: {wrong}", _columns(what, fitting), near or f"leave --{what}-key out")
    named = [column for alias in usual for column in fitting if column.lower() == alias]
    # Text is a label only in a column with a usual name: it could be a file name or a caption.
    certain = [column for column in fitting if "text" not in kinds[column]]
    if named or len(certain) == 1:
        return (named or certain)[0]
    if not certain:
        types = [f"{column} ({_type(feature)})" for column, feature in features.items()]
        fix = f"choose one with --{what}-key" if fitting else "convert a column, or choose another data set"
        raise UserError(f"{name}: no column of {what}s found among {listed(types, 20)}", _columns(what, fitting), fix)
    raise UserError(
        f"{name}: {' and '.join(certain)} could each be the column of {what}s",
        "one of them",
        f"--{what}-key {certain[0]}",
    )


def _columns(what: str, fitting: Sequence[str]) -> str:
    return f"one of {', '.join(fitting)}" if fitting else HELD[what]


def _type(feature: Any) -> str:
    """The type of a column in the words of `datasets`: "float64", "ClassLabel"."""
    import datasets

    return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__


def _holds(feature: Any) -> str:
    """What a column can hold: "image", "label", "label text" or ""."""
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
    if isinstance(value, str):
        return not value.strip()
    # On the hub, -1 marks withheld labels.
    return value is None or (isinstance(value, int) and value < 0)


def _distinct(name: str, key: str, values: Sequence[Any]) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Class names, and the class index of each value, of a column of labels that does not name its classes."""
    distinct = sorted({value for value in values if not _is_missing(value)})
    if len(distinct) == len(values) > 2:
        raise UserError(
            f"{name}: '{key}' is different for every image",
            "a column of labels, which many images share",
            "name it with --label-key",
        )
    return tuple(str(value) for value in distinct), {value: number for number, value in enumerate(distinct)}


def _class_order(
    declared: tuple[str, ...], key: str, parts: Mapping[str, Sequence[Part]], first: Part
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the classes in the order of their numbers, and the names that files have for them.

    Both are those of the first split's first file, unless no file has those that are `declared`: they are from the data
    set's card. A card may rename the classes of that file, number by number; names that it keeps may be in any order.
    """
    own = first.classes.get(key, declared)
    if any(part.classes.get(key) == declared for of_split in parts.values() for part in of_split):
        return own, own
    return declared, declared if set(own) <= set(declared) else own


def _by_name(where: str, key: str, values: Sequence[Any], parts: Sequence[Part], order: tuple[str, ...]) -> list[Any]:
    """The labels of a split as places in `order`, by the names that its files have for them.

    Missing labels stay as they are. Raises UserError for a name that is not in `order`.
    """
    places = {name: place for place, name in enumerate(order)}
    assert sum(part.num_rows for part in parts) == len(values)
    ordered: list[Any] = []
    for part in parts:
        own = values[len(ordered) : len(ordered) + part.num_rows]
        names = part.classes.get(key, order)
        if names == order:
            ordered += own
            continue
        known = {number: places[name] for number, name in enumerate(names) if name in places}
        if unknown := {value for value in own if not _is_missing(value)} - known.keys():
            number = min(unknown)
            name = names[number] if number < len(names) else str(number)
            raise UserError(
                f"{where}: {key} '{name}' is not one of the classes {listed(order)}",
                "the classes of the first split in every split, in any order",
                did_you_mean(name, order) or "rename the class, or remove its rows",
            )
        ordered += [known.get(value, value) for value in own]
    return ordered


def _class_numbers(where: str, key: str, values: Sequence[Any], numbers: Mapping[Any, int]) -> NDArray[np.int64]:
    labels = np.array([numbers.get(value, -1) for value in values], dtype=np.int64)
    if (wrong := np.flatnonzero(labels < 0)).size:
        row = int(wrong[0])
        what = "the label is missing" if _is_missing(values[row]) else f"'{values[row]}' is not one of the classes"
        more = f" ({wrong.size} such rows in all)" if wrong.size > 1 else ""
        raise UserError(
            f"{where}, row {row}: {key} = {values[row]!r}: {what}{more}",
            f"one of the {len(numbers)} classes in every row",
            "remove the row, or choose another column with --label-key",
        )
    return labels
