"""Tables loaded by `datasets`: from the hub, from a folder of parquet files, or as it saved them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdcli.data.dataset import LAYOUTS
from sdcli.errors import UserError


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


def load_from_disk(name: str, path: Path) -> dict[str, Any]:
    import datasets

    with _quiet():
        try:
            loaded = datasets.load_from_disk(str(path))
        except (OSError, ValueError, LookupError) as error:
            raise unreadable(name, error) from None
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def load_from_folder(name: str, path: Path) -> dict[str, Any]:
    import datasets
    from datasets.exceptions import DatasetsError

    with _quiet():
        try:
            return dict(datasets.load_dataset(str(path)))
        except FileNotFoundError:
            raise UserError(f"'{name}' holds no images", LAYOUTS, "check the path") from None
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise unreadable(name, error) from None


def load_from_hub(name: str, hub: str) -> dict[str, Any]:
    """Downloads a data set, or takes it from the cache where the hub does not answer."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    answers = hub_answers(hub)
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
            raise unreadable(name, error) from None
        finally:
            datasets.config.HF_HUB_OFFLINE = went_offline


def hub_answers(hub: str) -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(hub, timeout=10)
    except HfHubHTTPError:
        return True  # what it has against the name, load_dataset says better
    except Exception:  # which HTTP library is behind it, and what that raises, changes from release to release
        return False
    return True


def unreadable(name: str, error: Exception) -> UserError:
    cause = error.__cause__ or error
    reason = str(cause).strip().partition("\n")[0] or type(cause).__name__
    return UserError(f"'{name}' cannot be opened: {reason}", LAYOUTS, "repair it or give another folder")
