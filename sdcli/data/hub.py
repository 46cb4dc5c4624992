"""Tables loaded by `datasets`: from the hub, from a folder of parquet files, or from `Dataset.save_to_disk`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli.data.dataset import LAYOUTS
from sdcli.errors import UserError
from sdcli.hub import quiet, reach


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keeps `datasets` from writing to stderr while it opens local files."""
    import datasets

    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with quiet():
            yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()


def load_from_disk(name: str, path: Path) -> dict[str, Any]:
    import datasets

    with _without_bars():
        try:
            loaded = datasets.load_from_disk(str(path))
        except IndexError:
            # `datasets` saves a split without rows as no file at all, and fails to load it.
            raise _no_rows(name, "a split") from None
        except (OSError, ValueError, LookupError) as error:
            raise unreadable(name, error) from None
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a split that come from the same file."""

    num_rows: int
    classes: dict[str, tuple[str, ...]]
    """The names that the file itself gives the classes of a column, by column; a label is the place of a name."""

    @classmethod
    def of(cls, num_rows: int, features: Any) -> Part:
        import datasets

        typed = {key: feature for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
        return cls(num_rows, {key: tuple(feature.names) for key, feature in typed.items() if feature.names})


def load_from_folder(name: str, path: Path) -> tuple[dict[str, Any], dict[str, list[Part]]]:
    """The splits of a folder, and the files of each, in the order of its rows; no files where some are no tables.

    `datasets` gives all splits the types of the first file, and with them its names of classes, in its order.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    with _without_bars():
        try:
            files = datasets.load_dataset_builder(str(path)).config.data_files or {}
            parts = _parts(name, path, {str(split): list(map(str, own)) for split, own in files.items()})
            return dict(datasets.load_dataset(str(path))), parts
        except FileNotFoundError:
            raise UserError(f"'{name}' holds no images", LAYOUTS, "check the path") from None
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise unreadable(name, error) from None


def _parts(name: str, path: Path, files: dict[str, list[str]]) -> dict[str, list[Part]]:
    """The files of each split. Raises UserError for those that `datasets` cannot load without naming the reason."""
    if not all(
        os.path.isfile(file) and file.endswith((".parquet", ".arrow")) for own in files.values() for file in own
    ):
        return {}
    parts = {split: [_part(name, path, file) for file in own] for split, own in files.items()}
    for split, own_parts in parts.items():
        if not any(part.num_rows for part in own_parts):
            raise _no_rows(name, f"split '{split}'")
    for split, own_parts in parts.items():
        for part, file in zip(own_parts, files[split], strict=True):
            if not part.num_rows and file.endswith(".parquet"):
                raise UserError(
                    f"'{name}': '{os.path.relpath(file, path)}' has no rows", "rows in every file", "remove it"
                )
    return parts


def _part(name: str, path: Path, file: str) -> Part:
    import datasets
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    if file.endswith(".parquet"):
        with ParquetFile(file) as opened:
            schema, num_rows = opened.schema_arrow, opened.metadata.num_rows
    else:
        with pa.memory_map(file) as mapped:
            try:
                batches = pa.ipc.open_stream(mapped)
            except (OSError, pa.ArrowInvalid):
                reader = pa.ipc.open_file(mapped)
                batches = map(reader.get_batch, range(reader.num_record_batches))
                schema = reader.schema
            else:
                schema = batches.schema
            num_rows = sum(batch.num_rows for batch in batches)
    if twice := [column for column in dict.fromkeys(schema.names) if schema.names.count(column) > 1]:
        raise UserError(
            f"'{name}': '{os.path.relpath(file, path)}' has several columns named '{twice[0]}'",
            "a name of its own for every column",
            "rename or remove one of them",
        )
    is_typed = b"huggingface" in (schema.metadata or {})
    return Part.of(num_rows, datasets.Features.from_arrow_schema(schema) if is_typed else {})


def load_from_hub(name: str, hub: str) -> dict[str, Any]:
    """Downloads a data set, or takes it from the cache if the hub does not answer."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    with reach(hub, "dataset") as silence:
        try:
            return dict(datasets.load_dataset(hub))
        except ConnectionError:
            raise UserError(
                f"'{name}' is not in the cache, and {silence or 'the connection to the Hugging Face hub failed'}",
                "a network connection, a local folder, or a cache that holds it (HF_HOME)",
                f"on a machine with a network: hf download --repo-type dataset {hub} --local-dir FOLDER; "
                "then here: --dataset FOLDER",
            ) from None
        except DatasetNotFoundError:
            raise UserError(
                f"'{name}' is neither a folder nor a data set on the Hugging Face hub that you can access",
                "a folder, or the id of a data set as OWNER/NAME",
                f"see https://huggingface.co/datasets/{hub}; if it requires a login: hf auth login",
            ) from None
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise unreadable(name, error) from None


def unreadable(name: str, error: Exception) -> UserError:
    cause = error.__cause__ or error
    reason = str(cause).strip().partition("\n")[0] or type(cause).__name__
    if empty := re.fullmatch(r'Instruction "(.+)" corresponds to no data!', reason):
        return _no_rows(name, f"split '{empty[1]}'")
    if isinstance(cause, PermissionError):
        expected = "folders and files that you may read"
        return UserError(f"'{name}' cannot be opened: {reason}", expected, f"chmod -R u+rX {name}")
    return UserError(f"'{name}' cannot be opened: {reason}", LAYOUTS, "repair it or give another folder")


def _no_rows(name: str, split: str) -> UserError:
    return UserError(f"'{name}': {split} has no rows", "labelled images in every split", "leave the empty split out")
