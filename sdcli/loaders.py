"""Splits as batches, in an order and with variations that depend on seed, epoch and image alone."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from sdcli.data import Split
from sdcli.errors import UserError
from sdcli.signals import Batch
from sdcli.transforms import SMALL, Preprocess, Transform


def suitable_workers(device: torch.device, preprocess: Preprocess) -> int:
    """How many processes should load images for a network on `device`.

    None where a CPU sees small images: decoding them is a hundredth of the network's work, and processes that share its
    cores make torch's threads wait for each other.
    """
    if device.type == "cpu":
        return 0 if max(preprocess.size) <= SMALL else 1
    return min(8, os.cpu_count() or 1)


def make_loader(
    split: Split,
    transform: Transform,
    *,
    batch_size: int,
    train: bool,
    seed: int,
    workers: int,
    drop_last: bool = False,
) -> Loader:
    """Batches of a split. With `train` shuffled and varied, anew in each epoch: call `set_epoch` before each.

    An epoch's order depends on `seed` and the epoch alone, an image's variation on `seed`, the epoch and its `index`:
    the number of workers changes nothing, a run can go on in the middle of an epoch, and torch's, NumPy's and Python's
    generators are left as they were. A last training batch of one image is left out, since batch normalisation cannot
    train on it. An image that cannot be read raises its UserError while iterating, whichever process read it.

    Raises UserError where no batch would be left.
    """
    length = len(split)
    if drop_last:
        length -= length % batch_size
    elif train and batch_size > 1 and length % batch_size == 1:
        length -= 1
    if length == 0:
        at_least = batch_size if drop_last else 2 if train else 1
        raise UserError(
            f"split '{split.name}' has too few images: {len(split)}", f"at least {at_least}", "use more of the data set"
        )
    return Loader(
        _Served(split, transform, seed if train else None),
        sampler=EpochSampler(len(split), length, seed if train else None),
        batch_size=batch_size,
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        # Without its own it draws from torch's global one at the start of each epoch.
        generator=torch.Generator(),
    )


class Loader(DataLoader[Batch]):
    """A DataLoader whose epochs are told apart by their number; until `set_epoch` is called it is 0."""

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        """The next pass is this epoch's, without its first batches where a run goes on in the middle of it."""
        assert isinstance(self.sampler, EpochSampler) and self.batch_size is not None
        self.sampler.set_epoch(epoch, skip_batches * self.batch_size)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        error = None
        for batch in super().__iter__():
            if isinstance(batch, _Failed):
                error = batch.error
                break
            yield batch
        if error is not None:
            # Ends the workers while they listen. An error holds on to the frames that it went through; if the workers'
            # queues go with these, they may be closed first, and ending takes five seconds a worker.
            self._iterator = None
            raise error


@dataclass(frozen=True)
class _Failed:
    """What a worker sends in place of a batch. Raised there, the error would arrive as the text of its traceback."""

    error: UserError

    def to(self, device: torch.device) -> Batch:
        """Raises the error for those who read without our `Loader`: accelerate moves what it gets to a device."""
        raise self.error


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, place in the split) of each image of an epoch, in random order where there is a seed.

    The epoch goes with each image, since persistent workers do not hear of a new one.
    """

    def __init__(self, num_images: int, length: int, seed: int | None) -> None:
        self.num_images, self.length, self.seed = num_images, length, seed
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next pass is this epoch's, from its `start`-th image on. Called by accelerate too."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        places = np.arange(self.num_images)
        if self.seed is not None:
            places = np.random.RandomState(_key(self.seed, self.epoch) % 2**32).permutation(self.num_images)
        for place in places[self.start : self.length].tolist():
            yield self.epoch, place


class _Served(Dataset[Batch]):
    """A split as a DataLoader asks for it: a whole batch at a time. Without a seed the transform draws nothing."""

    def __init__(self, split: Split, transform: Transform, seed: int | None) -> None:
        self.split, self.transform, self.seed = split, transform, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, places: list[tuple[int, int]]) -> Batch | _Failed:
        chosen = np.array([place for _, place in places])
        index = self.split.index[chosen]
        images = []
        try:
            with _generators_kept():
                for (epoch, place), number in zip(places, index.tolist(), strict=True):
                    if self.seed is not None:
                        _seed_generators(_key(self.seed, epoch, number))
                    images.append(self.transform(self.split.image(place)))
        except UserError as error:
            if get_worker_info() is None:
                raise
            return _Failed(error)
        return Batch(torch.stack(images), torch.from_numpy(self.split.labels[chosen]), torch.from_numpy(index))


def _as_it_is(batch: Any) -> Any:
    return batch


def _key(*numbers: int) -> int:
    """64 bits that look random and are the same for the same numbers, everywhere and for good."""
    return int.from_bytes(blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")


def _seed_generators(key: int) -> None:
    """Seeds all that transforms draw from: torchvision's use torch, timm's use Python and NumPy."""
    random.seed(key)
    np.random.seed(key % 2**32)
    # torch.manual_seed would seed the GPU's generator too, which dropout draws from.
    torch.default_generator.manual_seed(key)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Puts the generators back: in the main process others draw from them too."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
