"""Measures how time and memory grow with exits, batch size, data set size and processes.

    python benchmarks/scaling.py [--model resnet18] [--only exits batch data processes]

Each row is a separate process (several for `processes`) that trains on the digits for one epoch after a warm-up epoch;
peak memory is that of the whole process, libraries included. `data` only loads batches from data sets of increasing
size: of small images, which are decoded once into a memory-mapped file, and of large ones, which are read one by one.
Its memory is the process's anonymous memory (RssAnon), because the pages of mapped files depend on free memory.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RUN = """
import json, re, sys, torch
from pathlib import Path
from sdcli.devices import keep_freed_memory
from sdcli.run.prepare import prepare
from sdcli.recipe.load import load_recipe
from sdcli.run.train import train_epoch
from sdcli.run.settings import Settings
from sdcli.run.state import Position
model, data, folder, overrides, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
settings = Settings(model, data, device="cpu", image_size=32, val_fraction=0.0)
training = prepare(settings, load_recipe(["quick"], overrides), Path(folder))
keep_freed_memory(training.accelerator.device)
list(train_epoch(training))
training.position = Position(3)
*_, epoch = train_epoch(training)
if training.is_first:
    # Not getrusage, whose peak includes that of the parent process.
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    print(json.dumps({"images_per_s": round(epoch.images_per_s, 1), "peak_mib": round(peak)}))
"""


DATA = """
import json, re, sys, time, torch
from pathlib import Path
from sdcli.data.measure import measure
from sdcli.data.open import open_dataset
from sdcli.data.loaders import EpochBatches
from sdcli.recipe.schema import Augment
from sdcli.data.resident import suitable_loader
from sdcli.data.transforms import Preprocess
torch.set_num_threads(1)
def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
data = open_dataset(sys.argv[1])
split = data.splits["train"]
(height, width), mean, std = measure(data)
preprocess = Preprocess((3, height, width), mean, std)
batches = EpochBatches(split, 128, seed=0)
loader, _ = suitable_loader(split, preprocess, Augment(), batches, seed=0, workers=0, device=torch.device("cpu"))
peak, start = held(), time.perf_counter()
for number, batch in enumerate(loader):
    peak = max(peak, held()) if number % 10 == 0 else peak
seconds = time.perf_counter() - start
print(json.dumps({"images_per_s": round(len(split) / seconds, 1), "peak_mib": round(peak)}))
"""


def run(model: str, data: str, overrides: list[str], processes: int = 1) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "run.py"
        script.write_text(RUN)
        threads = max(1, (os.cpu_count() or 1) // processes)
        call = [str(script), json.dumps([model, data, str(Path(folder) / "run"), overrides, threads])]
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
        out = subprocess.run([sys.executable, *launcher, *call], capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return result


def noise(number: int, side: int, folder: Path) -> Path:
    """Writes a data set of `number` images that repeats 256 different ones."""
    import datasets
    import numpy as np
    from PIL import Image

    encoded = []
    for seed in range(256):
        pixels = np.random.RandomState(seed).randint(0, 256, (side, side, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        encoded.append(buffer.getvalue())
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}
    )
    (folder / "data").mkdir()
    for name, count in (("train", number), ("test", 10)):
        rows = ({"image": {"bytes": encoded[i % 256], "path": None}, "label": i % 10} for i in range(count))
        table = datasets.Dataset.from_list(list(rows), features=features)
        table.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


def read(number: int, side: int) -> dict[str, Any]:
    """Loads one epoch of batches in a separate process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        noise(number, side, folder / "images")
        places = {"SDCLI_CACHE": str(folder / "decoded"), "HF_DATASETS_CACHE": str(folder / "tables")}
        call = [sys.executable, "-c", DATA, str(folder / "images")]
        out = subprocess.run(call, capture_output=True, text=True, check=True, env=os.environ | places)
    result: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--only", nargs="+", default=["exits", "batch", "data", "processes"])
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def line(what: str, value: object, result: dict[str, Any]) -> None:
        rows.append({what: value, **result})
        print(f"{what:10} {value!s:>6} {result['images_per_s']:>10} images/s {result['peak_mib']:>8} MiB", flush=True)

    if "exits" in options.only:
        for exits in (1, 2, 3, 4):
            line("exits", exits, run(options.model, "digits", [f"networks.student.exits={exits}"]))
    if "batch" in options.only:
        for size in (16, 32, 64, 128, 256):
            line("batch", size, run(options.model, "digits", [f"batch.size={size}"]))
    if "data" in options.only:
        for side, numbers in ((32, (5_000, 20_000, 80_000)), (160, (500, 2_000, 8_000))):
            for number in numbers:
                line(f"{side} px", number, read(number, side))
    if "processes" in options.only:
        for processes in (1, 2):
            line("processes", processes, run(options.model, "digits", [], processes))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
