"""Compares training steps in both memory formats: how much faster channels-last is, by family.

    python benchmarks/memory_format.py                                                 all rows of docs/performance.md
    python benchmarks/memory_format.py --models resnet18 vit_tiny_patch16_224 --image-size 224 --batch-size 16

Two runs of the same recipe, one in each format, take turns in one process on the same random images; the result is the
median of the ratios of adjacent steps, contiguous over channels-last, with its quartiles. On a CPU it is the process's
time on one thread, which other programs disturb less. `auto` is what `--memory-format auto` chooses.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sdcli.data.batch import Batch
from sdcli.devices import keep_freed_memory
from sdcli.network.memory_format import suitable_format
from sdcli.recipe.load import load_recipe
from sdcli.run.prepare import prepare
from sdcli.run.settings import Settings
from sdcli.run.train import train_step
from sdcli.run.training import Training

FORMATS = ("contiguous", "channels-last")


@dataclass(frozen=True)
class Case:
    model: str
    image_size: int
    batch_size: int


CASES = (
    Case("resnet18", 32, 16),
    Case("resnet18", 224, 4),
    Case("tf_efficientnet_lite0", 224, 4),
    Case("mobilenetv3_small_100", 224, 8),
    Case("regnetx_002", 224, 8),
    Case("densenet121", 64, 8),
    Case("vgg11", 32, 8),
    Case("repvgg_a0", 64, 8),
    Case("ghostnet_100", 224, 4),
    Case("convnext_atto", 224, 4),
    Case("edgenext_xx_small", 224, 4),
    Case("coatnet_nano_rw_224", 224, 2),
    Case("swin_tiny_patch4_window7_224", 224, 2),
    Case("vit_tiny_patch16_224", 224, 4),
    Case("test_resnet", 32, 16),
    Case("test_efficientnet", 32, 16),
)


def prepared(case: Case, memory_format: str, options: argparse.Namespace, folder: str) -> Training:
    """A run in one of the formats; its data are not used."""
    settings = Settings(
        case.model,
        "digits",
        image_size=case.image_size,
        device=options.device,
        precision=options.precision,
        memory_format=memory_format,
        workers=0,
    )
    recipe = load_recipe([options.recipe], [f"batch.size={case.batch_size}", "optimizer.lr=0.0001"])
    training = prepare(settings, recipe, Path(folder) / memory_format)
    training.module.train()
    return training


def measure(case: Case, options: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: prepared(case, name, options, folder) for name in FORMATS}
    training = runs["contiguous"]
    device = training.accelerator.device
    # As in `sdcli train`.
    keep_freed_memory(device)
    images = torch.randn(case.batch_size, *training.description.blueprint.plan.input_size, device=device)
    labels, index = torch.randint(0, 10, (case.batch_size,)), torch.arange(case.batch_size)
    shown = {"contiguous": images, "channels-last": images.contiguous(memory_format=torch.channels_last)}
    batches = {name: Batch(images, labels, index).to(device) for name, images in shown.items()}

    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def timed(name: str) -> float:
        start = clock()
        train_step(runs[name], [batches[name]])
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    for name in FORMATS:
        timed(name)
    times = [tuple(timed(name) for name in FORMATS) for _ in range(options.steps)]
    ratios = [one / other for one, other in times]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "model": case.model,
        "image_size": case.image_size,
        "batch_size": case.batch_size,
        "contiguous_ms": round(1000 * statistics.median(one for one, _ in times), 1),
        "ratio": round(median, 2),
        "quartiles": [round(low, 2), round(high, 2)],
        "auto": suitable_format([training.learner.student], device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--steps", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [Case(name, options.image_size, options.batch_size) for name in options.models or ()] or CASES
    for case in cases:
        print(json.dumps(measure(case, options)), flush=True)


if __name__ == "__main__":
    main()
