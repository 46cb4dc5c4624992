"""Loads a user's own Python files (`--import FILE.py`), which register further losses and heads."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from sdcli.errors import UserError

WHAT = "a Python file that registers losses or heads (README, Losses of your own)"


def find_imports(files: Iterable[Path | str]) -> list[str]:
    """The absolute paths of the files, valid from any folder; raises UserError for a file that does not exist."""
    return [str(_existing(Path(os.path.expanduser(file)))) for file in files]


def load_imports(files: Iterable[Path | str]) -> None:
    """Runs each file once, even if it is named several times.

    Raises UserError for a file that does not exist, one that fails (where and why), and one that registers a name that
    is already taken.
    """
    for file in files:
        _load(_existing(Path(os.path.expanduser(file))))


def digests(files: Iterable[Path | str]) -> dict[str, str]:
    """The sha256 of each file's content, by its path as it is given."""
    return {str(file): sha256(_existing(Path(os.path.expanduser(file))).read_bytes()).hexdigest() for file in files}


def _existing(path: Path) -> Path:
    if path.is_file():
        return path.resolve()
    near = sorted(str(other) for other in path.parent.glob("*.py"))
    raise UserError(
        f"--import {path}: there is no such file",
        WHAT,
        "give its path with --import" + (f"; in the same folder: {', '.join(near[:5])}" if near else ""),
    )


def _load(path: Path) -> None:
    # A unique module name, under which compiled and pickled functions are found again.
    name = f"sdcli_import_{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--import {path}: its name does not end in .py", WHAT, f"rename it {path.stem}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UserError as error:
        del sys.modules[name]
        raise error.within(f"--import {path}") from None
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(
            f"--import {path}{line_in(path, error)}: {type(error).__name__}: {error}",
            "a file that Python can import",
            f"python {path} shows the full traceback",
        ) from error


def line_in(path: Path, error: BaseException) -> str:
    """The line of the file that failed, as ", line 3"; "" if the error is not in the file."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}" if error.lineno else ""
    number, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            number = trace.tb_lineno
        trace = trace.tb_next
    return f", line {number}" if number else ""
