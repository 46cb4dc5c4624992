"""What several tests share."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

# Read when the hub's library is loaded: no test goes online, or waits for a network that is not there.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from sdcli import devices
from sdcli.cli import main
from sdcli.data.batch import Batch
from sdcli.network import blueprint

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_decoded_images_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDCLI_CACHE", str(tmp_path / "decoded"))


@pytest.fixture(scope="session", autouse=True)
def _freed_memory_is_given_back() -> Iterator[None]:
    """This process goes on to other networks than a command's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "keep_freed_memory", lambda device: None)
        yield


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
            patch.setattr(blueprint, name, remembered(getattr(blueprint, name)))
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
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The pictures that are written from here on, to see what they show."""
    seen: list[Figure] = []
    written = Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **named: Any) -> None:
        seen.append(figure)
        written(figure, *arguments, **named)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


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
    # What was being done, in a pipe: "opening digits …".
    said = [line for line in result.err.strip().splitlines() if not line.endswith(" …")]
    assert "\n".join(said) == f"error: {message}"


class Terminal(io.StringIO):
    """What a terminal is sent."""

    def isatty(self) -> bool:
        return True


def noise(number: int, height: int = 16, width: int = 16) -> Image.Image:
    """An image that no other number has."""
    pixels = np.random.RandomState(number).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch_of(labels: list[int] | Tensor) -> Batch:
    labels = torch.as_tensor(labels)
    return Batch(torch.zeros(len(labels), 3, 1, 1), labels, torch.arange(len(labels)))


class Case:
    """One entry of the vectors: its tensors in one precision, and its values."""

    def __init__(self, entry: dict, dtype: torch.dtype, atol: float) -> None:
        self.inputs = entry["inputs"]
        self.expected, self.dtype, self.atol = entry["expected"], dtype, atol
        self.batch = batch_of(self.inputs.get("y4", self.inputs.get("y", [])))

    def __getitem__(self, name: str) -> Tensor:
        return torch.tensor(self.inputs[name], dtype=self.dtype)

    def agrees(self, value: Tensor, name: str, scale: float = 1.0) -> bool:
        """Whether the value is that of the vectors; `scale` is what float32's rounding errors were multiplied by."""
        return self.equals(value, self.expected[name], scale)

    def equals(self, value: Tensor, number: object, scale: float = 1.0) -> bool:
        """Whether the value is this one, which was worked out from the vectors."""
        atol = self.atol * (scale if self.dtype == torch.float32 else 1.0)
        return torch.allclose(value.double(), torch.as_tensor(number, dtype=torch.float64), rtol=self.atol, atol=atol)


@pytest.fixture(params=[(torch.float64, 1e-9), (torch.float32, 1e-6)], ids=["float64", "float32"])
def case(request, vectors):
    return lambda name: Case(vectors[name], *request.param)
