"""Images per second from a data set to augmented, normalised batches: sdcli's cached pixels against timm's loader.

    python benchmarks/data.py --data FOLDER [--images N] [--batch-size 128] [--threads 1] [--rounds 3]

Both read the same images of the training split in one process, without workers, with the same augmentation: a random
crop with a border of an eighth, random horizontal flip, normalisation. Each measurement is a separate process, and the
two alternate, so that changes in machine load affect both. One warm-up pass over the images comes before the timed one.
Prints a table and one JSON line; the ratio is the result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any


def ours(split: Any, preprocess: Any, batch_size: int) -> tuple[Any, dict[str, float]]:
    """sdcli's loader, and the seconds to open the decoded images (and to decode them, at the first run)."""
    import torch

    from sdcli.data.augment import Augmentation
    from sdcli.data.cached import cached_pixels
    from sdcli.data.loaders import EpochBatches
    from sdcli.data.resident import ResidentLoader

    start = time.perf_counter()
    pixels, _ = cached_pixels(split, preprocess)
    assert pixels is not None, "these images are too large for the cache"
    timing = {"open_s": round(time.perf_counter() - start, 3)}
    device = torch.device("cpu")
    augmentation = Augmentation(preprocess, device, seed=0, crop="pad", hflip=0.5)
    loader = ResidentLoader(split, pixels, augmentation, EpochBatches(split, batch_size, seed=0), device)
    return loader, timing


def timms(split: Any, preprocess: Any, batch_size: int) -> tuple[Any, dict[str, float]]:
    """timm's loader, with a dataset that reads images and labels as sdcli does."""
    import torch
    from timm.data import create_loader
    from timm.data.transforms import ToNumpy
    from torchvision import transforms

    class Rows(torch.utils.data.Dataset[Any]):
        transform: Any = None

        def __len__(self) -> int:
            return len(split)

        def __getitem__(self, place: int) -> Any:
            return self.transform(split.image(place)), int(split.labels[place])

    rows = Rows()
    loader = create_loader(
        rows,
        input_size=preprocess.input_size,
        batch_size=batch_size,
        is_training=True,
        mean=preprocess.mean,
        std=preprocess.std,
        num_workers=0,
        persistent_workers=False,
        pin_memory=False,
        device=torch.device("cpu"),
    )
    height, width = preprocess.size
    # create_loader has no crop with a border. Like its own transforms, these return bytes; the loader normalises them.
    rows.transform = transforms.Compose(
        [
            transforms.RandomCrop((height, width), padding=(width // 8, height // 8)),
            transforms.RandomHorizontalFlip(),
            ToNumpy(),
        ]
    )
    return loader, {}


def measure(which: str, path: str, num_images: int | None, batch_size: int, threads: int) -> dict[str, float]:
    """Measures one loader in this process."""
    import torch

    from sdcli.data.measure import measure, natural_size
    from sdcli.data.open import open_dataset
    from sdcli.data.splits import limited
    from sdcli.data.transforms import Preprocess

    torch.set_num_threads(threads)
    opened = open_dataset(path)
    size, mean, std = measure(opened)
    natural = natural_size(size)
    assert natural is not None, "these images are too large or have different sizes"
    split = limited(opened.splits["train"], num_images, seed=0)
    preprocess = Preprocess((3, natural, natural), mean, std)
    loader, timing = (ours if which == "ours" else timms)(split, preprocess, batch_size)
    for _ in range(2):
        start, count = time.perf_counter(), 0
        for batch in loader:
            images = batch.images if which == "ours" else batch[0]
            count += len(images)
        seconds = time.perf_counter() - start
        assert images.shape[1:] == (3, natural, natural) and images.dtype == torch.float32
    return {"images_per_s": round(count / seconds, 1), **timing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="as for `sdcli train --dataset`")
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["ours", "timm"], help="one measurement, in this process")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.data, args.images, args.batch_size, args.threads)))
        return
    rounds: dict[str, list[float]] = {"ours": [], "timm": []}
    opened = []
    print(f"{'round':6}{'sdcli, images/s':>16}{'timm, images/s':>16}{'ratio':>8}")
    for number in range(1, args.rounds + 1):
        for which, measured in rounds.items():
            out = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--only", which],
                env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
                capture_output=True,
                text=True,
            )
            if out.returncode:
                sys.exit(out.stderr)
            result = json.loads(out.stdout.splitlines()[-1])
            measured.append(result["images_per_s"])
            opened += [result["open_s"]] if "open_s" in result else []
        ours_now, timm_now = rounds["ours"][-1], rounds["timm"][-1]
        print(f"{number:<6}{ours_now:16,.0f}{timm_now:16,.0f}{ours_now / timm_now:8.1f}", flush=True)
    ratios = [ours / timm for ours, timm in zip(*rounds.values(), strict=True)]
    summary = {
        "data": args.data,
        "images": args.images,
        "batch_size": args.batch_size,
        "threads": args.threads,
        "ours_images_per_s": statistics.median(rounds["ours"]),
        "timm_images_per_s": statistics.median(rounds["timm"]),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "first_open_s": opened[0],
        "later_open_s": opened[-1],
    }
    print(json.dumps(summary))


main()
