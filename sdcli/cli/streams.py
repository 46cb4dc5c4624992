"""Standard output and standard error that may vanish: readers that leave, full disks, descriptors that are closed."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO

from sdcli.errors import UserError


def secure() -> None:
    """Makes messages that cannot be written silent, and results that cannot be written one message.

    A descriptor that is closed is opened on the null device: the next file to be opened would take its number, and
    libraries write to these numbers.
    """
    if os.name != "posix":
        return
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(null)
    # Whoever has replaced a stream answers for it.
    if sys.stdout is sys.__stdout__:
        # Closed, it is one that nothing can be written to.
        closed = None if sys.stdout else os.open(os.devnull, os.O_RDONLY)
        sys.stdout = _text(_Results(1 if closed is None else closed, "w", closefd=False), sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Messages(2, "w", closefd=False), sys.stderr)


def _text(raw: io.FileIO, like: Any) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=like.encoding if like else "utf-8",
        errors=like.errors if like else "backslashreplace",
        line_buffering=like.line_buffering if like else True,
        write_through=like.write_through if like else False,
    )


class _Messages(io.FileIO):
    """Goes on in silence where it can no longer be written: a message never ends a run."""

    def write(self, content: Any) -> int:
        try:
            written = super().write(content)
        except OSError:
            _silence(self)
            written = None
        # None too where the reader of a pipe that does not block has fallen behind.
        return len(content) if written is None else written


class _Results(io.FileIO):
    """Raises UserError where it cannot be written, and BrokenPipeError where its reader has left."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            # What is left in the buffers is written when Python ends.
            _silence(self)
            if error.errno == errno.EPIPE:
                raise
            reason = "it is closed" if error.errno == errno.EBADF else error.strerror
            raise UserError(f"the results cannot be written to standard output: {reason}") from None


def _silence(stream: io.FileIO) -> None:
    """Points the stream's descriptor to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
