"""Images on which an exported file is compared with its network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sdcli.data.dataset import NAMED, Split
from sdcli.data.open import open_dataset
from sdcli.data.splits import limited, training_splits
from sdcli.data.transforms import SMALL, Preprocess, eval_transform
from sdcli.errors import UserError
from sdcli.network.checkpoint import Description

IMAGES, NOISE = 32, 8
"""How many images of the data, and of noise."""


class Samples(NamedTuple):
    """What an exported file is compared on."""

    batches: dict[str, Tensor]
    """[B, 3, H, W], by what they show."""
    notes: list[str]
    small: float | None
    """The share of the data's images that are small (`SMALL`), and so shown whole; None where it is not known."""


def samples(checkpoint: Path, about: Description, dataset: str | None) -> Samples:
    """What a checkpoint's network is compared on.

    Images of the data set that the checkpoint was trained on, which training has not seen; noise in their range where
    the data set cannot be opened. And normal noise. Raises UserError for a `dataset` that was asked for and cannot be
    opened.
    """
    preprocess = about.blueprint.preprocess
    generator = torch.Generator().manual_seed(0)
    named = NAMED.get(about.dataset.source)
    small = float(max(named.measured[0] or (SMALL + 1,)) <= SMALL) if named and named.measured else None
    noise = {"noise": torch.randn(NOISE, *preprocess.input_size, generator=generator)}
    try:
        name, split = _unseen(dataset or about.dataset.source or _recorded(checkpoint), about, own=dataset is None)
        transform = eval_transform(preprocess)
        photos = [split.image(i) for i in range(len(split))]
        images = torch.stack([transform(photo) for photo in photos])
    except UserError as error:
        if dataset is not None:
            raise
        note = (
            f"compared on noise in the range of images, not on images: {error.wrong} (--dataset names another data set)"
        )
        return Samples({"noise in range": _in_range(preprocess, generator)} | noise, [note], small)
    if small is None:
        small = sum(max(photo.size) <= SMALL for photo in photos) / len(photos)
    return Samples({f"{name} images": images} | noise, [], small)


def _unseen(source: str, about: Description, *, own: bool) -> tuple[str, Split]:
    """Images of a split that training has not seen, where there is one, and what they are."""
    trained_on = about.dataset
    image_key, label_key = (trained_on.image_key, trained_on.label_key) if own else (None, None)
    data = open_dataset(source, image_key=image_key, label_key=label_key)
    for name in ("test", "validation"):
        if name in data.splits:
            return data.splits[name].name, limited(data.splits[name], IMAGES, trained_on.seed)
    train, held_out = training_splits(data, trained_on.val_fraction, trained_on.seed)
    return "held-out" if held_out else train.name, limited(held_out or train, IMAGES, trained_on.seed)


def _recorded(checkpoint: Path) -> str:
    """The local data set of the run in the checkpoint's folder."""
    try:
        source = json.loads((checkpoint.parent / "run.json").read_text(encoding="utf-8"))["dataset"]
    except (OSError, ValueError, KeyError, TypeError):
        source = None
    if not isinstance(source, str):
        raise UserError("the checkpoint was trained on a local folder, whose path it does not contain")
    return source


def _in_range(preprocess: Preprocess, generator: torch.Generator) -> Tensor:
    pixels = torch.rand(IMAGES, *preprocess.input_size, generator=generator)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocess.mean, preprocess.std))
    return (pixels - mean) / std
