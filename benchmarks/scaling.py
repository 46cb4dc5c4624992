"""How time and memory grow with exits, batch, data and processes.

    python benchmarks/scaling.py [--model resnet18] [--only exits batch data processes]

Each line is a process of its own (several for `processes`) that trains a warm epoch of the digits; peak memory is the
process's, libraries and all. `data` repeats the digits in a folder of their own: memory should stay as it is.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RUN = """
import json, resource, sys, torch
from pathlib import Path
from sdcli.prepare import Position, Settings, prepare
from sdcli.recipe import load_recipe
from sdcli.train import train_epoch
model, data, folder, overrides, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
settings = Settings(model, data, device="cpu", image_size=32, val_fraction=0.0)
training = prepare(settings, load_recipe(["quick"], overrides), Path(folder))
list(train_epoch(training))
training.position = Position(3)
*_, epoch = train_epoch(training)
if training.is_first:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"images_per_s": round(epoch.images_per_s, 1), "peak_mib": round(peak)}))
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


def repeated_digits(times: int, folder: Path) -> str:
    """The digits `times` over, as a data set on disk."""
    import datasets

    from sdcli.data import open_dataset

    split = open_dataset("digits").splits["train"]
    count = len(split) * times
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}
    )

    def rows() -> Any:
        for place in range(count):
            yield {"image": split.image(place % len(split)), "label": int(split.labels[place % len(split)])}

    table = datasets.Dataset.from_generator(rows, features=features, cache_dir=str(folder / "cache"))
    parts = {"train": table, "test": table.select(range(100))}
    (folder / "data").mkdir()
    for name, part in parts.items():
        part.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return str(folder)


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
        for times in (1, 4, 16):
            with tempfile.TemporaryDirectory() as folder:
                data = repeated_digits(times, Path(folder))
                line("data", f"x{times}", run("test_resnet", data, []))
    if "processes" in options.only:
        for processes in (1, 2):
            line("processes", processes, run(options.model, "digits", [], processes))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
