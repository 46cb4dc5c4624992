"""What training a row of a study takes, as multiples of its baseline's time, measured side by side.

    python benchmarks/study/seconds.py benchmarks/study/cifar100.toml --data ../shared/data/cifar100

The cells of a study run for days, on a machine that does other things too and with versions of sdcli that become
faster, so their own seconds cannot be compared. Here every row of a network trains on a few thousand images for a few
epochs, by turns, one thread and one process at a time. Its seconds for an image, without validation and without the
first epoch of a phase, are divided by the baseline's of the same round and multiplied by the images that the row sees
in the study; the median over the rounds counts. Results go into docs/results/seconds.json, which docs/make_study.py
reads.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from run import ONE_THREAD, Cell, read_cells, read_study

BASELINES = ("baseline", "plain")
RATE = re.compile(r"-lr-[0-9.]+$")
RESULTS = Path("docs/results/seconds.json")
SHORT = ("--limit-train", "4096", "--limit-val", "100", "--epochs", "3")


def seconds(cell: Cell, data: str) -> float:
    """Seconds for an image of a short training, once it is warm."""
    with tempfile.TemporaryDirectory() as folder:
        command = replace(cell, options=(*cell.options, *SHORT)).command(data, Path(folder))
        done = subprocess.run(
            [sys.executable, "-m", "sdcli", *command], env=os.environ | ONE_THREAD, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{cell.name}: {done.stderr}")
        lines = (Path(folder) / cell.name / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    # An epoch is warm if the one before it was of the same phase.
    log = [line for before, line in pairwise(log) if before["phase"] == line["phase"]]
    return float(sum(line["seconds"] for line in log) / sum(line["num_images"] for line in log))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--data", help="the data set's folder, if it is on this machine")
    parser.add_argument("--network", help="of the study; by default its first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--rows", nargs="+", help="measure only these rows beside the baseline; others stay as they are"
    )
    options = parser.parse_args()
    study = read_study(options.study)
    network = options.network or next(iter(study["networks"]))
    if network not in study["networks"]:
        parser.error(f"--network {network}: the study has {', '.join(study['networks'])}")
    cells: dict[str, Cell] = {}
    for cell in read_cells(study):
        # What starts from another cell, or is taught by one, needs that cell's weights.
        if cell.network == network and not (cell.start or cell.teacher or RATE.search(cell.row)):
            cells.setdefault(cell.row, cell)
    baseline = next(row for row in BASELINES if row in cells)
    if options.rows:
        if unknown := [row for row in options.rows if row not in cells]:
            parser.error(f"--rows {' '.join(unknown)}: {network} has {', '.join(cells)}")
        cells = {row: cells[row] for row in cells if row in (baseline, *options.rows)}
    found: dict[str, list[float]] = {row: [] for row in cells}
    rows = [baseline, *(row for row in cells if row != baseline)]
    for number in range(options.rounds):
        took = {row: seconds(cells[row], options.data or study["dataset"]) for row in rows}
        for row, own in took.items():
            found[row].append(own / took[baseline])
        print(f"round {number + 1}: an image of {baseline} takes {1000 * took[baseline]:.3f} ms", flush=True)
    table: dict[str, Any] = {}
    for row, ratios in found.items():
        # As many images as in the study: exits-then-all has two phases, of half of the epochs each.
        epochs = float(study["rows"][row].get("epochs", 1)) * phases(cells[row])
        table[row] = {
            "image": round(statistics.median(ratios), 3),
            "training": round(epochs * statistics.median(ratios), 3),
        }
        print(f"{row:30} {table[row]['training']:.2f}  rounds {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    everything = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    key = f"{options.study.stem}/{network}"
    before = everything.get(key, {}).get("rows", {}) if options.rows else {}
    everything[key] = {"rounds": options.rounds, "rows": {**before, **table}}
    RESULTS.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


def phases(cell: Cell) -> int:
    """How many times a recipe runs through its epochs."""
    from sdcli.recipe.load import load_recipe

    names = [value for name, value in pairwise(cell.options) if name == "--recipe"]
    return len(load_recipe(names).all_phases)


if __name__ == "__main__":
    main()
