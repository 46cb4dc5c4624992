"""What several tests share."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Read when the hub's library is loaded: no test goes online, or waits for a network that is not there.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from sdcli.cli import main

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_decoded_images_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDCLI_CACHE", str(tmp_path / "decoded"))


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    """Inputs and values worked out from the papers' formulas and compared with published code (float64)."""
    return json.loads((Path(__file__).parent / "vectors.json").read_text())


@dataclass
class Result:
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def sdcli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["sdcli", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return Result(code, said.out, said.err)

    return run


def refused(result: Result, message: str) -> None:
    """Exit code 2, one message, nothing on stdout, no traceback."""
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err
    assert result.err.strip() == f"error: {message}"
