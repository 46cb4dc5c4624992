"""Where words go: data to stdout, talk to stderr."""

from __future__ import annotations

import sys

from rich.console import Console


def output() -> Console:
    """For tables. In a pipe nothing is cut to a width that nobody sees."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def talk() -> Console:
    """For progress and notes."""
    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """One remark."""
    talk().print(f"note: {text}", style="dim", soft_wrap=True, markup=False)
