"""Splits named, held out and limited. Training, validation and test images stay apart."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from sdcli.data.dataset import SPLITS, ImageData, Split
from sdcli.errors import UserError


def standard_splits(name: str, names: list[str]) -> tuple[dict[str, str], list[str]]:
    """The data set's own splits that are "train", "validation" and "test", in this order, and notes on the others."""
    lower = {own.lower(): own for own in names}
    chosen = {}
    for split, aliases in SPLITS.items():
        if own := next((lower[alias] for alias in aliases if alias in lower), None):
            chosen[split] = own
    if not chosen and len(names) == 1:
        chosen = {"train": names[0]}
    if not chosen:
        known = ", ".join(alias for aliases in SPLITS.values() for alias in aliases)
        raise UserError(f"'{name}': unknown splits {', '.join(names)}", f"at least one of {known}", "rename a split")
    return chosen, [f"split '{own}' is not used" for own in names if own not in chosen.values()]


def scored_as_test(splits: dict[str, Split]) -> tuple[dict[str, Split], list[str]]:
    """Uses the validation split as the test split if there is none."""
    if "test" in splits or "validation" not in splits:
        return splits, []
    own = splits["validation"].name
    renamed = {"test" if split == "validation" else split: part for split, part in splits.items()}
    return renamed, [f"no labelled test split: split '{own}' is scored instead"]


def training_splits(data: ImageData, fraction: float, seed: int) -> tuple[Split, Split | None]:
    """The splits for training and validation: the data set's own validation split, else images held out of train.

    Raises UserError if there is no split to train on, or none would be left to score.
    """
    if "train" not in data.splits:
        raise UserError(
            f"'{data.name}' has no training split",
            "a split named " + " or ".join(SPLITS["train"]),
            "give another data set",
        )
    if "validation" in data.splits:
        return data.splits["train"], data.splits["validation"]
    train, validation = hold_out(data.splits["train"], fraction, seed)
    if validation is None and "test" not in data.splits:
        raise UserError(
            f"'{data.name}' has no test split, and no validation images are held out",
            "images to score",
            "--val-fraction 0.1",
        )
    return train, validation


def fingerprint(split: Split) -> str:
    """What changes where images are added, removed or sorted into other classes: then others are held out of it."""
    return hashlib.sha256(split.labels.astype("<i8").tobytes() + split.index.astype("<i8").tobytes()).hexdigest()[:16]


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split | None]:
    """Holds the same fraction of every class out of `split`, for validation; None if the fraction is 0.

    A class with two or more images keeps at least one on each side; a single image stays in training. The same `seed`
    always gives the same splits. Raises UserError if `fraction` is not in [0, 1) or holds nothing out.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"validation fraction {fraction:g}", "at least 0 and less than 1", "--val-fraction 0.1")
    if fraction == 0:
        return split, None
    _, counts = np.unique(split.labels, return_counts=True)
    quotas = _quotas(counts, round(fraction * len(split)))
    quotas = np.clip(quotas, np.minimum(counts - 1, 1), counts - 1)
    held = _draw(split.labels, quotas, seed)
    if not held.any():
        raise UserError(
            f"split '{split.name}': no class has a second image to hold out for validation",
            "at least two images of a class",
            "--val-fraction 0",
        )
    return split.select(np.flatnonzero(~held)), split.select(np.flatnonzero(held))


def limited(split: Split, n: int | None, seed: int) -> Split:
    """A random choice of `n` images, stratified by class; all of them if `n` is None or not smaller."""
    if n is None or n >= len(split):
        return split
    if n < 1:
        raise UserError(f"a limit of {n} images", "at least 1", "remove the limit to use all images")
    _, counts = np.unique(split.labels, return_counts=True)
    return split.select(np.flatnonzero(_draw(split.labels, _quotas(counts, n), seed)))


def _quotas(counts: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """`total` divided in proportion to `counts`, by largest remainders."""
    shares = total * counts / counts.sum()
    quotas: NDArray[np.int64] = np.floor(shares).astype(np.int64)
    largest = np.argsort(quotas - shares, kind="stable")
    quotas[largest[: total - quotas.sum()]] += 1
    return quotas


def _draw(labels: NDArray[np.int64], quotas: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Marks randomly chosen images of each class, up to its quota."""
    drawn = np.zeros(len(labels), dtype=np.bool_)
    # The only generator of NumPy with a frozen stream: a library update must not turn a validation image into a
    # training image.
    generator = np.random.RandomState(seed % 2**32)
    for label, quota in zip(np.unique(labels), quotas, strict=True):
        drawn[generator.permutation(np.flatnonzero(labels == label))[:quota]] = True
    return drawn
