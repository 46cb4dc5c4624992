"""The training state of a run in one file: everything that is needed to resume as if it had never stopped.

The first line gives the format and the digest of the rest, which holds only tensors, numbers, strings, lists and
dictionaries: it is read with `weights_only=True`, which never runs code from the file. The previous state is kept
beside it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import field
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from sdcli.errors import UserError
from sdcli.files import replacing

VERSION = 6
"""The version of the file's layout; files of any other version are refused."""

HEADER = "sdcli state {version} sha256 {digest}\n"
HEADER_LENGTH = len(HEADER.format(version=VERSION, digest=64 * "0"))


@dataclass(config=ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, allow_inf_nan=False))
class Position:
    """How far a run has come. Values are validated on construction, which catches a damaged state."""

    epoch: Annotated[int, Field(ge=1)] = 1
    """The current epoch, counted from 1."""
    update: Annotated[int, Field(ge=0)] = 0
    """Updates finished in this epoch; all of them if only the scoring is left."""
    num_images: Annotated[int, Field(ge=0)] = 0
    """Images seen in this epoch, by all processes."""
    lr: float = 0.0
    """The learning rate of the last update."""
    skipped: Annotated[int, Field(ge=0)] = 0
    """Updates skipped in this epoch because a loss or the gradient was not finite (`optimizer.nonfinite`)."""
    skipped_images: Annotated[int, Field(ge=0)] = 0
    """The images of the skipped updates, in all processes."""
    in_a_row: Annotated[int, Field(ge=0)] = 0
    """Updates skipped in a row, up to the last one."""
    sums: Tensor | None = None
    """Each loss's contribution to the total, summed over this process's images, skipped updates excluded [losses]."""
    shares: dict[str, float] = field(default_factory=dict)
    """Each loss's share of the gradient norm, as last measured in this epoch."""
    seconds: Annotated[float, Field(ge=0)] = 0.0
    """What this epoch's updates have taken, over all parts of a run that was stopped within it."""
    cpu_seconds: Annotated[float, Field(ge=0)] = 0.0
    """The same of this process's CPU time."""


def previous(path: Path) -> Path:
    """The file of the previous state."""
    return path.with_name("previous.pt")


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a temporary file and renames it: the former state stays in place until the new one is complete and on the
    disk, and is then kept as `previous`.

    Raises UserError if it cannot be written; the former state is then still in place.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            _write(beside, state)
            if path.exists():
                _keep(path)
    except (OSError, RuntimeError) as error:
        # torch's writer turns a failed write into a RuntimeError of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space left on the disk" if full else " ".join(str(error).split())
        kept = "the previous state is intact" if path.exists() else "there is no previous state"
        raise UserError(
            f"the run's state cannot be written to '{path}': {reason}; {kept}",
            "free space for the run folder",
            f"free some space and resume: sdcli train --resume {path.parent.parent}",
        ) from None


def _write(path: Path, state: dict[str, Any]) -> None:
    with path.open("w+b") as file:
        file.write(bytes(HEADER_LENGTH))
        torch.save(state, file)
        file.seek(HEADER_LENGTH)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        file.write(HEADER.format(version=VERSION, digest=digest).encode())
        file.flush()
        os.fsync(file.fileno())


def _keep(path: Path) -> None:
    """Makes the last state the previous one; `path` exists at every moment."""
    with replacing(previous(path)) as beside:
        try:
            os.link(path, beside)
        except OSError:
            # Not every file system has hard links.
            shutil.copyfile(path, beside)


def load_state(path: Path) -> dict[str, Any]:
    """The state that `save_state` wrote, on the CPU; raises UserError for a damaged file or another format."""
    try:
        with path.open("rb") as file:
            _check_header(path, file)
            if damage := _damage(file):
                raise unusable(path, damage)
            # Reads from the current position, behind the header.
            state = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch.load raises all kinds of errors
        raise unusable(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    if not isinstance(state, dict):
        raise unusable(path, f"it holds {type(state).__name__}, not a table")
    return state


def _check_header(path: Path, file: BufferedReader) -> None:
    """Raises UserError for a state of another format."""
    start = file.read(HEADER_LENGTH)
    found = re.match(rb"sdcli state (\d+) ", start)
    # Formats 1 and 2 were torch's own file, a zip.
    version = found[1].decode() if found else "2 or older" if start.startswith(b"PK") else ""
    if version and version != str(VERSION):
        raise UserError(
            f"state cannot be used: '{path}' has format {version}",
            f"format {VERSION}, which this sdcli reads",
            "resume with the version of sdcli that saved it",
        )


def _damage(file: BufferedReader) -> str:
    """What is wrong with a state file, or ""; leaves the file positioned behind the header."""
    file.seek(0)
    found = re.fullmatch(HEADER.format(version=VERSION, digest="([0-9a-f]{64})").encode(), file.read(HEADER_LENGTH))
    if found is None:
        return "it is damaged: its first line is not that of a state"
    if hashlib.file_digest(file, "sha256").hexdigest() != found[1].decode():
        return "it is damaged: its content does not match its checksum"
    file.seek(HEADER_LENGTH)
    return ""


def unusable(path: Path, reason: str) -> UserError:
    """The error for a damaged state; offers the previous one if that is intact."""
    fix = "start a new run"
    try:
        with previous(path).open("rb") as file:
            if not _damage(file):
                fix = f"go back to the previous state, then resume: mv {previous(path)} {path}"
    except OSError:
        # There is no previous state to offer.
        pass
    return UserError(f"state cannot be used: '{path}': {reason}", "the state as sdcli train saved it", fix)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of the tensors' names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def random_states() -> dict[str, Any]:
    """The states of all random generators of this process."""
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
    """Restores all random generators to what `random_states` returned."""
    random.setstate(_python_state(states))
    np.random.set_state(_numpy_state(states))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def try_random_states(states: dict[str, Any]) -> None:
    """Tries these states on fresh generators; raises whatever they raise for an invalid state."""
    random.Random().setstate(_python_state(states))
    np.random.RandomState().set_state(_numpy_state(states))
    torch.Generator().set_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.Generator("cuda").set_state(states["cuda"])


def _python_state(states: dict[str, Any]) -> Any:
    version, words, gauss = states["python"]
    return version, tuple(words), gauss


def _numpy_state(states: dict[str, Any]) -> Any:
    name, keys, *rest = states["numpy"]
    return name, np.array(keys, dtype=np.uint32), *rest
