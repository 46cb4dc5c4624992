"""What several tests share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

# Read when the hub's library is loaded: no test goes online, or waits for a network that is not there.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_decoded_images_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDCLI_CACHE", str(tmp_path / "decoded"))


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    """Inputs and values worked out from the papers' formulas and compared with published code (float64)."""
    return json.loads((Path(__file__).parent / "vectors.json").read_text())
