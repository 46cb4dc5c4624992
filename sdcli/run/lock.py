"""One process per run folder: a lock that is released when its process ends, even if it is killed."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

from sdcli.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

HELD = (errno.EACCES, errno.EAGAIN)
"""The errors for a file that another process has locked; any other error means that the file system has no locks."""


class Lock:
    """A lock on one file, held by this process from `take` to `release`.

    The lock belongs to the process (fcntl), not to the open file (flock): worker processes inherit open files and would
    hold a flock for seconds after the run was killed. Closing any handle of the file in this process releases it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle: int | None = None

    def take(self, run: Path, *, wait: bool = False) -> bool:
        """Takes the lock of `run` unless this process already holds it. Returns False if there are no locks here.

        Raises UserError if another process holds it, unless it is to `wait`, or if the file cannot be written.
        """
        if self.handle is not None or fcntl is None:
            return self.handle is not None
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"'{self.path}' cannot be written: {error.strerror}", "a writable run folder") from None
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            holder = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            if error.errno in HELD:
                raise _in_use(run, holder) from None
            return False
        self.handle = handle
        # Only for the error message of other processes; a full disk is reported when the state is saved.
        with suppress(OSError):
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return True

    def release(self) -> None:
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None


def _in_use(run: Path, holder: str) -> UserError:
    return UserError(
        f"run '{run}' is in use by {holder or 'another process'}",
        "a run that no other process is training",
        "wait until it finishes, stop it with Ctrl-C or SIGTERM (its state is saved), or choose another --output",
    )
