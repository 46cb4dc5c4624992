"""Measures time and memory of a training step of each recipe against `baseline`, and the part that its passes explain.

    python benchmarks/recipes.py                          all of them, on resnet18 at 32 pixels, about 20 minutes
    python benchmarks/recipes.py --recipes byot cs-kd --model resnet18 --batch-size 64

Each recipe runs in a separate process, and its steps alternate with steps of `baseline`; the result is the median of
the ratios of adjacent steps. Teachers and peers are the same model. The expected time counts the MACs of all passes,
heads included: once for a forward pass, twice for a backward pass. `overhead` is the time ratio over the ratio of these
counts. `peak` is the process's peak memory in MiB. The expected memory is the peak of a process that only runs
`baseline`, plus the recipe's weights and optimizer state, which are held beside baseline's, plus the additional memory
that its forward pass keeps for the backward pass, gradients included.
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
from typing import Any

import torch

from sdcli.data.batch import Batch
from sdcli.devices import keep_freed_memory
from sdcli.recipe.load import load_recipe, recipe_names
from sdcli.run.prepare import prepare
from sdcli.run.settings import Settings
from sdcli.run.train import next_update, train_step
from sdcli.run.training import Training, enter_phase

BASELINE = "baseline"


def prepared(recipe: str, options: argparse.Namespace, folder: Path) -> tuple[Training, list[Batch]]:
    """A run in its last phase, and the batches of its first update."""
    overrides = [f"batch.size={options.batch_size}", "optimizer.lr=0.001", "schedule.warmup_epochs=0"]
    settings = Settings(options.model, "digits", image_size=options.image_size, device="cpu", workers=0)
    loaded = load_recipe([recipe], overrides)
    more = [f"networks.{name}.model={options.model}" for name, table in loaded.others.items() if table.model]
    if loaded.student.weights == "pretrained" or loaded.awaited:
        # In the place of weights from the hub, and of a trained teacher: a plain network as it begins.
        plain = prepare(settings, load_recipe([BASELINE], overrides), folder / "plain")
        start = plain.run.save("start", plain.network.state_dict(), plain.description)
        more += [f"networks.{name}.weights={start}" for name in loaded.awaited]
        more += [f"networks.student.weights={start}"] if loaded.student.weights == "pretrained" else []
        folder = folder / "run"
    if more:
        loaded = load_recipe([recipe], [*overrides, *more])
    training = prepare(settings, loaded, folder)
    keep_freed_memory(training.accelerator.device)
    if (last := len(training.objectives) - 1) > 0:
        training.position.epoch = training.epochs
        enter_phase(training, last)
    # At three quarters of the run, weights that change over time are in effect.
    training.learner.objective.set_time(0.75, 1.0)
    training.loader.set_epoch(1)
    training.module.train()
    return training, next_update(training, iter(training.loader))


def held(training: Training, batches: list[Batch]) -> tuple[float, float]:
    """MiB that a run holds permanently, and within a step (autograd's saved tensors and gradients). Call it after a
    first step."""
    parts = [*training.learner.state_dict().values()]
    for optimizer in training.optimizers.values():
        parts += [value for state in optimizer.state.values() for value in state.values()]
    storages = [part.untyped_storage() for part in parts if isinstance(part, torch.Tensor)]
    lasting = {storage.data_ptr(): storage.nbytes() for storage in storages}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in lasting:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        total, _ = training.module(batches[0])
    gradients = sum(p.numel() * p.element_size() for p in training.learner.parameters() if p.requires_grad)
    del total
    return sum(lasting.values()) / 2**20, (sum(kept.values()) + gradients) / 2**20


def measure(recipe: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row; to be run in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {BASELINE: prepared(BASELINE, options, Path(folder) / "baseline")}
        runs[recipe] = prepared(recipe, options, Path(folder) / "recipe")
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(options.steps + 2):
            for name, (training, batches) in runs.items():
                start = time.perf_counter()
                train_step(training, batches)
                if turn >= 2:
                    times[name].append(time.perf_counter() - start)
        # Ratios of adjacent steps: the machine's load changes more slowly than that.
        ratio = statistics.median(one / other for one, other in zip(times[recipe], times[BASELINE], strict=True))
        explained = runs[recipe][0].learner.training_macs / runs[BASELINE][0].learner.training_macs
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        (lasting, step), (_, plain) = held(*runs[recipe]), held(*runs[BASELINE])
    return {
        "recipe": recipe,
        "step_ms": round(1000 * statistics.median(times[recipe]), 1),
        "time_ratio": round(ratio, 3),
        "explained": round(explained, 3),
        "on_top": round(ratio / explained, 3),
        "peak_mib": round(peak),
        "memory_explained_mib": round(lasting + max(0.0, step - plain)) if recipe != BASELINE else 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=recipe_names())
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    if options.one:
        print(json.dumps(measure(options.recipes[0], options)))
        return
    same = ["--model", options.model, "--batch-size", str(options.batch_size)]
    same += ["--image-size", str(options.image_size), "--steps", str(options.steps), "--one"]
    memory = f"{'peak':>7} {'expected':>10} {'overhead':>8}"
    print(f"{'recipe':18} {'step ms':>9} {'x baseline':>11} {'expected':>10} {'overhead':>8} {memory}")
    rows: list[dict[str, Any]] = []
    for recipe in [BASELINE, *(name for name in options.recipes if name != BASELINE)]:
        call = [sys.executable, __file__, "--recipes", recipe, *same]
        out = subprocess.run(call, capture_output=True, text=True, check=True).stdout
        row = json.loads(out.splitlines()[-1])
        rows.append(row)
        row["memory_explained_mib"] += rows[0]["peak_mib"]
        row["memory_on_top"] = round(row["peak_mib"] / row["memory_explained_mib"], 3)
        print(
            f"{row['recipe']:18} {row['step_ms']:9} {row['time_ratio']:11} {row['explained']:10} {row['on_top']:8} "
            f"{row['peak_mib']:7} {row['memory_explained_mib']:10} {row['memory_on_top']:8}",
            flush=True,
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
