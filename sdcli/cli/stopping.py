"""Signals that end a run: noted, so that its state is saved before the process ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

TOGETHER_S = 1.0
"""A launcher, or timeout(1), passes a signal on that its processes have got from the terminal or as a group already."""


@contextmanager
def stopping() -> Iterator[Callable[[], int | None]]:
    """Has Ctrl-C, SIGTERM and SIGHUP (a terminal that is closed) noted, so that the run can save its state and leave.

    Only a second Ctrl-C leaves at once: the last saved state is complete, whatever it interrupts.
    """
    got: list[tuple[int, float]] = []

    def note(number: int, frame: Any) -> None:
        if got and number == signal.SIGINT and time.monotonic() - got[0][1] > TOGETHER_S:
            _leave()
        if not got and number == signal.SIGINT and os.isatty(2):
            _write(b"\nstopping after this update, to save the state; Ctrl-C again stops at once\n")
        got.append((number, time.monotonic()))

    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # nohup has SIGHUP ignored.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        former[signal.SIGHUP] = signal.getsignal(signal.SIGHUP)
    for number in former:
        signal.signal(number, note)
    try:
        yield lambda: got[0][0] if got else None
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _leave() -> None:
    """Ends this process and its workers without unwinding, which libraries may delay or turn into an error."""
    for child in multiprocessing.active_children():
        child.kill()
    # Progress on a terminal hides the cursor.
    _write(b"\x1b[?25h\nstopped\n" if os.isatty(2) else b"stopped\n")
    os._exit(128 + signal.SIGINT)


def _write(message: bytes) -> None:
    """Writes to standard error from within a signal handler, which may have interrupted any writer."""
    with suppress(OSError):
        os.write(2, message)
