"""Measures what keeping freed memory in huge pages gains and costs on a CPU (`sdcli.devices.keep_freed_memory`).

    python benchmarks/allocator.py                                       the rows of docs/performance.md, ten minutes
    python benchmarks/allocator.py --cases resnet50:32 --image-size 64   MODEL:BATCH

For each row three kinds of processes take turns: some keep freed memory in huge pages, as the commands do, some in
ordinary pages, some leave it to glibc. Time is the median step of recipe `default` after two warm-up steps, memory is
the peak of the process. Figures are the medians over the rounds.
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

from sdcli import devices
from sdcli.recipe.load import load_recipe
from sdcli.run.prepare import prepare
from sdcli.run.settings import Settings
from sdcli.run.train import next_update, train_step

CASES = ("test_resnet:64", "test_resnet:256", "resnet18:64", "resnet18:128")


WAYS = ("huge", "kept", "left")


def measure(case: str, way: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds per step and peak memory in MiB, measured in this process."""
    model, _, batch_size = case.partition(":")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(model, "digits", image_size=options.image_size, device="cpu", workers=0)
        recipe = load_recipe(["default"], [f"batch.size={batch_size}"])
        training = prepare(settings, recipe, Path(folder) / "run")
        if way == "kept":
            devices._heap_of_huge_pages = lambda libc: None
        if way != "left":
            devices.keep_freed_memory(training.accelerator.device)
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
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.cases[0], options.one, options)))
        return
    print(f"{'model':14} {'batch':>6}" + "".join(f" {way:>7}, s {way:>6}, MiB" for way in WAYS))
    rows = []
    for case in options.cases:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(options.rounds):
            for way in [*WAYS[number % 3 :], *WAYS[: number % 3]]:
                call = [sys.executable, __file__, "--cases", case, "--one", way, "--steps", str(options.steps)]
                call += ["--image-size", str(options.image_size), "--threads", str(options.threads)]
                out = subprocess.run(call, capture_output=True, text=True, check=True).stdout
                found[way].append(json.loads(out.splitlines()[-1]))
        median = {
            f"{way}_{what}": statistics.median(value[what] for value in values)
            for way, values in found.items()
            for what in ("seconds", "mib")
        }
        model, _, batch_size = case.partition(":")
        rows.append({"case": case, "rounds": found, **median})
        cells = (f" {median[f'{way}_seconds']:10.3f} {median[f'{way}_mib']:11.0f}" for way in WAYS)
        print(f"{model:14} {batch_size:>6}" + "".join(cells), flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
