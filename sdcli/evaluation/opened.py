"""A network and the data to score it on, opened together."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from sdcli.data.dataset import SPLITS, ImageData, Split, short_name
from sdcli.data.loaders import EpochBatches, Loader
from sdcli.data.open import open_dataset
from sdcli.data.resident import ResidentLoader, suitable_loader
from sdcli.data.splits import fingerprint, limited, training_splits
from sdcli.data.transforms import Preprocess
from sdcli.errors import UserError, did_you_mean
from sdcli.network.backbones import SOURCES, resolve
from sdcli.network.blueprint import Blueprint
from sdcli.network.checkpoint import Description, TrainedOn, find_checkpoint, read_description
from sdcli.network.multi_exit import MultiExit
from sdcli.network.weights import build_network, classes_of, read_weights_file, rebuild
from sdcli.recipe.schema import Network, weights_file


@dataclass(frozen=True)
class Opened:
    """A network and the data to score it on."""

    path: Path
    """Of the checkpoint; for a timm model, of its weights, or its name."""
    network: MultiExit
    about: Description
    data: ImageData
    splits: dict[str, Split]
    own: bool
    """Whether these are the data that it was trained on, split as they were for training."""
    notes: tuple[str, ...]
    changed: bool = False
    """Whether its training images have changed since, so that nobody knows which of them were held out."""

    @property
    def name(self) -> str:
        """The data set's name in tables."""
        return self.about.dataset.name if self.own else short_name(self.data)

    def choose(self, asked: str | None) -> tuple[str, list[str]]:
        """The split to score, and notes on what its score means; None asks for the test split, else another."""
        return _choose_split(asked, self.splits, self.data.name, self.path, self.own)

    @property
    def held_out(self) -> str:
        """The split that may choose weights and thresholds; raises UserError where no image was held out of
        training."""
        if "validation" in self.splits:
            return "validation"
        if self.changed:
            raise _changed(self.path, self.name)
        if self.own:
            raise UserError(
                f"'{self.path}' was trained on all images of {self.name}: none is left to calibrate on",
                "images that it has not seen, other than the test split, which only measures",
                "train with --val-fraction 0.1, or name other data with --dataset",
            )
        raise UserError(
            f"{self.data.name} has no validation split",
            "a split named validation, valid, val or dev: the test split only measures",
            "rename the split, or sort the images into val/CLASS/",
        )

    def batches(
        self,
        split: str,
        limit: int | None,
        batch_size: int,
        workers: int | None,
        device: torch.device,
        preprocess: Preprocess | None = None,
    ) -> tuple[Split, Loader | ResidentLoader, list[str]]:
        """The images of a split, their batches, and notes on how they are read.

        `preprocess` is that of another network which sees the same images.
        """
        chosen = limited(self.splits[split], limit, self.about.dataset.seed)
        batches = EpochBatches(chosen, batch_size)
        preprocess = preprocess or self.about.blueprint.preprocess
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
    changed = False
    if own and "train" in splits and "validation" not in splits and trained_on.fingerprint:
        changed = fingerprint(splits["train"]) != trained_on.fingerprint
    if changed and dataset is not None:
        # Other data of the same name.
        own = changed = False
    elif changed:
        del splits["train"]
        if not splits:
            raise _changed(path, trained_on.name)
        notes = (*notes, f"{_WHY_CHANGED.format(trained_on.name)}: they are left out")
    elif own:
        # The images that were held out of training form the validation split here too.
        train_split, val_split = training_splits(data, trained_on.val_fraction, trained_on.seed)
        splits |= {"train": train_split} | ({"validation": val_split} if val_split else {})
    return Opened(path, network, about, data, splits, own, notes, changed)


_WHY_CHANGED = "the training images of {} have changed since training, so that it is not known which were held out"


def _changed(path: Path, name: str) -> UserError:
    return UserError(
        f"'{path}': {_WHY_CHANGED.format(name)}",
        "the images as they were, or others that it has not seen",
        "restore them, train again, or name other data with --dataset",
    )


def open_timm(
    model: str,
    *,
    weights: Path | None,
    dataset: str,
    image_key: str | None = None,
    label_key: str | None = None,
) -> Opened:
    """A timm model without exits, with the weights of a file in timm's format or, for None, timm's pretrained ones.

    Images are prepared as for these weights. Raises UserError for a model or weights that do not exist, and for a
    classifier of other classes than the data set's.
    """
    weights = find_checkpoint(weights) if weights is not None else None
    if weights is not None and read_description(weights) is not None:
        raise UserError(
            f"'{weights}' is a checkpoint of sdcli, which names its own model and exits",
            "a checkpoint alone, or a model with weights in timm's format",
            f"sdcli eval {weights}",
        )
    table = Network(weights="pretrained" if weights is None else weights_file(weights), exits="none")
    file = read_weights_file(table, model)
    if file is None:
        resolve(model, num_classes=None, image_size=None, stem="imagenet")
    data = open_dataset(dataset, image_key=image_key, label_key=label_key)
    blueprint = Blueprint.draft(table, model, data.classes, file=file)
    network, loaded = build_network(table, blueprint)
    if loaded.fresh:
        found = classes_of(network.backbone, weights)
        whose = f"'{weights}' has" if weights else f"the pretrained weights of '{model}' have"
        raise UserError(
            f"{whose} {f'{found} classes' if found else 'no classifier'}, but the data set has {len(data.classes)}",
            "weights that were trained on the data set's classes",
            "choose another --dataset or --weights; sdcli train fits a new classifier",
        )
    network.calibration = None
    about = Description(blueprint, TrainedOn("", "", 0.0, seed=42), recipe={}, epoch=0)
    order = (
        f"the weights do not name their classes: their first is taken to be '{data.classes[0]}', the data set's first, "
        "and so on"
    )
    notes = (*data.notes, *loaded.notes, order)
    return Opened(weights or Path(model), network, about, data, dict(data.splits), own=False, notes=notes)


def is_model_name(text: str) -> bool:
    """Whether `text` is meant as a timm model rather than as a run folder or a checkpoint."""
    if text.startswith(SOURCES):
        return True
    path = Path(text)
    return not (os.path.exists(path) or path.suffix == ".safetensors" or len(path.parts) > 1)


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
