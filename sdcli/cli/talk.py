"""Where output goes: results to stdout, progress and messages to stderr.

Names that a user or a data set has chosen are printed as they are read, never as markup and never as something that
the terminal obeys: everything goes through `printable`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

WIDE = 160
"""Columns of a table that goes into a pipe or a file."""

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (newline and tab aside), marks that reverse the direction of text, and what no encoding has."""


def printable(text: str) -> str:
    r"""`text` with every character that a terminal would obey written as its escape: \x1b, \u202e."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


class _Console(Console):
    """A console that prints text as it is: no markup, no emoji codes, no control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


@lru_cache(maxsize=4)
def _console(file: TextIO) -> Console:
    if isinstance(file, io.TextIOWrapper):
        # Where the encoding lacks a character ("·" in ASCII), its escape is printed instead of a traceback.
        file.reconfigure(errors="backslashreplace")
    width = None if file.isatty() else WIDE
    return _Console(file=file, width=width, markup=False, emoji=False, highlight=False)


def output() -> Console:
    """For results. In a pipe or a file nothing is cut to the width of a terminal."""
    return _console(sys.stdout)


def talk() -> Console:
    """For progress and messages."""
    return _console(sys.stderr)


def is_watched() -> bool:
    """Whether progress can be shown in place: a file or a pipe gets plain lines, whatever its colours."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def line(text: str) -> None:
    """One line of results."""
    print(printable(text), file=output().file)


def message(*parts: str | tuple[str, str], style: str = "", prose: bool = False) -> None:
    """One message, of plain and styled parts.

    It is left to the terminal to break the line, so that a path or a command is copied whole; `prose` is broken between
    words. In a file or a pipe nothing is broken.
    """
    talk().print(Text.assemble(*parts, style=style), soft_wrap=not (prose and is_watched()))


def note(text: str) -> None:
    """One remark."""
    message(f"note: {text}", style="dim", prose=True)


def print_json(value: Any) -> None:
    """`value` as JSON on stdout; NaN and infinity, which JSON does not have, become null."""
    line(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def only_results() -> Iterator[None]:
    """Sends whatever else prints to stdout (an imported file, a library) to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def stages(*, plain: bool = True) -> Iterator[None]:
    """Shows what is being done, the loading of torch first: what the modules of `sdcli` log.

    On a terminal in one line, which the next replaces and which is removed at the end. Elsewhere, where `plain`, as a
    line each, without the details of long stages (DEBUG). Warnings are notes, which stay.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    log, handler = logging.getLogger("sdcli"), _Stages(sys.stderr, plain)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if is_watched() else logging.INFO)
    try:
        if "torch" not in sys.modules:
            log.info("loading torch and timm")
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        handler.clear()


def end_stage() -> None:
    """Makes room for something else in the place of the stage that is shown."""
    for handler in logging.getLogger("sdcli").handlers:
        if isinstance(handler, _Stages):
            handler.clear()


class _Stages(logging.Handler):
    def __init__(self, file: TextIO, plain: bool) -> None:
        super().__init__()
        self.file, self.plain, self.shown = file, plain, False

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.clear()
            note(record.getMessage())
            return
        text = printable(record.getMessage()) + " …"
        if is_watched():
            # No live display: a library's own progress bar may begin in the middle of it.
            self.clear()
            self.file.write(f"\x1b[2m{set_cell_size(text, min(cell_len(text), talk().width - 1))}\x1b[0m")
            self.file.flush()
            self.shown = True
        elif self.plain and record.levelno >= logging.INFO:
            print(text, file=self.file, flush=True)

    def clear(self) -> None:
        if self.shown:
            self.file.write("\r\x1b[2K")
            self.file.flush()
        self.shown = False
