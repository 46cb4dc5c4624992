from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise, png
from PIL import Image

from sdcli.data import cached, loaders, resident, transforms
from sdcli.data.augment import Augmentation, Mixing
from sdcli.data.batch import Batch
from sdcli.data.cached import Pixels, cached_pixels
from sdcli.data.dataset import ImageData, Images, Split
from sdcli.data.loaders import EpochBatches
from sdcli.data.open import open_dataset
from sdcli.data.resident import ResidentLoader
from sdcli.data.splits import training_splits
from sdcli.data.tables import Rows
from sdcli.data.transforms import Preprocess
from sdcli.errors import UserError
from sdcli.recipe.schema import Augment

datasets = pytest.importorskip("datasets")

CPU = torch.device("cpu")
PREPROCESS = Preprocess((3, 16, 16), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for what is decoded."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("SDCLI_CACHE", str(tmp_path / "decoded"))
    return tmp_path / "decoded"


def parquet(folder: Path, images: list[Image.Image]) -> Path:
    """A data set of a table, as the hub's are; every other image is of the same class."""
    (folder / "data").mkdir(parents=True)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {
        "img": [{"bytes": png(image), "path": None} for image in images],
        "label": [place % 2 for place in range(len(images))],
    }
    table = datasets.Dataset.from_dict(rows, features)
    table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


def class_folders(folder: Path, images: list[Image.Image]) -> Path:
    for place, image in enumerate(images):
        path = folder / ["cat", "dog"][place % 2] / f"{place:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder


@pytest.fixture
def opened(tmp_path: Path) -> ImageData:
    return open_dataset(str(parquet(tmp_path / "set", [noise(i) for i in range(40)])))


class Noise(Images):
    """Images that need no file."""

    def read(self, row: int) -> Image.Image:
        return noise(row)


def split_of(count: int) -> Split:
    return Split("train", Noise(), np.arange(count) % 3, np.arange(count))


def pixels_of(split: Split, preprocess: Preprocess = PREPROCESS) -> Pixels:
    pixels, notes = cached_pixels(split, preprocess)
    assert pixels is not None and not notes
    return pixels


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def holds(pixels: Pixels, split: Split) -> bool:
    """Whether the bytes are those of the images, one by one."""
    expected = np.stack([np.asarray(split.image(i)).transpose(2, 0, 1) for i in range(len(split))])
    return len(pixels) == len(split) and np.array_equal(pixels.take(np.arange(len(split))), expected)


def loader_of(split: Split, train: bool = True, batch_size: int = 8, **options: Any) -> ResidentLoader:
    varied = {"crop": "pad", "hflip": 0.5, "cutout": 4} if train else {}
    augmentation = Augmentation(PREPROCESS, CPU, seed=3, **varied)
    batches = EpochBatches(split, batch_size, seed=3 if train else None, **options)
    return ResidentLoader(split, pixels_of(split), augmentation, batches, CPU)


def pass_over(loader: Any, epoch: int = 0, skip_updates: int = 0) -> Batch:
    loader.set_epoch(epoch, skip_updates)
    batches = list(loader)
    return Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "labels", "index")))


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("images", "labels", "index"))


# The file


def test_file_holds_the_images_bytes_and_is_mapped(opened: ImageData, cache: Path) -> None:
    split = opened.splits["train"]
    pixels = pixels_of(split)
    assert isinstance(pixels.array, np.memmap) and holds(pixels, split)
    assert [Path(name).suffix for name in files(cache)] == [".npy"]


def test_images_are_decoded_once(opened: ImageData, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels_of(opened.splits["train"])
    again = open_dataset(opened.name).splits["train"]
    read: list[int] = []
    monkeypatch.setattr(Rows, "read", lambda rows, row: read.append(row) or noise(row))
    assert len(pixels_of(again)) == 40
    assert read == [0], "the first image shows whether images are small"
    assert len(files(cache)) == 1


def test_training_and_validation_share_the_file(opened: ImageData, cache: Path) -> None:
    train, validation = training_splits(opened, 0.1, 0)
    assert validation is not None
    assert holds(pixels_of(train), train) and holds(pixels_of(validation), validation)
    assert len(files(cache)) == 1


def test_small_part_of_a_table_gets_no_file(opened: ImageData, cache: Path) -> None:
    part = opened.splits["train"].select([39, 3, 7])
    pixels = pixels_of(part)
    assert holds(pixels, part) and pixels.array.shape[0] == 3 and not files(cache)


@pytest.mark.parametrize("other", [{"input_size": (3, 24, 24)}, {"interpolation": "bilinear"}])
def test_other_input_size_or_interpolation_has_a_file_of_its_own(
    opened: ImageData, cache: Path, other: dict[str, Any]
) -> None:
    split = opened.splits["train"]
    pixels_of(split)
    pixels_of(split, Preprocess(**{"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, **other}))
    assert len(files(cache)) == 2


def test_mean_and_spread_do_not_make_another_file(opened: ImageData, cache: Path) -> None:
    pixels_of(opened.splits["train"])
    pixels_of(opened.splits["train"], Preprocess((3, 16, 16), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    assert len(files(cache)) == 1


def test_changed_image_file_makes_another_file(tmp_path: Path, cache: Path) -> None:
    folder = class_folders(tmp_path / "set", [noise(i) for i in range(6)])
    split = open_dataset(str(folder)).splits["train"]
    assert holds(pixels_of(split), split) and len(files(cache)) == 1
    noise(99).save(folder / "cat" / "002.png")
    os.utime(folder / "cat" / "002.png", (1, 1))
    split = open_dataset(str(folder)).splits["train"]
    assert holds(pixels_of(split), split) and len(files(cache)) == 2


def test_changed_file_of_a_table_makes_another_file(tmp_path: Path, cache: Path) -> None:
    """Of rows that name their images instead of holding them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "set"
    folder.mkdir()
    rows: list[dict[str, Any]] = [{"bytes": png(noise(0)), "path": None}]
    for place in range(1, 6):
        noise(place).save(folder / f"{place}.png")
        rows.append({"bytes": None, "path": f"{place}.png"})
    images = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": images, "label": [0, 1] * 3}), folder / "train.parquet")
    split = open_dataset(str(folder)).splits["train"]
    assert holds(pixels_of(split), split) and len(files(cache)) == 1
    assert holds(pixels_of(open_dataset(str(folder)).splits["train"]), split) and len(files(cache)) == 1
    noise(99).save(folder / "2.png")
    os.utime(folder / "2.png", (1, 1))
    split = open_dataset(str(folder)).splits["train"]
    assert holds(pixels_of(split), split) and len(files(cache)) == 2
    (folder / "2.png").unlink()
    assert split.images.identity() is None


def test_changed_table_makes_another_file(tmp_path: Path, cache: Path) -> None:
    for first in (0, 100):
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        folder = parquet(tmp_path / "set", [noise(first + i) for i in range(6)])
        split = open_dataset(str(folder)).splits["train"]
        assert holds(pixels_of(split), split)
    assert len(files(cache)) == 2


@pytest.mark.parametrize("damage", ["cut off", "empty", "foreign", "other shape", "other type"])
def test_damaged_file_is_made_anew(opened: ImageData, cache: Path, damage: str) -> None:
    split = opened.splits["train"]
    pixels_of(split)
    path = next(cache.iterdir())
    whole = path.read_bytes()
    if damage == "other shape":
        np.save(path, np.zeros((39, 3, 16, 16), np.uint8))
    elif damage == "other type":
        np.save(path, np.zeros((40, 3, 16, 16), np.int8))
    else:
        path.write_bytes({"cut off": whole[:-1], "empty": b"", "foreign": b"not an array" * 4000}[damage])
    assert holds(pixels_of(split), split)
    assert path.read_bytes() == whole


MAKE = """
import sys, time
from sdcli.data import cached
from sdcli.data.open import open_dataset
from sdcli.data.transforms import Preprocess

decoded = cached._decoded

def both_at_once(*arguments):
    end = time.monotonic() + 30
    while len(list(cached.cache_folder().glob("*.tmp"))) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.2)
    yield from decoded(*arguments)

cached._decoded = both_at_once
split = open_dataset(sys.argv[1]).splits["train"]
pixels, notes = cached.cached_pixels(split, Preprocess((3, 16, 16), (0.5,) * 3, (0.5,) * 3))
print(type(pixels.array).__name__, notes, int(pixels.array.sum()))
"""


def test_two_processes_may_make_the_file_at_once(tmp_path: Path, cache: Path) -> None:
    folder = class_folders(tmp_path / "set", [noise(i) for i in range(10)])
    arguments = [sys.executable, "-c", MAKE, str(folder)]
    processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    split = open_dataset(str(folder)).splits["train"]
    pixels = pixels_of(split)
    assert said == [f"memmap [] {int(pixels.array.sum())}"] * 2
    assert holds(pixels, split) and len(files(cache)) == 1, "no temporary file is left"


def test_folder_that_cannot_be_written_is_a_note_and_images_are_in_memory(
    opened: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDCLI_CACHE", str(tmp_path / "file" / "folder"))
    pixels, notes = cached_pixels(opened.splits["train"], PREPROCESS)
    assert pixels is not None and holds(pixels, opened.splits["train"])
    path = tmp_path / "file" / "folder"
    assert notes == [
        f"failed to cache decoded images: [Errno 20] Not a directory: '{path}' (SDCLI_CACHE sets the folder)"
    ]


def test_full_disk_is_a_note_and_images_are_in_memory(
    opened: ImageData, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cached.os, "fsync", full)
    pixels, notes = cached_pixels(opened.splits["train"], PREPROCESS)
    assert pixels is not None and holds(pixels, opened.splits["train"])
    assert notes == ["failed to cache decoded images: [Errno 28] No space left on device (SDCLI_CACHE sets the folder)"]
    assert not files(cache)


def test_more_than_memory_may_hold_is_read_image_by_image_where_there_is_no_file(
    opened: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached, "MEMORY", 1000)
    assert holds(pixels_of(opened.splits["train"]), opened.splits["train"])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDCLI_CACHE", str(tmp_path / "file"))
    pixels, notes = cached_pixels(opened.splits["train"], PREPROCESS)
    assert pixels is None and len(notes) == 1


def test_what_a_killed_run_left_is_removed_a_day_later(opened: ImageData, cache: Path) -> None:
    cache.mkdir()
    for name, hours in (("old", 25), ("new", 1)):
        (cache / f"{name}.tmp").write_text("")
        os.utime(cache / f"{name}.tmp", (time.time() - hours * 3600,) * 2)
    pixels_of(opened.splits["train"])
    assert [name for name in files(cache) if name.endswith(".tmp")] == ["new.tmp"]


def test_broken_image_is_named_and_leaves_no_file(tmp_path: Path, cache: Path) -> None:
    folder = class_folders(tmp_path / "set", [noise(i) for i in range(6)])
    (folder / "cat" / "004.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"004\.png': the image cannot be read"):
        cached_pixels(open_dataset(str(folder)).splits["train"], PREPROCESS)
    assert not files(cache)


def test_every_broken_image_is_named_at_once(tmp_path: Path, cache: Path) -> None:
    folder = class_folders(tmp_path / "set", [noise(i) for i in range(60)])
    for number in range(0, 60, 2):
        (folder / "cat" / f"{number:03}.png").write_bytes(b"nothing")
    with pytest.raises(UserError) as error:
        cached_pixels(open_dataset(str(folder)).splits["train"], PREPROCESS)
    lines = str(error.value).splitlines()
    assert lines[:2] == [
        "30 images cannot be read:",
        f"    '{folder}/cat/000.png': the image cannot be read (unknown format)",
    ]
    assert lines[20:22] == [
        f"    '{folder}/cat/038.png': the image cannot be read (unknown format)",
        "    … (10 more)",
    ]
    assert not files(cache)


@pytest.mark.parametrize("large", [0, 5])
def test_large_images_are_not_for_the_cache(tmp_path: Path, cache: Path, large: int) -> None:
    images = [noise(i, 16, 97 if i == large else 16) for i in range(6)]
    split = open_dataset(str(class_folders(tmp_path / "set", images))).splits["train"]
    assert cached_pixels(split, PREPROCESS) == (None, [])
    assert not files(cache)


def test_large_input_is_not_for_the_cache() -> None:
    assert cached_pixels(split_of(4), Preprocess((3, 97, 97), (0.5,) * 3, (0.5,) * 3)) == (None, [])


def test_images_of_unknown_origin_are_decoded_into_memory(cache: Path) -> None:
    split = split_of(10).select([3, 9, 1])
    assert holds(pixels_of(split), split) and not files(cache)


def test_cache_folder_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cached.cache_folder() == tmp_path / "decoded"
    monkeypatch.delenv("SDCLI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cached.cache_folder() == tmp_path / "sdcli"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cached.cache_folder() == Path.home() / ".cache" / "sdcli"


# Batches


@pytest.mark.parametrize("size", [(16, 16), (12, 20), None])
def test_evaluation_sees_the_same_bits_as_without_the_cache(tmp_path: Path, size: tuple[int, int] | None) -> None:
    # Without a size each image has its own, and is brought to the input size.
    images = [noise(i, *(size or (10 + i, 30 - i))) for i in range(11)]
    split = open_dataset(str(parquet(tmp_path / "set", images))).splits["train"]
    uncached = loaders.make_loader(
        split, transforms.eval_transform(PREPROCESS), EpochBatches(split, 4), seed=None, workers=0
    )
    assert equal(pass_over(uncached), pass_over(loader_of(split, train=False, batch_size=4)))


@pytest.mark.parametrize("count", [33, 32, 31])
def test_order_is_that_of_images_that_are_decoded_each_time(count: int) -> None:
    split = split_of(count + 10).select(np.arange(10, count + 10))
    transform = transforms.train_transform(PREPROCESS)
    other = loaders.make_loader(split, transform, EpochBatches(split, 8, seed=3), seed=3, workers=0)
    ours = loader_of(split)
    assert len(ours) == len(other) == 4
    for epoch in (0, 5):
        one, two = pass_over(ours, epoch), pass_over(other, epoch)
        assert torch.equal(one.index, two.index) and torch.equal(one.labels, two.labels)


def test_epochs_differ_in_order_and_variation_and_come_back_the_same() -> None:
    loader = loader_of(split_of(32))
    first, second, again = pass_over(loader, 1), pass_over(loader, 2), pass_over(loader, 1)
    assert equal(first, again) and not torch.equal(first.index, second.index)
    images = [dict(zip(batch.index.tolist(), batch.images, strict=True)) for batch in (first, second)]
    assert sum(torch.equal(images[0][i], images[1][i]) for i in range(32)) < 3


def test_run_resumes_within_an_epoch() -> None:
    whole, rest = pass_over(loader_of(split_of(40)), 4), pass_over(loader_of(split_of(40)), 4, skip_updates=3)
    assert equal(Batch(whole.images[24:], whole.labels[24:], whole.index[24:]), rest)


@pytest.mark.parametrize("count", [64, 61, 52, 50, 49, 48])
def test_two_processes_divide_the_batches_of_one(count: int) -> None:
    split = split_of(count)
    alone = loader_of(split, batch_size=16)
    two = [loader_of(split, batch_size=16, rank=rank, world=2) for rank in (0, 1)]
    for loader in (alone, *two):
        loader.set_epoch(2)
    batches, shared = list(alone), [list(loader) for loader in two]
    assert len(shared[0]) == len(shared[1]) == len(two[0]) == len(two[1])
    for whole, first, second in zip(batches, *shared, strict=False):
        assert len(first.labels) == len(second.labels) >= 2
        number = 2 * len(first.labels)
        assert number >= len(whole.labels) - 1, "one image is left out where they cannot get as many"
        merged = torch.stack([first.images, second.images], dim=1).flatten(0, 1)
        assert torch.equal(merged, whole.images[:number])
    assert len(batches) - len(shared[0]) == (count in (50,)), "two images would be one for each"


@pytest.mark.parametrize("count", [17, 16, 15, 9, 8])
def test_evaluation_gives_every_image_to_one_process(count: int) -> None:
    loaders_of_all = [loader_of(split_of(count), train=False, batch_size=2, rank=rank, world=4) for rank in range(4)]
    batches = [list(loader) for loader in loaders_of_all]
    assert [len(own) for own in batches] == [len(loader) for loader in loaders_of_all]
    assert sorted(i for own in batches for batch in own for i in batch.index.tolist()) == list(range(count))


def test_single_training_image_is_an_error() -> None:
    with pytest.raises(UserError) as error:
        loader_of(split_of(1))
    assert str(error.value) == (
        "split 'train' has too few images: 1\n  expected: at least 2\n  fix:      use more of the data set"
    )


def test_images_that_live_on_the_device_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    split = split_of(20).select(np.arange(5, 20))
    mapped = pass_over(loader_of(split), 1)
    monkeypatch.setattr(resident, "_fits", lambda *_: True)
    loader = loader_of(split)
    assert loader.resident is not None and equal(mapped, pass_over(loader, 1))


def test_workers_that_have_nothing_to_do_are_a_note(opened: ImageData) -> None:
    split = opened.splits["train"]
    _, notes = resident.suitable_loader(split, PREPROCESS, None, EpochBatches(split, 8), seed=0, workers=2, device=CPU)
    assert notes == ["--workers 2 has no effect on split 'train': small images are decoded once"]


@pytest.mark.parametrize(
    "augment, kind",
    [
        (None, ResidentLoader),
        (Augment(cutout=4), ResidentLoader),
        (Augment(aa="trivial"), loaders.Loader),
        (Augment(crop="resized"), loaders.Loader),
    ],
)
def test_loader_suits_images_and_recipe(opened: ImageData, augment: Augment | None, kind: type) -> None:
    split = opened.splits["train"]
    batches = EpochBatches(split, 8, seed=None if augment is None else 0)
    loader, notes = resident.suitable_loader(split, PREPROCESS, augment, batches, seed=0, workers=0, device=CPU)
    assert isinstance(loader, kind) and not notes
    batch = pass_over(loader)
    assert batch.images.shape == (40, 3, 16, 16)
    assert (batch.index.tolist() == list(range(40))) == (augment is None)


def test_large_images_are_read_one_by_one(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "set", [noise(i, 100, 100) for i in range(4)])
    split = open_dataset(str(folder)).splits["train"]
    loader, _ = resident.suitable_loader(split, PREPROCESS, None, EpochBatches(split, 4), seed=0, workers=0, device=CPU)
    assert isinstance(loader, loaders.Loader) and pass_over(loader).images.shape == (4, 3, 16, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_draws_the_same_and_is_never_waited_for() -> None:
    split, gpu = split_of(64), torch.device("cuda")
    options = {"crop": "pad", "hflip": 0.5, "cutout": 4, "reprob": 0.5}
    here, there = (
        ResidentLoader(
            split,
            pixels_of(split),
            Augmentation(PREPROCESS, device, seed=3, **options),
            EpochBatches(split, 8, seed=3),
            device,
        )
        for device in (CPU, gpu)
    )
    mixing = Mixing(3, gpu, seed=3, mixup=0.2, cutmix=1.0)
    batches = iter(there)
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            mixing([batch.images], batch.labels, batch.index, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert equal(pass_over(here, 1), pass_over(there, 1).to(CPU))
