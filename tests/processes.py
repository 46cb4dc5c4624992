"""Real processes of the command line that begin where torch and timm are loaded already: a tenth of the time."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sdcli.cli import main

LONGEST_S = 300.0
"""After which a process hangs: many times what any takes."""

SERVER = multiprocessing.get_context("forkserver")
# Not this module: before Python 3.13 the server does not find it.
LOADED = [
    "sdcli.cli",
    "sdcli.run.train",
    "sdcli.run.tune",
    "sdcli.evaluation.scoring",
    "sdcli.cli.plots",
    "datasets",
    "matplotlib.figure",
    "pandas",
]
SERVER.set_forkserver_preload([*LOADED, "torchmetrics.functional.classification"])


CLOSED = "closed"
"""A stream of a process that is closed when it starts, as by `>&-`."""


def _begin(
    arguments: list[str],
    folder: str,
    environment: dict[str, str],
    said: list[str],
    leads: bool,
    ignored: list[int],
    method: str,
) -> None:
    # A process of a fork server would start its own from another one.
    multiprocessing.set_start_method(method, force=True)
    if leads:
        os.setpgid(0, 0)
    # Jobs in the background of a shell begin with Ctrl-C ignored, those of `nohup` with SIGHUP; tests are among them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, (name, file) in enumerate(zip(("stdout", "stderr"), said, strict=True), start=1):
        if file == CLOSED:
            os.close(number)
            setattr(sys, name, None)
            setattr(sys, f"__{name}__", None)
        else:
            handle = os.open(file, os.O_WRONLY | os.O_CREAT)
            os.dup2(handle, number)
            os.close(handle)
    torch.set_num_threads(1)
    sys.argv = ["sdcli", *arguments]
    main()


class Process:
    """`sdcli` with these arguments, in a process that knows nothing of the test's own.

    `out` and `err` name what its streams are, files of its own by default. With `leads` it has a process group of its
    own, as under timeout(1) or in a terminal; `ignored` are signals that it starts with ignored, as under nohup.
    `method` is how it starts processes that load images: by default as this Python does.
    """

    def __init__(
        self,
        *arguments: object,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        out: Path | str | None = None,
        err: Path | str | None = None,
        leads: bool = False,
        ignored: Sequence[int] = (),
        method: str | None = None,
    ) -> None:
        folder = tempfile.mkdtemp(prefix="sdcli-test-")
        atexit.register(shutil.rmtree, folder)
        said = [str(file or os.path.join(folder, name)) for name, file in (("out", out), ("err", err))]
        given = [str(argument) for argument in arguments]
        environment = {**os.environ, **(env or {})}
        self._said = said
        method = method or multiprocessing.get_start_method()
        work = (given, str(cwd or Path.cwd()), environment, said, leads, list(ignored), method)
        self._process = SERVER.Process(target=_begin, args=work)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, minus the signal where one ended it; None while it runs."""
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join(LONGEST_S)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
        assert code is not None, f"hangs: {self.err}"
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def signal_group(self, number: int) -> None:
        """To the process and its workers, where it leads a group."""
        if self.poll() is None:
            os.killpg(self.pid, number)

    @property
    def out(self) -> str:
        return Path(self._said[0]).read_text()

    @property
    def err(self) -> str:
        return Path(self._said[1]).read_text()


def finished(*arguments: object, **options: Any) -> Process:
    process = Process(*arguments, **options)
    process.wait()
    return process


def together(number: int, *arguments: object) -> list[Process]:
    """As many processes as a launcher starts of one machine, with what it puts into their environment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [
        Process(*arguments, env={name: str(value) for name, value in {**common, "RANK": r, "LOCAL_RANK": r}.items()})
        for r in range(number)
    ]
