"""Splits as batches, in an order and with variations that depend on seed, epoch and image alone."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from sdcli.augment import key
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


def make_loader(split: Split, transform: Transform, batches: EpochBatches, *, seed: int | None, workers: int) -> Loader:
    """Batches of a split whose images are read and transformed one by one; with a `seed` they are varied.

    An image's variation depends on `seed`, the epoch and its `index` alone: the number of workers changes nothing, a
    run can go on in the middle of an epoch, and torch's, NumPy's and Python's generators are left as they were. An
    image that cannot be read raises its UserError while iterating, whichever process read it.
    """
    return Loader(
        _Served(split, transform, seed),
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        # Without its own it draws from torch's global one at the start of each epoch.
        generator=torch.Generator(),
    )


class Loader(DataLoader[Batch]):
    """A DataLoader whose epochs are told apart by their number; until `set_epoch` is called it is 0."""

    def set_epoch(self, epoch: int, skip_updates: int = 0) -> None:
        """The next pass is this epoch's, without its first updates where a run goes on in the middle of it."""
        assert isinstance(self.batch_sampler, EpochBatches)
        self.batch_sampler.set_epoch(epoch, skip_updates)

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


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Which images each batch of an epoch holds, as (epoch, place in the split): one process's share of them.

    The epoch goes with each image, since persistent workers do not hear of a new one.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int | None = None,
        parts: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """With a `seed` for training: an order that depends on it and on the epoch alone. `batch_size` is that of an
        update, whatever it is shared out to: `world` processes see every `world`-th of its images each, in `parts`
        batches one after the other. An epoch's last update is made smaller so that all get as many, and is left out
        where a batch would have a single image, since batch normalisation cannot train on it.

        Without a `seed`, for scoring: everything in order, and of each `world` batches a process gets one.

        Raises UserError where a batch cannot be shared out, or none would be left.
        """
        self.num_images, self.batch_size, self.seed = len(split), batch_size, seed
        self.parts, self.rank, self.world = parts, rank, world
        self.epoch = self.start = 0
        self.length = self.num_images
        if seed is not None:
            shares = parts * world
            if batch_size % shares:
                fitting = max(shares, batch_size // shares * shares)
                raise UserError(
                    f"a batch of {batch_size} images cannot be shared out evenly to {world} processes "
                    f"in {parts} parts each",
                    f"a multiple of {shares}",
                    f"--batch-size {fitting}",
                )
            last = self.length % batch_size
            least = min(2, batch_size // shares) * shares
            self.length -= last if last < least else last % shares
        if self.length == 0:
            at_least = min(2, batch_size) * parts * world if seed is not None else 1
            raise UserError(
                f"split '{split.name}' has too few images: {len(split)}",
                f"at least {at_least}",
                "use more of the data set",
            )

    @property
    def updates(self) -> int:
        """How many updates an epoch has; of a split that is scored, how many batches there are in all."""
        return -(-self.length // self.batch_size)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next pass is this epoch's, from the update after its first `start` on."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        if self.seed is None:
            return len(range(self.rank, self.updates, self.world))
        return self.updates * self.parts

    def places(self) -> Iterator[NDArray[np.int64]]:
        """The places of each batch."""
        order = np.arange(self.num_images)
        if self.seed is None:
            for start in range(self.rank * self.batch_size, self.length, self.world * self.batch_size):
                yield order[start : start + self.batch_size]
            return
        order = np.random.RandomState(key(self.seed, self.epoch) % 2**32).permutation(self.num_images)[: self.length]
        for start in range(self.start * self.batch_size, self.length, self.batch_size):
            own = order[start : start + self.batch_size][self.rank :: self.world]
            yield from np.split(own, self.parts)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for places in self.places():
            yield [(self.epoch, place) for place in places.tolist()]


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
                        _seed_generators(key(self.seed, epoch, number))
                    images.append(self.transform(self.split.image(place)))
        except UserError as error:
            if get_worker_info() is None:
                raise
            return _Failed(error)
        return Batch(torch.stack(images), torch.from_numpy(self.split.labels[chosen]), torch.from_numpy(index))


def _as_it_is(batch: Any) -> Any:
    return batch


def _seed_generators(seed: int) -> None:
    """Seeds all that transforms draw from: torchvision's use torch, timm's use Python and NumPy."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would seed the GPU's generator too, which dropout draws from.
    torch.default_generator.manual_seed(seed)


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
