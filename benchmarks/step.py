"""Compares a training step with exits to a plain timm step of the same network: the time ratio and the MACs ratio.

    python benchmarks/step.py                                                the four rows of docs/performance.md
    python benchmarks/step.py --model resnet50 --batch-size 32 --image-size 32 --recipe byot
    python benchmarks/step.py --device cuda --precision bf16 --compile --batch-size 512

Steps of both alternate in one process, on the same random images; the result is the median of the ratios of adjacent
steps. Heads, losses and taps should only cost their arithmetic: `on_top`, the time ratio over the MACs ratio, is the
overhead.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sdcli.data.batch import Batch
from sdcli.devices import keep_freed_memory
from sdcli.method.optimizer import create_optimizer
from sdcli.network.backbones import create
from sdcli.recipe.load import load_recipe
from sdcli.run.prepare import prepare
from sdcli.run.settings import Settings
from sdcli.run.train import train_step
from sdcli.run.training import Training


@dataclass(frozen=True)
class Case:
    model: str
    batch_size: int
    image_size: int
    channels: tuple[int, ...] | None = None
    """Of the four stages of a ResNet; by default the model's own."""


CASES = (
    Case("resnet18", 64, 32),
    Case("resnet18", 128, 32, (16, 32, 64, 128)),
    Case("vit_tiny_patch16_224", 16, 224),
    Case("mobilenetv3_small_100", 16, 224),
)


def prepared(case: Case, options: argparse.Namespace, folder: str) -> Training:
    """An sdcli run; its data are not used."""
    settings = Settings(
        case.model,
        "digits",
        image_size=case.image_size,
        device=options.device,
        precision=options.precision,
        compile=options.compile,
        memory_format=options.memory_format,
    )
    overrides = [f"batch.size={case.batch_size}", "optimizer.lr=0.001"]
    if case.channels:
        overrides.append(f"networks.student.model_args.channels={list(case.channels)}")
    training = prepare(settings, load_recipe([options.recipe], overrides), Path(folder) / "run")
    # As in `sdcli train`.
    keep_freed_memory(training.accelerator.device)
    return training


def plain_step(training: Training, batch: Batch, options: argparse.Namespace) -> Callable[[], Any]:
    """A step of the same network without exits, as in a minimal training loop around timm's model."""
    device = training.accelerator.device
    model = create(training.description.blueprint.architecture, device="cpu").to(device).train()
    if options.memory_format == "channels-last":
        model.to(memory_format=torch.channels_last)
    if options.compile:
        model.compile()
    optimizer = create_optimizer([model], training.recipe.optimizer)
    clip = training.recipe.optimizer.clip_grad

    def step() -> None:
        with training.accelerator.autocast():
            loss = F.cross_entropy(model(batch.images), batch.labels)
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timed(step: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        training = prepared(case, options, folder)
        device = training.accelerator.device
        images = torch.randn(case.batch_size, *training.description.blueprint.plan.input_size)
        batch = Batch(images, torch.randint(0, 10, (case.batch_size,)), torch.arange(case.batch_size)).to(device)
        if options.memory_format == "channels-last":
            batch.images = batch.images.contiguous(memory_format=torch.channels_last)
        training.module.train()
        plain = plain_step(training, batch, options)
        steps = {"plain": plain, "exits": lambda: train_step(training, [batch])}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(options.warmup):
            for step in steps.values():
                timed(step, device)
        for _ in range(options.steps):
            for name, step in steps.items():
                times[name].append(timed(step, device))
        about = training.description
        costs = about.blueprint.costs()
    median = {name: statistics.median(values) for name, values in times.items()}
    # Ratios of adjacent steps: the machine's load changes more slowly than that.
    ratio = statistics.median(one / other for one, other in zip(times["exits"], times["plain"], strict=True))
    macs = costs["ensemble"].macs / costs["final"].macs
    return {
        "model": case.model,
        "batch_size": case.batch_size,
        "image_size": case.image_size,
        "plain_ms": round(1000 * median["plain"], 2),
        "exits_ms": round(1000 * median["exits"], 2),
        "time_ratio": round(ratio, 3),
        "macs_ratio": round(macs, 3),
        "on_top": round(ratio / macs, 3),
        "images_per_s": round(case.batch_size / median["exits"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--memory-format", default="contiguous")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = [Case(options.model, options.batch_size, options.image_size)] if options.model else CASES
    columns = ("model", "batch_size", "plain_ms", "exits_ms", "time_ratio", "macs_ratio", "on_top")
    print("".join(f"{column:>24}" if column == "model" else f"{column:>12}" for column in columns))
    rows = []
    for case in cases:
        row = measure(case, options)
        print("".join(f"{row[column]:>24}" if column == "model" else f"{row[column]:>12}" for column in columns))
        rows.append(row)
    print(json.dumps({"threads": options.threads, "recipe": options.recipe, "device": options.device, "rows": rows}))


if __name__ == "__main__":
    main()
