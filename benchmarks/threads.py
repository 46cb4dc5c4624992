"""Measures the cost of waiting threads that spin instead of sleeping, alone and beside a busy process.

    python benchmarks/threads.py

Times an epoch of `quick` on the digits. Prints a table and one JSON line: seconds for each case, and the ratio of
spinning to sleeping, which is the result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

EPOCH = """
import sys, time
from pathlib import Path
from sdcli.run.prepare import prepare
from sdcli.recipe.load import load_recipe
from sdcli.run.train import train_epoch
from sdcli.run.settings import Settings
from sdcli.run.state import Position
settings = Settings("resnet18", "digits", device="cpu")
training = prepare(settings, load_recipe(["quick"], ["epochs=2"]), Path(sys.argv[1]))
for _ in train_epoch(training): pass
training.position = Position(2)
start = time.monotonic()
for _ in train_epoch(training): pass
print(time.monotonic() - start)
"""


def seconds(policy: str, busy: bool) -> float:
    """Seconds of an epoch after a warm-up under this `OMP_WAIT_POLICY`; with `busy`, another process uses a core."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            out = subprocess.run(
                [sys.executable, "-c", EPOCH, str(Path(folder) / "run")],
                env={**os.environ, "OMP_WAIT_POLICY": policy},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
    finally:
        if other:
            other.kill()
    return float(out)


def main() -> None:
    """Both policies alternate, so that changes in machine load affect both."""
    result: dict[str, float] = {}
    for busy in (False, True):
        where = "beside a busy process" if busy else "alone"
        for policy in ("active", "passive"):
            result[f"{where}, {policy}"] = round(seconds(policy, busy), 2)
        result[f"{where}, ratio"] = round(result[f"{where}, active"] / result[f"{where}, passive"], 2)
    for name, value in result.items():
        print(f"{name:36} {value:8.2f}")
    print(json.dumps(result))


main()
