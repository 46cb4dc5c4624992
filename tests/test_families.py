"""One small member of every timm family trains. Slow: run with -m slow; docs/families.csv is its committed result."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def benchmark():
    path = ROOT / "benchmarks" / "train_families.py"
    spec = importlib.util.spec_from_file_location("train_families", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_families"] = module
    spec.loader.exec_module(module)
    return module


MEMBERS = benchmark().smallest_members()


def test_there_are_as_many_families_as_timm_has():
    from timm.models import list_models, model_entrypoint

    homes = {model_entrypoint(name).__module__ for name in list_models()}
    assert set(MEMBERS) == {home.rpartition(".")[2] for home in homes if home.startswith("timm.")}


@pytest.mark.slow
@pytest.mark.parametrize("family", MEMBERS)
def test_every_trained_parameter_of_the_family_gets_a_finite_gradient(family):
    row = benchmark().train_one_step(MEMBERS[family])
    assert not row.get("error")
    assert row["without_gradient"] == ""
    assert row["checkpointing"] in ("ok", "none")
    assert row["trained"] > 10
    assert math.isfinite(float(row["loss"]))
