"""Where a run stands, in one file: all that is needed to go on as if it had never stopped.

Tensors, numbers, strings, lists and dictionaries, nothing else: the file is read with `weights_only=True`, which runs
no code that it may hold.
"""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdcli.errors import UserError
from sdcli.files import replacing

VERSION = 3
"""Of the file's layout; another one is refused."""


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes beside the place and renames: the former state stays until the new one is whole and on the disk.

    Raises UserError where it cannot be written; the former state is then still there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside, beside.open("wb") as file:
            torch.save({"version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        # torch's writer turns a failed write into a RuntimeError of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space is left on the disk" if full else " ".join(str(error).split())
        kept = "the state before it is whole" if path.exists() else "there is none from before"
        raise UserError(
            f"the state of the run cannot be written to '{path}': {reason}; {kept}",
            "room for it in the run folder",
            f"free some and go on: sdcli train --resume {path.parent.parent}",
        ) from None


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote, on the CPU; raises UserError for a file that is none."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version = state.pop("version")
    except Exception as error:  # torch.load raises whatever comes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"'{path}' cannot be read: {reason}", "the state that sdcli train wrote") from None
    if version != VERSION:
        raise UserError(
            f"'{path}' has format {version}", f"format {VERSION}, which this sdcli reads", "use the sdcli that wrote it"
        )
    return state


def random_states() -> dict[str, Any]:
    """Of every generator that this process may draw from."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Puts all generators back to where `random_states` found them."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
