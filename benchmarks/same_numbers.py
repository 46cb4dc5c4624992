"""Checks whether a code change alters any number: trains six recipes of different kinds on the digits.

    python benchmarks/same_numbers.py --save before.json      # on the old code
    python benchmarks/same_numbers.py --compare before.json   # on the new code

Prints one line per recipe with digests of the log (without times) and of the trained weights; the scores are compared
too. With --compare it exits with code 1 and names the recipes whose numbers differ. It uses one thread, so that sums do
not depend on the order in which threads finish.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

RUNS = {
    "byot": ["test_resnet"],
    "one": ["resnet10t"],
    "ps-kd": ["test_resnet"],
    "born-again": ["test_resnet"],
    "ema-teacher": ["test_resnet"],
    "default": ["test_vit", "--recipe", "schedules/transformer"],
}
"""Covers feature hints, gated branches, a memory of predictions, phases, an EMA teacher, and a transformer."""
SHORT = [
    "--dataset=digits",
    "--epochs=2",
    "--limit-train=300",
    "--limit-val=100",
    "--batch-size=50",
    "--device=cpu",
    "--seed=7",
]
TIMES = ("seconds", "cpu_seconds", "images_per_s")


def digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def train(recipe: str, arguments: list[str], folder: Path) -> dict[str, Any]:
    model, *more = arguments
    command = [
        sys.executable,
        "-m",
        "sdcli",
        "train",
        model,
        "--recipe",
        recipe,
        *more,
        *SHORT,
        "--output",
        str(folder),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SDCLI_CACHE": str(folder.parent / "cache")}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    from safetensors.numpy import load_file

    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    weights = load_file(folder / "last.safetensors")
    return {
        "log": digest([{name: value for name, value in line.items() if name not in TIMES} for line in log]),
        "weights": digest({name: sha256(tensor.tobytes()).hexdigest() for name, tensor in weights.items()}),
        "report": digest(json.loads((folder / "report.json").read_text())),
        "loss": log[-1]["loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path, help="write the digests to this file")
    parser.add_argument("--compare", type=Path, help="compare the digests with those in this file")
    arguments = parser.parse_args()
    former = json.loads(arguments.compare.read_text()) if arguments.compare else {}
    found, differing = {}, []
    for recipe, command in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[recipe] = train(recipe, command, Path(folder) / "run")
        same = "" if not former else "same" if former[recipe] == found[recipe] else "DIFFERENT"
        differing += [recipe] if same == "DIFFERENT" else []
        print(f"{recipe:12} log {found[recipe]['log']}  weights {found[recipe]['weights']}  {same}", flush=True)
    if arguments.save:
        arguments.save.write_text(json.dumps(found, indent=2) + "\n")
    if differing:
        sys.exit(f"numbers differ: {', '.join(differing)}")


if __name__ == "__main__":
    main()
