"""Tables loaded by `datasets`: from the hub, from a folder of parquet files, or from `Dataset.save_to_disk`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
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


def load_from_folder(name: str, path: Path) -> dict[str, Any]:
    import datasets
    from datasets.exceptions import DatasetsError

    with _without_bars():
        try:
            return dict(datasets.load_dataset(str(path)))
        except FileNotFoundError:
            raise UserError(f"'{name}' holds no images", LAYOUTS, "check the path") from None
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise unreadable(name, error) from None


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
