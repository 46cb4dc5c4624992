"""Measures the speed-up and memory cost of keeping freed memory on a CPU (`sdcli.devices.keep_freed_memory`).

    python benchmarks/allocator.py                                       the rows of docs/performance.md, ten minutes
    python benchmarks/allocator.py --cases resnet50:32 --image-size 64   MODEL:BATCH

For each row, processes that keep freed memory alternate with processes that use glibc's default. Time is the median
step of recipe `default` after two warm-up steps, memory is the peak of the process. Ratios are those of the medians
over the rounds.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from sdcli.devices import keep_freed_memory
from sdcli.recipe.load import load_recipe
from sdcli.run.prepare import prepare
from sdcli.run.settings import Settings
from sdcli.run.train import next_update, train_step

CASES = ("test_resnet:64", "test_resnet:256", "resnet18:64", "resnet18:128")


def measure(case: str, keeps: bool, options: argparse.Namespace) -> dict[str, float]:
    """Seconds per step and peak memory in MiB, measured in this process."""
    model, _, batch_size = case.partition(":")
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(model, "digits", image_size=options.image_size, device="cpu", workers=0)
        recipe = load_recipe(["default"], [f"batch.size={batch_size}"])
        training = prepare(settings, recipe, Path(folder) / "run")
        if keeps:
            keep_freed_memory(training.accelerator.device)
        training.loader.set_epoch(1)
        training.module.train()
        batches = next_update(training, iter(training.loader))
        times = []
        for _ in range(options.steps + 2):
            start = time.perf_counter()
            train_step(training, batches)
            times.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(times[2:]),
        "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="MODEL:BATCH")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=("kept", "left"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.cases[0], options.one == "kept", options)))
        return
    print(f"{'model':14} {'batch':>6} {'kept, s':>8} {'left, s':>8}      x  kept, MiB  left, MiB      x")
    rows = []
    for case in options.cases:
        found: dict[str, list[dict[str, float]]] = {"kept": [], "left": []}
        for _ in range(options.rounds):
            for way, values in found.items():
                call = [sys.executable, __file__, "--cases", case, "--one", way, "--steps", str(options.steps)]
                call += ["--image-size", str(options.image_size)]
                out = subprocess.run(call, capture_output=True, text=True, check=True).stdout
                values.append(json.loads(out.splitlines()[-1]))
        median = {
            f"{way}_{what}": statistics.median(value[what] for value in values)
            for way, values in found.items()
            for what in ("seconds", "mib")
        }
        model, _, batch_size = case.partition(":")
        faster = median["left_seconds"] / median["kept_seconds"]
        larger = median["kept_mib"] / median["left_mib"]
        rows.append({"case": case, **median, "time_ratio": faster, "memory_ratio": larger})
        print(
            f"{model:14} {batch_size:>6} {median['kept_seconds']:8.2f} {median['left_seconds']:8.2f} {faster:6.2f} "
            f"{median['kept_mib']:10.0f} {median['left_mib']:10.0f} {larger:6.2f}",
            flush=True,
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
