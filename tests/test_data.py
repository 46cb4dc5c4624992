from __future__ import annotations

import errno
import json
import os
import pickle
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from socket import AF_UNIX
from socket import socket as Socket
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise, png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from sdcli.data import folders, loaders, transforms
from sdcli.data.batch import Batch
from sdcli.data.dataset import LAYOUTS, NAMED, Images, Split, short_name
from sdcli.data.images import read_image
from sdcli.data.measure import measure, natural_size
from sdcli.data.open import open_dataset
from sdcli.data.splits import hold_out, limited, training_splits
from sdcli.data.transforms import Preprocess
from sdcli.errors import UserError

datasets = pytest.importorskip("datasets")

CIFAR_100 = Path(__file__).parents[2] / "shared" / "data" / "cifar100"
PREPROCESS = Preprocess((3, 32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
PHOTO = Preprocess((3, 64, 64), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), interpolation="bilinear", crop_pct=0.9)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(labels: list[Any], label: Any = None, **columns: Any) -> Any:
    """A table of images with a column of labels, the way the hub's are."""
    label = label or datasets.ClassLabel(names=["cat", "dog"])
    features = {"img": datasets.Image(), "label": label}
    rows = {"img": [{"bytes": png(noise(i)), "path": None} for i in range(len(labels))], "label": labels}
    for name, (feature, values) in columns.items():
        features[name], rows[name] = feature, values
    return datasets.Dataset.from_dict(rows, datasets.Features(features))


def parquet(folder: Path, **splits: Any) -> Path:
    (folder / "data").mkdir(parents=True)
    for name, rows in splits.items():
        rows.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


def class_folders(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(number).save(path)
    return folder


class Noise(Images):
    """Images that need no file."""

    def read(self, row: int) -> Image.Image:
        return noise(row, 32, 32)


def split_of(labels: list[int]) -> Split:
    return Split("train", Noise(), np.array(labels, dtype=np.int64), np.arange(len(labels), dtype=np.int64))


def message(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def pass_over(loader: loaders.Loader, epoch: int, skip_updates: int = 0) -> Batch:
    """All the batches of an epoch as one."""
    loader.set_epoch(epoch, skip_updates)
    batches = list(loader)
    columns = [(batch.images, batch.labels, batch.index) for batch in batches]
    return Batch(*(torch.cat(column) for column in zip(*columns, strict=True)))


def by_index(batch: Batch) -> dict[int, torch.Tensor]:
    return dict(zip(batch.index.tolist(), batch.images, strict=True))


# Opening


def test_digits_open_without_network_torchvision_or_datasets() -> None:
    code = (
        "import sys; from sdcli.data.open import open_dataset; digits = open_dataset('digits');"
        "print(len(digits.splits['train']), len(digits.splits['test']), sorted({'datasets', 'timm', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1438 359 []\n"


def test_digits_hold_a_fifth_of_each_class_for_testing() -> None:
    digits = open_dataset("digits")
    train, test = (np.bincount(digits.splits[name].labels) for name in ("train", "test"))
    np.testing.assert_array_equal(test, np.round((train + test) / 5))
    assert digits.classes == tuple("0123456789")


def test_digits_are_grey_on_the_full_scale_and_not_to_be_mirrored() -> None:
    digits = open_dataset("digits")
    pixels = np.stack([np.asarray(digits.splits["train"].image(i)) for i in range(50)])
    assert pixels.shape == (50, 8, 8, 3)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert not digits.hflip


@pytest.mark.slow
def test_digits_are_scikit_learns() -> None:
    digits = open_dataset("digits")
    ours = {
        (part.labels[i], np.asarray(part.image(i))[..., 0].tobytes())
        for part in digits.splits.values()
        for i in range(len(part))
    }
    theirs = load_digits()
    scaled = (theirs.images.astype(int) * 255 // 16).astype(np.uint8)
    assert ours == {(label, image.tobytes()) for label, image in zip(theirs.target, scaled, strict=True)}


def test_parquet_folder_opens_with_columns_and_classes_found(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "set", train=table([0, 1, 1]), test=table([1, 0]))
    opened = open_dataset(str(folder))
    assert (opened.image_key, opened.label_key, opened.classes) == ("img", "label", ("cat", "dog"))
    assert {name: split.labels.tolist() for name, split in opened.splits.items()} == {
        "train": [0, 1, 1],
        "test": [1, 0],
    }
    np.testing.assert_array_equal(np.asarray(opened.splits["train"].image(2)), np.asarray(noise(2)))


def test_opening_a_folder_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = parquet(tmp_path / "set", train=table([0, 1]), test=table([1, 0]))
    capfd.readouterr()
    open_dataset(str(folder))
    assert tuple(capfd.readouterr()) == ("", "")


def test_opening_leaves_the_progress_bars_of_datasets_on(tmp_path: Path) -> None:
    before = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    open_dataset(str(parquet(tmp_path / "set", train=table([0, 1]))))
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == before


def test_source_opens_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "set", train=table([0, 1]))
    monkeypatch.chdir(tmp_path)
    opened = open_dataset("set/")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert opened.name == "set/"
    assert len(open_dataset(opened.source).splits["train"]) == 2


@pytest.mark.parametrize("as_dict", [True, False])
def test_folder_of_save_to_disk_opens(tmp_path: Path, as_dict: bool) -> None:
    rows = table([0, 1, 1])
    (datasets.DatasetDict(train=rows) if as_dict else rows).save_to_disk(tmp_path / "saved")
    opened = open_dataset(str(tmp_path / "saved"))
    assert opened.splits["train"].labels.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(np.asarray(opened.splits["train"].image(1)), np.asarray(noise(1)))


def test_class_folders_open_with_sorted_names_and_without_hidden_files(tmp_path: Path) -> None:
    names = [
        "train/dog/a.png",
        "train/cat/b.png",
        "train/cat/._b.png",
        "train/.trash/c.png",
        "val/dog/d.png",
        "test/cat/e.png",
    ]
    opened = open_dataset(str(class_folders(tmp_path / "set", *names)))
    assert opened.classes == ("cat", "dog")
    assert {name: split.labels.tolist() for name, split in opened.splits.items()} == {
        "train": [0, 1],
        "validation": [1],
        "test": [0],
    }
    np.testing.assert_array_equal(np.asarray(opened.splits["train"].image(1)), np.asarray(noise(0)))
    assert (opened.image_key, opened.label_key) == (None, None)


def test_images_lie_at_any_depth_below_their_class_in_torchvisions_order(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    names = ["dog/images/b.png", "dog/images/a.png", "dog/z.png", "dog/A/c.png", "dog/images/x/d.png", "cat/e.JPEG"]
    folder = class_folders(tmp_path / "set", *(f"train/{name}" for name in names))
    opened = open_dataset(str(folder))
    images = ImageFolder(str(folder / "train"))
    assert opened.classes == ("cat", "dog")
    split = opened.splits["train"]
    read = [os.fsdecode(path) for path in split.images.paths]  # type: ignore[attr-defined]
    assert list(zip(read, split.labels.tolist(), strict=True)) == images.samples
    assert len(read) == len(names)


def test_extensions_are_torchvisions() -> None:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert folders.EXTENSIONS == IMG_EXTENSIONS


def tiny_imagenet(folder: Path) -> Path:
    """Two classes, laid out as Tiny-ImageNet is: labels of val in a file, none of test."""
    class_folders(folder, *(f"train/{c}/images/{c}_{i}.JPEG" for c in ("n1", "n2") for i in range(3)))
    class_folders(folder, "val/images/val_0.JPEG", "val/images/val_1.JPEG", "val/images/val_2.JPEG")
    class_folders(folder, "test/images/test_0.JPEG")
    for c in ("n1", "n2"):
        (folder / "train" / c / f"{c}_boxes.txt").write_text(f"{c}_0.JPEG\t0\t0\t62\t62\n")
    lines = ["val_0.JPEG\tn2\t0\t32\t44\t62", "val_2.JPEG\tn1\t4\t0\t55\t44", "", "val_1.JPEG\tn2\t0\t0\t9\t9"]
    (folder / "val" / "val_annotations.txt").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    return folder


def test_tiny_imagenet_opens_as_it_is_unpacked(tmp_path: Path) -> None:
    opened = open_dataset(str(tiny_imagenet(tmp_path / "set")))
    assert opened.classes == ("n1", "n2")
    assert {name: (split.name, split.labels.tolist()) for name, split in opened.splits.items()} == {
        "train": ("train", [0, 0, 0, 1, 1, 1]),
        "test": ("val", [0, 1, 1]),
    }
    # Of n1, then of n2.
    for row, number in enumerate((2, 0, 1)):
        pixels = np.asarray(Image.open(tmp_path / "set" / "val" / "images" / f"val_{number}.JPEG"))
        np.testing.assert_array_equal(np.asarray(opened.splits["test"].image(row)), pixels)
    assert opened.notes == (
        "split 'test' is left out: its images have no classes (expected test/CLASS/*.jpg, or "
        "test/test_annotations.txt with a line FILE<TAB>CLASS for every image)",
        "skipped 2 files without the extension of an image: train/n1/n1_boxes.txt, train/n2/n2_boxes.txt",
        "no labelled test split: split 'val' is scored instead",
    )


def test_images_without_a_line_in_the_annotations_are_skipped_with_a_note(tmp_path: Path) -> None:
    folder = tiny_imagenet(tmp_path / "set")
    class_folders(folder, "val/images/more.JPEG")
    assert "skipped 1 image without a line in the annotations: val/images/more.JPEG" in open_dataset(str(folder)).notes


def test_annotations_may_lie_beside_the_images(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "set", "train/cat/a.png", "train/dog/b.png", "test/c.png", "test/d.png")
    (folder / "test" / "test_annotations.txt").write_text("c.png\tdog\nd.png\tcat\n")
    assert open_dataset(str(folder)).splits["test"].labels.tolist() == [0, 1]


@pytest.mark.parametrize("images", ["val/a.png", "val/images/a.png", "val/images/deep/a.png"])
def test_split_whose_images_have_no_classes_is_left_out(tmp_path: Path, images: str) -> None:
    folder = class_folders(tmp_path / "set", "train/cat/a.png", "train/dog/b.png", images)
    opened = open_dataset(str(folder))
    assert list(opened.splits) == ["train"]
    assert opened.notes == (
        "split 'val' is left out: its images have no classes (expected val/CLASS/*.jpg, or "
        "val/val_annotations.txt with a line FILE<TAB>CLASS for every image)",
    )


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("val_0.JPEG n1", "no file and class separated by a tab"),
        ("val_0.JPEG\t", "no file and class separated by a tab"),
        ("../a.JPEG\tn1", "'../a.JPEG' lies outside of 'FOLDER/val/images'"),
        ("/a.JPEG\tn1", "'/a.JPEG' lies outside of 'FOLDER/val/images'"),
        ("val_1.JPEG\tn1", "'val_1.JPEG' has two classes, 'n2' and 'n1'"),
    ],
)
def test_wrong_line_of_annotations_is_named(tmp_path: Path, line: str, wrong: str) -> None:
    folder = tiny_imagenet(tmp_path / "set")
    file = folder / "val" / "val_annotations.txt"
    file.write_bytes(file.read_bytes() + f"\n{line}\n".encode())
    assert message(lambda: open_dataset(str(folder))) == (
        f"'{file}', line 5: {wrong.replace('FOLDER', str(folder))}\n"
        "  expected: one line FILE<TAB>CLASS for every image; further columns are ignored\n"
        "  fix:      repair or remove the line"
    )


def test_annotations_without_a_line_are_an_error(tmp_path: Path) -> None:
    file = tiny_imagenet(tmp_path / "set") / "val" / "val_annotations.txt"
    file.write_text("\n")
    assert message(lambda: open_dataset(str(tmp_path / "set"))) == (
        f"'{file}' lists no image\n"
        "  expected: a line FILE<TAB>CLASS for every image\n"
        "  fix:      fill or remove the file"
    )


def test_class_of_the_annotations_that_train_does_not_have_is_an_error(tmp_path: Path) -> None:
    folder = tiny_imagenet(tmp_path / "set")
    file = folder / "val" / "val_annotations.txt"
    file.write_text("val_0.JPEG\tx9\n")
    assert message(lambda: open_dataset(str(folder))) == (
        f"'{file}': there is no class 'x9' in '{folder}/train'\n"
        "  expected: the same classes in every split\n"
        "  fix:      repair the file"
    )


@pytest.mark.parametrize("names", [("cat/a.png", "dog/b.png"), ("train/cat/a.png", "train/dog/b.png")])
def test_data_set_may_lie_in_a_single_folder_below(tmp_path: Path, names: tuple[str, ...]) -> None:
    class_folders(tmp_path / "set" / "pets", *names)
    class_folders(tmp_path / "set" / "__MACOSX", "cat/._a.png")
    (tmp_path / "set" / "pets" / "train" / "eel").mkdir(parents=True)
    opened = open_dataset(str(tmp_path / "set"))
    assert (opened.classes, opened.source) == (("cat", "dog"), str(tmp_path / "set"))


def test_folders_beside_the_splits_are_noted(tmp_path: Path) -> None:
    names = ["train/steam/a.png", "train/diesel/b.png", "bus/a.png", "car/deep/b.png"]
    folder = class_folders(tmp_path / "set", *names)
    (folder / "empty").mkdir()
    opened = open_dataset(str(folder))
    assert opened.classes == ("diesel", "steam")
    assert opened.notes == (
        "2 folders with images are not used: bus, car (only the splits are read: train; the folder of a class belongs "
        "in each of them: train/CLASS/*.jpg)",
    )


def test_folder_beside_the_splits_that_cannot_be_read_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As lost+found, where the data set is a disk of its own."""
    folder = class_folders(tmp_path / "set", "train/cat/a.png", "train/dog/b.png", "locked/c.png", "holdout/d.png")
    locked, scandir = str(folder / "locked"), os.scandir

    def checked(path: Any) -> Any:
        if os.fspath(path) == locked:
            raise PermissionError(errno.EACCES, "Permission denied", locked)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", checked)
    (note,) = open_dataset(str(folder)).notes
    assert note.startswith("1 folder with images is not used: holdout (")


@pytest.mark.parametrize(
    ("classes", "loose", "shown"),
    [
        (("train/cat/a.png", "train/dog/b.png"), ("train/c.png", "d.JPG"), "2 images .* d.JPG, train/c.png"),
        (("cat/a.png", "dog/b.png"), ("c.png",), "1 image .* c.png"),
        (("pets/cat/a.png", "pets/dog/b.png"), ("pets/c.png", "d.png"), "2 images .* d.png, pets/c.png"),
    ],
)
def test_images_outside_of_class_folders_are_noted(
    tmp_path: Path, classes: tuple[str, ...], loose: tuple[str, ...], shown: str
) -> None:
    opened = open_dataset(str(class_folders(tmp_path / "set", *classes, *loose)))
    assert len(opened.splits["train"]) == 2
    assert opened.notes == (f"skipped {shown}".replace(".*", "outside of the class folders:"),)


def test_folder_of_data_sets_is_an_error(tmp_path: Path) -> None:
    class_folders(tmp_path / "sets" / "pets", "train/cat/a.png", "train/dog/b.png")
    class_folders(tmp_path / "sets" / "cars", "suv/a.png", "van/b.png")
    assert message(lambda: open_dataset(str(tmp_path / "sets"))) == (
        f"'{tmp_path}/sets/pets' holds a split, 'train', where the folder of a class was expected\n"
        "  expected: splits above classes: train/CLASS/*.jpg\n"
        f"  fix:      --dataset {tmp_path}/sets/pets"
    )


def test_splits_below_classes_are_an_error(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "set", "cat/train/a.png", "cat/test/b.png", "dog/train/a.png")
    assert message(lambda: open_dataset(str(folder))).splitlines()[-1] == "  fix:      move its images to train/cat"


def test_link_to_a_folder_above_it_is_not_followed(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "set", "cat/a.png", "dog/b.png")
    (folder / "dog" / "again").symlink_to(folder)
    (folder / "eel").symlink_to(folder / "cat")
    opened = open_dataset(str(folder))
    assert opened.classes == ("cat", "dog", "eel")
    assert len(opened.splits["train"]) == 3


@pytest.mark.parametrize("names", [("cat/a.png", "dog/b.png"), ("train/cat/a.png", "train/dog/b.png")])
def test_link_back_is_no_class(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = class_folders(tmp_path / "set", *names)
    for parent in {(folder / name).parent.parent for name in names}:
        (parent / "loop").symlink_to(".")
        (parent / "up").symlink_to(folder)
    opened = open_dataset(str(folder))
    assert opened.classes == ("cat", "dog")
    assert len(opened.splits["train"]) == 2
    assert opened.notes == ()


def test_what_cannot_be_read_is_reported_at_once_for_all_splits_without_opening_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["train/cat/a.png", "train/dog/b.png", "test/cat/c.png", "test/dog/d.png"]
    folder = class_folders(tmp_path / "set", *names)
    os.mkfifo(folder / "train" / "cat" / "pipe.png")
    (folder / "train" / "dog" / "link.png").symlink_to("nowhere.png")
    (folder / "test" / "dog" / "zero.jpg").touch()
    socket = Socket(AF_UNIX)
    # Relative: the path of a socket may have 100 characters at most.
    monkeypatch.chdir(folder / "test" / "cat")
    socket.bind("socket.png")
    try:
        text = message(lambda: open_dataset(str(folder)))
    finally:
        socket.close()
    assert text == (
        f"'{folder}': 4 image files cannot be read: train/cat/pipe.png (a named pipe), train/dog/link.png "
        "(a broken link), test/cat/socket.png (a socket), test/dog/zero.jpg (empty)\n"
        "  expected: regular files that are not empty\n"
        "  fix:      replace or remove them"
    )


def test_files_without_the_extension_of_an_image_are_a_note(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "set", "train/cat/a.png", "train/dog/b.png")
    for name in ("train/cat/c.gif", "train/cat/.hidden.gif", "train/dog/a.txt", "train/dog/deep.txt", "train/dog/x.md"):
        (folder / name).touch()
    os.mkfifo(folder / "train" / "cat" / "pipe")
    (folder / "README.md").touch()
    assert open_dataset(str(folder)).notes == (
        "skipped 5 files without the extension of an image: train/cat/c.gif, train/cat/pipe, train/dog/a.txt, …",
    )


def test_class_folder_without_images_is_a_note_and_no_class(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "set", "train/cat/a.png", "train/dog/b.png", "test/cat/c.png")
    for name in ("train/eel", "test/dog", "test/eel"):
        (folder / name).mkdir()
    opened = open_dataset(str(folder))
    assert opened.classes == ("cat", "dog")
    assert opened.notes == (
        "left out 1 class folder without images: train/eel",
        "split 'test' has no images of 1 of 2 classes: dog",
    )


def test_class_that_only_another_split_has_images_of_is_an_error(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "set", "train/cat/a.png", "train/dog/b.png", "test/eel/c.png")
    (folder / "train" / "eel").mkdir()
    assert message(lambda: open_dataset(str(folder))) == (
        f"'{folder}/test/eel' holds images, but '{folder}/train/eel' holds none\n"
        "  expected: images of every class in the first split\n"
        "  fix:      add some, or remove the class from every split"
    )


def test_classes_are_counted_in_every_split(tmp_path: Path) -> None:
    names = ["train/cat/a.png", "train/cat/b.png", "train/dog/c.png", "test/cat/d.png"]
    counts = open_dataset(str(class_folders(tmp_path / "set", *names))).class_counts()
    assert {name: count.tolist() for name, count in counts.items()} == {"train": [2, 1], "test": [1, 0]}


@pytest.mark.parametrize("name", ["🌷 tulips", os.fsdecode(b"caf\xe9")])
def test_any_name_of_a_folder_or_file_works(tmp_path: Path, name: str) -> None:
    folder = class_folders(tmp_path / name, f"{name}/{name}.png", "b/b.png")
    opened = open_dataset(str(folder))
    shown = name if name.isprintable() else "caf\\xe9"
    assert (opened.classes, short_name(opened)) == (("b", shown), shown)
    np.testing.assert_array_equal(np.asarray(opened.splits["train"].image(1)), np.asarray(noise(0)))


def test_tables_in_a_folder_whose_name_is_not_utf_8_are_an_error(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "set", train=table([0, 1])).rename(tmp_path / os.fsdecode(b"caf\xe9"))
    assert message(lambda: open_dataset(str(folder))) == (
        f"'{folder}': the path is not valid UTF-8\n"
        "  expected: UTF-8, for data sets of tables\n"
        "  fix:      rename the folder"
    )


def test_class_folders_without_splits_are_for_training(tmp_path: Path) -> None:
    # "train" is a class here: it holds images, not class folders.
    opened = open_dataset(str(class_folders(tmp_path / "set", "train/a.png", "truck/b.png")))
    assert opened.classes == ("train", "truck")
    assert list(opened.splits) == ["train"]


def test_class_folder_that_train_does_not_have_is_an_error(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "set", "train/cat/a.png", "train/dog/a.png", "test/cats/a.png")
    assert message(lambda: open_dataset(str(folder))) == (
        f"'{folder}/test/cats': there is no such class in '{folder}/train'\n"
        "  expected: the same folder names in every split\n"
        "  fix:      did you mean 'cat'?"
    )


def test_key_for_class_folders_is_an_error_since_it_would_have_no_effect(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "set", "cat/a.png", "dog/b.png")
    assert message(lambda: open_dataset(str(folder), label_key="label")) == (
        f"--label-key label: '{folder}' has no columns\n"
        "  expected: a data set of tables\n"
        "  fix:      leave --label-key out"
    )


def test_validation_is_scored_where_there_is_no_test_split(tmp_path: Path) -> None:
    opened = open_dataset(str(parquet(tmp_path / "set", train=table([0, 1]), validation=table([1, 0]))))
    assert list(opened.splits) == ["train", "test"]
    assert opened.splits["test"].name == "validation"
    assert opened.notes == ("no labelled test split: split 'validation' is scored instead",)


def test_test_split_with_secret_labels_is_left_out(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "set", train=table([0, 1]), validation=table([1, 0]), test=table([-1, -1]))
    opened = open_dataset(str(folder))
    assert opened.splits["test"].name == "validation"
    assert opened.notes == (
        "split 'test' is left out: it has no labels",
        "no labelled test split: split 'validation' is scored instead",
    )


def test_set_without_any_label_is_an_error(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "set", test=table([-1, None]))
    assert message(lambda: open_dataset(str(folder))) == (
        f"{folder}: no image has a 'label'\n  expected: labelled images\n  fix:      try another --label-key"
    )


def test_splits_go_by_many_names_and_others_are_noted(tmp_path: Path) -> None:
    saved = datasets.DatasetDict(Training=table([0, 1]), dev=table([0, 1]), eval=table([1, 0]), extra=table([1]))
    saved.save_to_disk(tmp_path / "saved")
    opened = open_dataset(str(tmp_path / "saved"))
    assert {name: split.name for name, split in opened.splits.items()} == {
        "train": "Training",
        "validation": "dev",
        "test": "eval",
    }
    assert opened.notes == ("split 'extra' is not used",)


def test_fine_label_is_taken_before_coarse_label(tmp_path: Path) -> None:
    rows = table([0, 1], coarse_label=(datasets.ClassLabel(names=["a", "b"]), [0, 1])).rename_column(
        "label", "fine_label"
    )
    assert open_dataset(str(parquet(tmp_path / "set", train=rows))).label_key == "fine_label"


def test_only_column_of_whole_numbers_is_the_label(tmp_path: Path) -> None:
    rows = table([7, 3, 7], datasets.Value("int32"), caption=(datasets.Value("string"), ["a", "b", "c"]))
    opened = open_dataset(str(parquet(tmp_path / "set", train=rows.rename_column("label", "species"))))
    assert (opened.label_key, opened.classes) == ("species", ("3", "7"))
    assert opened.splits["train"].labels.tolist() == [1, 0, 1]


def test_text_labels_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    rows = table(["owl", "bat", "owl"], datasets.Value("string"))
    opened = open_dataset(str(parquet(tmp_path / "set", train=rows)))
    assert opened.classes == ("bat", "owl")
    assert opened.splits["train"].labels.tolist() == [1, 0, 1]


def test_keys_choose_other_columns(tmp_path: Path) -> None:
    photos = [{"bytes": png(noise(i + 10)), "path": None} for i in range(2)]
    rows = table([0, 1], photo_2=(datasets.Image(), photos), other=(datasets.ClassLabel(names=["x", "y"]), [1, 0]))
    folder = parquet(tmp_path / "set", train=rows)
    opened = open_dataset(str(folder), image_key="photo_2", label_key="other")
    assert opened.classes == ("x", "y")
    np.testing.assert_array_equal(np.asarray(opened.splits["train"].image(0)), np.asarray(noise(10)))


def test_images_as_plain_bytes_open(tmp_path: Path) -> None:
    """As pandas writes them, without the hub's own types."""
    rows = datasets.Dataset.from_dict({"image": [png(noise(0)), png(noise(1))], "label": [0, 1]})
    opened = open_dataset(str(parquet(tmp_path / "set", train=rows)))
    np.testing.assert_array_equal(np.asarray(opened.splits["train"].image(1)), np.asarray(noise(1)))


# Errors of opening, word for word


def test_unknown_name_is_answered_with_the_nearest() -> None:
    assert message(lambda: open_dataset("cifar-100")) == (
        "unknown data set 'cifar-100'\n  expected: one of cifar10, cifar100, digits\n  fix:      did you mean 'cifar100'?"
    )


@pytest.mark.parametrize("name", ["{parent}/picturs/set", "./picturs", "picturs/set"])
def test_mistyped_path_is_an_error_with_the_nearest_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "picturs").mkdir() if name == "picturs/set" else None
    (tmp_path / "picturs" / "sets").mkdir() if name == "picturs/set" else None
    monkeypatch.chdir(tmp_path)
    name = name.format(parent=tmp_path)
    missing, parent, near = (
        ("set", tmp_path / "picturs", "sets") if name == "picturs/set" else ("picturs", tmp_path, "pictures")
    )
    assert message(lambda: open_dataset(name)) == (
        f"the path '{name}' does not exist: there is no '{missing}' in '{parent}'\n"
        f"  expected: {LAYOUTS}\n"
        f"  fix:      did you mean '{near}'?"
    )


@pytest.mark.parametrize(
    ("file", "fix"),
    [
        ("train.parquet", "give its folder, 'FOLDER'"),
        ("labels.csv", "put the images of each class into a folder of their own, and give the folder above"),
        ("flowers.tar.gz", "unpack it and give the folder"),
    ],
)
def test_file_instead_of_a_folder_is_an_error(tmp_path: Path, file: str, fix: str) -> None:
    (tmp_path / file).touch()
    assert message(lambda: open_dataset(str(tmp_path / file))) == (
        f"'{tmp_path / file}' is a file\n  expected: {LAYOUTS}\n  fix:      {fix.replace('FOLDER', str(tmp_path))}"
    )


@pytest.mark.parametrize("name", ["./flowers", "./pictures/set", "./data"])
def test_unrelated_folder_is_never_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for folder in ("folders", "fl", "pict", "setting"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data.csv").touch()
    monkeypatch.chdir(tmp_path)
    assert message(lambda: open_dataset(name)).splitlines()[-1] == "  fix:      check the path"


def test_path_that_is_too_long_is_an_error() -> None:
    assert message(lambda: open_dataset("./" + "x" * 300)) == (
        f"the path './{'x' * 98}… (302 characters)' cannot be opened: File name too long\n"
        f"  expected: {LAYOUTS}\n"
        "  fix:      check the path"
    )


def test_home_of_an_unknown_user_is_an_error() -> None:
    assert message(lambda: open_dataset("~nobody-of-that-name/set")).splitlines()[0] == (
        "the path '~nobody-of-that-name/set' cannot be opened: Could not determine home directory."
    )


@pytest.mark.parametrize("name", ["/", "~", "~/.."])
def test_whole_disk_is_refused_without_a_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def walked(*_: object, **__: object) -> Any:
        raise AssertionError("walked")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(folders.os, "scandir", walked)
    monkeypatch.setattr(folders.os, "walk", walked)
    assert message(lambda: open_dataset(name)) == (
        f"'{name}' is not the folder of a data set\n  expected: {LAYOUTS}\n  fix:      give the data set's own folder"
    )


@pytest.mark.parametrize("inner", ["", "dog"])
def test_folder_without_permission_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str) -> None:
    # Root may read everything, so that the mode of a folder has no effect in a test.
    folder = class_folders(tmp_path / "set", "cat/a.png", "dog/b.png")
    locked, scandir = str(folder / inner), os.scandir

    def checked(path: Any) -> Any:
        if os.fspath(path) == locked:
            raise PermissionError(errno.EACCES, "Permission denied", locked)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", checked)
    assert message(lambda: open_dataset(str(folder))) == (
        f"'{folder}' cannot be opened: [Errno 13] Permission denied: '{locked}'\n"
        "  expected: folders and files that you may read\n"
        f"  fix:      chmod -R u+rX {folder}"
    )


def test_folder_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert message(lambda: open_dataset(str(tmp_path / "empty"))) == (
        f"'{tmp_path}/empty' holds no images\n  expected: {LAYOUTS}\n  fix:      check the path"
    )


def test_folder_with_a_single_class_is_an_error(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "set", "images/a.png", "images/b.png")
    assert message(lambda: open_dataset(str(folder))) == (
        f"'{folder}' has a single class, 'images'\n"
        "  expected: two classes or more\n"
        "  fix:      give the folder that holds the class folders"
    )


def test_damaged_parquet_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = parquet(tmp_path / "set", train=table([0, 1]))
    file = next((folder / "data").iterdir())
    file.write_bytes(file.read_bytes()[:-100])
    capfd.readouterr()
    assert message(lambda: open_dataset(str(folder))).startswith(f"'{folder}' cannot be opened: ")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["cifar10", "uoft-cs/cifar10"])
def test_hub_set_that_is_not_in_the_cache_is_one_message_without_a_network(capfd: Any, name: str) -> None:
    assert message(lambda: open_dataset(name)) == (
        f"'{name}' is not in the cache, and HF_HUB_OFFLINE is set\n"
        "  expected: a network connection, a local folder, or a cache that holds it (HF_HOME)\n"
        "  fix:      on a machine with a network: hf download --repo-type dataset uoft-cs/cifar10 --local-dir FOLDER; "
        "then here: --dataset FOLDER"
    )
    assert tuple(capfd.readouterr()) == ("", "")


def test_hub_set_in_the_cache_opens_without_a_network(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "cifar10", train=table([0, 1]), test=table([1, 0]))
    datasets.load_dataset(str(folder))
    (tmp_path / "cache" / "cifar10").rename(tmp_path / "cache" / "uoft-cs___cifar10")
    assert open_dataset("cifar10").splits["test"].labels.tolist() == [1, 0]


def test_downloaded_hub_set_opens_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = parquet(tmp_path / "set", train=table([0, 1]), test=table([1]))
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda hub: load(str(folder)) if hub == "uoft-cs/cifar10" else None)
    opened = open_dataset("cifar10")
    assert (opened.name, opened.source, opened.hflip) == ("cifar10", "cifar10", True)
    assert measure(opened) == ((32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


COLUMN_ERRORS = [
    (
        {"label_key": "lable"},
        "there is no column 'lable'\n  expected: one of label, text\n  fix:      did you mean 'label'?",
    ),
    (
        {"label_key": "img"},
        "column 'img' (Image) does not hold labels\n  expected: one of label, text\n  fix:      leave --label-key out",
    ),
    (
        {"image_key": "label"},
        "column 'label' (ClassLabel) does not hold images\n  expected: one of img\n  fix:      leave --image-key out",
    ),
]


@pytest.mark.parametrize(("keys", "expected"), COLUMN_ERRORS)
def test_column_that_does_not_fit_is_an_error(tmp_path: Path, keys: dict[str, str], expected: str) -> None:
    folder = parquet(tmp_path / "set", train=table([0, 1], text=(datasets.Value("string"), ["a", "b"])))
    assert message(lambda: open_dataset(str(folder), **keys)) == f"{folder}: {expected}"


def test_missing_label_column_lists_the_others_and_their_types(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "set", train=table([0.0, 1.0], datasets.Value("float64")))
    assert message(lambda: open_dataset(str(folder))) == (
        f"{folder}: no column of labels found among img (Image), label (float64)\n"
        "  expected: a column of whole numbers, ClassLabel or text\n"
        "  fix:      convert a column, or choose another data set"
    )
    assert message(lambda: open_dataset(str(folder), label_key="label")) == (
        f"{folder}: column 'label' (float64) does not hold labels\n"
        "  expected: a column of whole numbers, ClassLabel or text\n"
        "  fix:      leave --label-key out"
    )


def test_caption_is_offered_where_the_labels_are_of_a_wrong_type(tmp_path: Path) -> None:
    rows = table([0.0, 1.0], datasets.Value("float64"), caption=(datasets.Value("string"), ["a", "b"]))
    assert message(lambda: open_dataset(str(parquet(tmp_path / "set", train=rows)))) == (
        f"{tmp_path}/set: no column of labels found among img (Image), label (float64), caption (string)\n"
        "  expected: one of caption\n"
        "  fix:      choose one with --label-key"
    )


def test_two_possible_labels_are_the_users_choice(tmp_path: Path) -> None:
    rows = table([0, 1], size=(datasets.Value("int64"), [4, 4])).rename_column("label", "kind")
    folder = parquet(tmp_path / "set", train=rows)
    assert message(lambda: open_dataset(str(folder))) == (
        f"{folder}: kind and size could each be the column of labels\n  expected: one of them\n  fix:      --label-key kind"
    )


def test_column_of_row_numbers_is_not_taken_for_labels(tmp_path: Path) -> None:
    rows = table([0, 1, 2], datasets.Value("int64")).rename_column("label", "id")
    folder = parquet(tmp_path / "set", train=rows)
    assert message(lambda: open_dataset(str(folder))) == (
        f"{folder}: 'id' is different for every image\n"
        "  expected: a column of labels, which many images share\n"
        "  fix:      name it with --label-key"
    )


@pytest.mark.parametrize(
    ("labels", "wrong"),
    [
        ([0, -1, 1], "label = -1: the label is missing"),
        ([0, None, None], "label = None: the label is missing (2 such rows in all)"),
    ],
)
def test_missing_label_is_named_by_its_row(tmp_path: Path, labels: list[int], wrong: str) -> None:
    folder = parquet(tmp_path / "set", train=table(labels))
    assert message(lambda: open_dataset(str(folder))) == (
        f"{folder}, split 'train', row 1: {wrong}\n"
        "  expected: one of the 2 classes in every row\n"
        "  fix:      remove the row, or choose another column with --label-key"
    )


@pytest.mark.parametrize("empty", ["", "  "])
def test_empty_text_is_a_missing_label(tmp_path: Path, empty: str) -> None:
    text = datasets.Value("string")
    folder = parquet(tmp_path / "set", train=table(["owl", empty, "bat", "bat"], text))
    assert message(lambda: open_dataset(str(folder))).splitlines()[:2] == [
        f"{folder}, split 'train', row 1: label = {empty!r}: the label is missing",
        "  expected: one of the 2 classes in every row",
    ]
    folder = parquet(tmp_path / "secret", train=table(["owl", "bat", "bat"], text), test=table([empty] * 2, text))
    assert "split 'test' is left out: it has no labels" in open_dataset(str(folder)).notes


# Names of classes in several files


def store(folder: Path, how: str, **splits: Any) -> Path:
    """Tables as the files of a data set; a shard is named train.0."""
    if how == "saved":
        datasets.DatasetDict(splits).save_to_disk(folder)
        return folder
    (folder / "data").mkdir(parents=True)
    for name, rows in splits.items():
        split, _, shard = name.partition(".")
        file = folder / "data" / f"{split}-{int(shard or 0):05}-of-00002.{how}"
        if how == "parquet":
            rows.to_parquet(file)
        else:
            import pyarrow as pa

            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, rows.data.table.schema) as stream:
                stream.write_table(rows.data.table)
    return folder


def named(labels: list[int], *names: str) -> Any:
    return table(labels, datasets.ClassLabel(names=list(names)))


def labels_of(folder: Path) -> dict[str, list[str]]:
    """The names of the classes of every row."""
    opened = open_dataset(str(folder))
    return {name: [opened.classes[label] for label in split.labels] for name, split in opened.splits.items()}


@pytest.mark.parametrize("how", ["parquet", "saved", "arrow"])
def test_splits_that_number_their_classes_differently_agree_on_their_names(tmp_path: Path, how: str) -> None:
    splits = {"train": named([0, 1, 1], "red", "green"), "test": named([0, 1, 1], "green", "red")}
    folder = store(tmp_path / "set", how, **splits)
    assert open_dataset(str(folder)).classes == ("red", "green")
    assert labels_of(folder) == {"train": ["red", "green", "green"], "test": ["green", "red", "red"]}


@pytest.mark.parametrize("how", ["parquet", "arrow"])
def test_files_of_a_split_may_number_their_classes_differently_too(tmp_path: Path, how: str) -> None:
    parts = {"train.0": named([0, 1, 1], "red", "green"), "train.1": named([0, 1, 1, 1], "green", "red")}
    assert labels_of(store(tmp_path / "set", how, **parts)) == {
        "train": ["red", "green", "green", "green", "red", "red", "red"]
    }


@pytest.mark.parametrize("how", ["parquet", "saved"])
def test_a_split_may_name_fewer_classes_or_more_than_it_has(tmp_path: Path, how: str) -> None:
    few, more = named([0, 0], "blue"), named([1, 2], "grey", "green", "red")
    splits = {"train": named([0, 1, 2], "red", "green", "blue"), "validation": few, "test": more}
    assert labels_of(store(tmp_path / "set", how, **splits)) == {
        "train": ["red", "green", "blue"],
        "validation": ["blue", "blue"],
        "test": ["green", "red"],
    }


@pytest.mark.parametrize("how", ["parquet", "saved"])
def test_class_that_the_first_split_does_not_name_is_an_error(tmp_path: Path, how: str) -> None:
    splits = {"train": named([0, 1], "red", "green"), "test": named([0, 2], "green", "red", "gren")}
    folder = store(tmp_path / "set", how, **splits)
    assert message(lambda: open_dataset(str(folder))) == (
        f"{folder}, split 'test': label 'gren' is not one of the classes red, green\n"
        "  expected: the classes of the first split in every split, in any order\n"
        "  fix:      did you mean 'green'?"
    )


def test_number_without_a_name_is_an_error_where_names_differ(tmp_path: Path) -> None:
    bad = named([0, 1], "red", "a")
    bad = (
        bad.with_format("arrow").map(lambda rows: rows.set_column(1, "label", [[0, 5]]), batched=True).with_format(None)
    )
    folder = store(tmp_path / "set", "saved", train=named([0] * 6, *"abcde", "red"), test=bad)
    assert "split 'test': label '5' is not one of the classes" in message(lambda: open_dataset(str(folder)))


def test_missing_label_stays_missing_where_names_are_in_another_order(tmp_path: Path) -> None:
    folder = store(tmp_path / "set", "parquet", train=named([0, 1], "a", "b"), test=named([0, -1], "b", "a"))
    assert "split 'test', row 1: label = -1: the label is missing" in message(lambda: open_dataset(str(folder)))


CARD = """---
dataset_info:
  features:
  - name: img
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': {}
          '1': {}
---
"""


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (("cat", "dog"), {"train": ["cat", "dog", "dog"], "test": ["dog", "cat", "cat"]}),
        (("green", "red"), {"train": ["red", "green", "green"], "test": ["green", "red", "red"]}),
    ],
)
def test_card_may_rename_classes_but_not_swap_them(
    tmp_path: Path, card: tuple[str, str], expected: dict[str, list[str]]
) -> None:
    splits = {"train": named([0, 1, 1], "red", "green"), "test": named([0, 1, 1], "green", "red")}
    folder = store(tmp_path / "set", "parquet", **splits)
    (folder / "README.md").write_text(CARD.format(*card))
    assert sorted(open_dataset(str(folder)).classes) == sorted(card)
    assert labels_of(folder) == expected


def test_label_that_train_does_not_have_is_named_by_its_row(tmp_path: Path) -> None:
    text = datasets.Value("string")
    folder = parquet(tmp_path / "set", train=table(["owl", "bat", "owl"], text), test=table(["bat", "ant"], text))
    assert message(lambda: open_dataset(str(folder))).splitlines()[0] == (
        f"{folder}, split 'test', row 1: label = 'ant': 'ant' is not one of the classes"
    )


# Images


def saved(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palette_with_transparency() -> bytes:
    image = noise(0).quantize(8)
    return saved(image, transparency=bytes([0, 128, 255]))


IMAGES = {
    "grey": (saved(Image.new("L", (2, 2), 100)), (100, 100, 100)),
    "grey and alpha": (saved(Image.new("LA", (2, 2), (100, 7))), (100, 100, 100)),
    "one bit": (saved(Image.new("1", (2, 2), 1)), (255, 255, 255)),
    "16 bits": (saved(Image.fromarray(np.full((2, 2), 100 * 257, dtype=np.uint16))), (100, 100, 100)),
    "RGBA": (saved(Image.new("RGBA", (2, 2), (10, 20, 30, 0))), (10, 20, 30)),
    "palette": (saved(Image.new("RGB", (2, 2), (10, 20, 30)).quantize(2)), (10, 20, 30)),
    "CMYK": (saved(Image.new("CMYK", (2, 2), (0, 255, 0, 0)), "tiff"), (255, 0, 255)),
    "WebP": (saved(Image.new("RGB", (2, 2), (10, 20, 30)), "webp", lossless=True), (10, 20, 30)),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_every_kind_of_image_becomes_rgb(kind: str) -> None:
    source, colour = IMAGES[kind]
    image = read_image(source, "here")
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == colour


def test_palette_with_transparency_becomes_rgb_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(palette_with_transparency(), "here").mode == "RGB"


def test_photo_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn clockwise to see it upright
    sideways = Image.fromarray(np.array([[[255] * 3, [0] * 3]] * 8, dtype=np.uint8).repeat(8, axis=1))
    image = read_image(saved(sideways, "jpeg", exif=exif), "here")
    assert image.size == (8, 16)
    assert np.asarray(image)[0, 0, 0] > 200 > 50 > np.asarray(image)[-1, 0, 0]


WIDE = {
    "8 bits in 32": (np.int32, [0, 100, 255], [0, 100, 255], "tiff"),
    "16 bits in 32": (np.int32, [0, 256, 100 * 257], [0, 1, 100], "tiff"),
    "16 bits, dark": (np.uint16, [0, 100, 255], [0, 0, 1], "tiff"),
    "16 bits of PNG, dark": (np.uint16, [0, 100, 255], [0, 0, 1], "png"),
    "16 bits of PGM, dark": (np.uint16, [0, 100, 255], [0, 0, 1], "ppm"),
}


@pytest.mark.parametrize("kind", WIDE)
def test_integers_of_more_than_8_bits_keep_their_brightness(kind: str) -> None:
    dtype, values, expected, file_format = WIDE[kind]
    source = saved(Image.fromarray(np.array([values], dtype=dtype)), file_format)
    assert np.asarray(read_image(source, "here"))[0, :, 0].tolist() == expected


def test_signed_16_bits_are_not_taken_for_32() -> None:
    # Pillow reads signed 16 bits as 32, and cannot write them.
    source = saved(Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint16)), "tiff", tiffinfo={339: 2})
    with Image.open(BytesIO(source)) as opened:
        assert opened.mode == "I"
    assert np.asarray(read_image(source, "here"))[0, :, 0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("kind", ["table", "files"])
@pytest.mark.parametrize("workers", [0, 1])
def test_image_that_is_nothing_but_a_line_is_refused_by_its_name(tmp_path: Path, kind: str, workers: int) -> None:
    """Resized to 224 pixels, it would take gigabytes."""
    line = Image.new("RGB", (1, 60_000))
    if kind == "files":
        folder = class_folders(tmp_path / "set", "cat/a.png", "dog/b.png")
        line.save(folder / "dog" / "b.png")
        where = f"'{folder}/dog/b.png'"
    else:
        rows = {"image": [png(noise(0)), png(line)], "label": [0, 1]}
        folder = parquet(tmp_path / "set", train=datasets.Dataset.from_dict(rows))
        where = f"{folder}, split 'train', row 1"
    opened = open_dataset(str(folder))
    expected = (
        f"{where}: the image cannot be read (1x60000 pixels: a side is over 100 times the other)\n"
        "  expected: a JPEG, PNG, WebP or similar file\n"
        "  fix:      replace or remove it"
    )
    loader = loader_of(opened.splits["train"], workers=workers, batch_size=2)
    assert message(lambda: list(loader)) == expected
    assert message(lambda: measure(opened)) == expected


def test_floating_point_image_is_refused_since_its_range_is_unknown() -> None:
    source = saved(Image.new("F", (2, 2), 0.5), "tiff")
    assert message(lambda: read_image(source, "here")) == (
        "here: the image cannot be read (32-bit values without a known range)\n"
        "  expected: a JPEG, PNG, WebP or similar file\n"
        "  fix:      replace or remove it"
    )


@pytest.fixture
def broken(tmp_path: Path) -> Split:
    """Row 2 of four is no image."""
    rows = {"image": [png(noise(0)), png(noise(1)), b"not an image", png(noise(3))], "label": [0, 1, 0, 1]}
    folder = parquet(tmp_path / "broken", train=datasets.Dataset.from_dict(rows))
    return open_dataset(str(folder)).splits["train"]


def test_broken_image_in_a_table_is_named_by_its_row(broken: Split, tmp_path: Path) -> None:
    # The index in the original split, not in the selection.
    assert message(lambda: broken.select([3, 2]).image(1)) == (
        f"{tmp_path}/broken, split 'train', row 2: the image cannot be read (unknown format)\n"
        "  expected: a JPEG, PNG, WebP or similar file\n"
        "  fix:      replace or remove it"
    )


def test_broken_image_file_is_named_by_its_path(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "set", "cat/a.png", "dog/b.png")
    path = folder / "dog" / "b.png"
    path.write_bytes(path.read_bytes()[:200])
    split = open_dataset(str(folder)).splits["train"]
    assert message(lambda: split.image(1)).startswith(f"'{path}': the image cannot be read (")


def test_row_without_an_image_is_an_error(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict(
        {"image": [None, {"bytes": png(noise(1)), "path": None}], "label": [0, 1]},
        datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    folder = parquet(tmp_path / "set", train=rows)
    assert message(lambda: open_dataset(str(folder))) == (
        f"{folder}, split 'train': 1 row without an image that can be read: row 0 (no image)\n"
        "  expected: an image in every row, or the path of one inside the folder of the data set\n"
        "  fix:      repair or remove them"
    )


def rows_of_files(folder: Path, *values: Any) -> Path:
    """A parquet file whose rows may name image files instead of holding images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"image": images, "label": [0, 1] * (len(values) // 2)}), folder / "train.parquet")
    return folder


def test_row_may_name_a_file_inside_the_folder(tmp_path: Path) -> None:
    inside = class_folders(tmp_path / "set" / "images", "a.png", "b.png") / "b.png"
    files = [{"bytes": None, "path": "images/a.png"}, {"bytes": None, "path": str(inside)}]
    rows_of_files(tmp_path / "set" / "tables", *files)
    split = open_dataset(str(tmp_path / "set")).splits["train"]
    for row in (0, 1):
        np.testing.assert_array_equal(np.asarray(split.image(row)), np.asarray(noise(row)))


def test_row_that_names_a_file_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    noise(0).save(tmp_path / "secret.png")
    outside = str(tmp_path / "secret.png")
    held = {"bytes": png(noise(0)), "path": outside}
    files = [{"bytes": None, "path": path} for path in (outside, "../secret.png", "no.png", "\0", "")]
    folder = rows_of_files(tmp_path / "set" / "tables", *files, held)
    assert message(lambda: open_dataset(str(folder))) == (
        f"{folder}, split 'train': 5 rows without an image that can be read: "
        f"row 0 ('{outside}' is outside of the data set), row 1 ('../secret.png' is outside of the data set), "
        "row 2 ('no.png': no such file), row 3 (no image), row 4 (no image)\n"
        "  expected: an image in every row, or the path of one inside the folder of the data set\n"
        "  fix:      repair or remove them"
    )


def test_link_out_of_the_folder_is_refused_too(tmp_path: Path) -> None:
    noise(0).save(tmp_path / "secret.png")
    held = {"bytes": png(noise(0)), "path": None}
    folder = rows_of_files(tmp_path / "set", {"bytes": None, "path": "link.png"}, held)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    assert "row 0 ('link.png' is outside of the data set)" in message(lambda: open_dataset(str(folder)))


@pytest.mark.parametrize("empty", ["train", "test"])
@pytest.mark.parametrize("saved", [False, True])
def test_split_without_rows_is_an_error(tmp_path: Path, empty: str, saved: bool) -> None:
    splits = {"train": table([0, 1]), "test": table([1, 0])} | {empty: table([])}
    if saved:
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    else:
        parquet(tmp_path / "set", **splits)
    split = "a split" if saved else f"split '{empty}'"
    assert message(lambda: open_dataset(str(tmp_path / "set"))) == (
        f"'{tmp_path}/set': {split} has no rows\n"
        "  expected: labelled images in every split\n"
        "  fix:      leave the empty split out"
    )


@pytest.mark.parametrize(
    ("names", "wrong", "expected", "fix"),
    [
        (["train", "test"], "split 'test' has no rows", "labelled images in every split", "leave the empty split out"),
        (["train-0", "train-1"], "'train-1.parquet' has no rows", "rows in every file", "remove it"),
    ],
)
def test_file_without_rows_is_an_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], names: list[str], wrong: str, expected: str, fix: str
) -> None:
    """As other programs write it, with an empty group of rows."""
    import pyarrow.parquet as pq

    (tmp_path / "set").mkdir()
    rows = table([0, 1]).data.table
    for name, part in zip(names, (rows, rows.slice(0, 0)), strict=True):
        pq.write_table(part, tmp_path / "set" / f"{name}.parquet")
    capfd.readouterr()
    assert message(lambda: open_dataset(str(tmp_path / "set"))) == (
        f"'{tmp_path}/set': {wrong}\n  expected: {expected}\n  fix:      {fix}"
    )
    assert tuple(capfd.readouterr()) == ("", "")


def test_columns_of_the_same_name_are_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "set").mkdir()
    rows = table([0, 1]).data.table
    twice = pa.Table.from_arrays([rows["img"], rows["label"], rows["label"]], names=["img", "label", "label"])
    pq.write_table(twice, tmp_path / "set" / "train.parquet")
    capfd.readouterr()
    assert message(lambda: open_dataset(str(tmp_path / "set"))) == (
        f"'{tmp_path}/set': 'train.parquet' has several columns named 'label'\n"
        "  expected: a name of its own for every column\n"
        "  fix:      rename or remove one of them"
    )
    assert tuple(capfd.readouterr()) == ("", "")


def test_measuring_names_every_image_that_cannot_be_read(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "set", *(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(3)))
    for name in ("cat/0.png", "dog/1.png"):
        (folder / name).write_bytes(b"nothing")
    assert message(lambda: measure(open_dataset(str(folder)))) == (
        "2 images cannot be read:\n"
        f"    '{folder}/cat/0.png': the image cannot be read (unknown format)\n"
        f"    '{folder}/dog/1.png': the image cannot be read (unknown format)\n"
        "  expected: a JPEG, PNG, WebP or similar file\n"
        "  fix:      replace or remove them"
    )


@pytest.mark.parametrize("kind", ["table", "files"])
def test_split_pickles_without_its_pixels(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "set"
    if kind == "table":
        parquet(folder, train=table([0, 1] * 20))
    else:
        class_folders(folder, "cat/a.png", "dog/b.png")
    split = open_dataset(str(folder)).splits["train"]
    first = np.asarray(split.image(1))
    copy = pickle.dumps(split)
    assert len(copy) < 10_000
    np.testing.assert_array_equal(np.asarray(pickle.loads(copy).image(1)), first)


# Splitting


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=60, deadline=None)
def test_hold_out_takes_a_share_of_every_class(counts: list[int], fraction: float, seed: int) -> None:
    split = split_of([label for label, count in enumerate(counts) for _ in range(count)])
    if max(counts) == 1:
        with pytest.raises(UserError):
            hold_out(split, fraction, seed)
        return
    train, validation = hold_out(split, fraction, seed)
    assert validation is not None
    together = np.concatenate([train.index, validation.index])
    assert sorted(together.tolist()) == list(range(len(split)))
    for label, count in enumerate(counts):
        held = int((validation.labels == label).sum())
        assert held == 0 if count == 1 else 1 <= held < count
        assert count == 1 or held == 1 or held == count - 1 or abs(held - fraction * count) < 2


def test_hold_out_depends_on_the_seed_alone() -> None:
    split = split_of([0, 1] * 50)
    held = [hold_out(split, 0.1, seed)[1] for seed in (1, 1, 2)]
    assert all(part is not None for part in held)
    first, again, other = (part.index.tolist() for part in held if part is not None)
    assert first == again != other


def test_hold_out_is_the_same_as_in_the_first_release() -> None:
    """Written down: a checkpoint names its validation images by fraction and seed alone."""
    _, validation = hold_out(split_of([0, 1] * 10), 0.2, 42)
    assert validation is not None
    assert validation.index.tolist() == [1, 2, 3, 16]


def test_hold_out_of_nothing_keeps_all() -> None:
    split = split_of([0, 1])
    assert hold_out(split, 0.0, 0) == (split, None)


def test_hold_out_of_more_than_all_is_an_error() -> None:
    assert message(lambda: hold_out(split_of([0, 1]), 1.5, 0)) == (
        "validation fraction 1.5\n  expected: at least 0 and less than 1\n  fix:      --val-fraction 0.1"
    )


@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.integers(1, 70), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_limit_keeps_the_share_of_every_class(labels: list[int], n: int, seed: int) -> None:
    split = split_of(labels)
    some = limited(split, n, seed)
    assert len(some) == min(n, len(split))
    assert len(set(some.index.tolist())) == len(some)
    for label in set(labels):
        assert abs((some.labels == label).sum() - labels.count(label) * len(some) / len(labels)) < 1
    assert limited(split, n, seed).index.tolist() == some.index.tolist()


def test_limit_of_none_is_the_split() -> None:
    split = split_of([0, 1])
    assert limited(split, None, 0) is split


def test_validation_split_of_its_own_is_taken_before_a_fraction(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "set", train=table([0, 1] * 5), validation=table([0]), test=table([1]))
    train, validation = training_splits(open_dataset(str(folder)), 0.2, 0)
    assert validation is not None
    assert (len(train), validation.name) == (10, "validation")


def test_set_without_a_training_split_cannot_be_trained_on(tmp_path: Path) -> None:
    opened = open_dataset(str(parquet(tmp_path / "set", test=table([0, 1]))))
    assert message(lambda: training_splits(opened, 0.1, 0)) == (
        f"'{tmp_path}/set' has no training split\n"
        "  expected: a split named train or training\n"
        "  fix:      give another data set"
    )


def test_something_is_left_to_score(tmp_path: Path) -> None:
    opened = open_dataset(str(class_folders(tmp_path / "set", "cat/a.png", "dog/b.png")))
    assert message(lambda: training_splits(opened, 0.0, 0)) == (
        f"'{tmp_path}/set' has no test split, and no validation images are held out\n"
        "  expected: images to score\n"
        "  fix:      --val-fraction 0.1"
    )


# Measuring


def test_mean_and_spread_are_those_of_all_pixels(tmp_path: Path) -> None:
    # Half the pixels 0 and half 255 in red, all 51 in green: mean 0.5, 0.2; standard deviation 0.5, 0.
    for name, red in (("cat/a.png", 0), ("dog/b.png", 255)):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True)
        Image.new("RGB", (4, 6), (red, 51, 255)).save(path)
    size, mean, std = measure(open_dataset(str(tmp_path / "set")))
    assert size == (6, 4)
    assert mean == (0.5, 0.2, 1.0)
    assert std == (0.5, 0.001, 0.001)


def test_images_of_different_sizes_have_no_common_size(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "set", "cat/a.png", "dog/b.png")
    noise(0, 20, 12).save(folder / "cat" / "c.png")
    assert measure(open_dataset(str(folder)))[0] is None


@pytest.mark.parametrize(
    ("size", "natural"),
    [((8, 8), 8), ((33, 20), 33), ((96, 96), 96), ((97, 50), None), (None, None)],
)
def test_small_images_have_a_natural_input_size(size: tuple[int, int] | None, natural: int | None) -> None:
    assert natural_size(size) == natural


# Transforms


def test_preprocess_survives_json() -> None:
    assert Preprocess.from_dict(json.loads(json.dumps(PHOTO.to_dict()))) == PHOTO


def test_small_image_of_the_input_size_is_only_normalised() -> None:
    image = noise(0, 32, 32)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(transforms.eval_transform(PREPROCESS)(image), (pixels - 0.5) / 0.25)


@pytest.mark.parametrize("size", [(8, 8), (20, 30), (90, 90)])
def test_small_image_is_evaluated_whole(size: tuple[int, int]) -> None:
    # Black with a white border: a crop would lose it.
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1] = 255, 255, 255, 255
    seen = transforms.eval_transform(PREPROCESS)(Image.fromarray(pixels))
    assert seen.shape == (3, 32, 32)
    centre = seen[:, 16, 16].max()
    assert min(edge.min() for edge in (seen[:, 0], seen[:, -1], seen[:, :, 0], seen[:, :, -1])) > centre


def test_large_image_is_evaluated_as_timm_does() -> None:
    from timm.data import create_transform

    image = noise(0, 120, 200)
    timms = create_transform((3, 64, 64), interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=0.9)
    torch.testing.assert_close(transforms.eval_transform(PHOTO)(image), timms(image), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(10, 10), (32, 32), (50, 80), (120, 100), (70, 300)])
@pytest.mark.parametrize("crop", ["auto", "pad", "resized", "none"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 32, 48)])
def test_every_crop_gives_the_input_size(size: tuple[int, int], crop: Any, shape: tuple[int, int, int]) -> None:
    preprocess = Preprocess(shape, PREPROCESS.mean, PREPROCESS.std)
    image = noise(0, *size)
    assert transforms.train_transform(preprocess, crop=crop)(image).shape == shape
    assert transforms.eval_transform(preprocess)(image).shape == shape


def test_without_variation_training_sees_what_evaluation_sees() -> None:
    image = noise(0, 32, 32)
    plain = transforms.train_transform(PREPROCESS, crop="none", hflip=0.0)
    torch.testing.assert_close(plain(image), transforms.eval_transform(PREPROCESS)(image), rtol=0, atol=0)


def test_mirror_swaps_left_and_right() -> None:
    image = noise(0, 32, 32)
    mirrored = transforms.train_transform(PREPROCESS, crop="none", hflip=1.0)
    torch.testing.assert_close(mirrored(image), transforms.eval_transform(PREPROCESS)(image).flip(2), rtol=0, atol=0)


def test_padded_crop_moves_the_image_by_an_eighth_at_most_and_fills_with_grey() -> None:
    image = noise(0, 32, 32)
    transform = transforms.train_transform(PREPROCESS, crop="pad", hflip=0.0, fill=255)
    plain = transforms.eval_transform(PREPROCESS)(image)
    framed = torch.full((3, 40, 40), 2.0)  # (1 - mean) / std
    framed[:, 4:36, 4:36] = plain
    windows = {framed[:, y : y + 32, x : x + 32].numpy().tobytes(): (y, x) for y in range(9) for x in range(9)}
    places = {windows[transform(image).numpy().tobytes()] for _ in range(300)}
    assert {y for y, _ in places} == {x for _, x in places} == set(range(9))


def test_cutout_paints_a_square_with_the_mean_and_cuts_it_off_at_the_border() -> None:
    ones = torch.ones(3, 32, 32)
    areas = set()
    for _ in range(300):
        painted = transforms.Cutout(16)(ones.clone())
        zeros = painted[0] == 0
        rows, columns = zeros.any(1).nonzero().flatten(), zeros.any(0).nonzero().flatten()
        assert zeros[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert 8 <= len(rows) <= 16 and 8 <= len(columns) <= 16
        areas.add((len(rows), len(columns)))
    assert (16, 16) in areas and len(areas) > 20


def test_cutout_has_its_centre_on_every_pixel() -> None:
    covered = sum(transforms.Cutout(1)(torch.ones(1, 4, 4)) == 0 for _ in range(500))
    assert bool((covered > 0).all())


def test_erase_replaces_a_rectangle_by_noise() -> None:
    grey = Image.new("RGB", (32, 32), (128, 128, 128))
    seen = transforms.train_transform(PREPROCESS, crop="none", hflip=0.0, reprob=1.0)(grey)
    values, counts = seen.unique(return_counts=True)
    assert 0.02 < 1 - counts.max().item() / seen.numel() < 0.4
    assert len(values) > 50


POLICIES = [
    *transforms.POLICIES,
    *transforms.TIMM_POLICIES,
    "rand-m9-mstd0.5-inc1",
    "rand-m5-tweights",
    "augmix-m3-w2",
    "v0-mstd0.5",
]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_varies_images(policy: str) -> None:
    transforms.check_policy(policy)
    transform = transforms.train_transform(PREPROCESS, crop="none", hflip=0.0, aa=policy)
    assert len({transform(noise(0, 32, 32)).numpy().tobytes() for _ in range(20)}) > 1


@pytest.mark.parametrize(
    "policy",
    [
        "cifar",
        "rand-m",
        "rand-x9",
        "rand-mm9.5",
        "rand-m0.5",
        "rand-mstdinf",
        "rand-tweigths",
        "Rand-m9",
        "v1",
        "",
        "3b",
    ],
)
def test_unknown_policy_is_an_error(policy: str) -> None:
    with pytest.raises(UserError):
        transforms.check_policy(policy)


def test_timm_policy_makes_an_image_black_where_pillow_would_raise() -> None:
    """At magnitude 10 "Posterize" keeps no bit."""
    transform = transforms.train_transform(PREPROCESS, crop="none", hflip=0.0, aa="rand-m10-n1-p1-inc1")
    image = noise(0, 32, 32)
    assert any((transform(image) == -2).all() for _ in range(200))


def test_unknown_policy_is_answered_with_the_known_ones() -> None:
    assert message(lambda: transforms.check_policy("cifar100")) == (
        "unknown augmentation policy 'cifar100'\n"
        "  expected: none, cifar10, trivial, or timm's rand, augmix, original, originalr, v0, v0r, 3a "
        "with their options (rand-m9-mstd0.5-inc1)\n"
        "  fix:      did you mean 'cifar10'?"
    )


@pytest.mark.parametrize("policy", ["cifar10", "trivial", "rand-m9-n1-p1"])
def test_policy_fills_with_the_given_grey(policy: str) -> None:
    white = Image.new("RGB", (32, 32), (255, 255, 255))
    transform = transforms.train_transform(PREPROCESS, crop="none", hflip=0.0, aa=policy, fill=77)
    filled = (77 / 255 - 0.5) / 0.25
    assert any(torch.isclose(transform(white), torch.tensor(filled)).any() for _ in range(100))


def test_unknown_crop_is_an_error() -> None:
    wrong: Any = "padd"
    assert message(lambda: transforms.train_transform(PREPROCESS, crop=wrong)) == (
        "unknown crop 'padd'\n  expected: one of auto, none, pad, resized\n  fix:      did you mean 'pad'?"
    )


# Loaders

VARIED = {"aa": "rand-m9-mstd0.5", "cutout": 8, "reprob": 0.5}
"""Draws from Python's, NumPy's and torch's generators."""


@pytest.mark.parametrize(("usable", "processes", "workers"), [(64, 1, 8), (6, 2, 3), (4, 8, 1), (64, 8, 8)])
def test_workers_of_a_gpu_share_the_cores_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch, usable: int, processes: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(usable)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert loaders.suitable_workers(torch.device("cuda"), PHOTO) == workers


def loader_of(
    split: Split, *, workers: int = 0, seed: int = 5, batch_size: int = 4, train: bool = True
) -> loaders.Loader:
    transform = transforms.train_transform(PREPROCESS, **VARIED) if train else transforms.eval_transform(PREPROCESS)
    order = loaders.EpochBatches(split, batch_size, seed=seed if train else None)
    return loaders.make_loader(split, transform, order, seed=seed if train else None, workers=workers)


def test_batch_holds_images_labels_and_index(tmp_path: Path) -> None:
    split = split_of([0, 1, 1, 0, 1, 1]).select([5, 3, 2])
    batch = next(iter(loader_of(split, train=False)))
    assert batch.images.shape == (3, 3, 32, 32) and batch.images.dtype == torch.float32
    assert batch.labels.tolist() == [1, 0, 1] and batch.labels.dtype == torch.int64
    assert batch.index.tolist() == [5, 3, 2] and batch.index.dtype == torch.int64
    torch.testing.assert_close(batch.images[1], transforms.eval_transform(PREPROCESS)(noise(3, 32, 32)), rtol=0, atol=0)


def test_workers_change_nothing() -> None:
    alone, with_workers = (loader_of(split_of([0, 1] * 9), workers=workers) for workers in (0, 2))
    for epoch in (1, 2):
        ours, theirs = pass_over(alone, epoch), pass_over(with_workers, epoch)
        assert torch.equal(ours.index, theirs.index)
        assert torch.equal(ours.images, theirs.images)


def test_epochs_differ_in_order_and_variation() -> None:
    loader = loader_of(split_of([0, 1] * 9))
    first, second = pass_over(loader, 1), pass_over(loader, 2)
    assert sorted(first.index.tolist()) == sorted(second.index.tolist()) == list(range(18))
    assert first.index.tolist() != second.index.tolist()
    later = by_index(second)
    assert not any(torch.equal(image, later[number]) for number, image in by_index(first).items())


def test_an_epoch_comes_back_the_same() -> None:
    loader = loader_of(split_of([0, 1] * 9))
    first, _, again = pass_over(loader, 1), pass_over(loader, 2), pass_over(loader, 1)
    assert torch.equal(first.images, again.images)


def test_variation_of_an_image_depends_on_seed_epoch_and_index_alone() -> None:
    split = split_of([0, 1] * 9)
    whole = by_index(pass_over(loader_of(split), 3))
    part = by_index(pass_over(loader_of(split.select([16, 2, 7, 4]), batch_size=2), 3))
    other = by_index(pass_over(loader_of(split, seed=6), 3))
    assert len(part) == 4
    for number, image in part.items():
        assert torch.equal(image, whole[number])
        assert not torch.equal(image, other[number])


def test_images_of_a_batch_vary_each_on_its_own() -> None:
    class Same(Images):
        def read(self, row: int) -> Image.Image:
            return noise(0, 32, 32)

    split = Split("train", Same(), np.zeros(16, dtype=np.int64), np.arange(16, dtype=np.int64))
    transform = transforms.train_transform(PREPROCESS, crop="pad", hflip=0.5)
    order = loaders.EpochBatches(split, 16, seed=0)
    batch = next(iter(loaders.make_loader(split, transform, order, seed=0, workers=0)))
    assert len({image.numpy().tobytes() for image in batch.images}) > 12


def test_run_resumes_within_an_epoch() -> None:
    loader = loader_of(split_of([0, 1] * 9))
    whole, rest = pass_over(loader, 2), pass_over(loader, 2, skip_updates=3)
    assert torch.equal(rest.index, whole.index[12:])
    assert torch.equal(rest.images, whole.images[12:])
    assert len(loader) == 5


def test_other_random_numbers_are_not_disturbed() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def after_seeding() -> None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    after_seeding()
    expected = draw()
    after_seeding()
    pass_over(loader_of(split_of([0, 1] * 3)), 1)
    assert draw() == expected


def test_evaluation_keeps_order_and_every_image() -> None:
    batches = list(loader_of(split_of([0, 1, 0, 1, 0]), train=False))
    assert [batch.index.tolist() for batch in batches] == [[0, 1, 2, 3], [4]]


def test_last_training_batch_of_one_image_is_left_out() -> None:
    loader = loader_of(split_of([0, 1] * 4 + [0]))
    assert len(loader) == 2
    assert [len(batch.labels) for batch in loader] == [4, 4]


def batches_of(count: int, size: int, **options: object) -> list[list[int]]:
    order = loaders.EpochBatches(split_of([0] * count), size, **options)  # type: ignore[arg-type]
    order.set_epoch(3)
    batches = [places.tolist() for places in order.positions()]
    assert len(order) == len(batches)
    return batches


@pytest.mark.parametrize(("world", "parts"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("count", [32, 36, 38, 33])
def test_processes_and_parts_share_the_updates_of_one_process(count: int, world: int, parts: int) -> None:
    alone = batches_of(count, 8, seed=1)
    shares = [batches_of(count, 8, seed=1, parts=parts, world=world, rank=rank) for rank in range(world)]
    updates = [
        [place for share in shares for batch in share[first : first + parts] for place in batch]
        for first in range(0, len(shares[0]), parts)
    ]
    assert len({len(share) for share in shares}) == 1
    for update, whole in zip(updates, alone, strict=False):
        assert len(set(update)) == len(update)
        # The last one is smaller, so that all get equally many, and none a single image.
        assert set(update) <= set(whole) and len(whole) - len(update) < world * parts
    assert len(updates) >= count // 8
    assert all(len(batch) == len(shares[0][i]) >= 2 for share in shares for i, batch in enumerate(share))


def test_a_batch_that_cannot_be_divided_evenly_is_an_error() -> None:
    assert message(lambda: loaders.EpochBatches(split_of([0] * 40), 10, seed=1, world=2, parts=2)) == (
        "a batch of 10 images cannot be divided evenly among 2 processes with 2 micro-batches\n"
        "  expected: a multiple of 4\n"
        "  fix:      --batch-size 8"
    )


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_score_every_image_once_in_whole_batches(world: int) -> None:
    shares = [batches_of(13, 4, world=world, rank=rank) for rank in range(world)]
    alone = batches_of(13, 4)
    assert alone == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12]]
    assert shares == [alone[rank::world] for rank in range(world)]


def test_single_training_image_is_an_error() -> None:
    assert message(lambda: loader_of(split_of([0]))) == (
        "split 'train' has too few images: 1\n  expected: at least 2\n  fix:      use more of the data set"
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_image_arrives_as_the_same_error_from_every_process(broken: Split, tmp_path: Path, workers: int) -> None:
    loader = loader_of(broken, workers=workers, train=False)
    with pytest.raises(UserError) as caught:
        list(loader)
    assert str(caught.value) == (
        f"{tmp_path}/broken, split 'train', row 2: the image cannot be read (unknown format)\n"
        "  expected: a JPEG, PNG, WebP or similar file\n"
        "  fix:      replace or remove it"
    )


def test_loader_can_be_read_again_after_an_error() -> None:
    class Broken(Images):
        def read(self, row: int) -> Image.Image:
            if row == 5:
                raise UserError("broken")
            return noise(row)

    split = Split("train", Broken(), np.zeros(8, dtype=np.int64), np.arange(8, dtype=np.int64))
    loader = loader_of(split, workers=2, batch_size=2, train=False)
    for _ in range(2):
        seen = []
        with pytest.raises(UserError, match="broken"):
            for batch in loader:
                seen += batch.index.tolist()
        assert seen == [0, 1, 2, 3]


def test_loader_pickles_for_workers_that_are_not_forked() -> None:
    loader = loader_of(split_of([0, 1] * 4))
    copy = pickle.loads(pickle.dumps(loader.dataset))
    places = [(1, 3), (1, 0)]
    assert torch.equal(copy.__getitems__(places).images, loader.dataset.__getitems__(places).images)


def test_the_size_and_colours_of_the_digits_are_those_that_are_measured() -> None:
    digits = open_dataset("digits")
    assert digits.measured == measure(replace(digits, measured=None))


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR_100.is_dir(), reason="needs ../shared/data/cifar100")
def test_cifar_100_opens_and_is_measured_as_published() -> None:
    opened = open_dataset(str(CIFAR_100))
    assert {name: len(split) for name, split in opened.splits.items()} == {"train": 50_000, "test": 10_000}
    assert (opened.image_key, opened.label_key, len(opened.classes)) == ("img", "fine_label", 100)
    size, mean, std = measure(opened)
    _, published_mean, published_std = NAMED["cifar100"].measured or (None, None, None)
    assert size == (32, 32)
    assert mean == pytest.approx(published_mean, abs=0.01)
    assert std == pytest.approx(published_std, abs=0.01)
