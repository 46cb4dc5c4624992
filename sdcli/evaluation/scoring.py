"""Scores a checkpoint's exits on a data set."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from sdcli.data.dataset import SPLITS, ImageData, Split, short_name
from sdcli.data.loaders import EpochBatches, Loader
from sdcli.data.open import open_dataset
from sdcli.data.resident import ResidentLoader, suitable_loader
from sdcli.data.splits import limited, training_splits
from sdcli.devices import accelerator_for, short_of_memory
from sdcli.errors import UserError, did_you_mean, unknown
from sdcli.evaluation.dynamic import Dynamic, evaluate_dynamic
from sdcli.evaluation.evaluate import Report, evaluate
from sdcli.network.checkpoint import Description
from sdcli.network.multi_exit import MultiExit
from sdcli.network.policies import Policy
from sdcli.network.weights import rebuild


class Scored(NamedTuple):
    """The scores of a checkpoint, and notes about them."""

    report: Report
    notes: list[str]
    classes: tuple[str, ...]
    epoch: int
    """The number of epochs after which the checkpoint was saved."""
    dynamic: Dynamic | None = None
    """The scores of early exit, if they were asked for."""


@dataclass(frozen=True)
class Opened:
    """A checkpoint and the data to score it on."""

    path: Path
    network: MultiExit
    about: Description
    data: ImageData
    splits: dict[str, Split]
    own: bool
    """Whether these are the data that it was trained on, split as they were for training."""
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The data set's name in tables."""
        return self.about.dataset.name if self.own else short_name(self.data)

    def choose(self, asked: str | None) -> tuple[str, list[str]]:
        """The split to score, and notes on what its score means; None asks for the test split, else another."""
        return _choose_split(asked, self.splits, self.data.name, self.path, self.own)

    def batches(
        self, split: str, limit: int | None, batch_size: int, workers: int | None, device: torch.device
    ) -> tuple[Split, Loader | ResidentLoader, list[str]]:
        """The images of a split, their batches, and notes on how they are read."""
        chosen = limited(self.splits[split], limit, self.about.dataset.seed)
        batches = EpochBatches(chosen, batch_size)
        preprocess = self.about.blueprint.preprocess
        loader, notes = suitable_loader(chosen, preprocess, None, batches, seed=0, workers=workers, device=device)
        return chosen, loader, notes


def open_checkpoint(
    path: Path, *, dataset: str | None = None, image_key: str | None = None, label_key: str | None = None
) -> Opened:
    """A checkpoint with the data set that it was trained on, or with another one.

    Raises UserError for a file that is no checkpoint, data that cannot be opened, and classes that do not match.
    """
    network, about = rebuild(path)
    trained_on = about.dataset
    data = open_dataset(
        dataset or trained_on.source or recorded_source(path),
        image_key=image_key or (None if dataset else trained_on.image_key),
        label_key=label_key or (None if dataset else trained_on.label_key),
    )
    # The same data in another folder are split as they were for training.
    own = dataset is None or short_name(data) == trained_on.name
    notes = (*data.notes, *_compare_classes(list(about.blueprint.classes), list(data.classes), path))
    splits = dict(data.splits)
    if own:
        # The images that were held out of training form the validation split here too.
        train_split, val_split = training_splits(data, trained_on.val_fraction, trained_on.seed)
        splits |= {"train": train_split} | ({"validation": val_split} if val_split else {})
    return Opened(path, network, about, data, splits, own, notes)


def score_checkpoint(
    path: Path,
    *,
    points: list[str] | None = None,
    dataset: str | None = None,
    split: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    limit: int | None = None,
    batch_size: int = 256,
    device: str | None = None,
    workers: int | None = None,
    dynamic: bool = False,
    budget: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scored:
    """Scores `points` (None: all) of a checkpoint, on the data set that it was trained on or on another one.

    With `dynamic` early exit is scored too, as calibrated, or within a `budget` (a share of the plain network's MACs).

    `split` can be any usual name of a split (`dataset.SPLITS`); None means the test split or, for data without one, the
    validation split. Raises UserError for a point that the checkpoint does not have, a split that the data set does not
    have, and classes that do not match.
    """
    opened = open_checkpoint(path, dataset=dataset, image_key=image_key, label_key=label_key)
    network = opened.network
    if points is not None:
        for point in points:
            if point not in network.classifiers:
                raise unknown("exit", point, network.classifiers)
        points = [point for point in network.classifiers if point in points]
    policy = calibrated_policy(network, path, budget) if dynamic else None
    split, notes = opened.choose(split)
    accelerator = accelerator_for(device)
    chosen, loader, loader_notes = opened.batches(split, limit, batch_size, workers, accelerator.device)
    notes = [*opened.notes, *notes, *loader_notes]
    points = points or network.classifiers
    total = len(chosen)
    at_once = min(batch_size, total)
    doing, smaller = f"on {accelerator.device} with {at_once} images at a time", f"--batch-size {at_once // 2}"
    with short_of_memory(doing, "a network and a batch that fit", smaller if at_once > 1 else "another --device"):
        report = evaluate(
            network.to(accelerator.device),
            loader,
            points=points,
            costs=opened.about.blueprint.costs(points),
            device=accelerator.device,
            model=opened.about.blueprint.architecture.model,
            dataset=opened.name,
            split=split,
            progress=lambda done: progress(done, total * (2 if policy else 1)),
        )
        leaving = None
        if policy is not None:
            leaving = evaluate_dynamic(
                network, loader, policy, accelerator.device, lambda done: progress(total + done, 2 * total)
            )
    check_finite(report, path)
    return Scored(report, notes, opened.data.classes, opened.about.epoch, leaving)


def check_finite(report: Report, path: Path) -> None:
    """Raises UserError where an exit's outputs are not finite."""
    for result in report.exits:
        if not math.isfinite(result.nll):
            raise UserError(
                f"'{path}': {result.point} has an NLL of {result.nll} on {report.num_images} images",
                "a network whose outputs are finite",
                "train it again with a lower learning rate",
            )


def calibrated_policy(network: MultiExit, path: Path, budget: float | None) -> Policy:
    """When images leave early, as `sdcli calibrate` has found, or within a budget.

    Raises UserError for a checkpoint that was not calibrated, and for a budget that it cannot meet.
    """
    if network.calibration is None:
        raise UserError(
            f"'{path}' is not calibrated: it does not say when an image may leave early",
            "a calibrated checkpoint",
            f"sdcli calibrate {path}",
        )
    policy = network.strategy(budget=budget).policy
    assert policy is not None
    return policy


def recorded_source(path: Path) -> str:
    """The local data set that the run in the checkpoint's folder was trained on.

    Raises UserError if the checkpoint is in another folder: it does not itself contain the path of a local data set.
    """
    try:
        source = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))["dataset"]
    except (OSError, ValueError, KeyError, TypeError):
        source = None
    if not isinstance(source, str):
        raise UserError(
            f"'{path}' was trained on a local folder, but does not contain its path",
            "the data set",
            f"sdcli eval {path} --dataset FOLDER",
        )
    return source


def _choose_split(
    asked: str | None, splits: dict[str, Split], dataset: str, path: Path, own: bool
) -> tuple[str, list[str]]:
    """The split to score, and notes on what its score means if the checkpoint has seen it (`own` data)."""
    notes = []
    if asked is None:
        split = next(name for name in reversed(SPLITS) if name in splits)
        if split != "test":
            notes.append(f"{dataset} has no test split: the {split} split is scored")
    else:
        split = next((name for name, others in SPLITS.items() if asked.lower() in others), asked)
    if split not in splits:
        there = f"--split {'validation' if 'validation' in splits else next(iter(splits))}"
        fix = did_you_mean(split, splits) or there
        raise UserError(f"{dataset} has no split '{asked}'", "one of " + ", ".join(splits), fix)
    if own and split == "validation" and path.name != "last.safetensors":
        notes.append("the epoch was chosen by its validation score: expect a slightly lower score on new images")
    if own and split == "train":
        notes.append("this checkpoint was trained on these images")
    return split, notes


def _compare_classes(ours: list[str], theirs: list[str], path: Path) -> list[str]:
    """Raises UserError if the numbers of classes differ; returns a note if only their names do."""
    if len(ours) != len(theirs):
        raise UserError(
            f"'{path}' has {len(ours)} classes, but the data set has {len(theirs)}",
            "a data set with the classes that the checkpoint was trained on",
            "choose another --dataset, or another column with --label-key",
        )
    if ours != theirs:
        number = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        return [
            f"class {number} is '{ours[number]}' in the checkpoint and '{theirs[number]}' in the data set: "
            "the scores are valid only if both mean the same class"
        ]
    return []
