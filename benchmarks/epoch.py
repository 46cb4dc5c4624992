"""Times a training epoch including data loading, as a user runs it: images per second, and the time of a whole run.

    python benchmarks/epoch.py --data ../shared/data/cifar100 --images 5000                    on the CPU
    python benchmarks/epoch.py --data FOLDER --device cuda --precision bf16 --compile --batch-size 512

One warm-up epoch, then one timed epoch; nothing is scored. Also prints one JSON line. On a GPU it reports the share of
the peak FLOPS, with 6 FLOPs per MAC of the network and its heads (forward and backward).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from sdcli.devices import keep_freed_memory
from sdcli.recipe.load import load_recipe
from sdcli.run.events import Epoch
from sdcli.run.prepare import prepare
from sdcli.run.settings import Settings
from sdcli.run.state import Position
from sdcli.run.train import train_epoch

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Peak dense bf16 FLOPS according to the manufacturer, by a part of the device's name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--images", type=int, help="train on this many images only")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--memory-format", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", type=Path, help="write a trace of a few updates here")
    options = parser.parse_args()
    settings = Settings(
        options.model,
        options.data,
        val_fraction=0.0,
        limit_train=options.images,
        device=options.device,
        precision=options.precision,
        memory_format=options.memory_format,
        compile=options.compile,
    )
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe([options.recipe], [f"batch.size={options.batch_size}"])
        start = time.perf_counter()
        training = prepare(settings, recipe, Path(folder) / "run")
        keep_freed_memory(training.accelerator.device)
        prepared = time.perf_counter() - start
        list(train_epoch(training))
        warm = time.perf_counter() - start - prepared
        # Not epoch 2, in which gradient shares are measured.
        training.position = Position(3)
        if options.profile:
            with torch.profiler.profile() as profiler:
                list(train_epoch(training))
            profiler.export_chrome_trace(str(options.profile))
            print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=25))
            training.position = Position(5)
        *_, epoch = train_epoch(training)
        assert isinstance(epoch, Epoch)
        about = training.description
        macs = about.blueprint.costs()["ensemble"].macs
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    peak = next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)
    result = {
        "device": name,
        "model": options.model,
        "batch_size": options.batch_size,
        "images_per_s": round(epoch.images_per_s, 1),
        "epoch_s": round(epoch.seconds, 2),
        "epochs_200_min": round(200 * epoch.seconds / 60, 2),
        "prepare_s": round(prepared, 1),
        "first_epoch_s": round(warm, 1),
        "share_of_peak": round(6 * macs * epoch.images_per_s / peak, 3) if peak else None,
    }
    for key, value in result.items():
        print(f"{key:16} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
