"""Real processes of the command line that begin where torch and timm are loaded already: a tenth of the time."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from sdcli.cli import main

SERVER = multiprocessing.get_context("forkserver")
# Not this module: before Python 3.13 the server does not find it.
LOADED = [
    "sdcli.cli",
    "sdcli.run.train",
    "sdcli.evaluation.scoring",
    "sdcli.cli.plots",
    "datasets",
    "matplotlib.figure",
    "pandas",
]
SERVER.set_forkserver_preload([*LOADED, "torchmetrics.functional.classification"])


def _begin(arguments: list[str], folder: str, environment: dict[str, str], said: list[str]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(said, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    sys.argv = ["sdcli", *arguments]
    main()


class Process:
    """`sdcli` with these arguments, in a process that knows nothing of the test's own."""

    def __init__(self, *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        folder = tempfile.mkdtemp(prefix="sdcli-test-")
        atexit.register(shutil.rmtree, folder)
        said = [os.path.join(folder, name) for name in ("out", "err")]
        given = [str(argument) for argument in arguments]
        environment = {**os.environ, **(env or {})}
        self._said = said
        self._process = SERVER.Process(target=_begin, args=(given, str(cwd or Path.cwd()), environment, said))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, minus the signal where one ended it; None while it runs."""
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        code = self._process.exitcode
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def out(self) -> str:
        return Path(self._said[0]).read_text()

    @property
    def err(self) -> str:
        return Path(self._said[1]).read_text()


def finished(*arguments: object, cwd: Path | None = None) -> Process:
    process = Process(*arguments, cwd=cwd)
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
