"""What several tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    """Inputs and values worked out from the papers' formulas and compared with published code (float64)."""
    return json.loads((Path(__file__).parent / "vectors.json").read_text())


@pytest.fixture(autouse=True)
def _own_hub_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache, and none goes online."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
