"""What several tests share."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Read when the hub's library is loaded: no test goes online, or waits for a network that is not there.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from sdcli import checks, prepare
from sdcli.cli import main

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_decoded_images_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDCLI_CACHE", str(tmp_path / "decoded"))


@pytest.fixture(scope="session", autouse=True)
def _models_are_settled_once() -> Iterator[None]:
    """How a model is built and cut is worked out once for the same question: it is most of a short run."""

    def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
        answers: dict[str, Any] = {}

        def ask(*arguments: Any, **named: Any) -> Any:
            question = repr((arguments, named))
            if question not in answers:
                answers[question] = function(*arguments, **named)
            return answers[question]

        return ask

    with pytest.MonkeyPatch.context() as patch:
        for name in ("resolve", "plan_network"):
            function = remembered(getattr(prepare, name))
            for module in (prepare, checks):
                patch.setattr(module, name, function)
        yield


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
