"""Splits as batches. Their order and augmentation depend only on seed, epoch and image."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from sdcli.data.augment import key
from sdcli.data.batch import Batch
from sdcli.data.dataset import Split
from sdcli.data.transforms import SMALL, Preprocess, Transform
from sdcli.errors import UserError, counted


def suitable_workers(device: torch.device, preprocess: Preprocess) -> int:
    """The default number of processes that load images for a network on `device`.

    0 for small images on a CPU: decoding them takes a hundredth of the network's time, and processes that share its
    cores make torch's threads wait for each other. For a GPU, the cores that this process may use, divided by the
    processes on this machine.
    """
    if device.type == "cpu":
        return 0 if max(preprocess.size) <= SMALL else 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def make_loader(
    split: Split,
    transform: Transform,
    batches: EpochBatches,
    *,
    seed: int | None,
    workers: int,
    beside: Beside | None = None,
    pin: bool = False,
) -> Loader:
    """Batches of a split whose images are read and transformed one by one; a `seed` makes the transform random.

    An image's augmentation depends only on `seed`, the epoch and its `index`: the number of workers changes nothing, a
    run can resume within an epoch, and the generators of torch, NumPy and Python keep their state. An image that cannot
    be read raises its UserError while iterating, whichever process read it. `pin` puts batches into pinned memory, from
    which a GPU copies asynchronously.
    """
    return Loader(
        _Served(split, transform, seed, beside),
        batch_sampler=batches,
        collate_fn=batches_as_they_are,
        num_workers=workers,
        worker_init_fn=leave_signals_to_parent,
        persistent_workers=workers > 0,
        pin_memory=pin,
        # Without its own generator, it draws from torch's global one at the start of each epoch.
        generator=torch.Generator(),
    )


class Loader(DataLoader[Batch]):
    """A DataLoader whose epochs are numbered; the number is 0 until `set_epoch` is called."""

    def set_epoch(self, epoch: int, skip_updates: int = 0) -> None:
        """The next pass is this epoch, without its first updates if a run resumes within it."""
        assert isinstance(self.batch_sampler, EpochBatches)
        self.batch_sampler.set_epoch(epoch, skip_updates)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        try:
            for batch in super().__iter__():
                if isinstance(batch, _Failed):
                    raise batch.error
                yield batch
        except Exception as error:  # a lost worker shows as any error
            lost = self._lost()
            # Ends the workers while they listen: an error holds on to the frames that it went through, and if the
            # workers' queues go with these, they may be closed first, and ending takes five seconds a worker.
            self.close()
            if lost is None:
                raise
            raise lost from error

    def close(self) -> None:
        """Ends the workers, if there are any; the next pass starts others."""
        iterator, self._iterator = self._iterator, None
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()

    def _get_iterator(self) -> Any:
        # torch would raise an error for a worker that dies wherever the main thread is, in the middle of an update too.
        # Without its handler the error comes where a batch is waited for.
        former = signal.getsignal(signal.SIGCHLD) if os.name == "posix" else None
        iterator = super()._get_iterator()
        if former is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, former)
        for worker in getattr(iterator, "_workers", ()):
            # What torch does at last to a worker that does not end by itself; SIGTERM is ignored.
            worker.terminate = worker.kill
        return iterator

    def _lost(self) -> UserError | None:
        """The error for a worker that something has ended; None where all are there."""
        for worker in getattr(self._iterator, "_workers", ()):
            if (code := worker.exitcode) is not None:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return UserError(
                    f"process {worker.pid}, one of {self.num_workers} that load images, {how}{CAUSES.get(-code, '')}",
                    "processes that last as long as they are needed",
                    "--workers 0" + (f", or fewer than {self.num_workers}" if self.num_workers > 1 else ""),
                )
        return None


CAUSES = {
    int(getattr(signal, name)): cause
    for name, cause in (
        ("SIGKILL", ": the machine has probably run out of memory"),
        ("SIGBUS", ": shared memory (/dev/shm) has probably run out"),
    )
    if hasattr(signal, name)
}
"""Why a worker is usually killed, by signal."""


def leave_signals_to_parent(worker: int) -> None:
    """Has a worker ignore what ends a run: a terminal, timeout(1), systemd and Slurm send it to all processes at once,
    and the run needs its workers until it has saved its state. They end with their parent anyway."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@dataclass(frozen=True)
class _Failed:
    """Sent by a worker in place of a batch. Raised there, the error would arrive as the text of its traceback."""

    error: UserError


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """The images of each batch of an epoch, as (epoch, position in the split): the share of one process.

    Each image carries the epoch, since persistent workers are not notified of a new one.
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
        mates: int = 0,
    ) -> None:
        """With a `seed`, for training: a shuffled order that depends only on it and the epoch. `batch_size` is that of
        an update, over all processes: each of `world` processes gets every `world`-th of its images, as `parts`
        micro-batches. An epoch's last update is made smaller so that all get equally many, and is dropped if a
        micro-batch would have a single image, since batch normalisation cannot train on it. With `mates`, each drawn
        image is followed by this many others of its class, and they stay together; the epoch does not get longer.

        Without a `seed`, for scoring: everything in order, and each process gets one of every `world` batches.

        Raises UserError if a batch cannot be divided evenly, or none would be left.
        """
        self.num_images, self.batch_size, self.seed = len(split), batch_size, seed
        self.parts, self.rank, self.world, self.group = parts, rank, world, mates + 1
        self.labels = split.labels
        self.epoch = self.start = 0
        self.length = self.num_images
        if seed is not None:
            self.length -= self.length % self.group
            shares = parts * world * self.group
            if batch_size % shares:
                fitting = max(shares, batch_size // shares * shares)
                groups = f" in groups of {self.group}" if mates else ""
                raise UserError(
                    f"a batch of {batch_size} images cannot be divided evenly{groups} among "
                    f"{counted(world, 'process', 'processes')} with {counted(parts, 'micro-batch', 'micro-batches')}",
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
        """Updates per epoch; for a split that is scored, batches over all processes."""
        return -(-self.length // self.batch_size)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next pass is this epoch, without its first `start` updates."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        if self.seed is None:
            return len(range(self.rank, self.updates, self.world))
        return self.updates * self.parts

    def positions(self) -> Iterator[NDArray[np.int64]]:
        """The positions in the split of each batch's images."""
        order = np.arange(self.num_images)
        if self.seed is None:
            for start in range(self.rank * self.batch_size, self.length, self.world * self.batch_size):
                yield order[start : start + self.batch_size]
            return
        order = np.random.RandomState(key(self.seed, self.epoch) % 2**32).permutation(self.num_images)
        order = order[: self.length // self.group]
        if self.group > 1:
            labels, anchors = torch.from_numpy(self.labels), torch.from_numpy(order)
            generator = _generator(self.seed, self.epoch, "mates")
            mates = classmates(labels, anchors, self.group - 1, generator=generator)
            order = torch.cat([anchors[:, None], mates], dim=1).flatten().numpy()
        for start in range(self.start * self.batch_size, self.length, self.batch_size):
            update = order[start : start + self.batch_size].reshape(-1, self.group)
            yield from np.split(update[self.rank :: self.world].reshape(-1), self.parts)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for positions in self.positions():
            yield [(self.epoch, position) for position in positions.tolist()]


class Beside:
    """The images shown beside a batch's own (`[batch.views]`): a function of seed, epoch, name and image."""

    def __init__(self, labels: NDArray[np.int64], seed: int, views: Mapping[str, str]) -> None:
        self.labels, self.seed, self.views = torch.from_numpy(labels), seed, dict(views)
        self._drawn: dict[str, tuple[int, NDArray[np.int64]]] = {}

    def positions(self, name: str, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The images that `name` shows beside those at `positions`: the same, or others of their class."""
        if self.views[name] == "itself":
            return positions
        if name not in self._drawn or self._drawn[name][0] != epoch:
            everything = torch.arange(len(self.labels))
            generator = _generator(self.seed, epoch, name)
            mates = classmates(self.labels, everything, itself=True, generator=generator)
            self._drawn[name] = epoch, mates[:, 0].numpy()
        return self._drawn[name][1][positions]

    def seed_of(self, name: str) -> int:
        """The seed that makes these images differ from the batch's own."""
        return key(self.seed, name)


def _generator(seed: int, epoch: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(key(seed, epoch, name))


def classmates(
    labels: Tensor, anchors: Tensor, num: int = 1, *, itself: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """For each anchor (an index into `labels`), the indices of `num` images of its class, drawn at random [A, M].

    With `itself`, an anchor may be its own mate, as in CS-KD (Yun et al. 2020, arXiv:2003.13964); without, only if its
    class has no other image, as in BAKE. The mates of one anchor differ as long as the class has enough images.
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    order = shuffled[labels[shuffled].argsort(stable=True)]
    position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    count = torch.bincount(labels)
    first = count.cumsum(0) - count
    size, start, own = count[labels[anchors]], first[labels[anchors]], position[anchors] - first[labels[anchors]]
    # A random stretch of the class's shuffled circle, starting right after the anchor if that is excluded.
    drawn = size if itself else (size - 1).clamp(min=1)
    offset = (torch.rand(len(anchors), generator=generator, dtype=torch.float64) * drawn).long()
    steps = (offset[:, None] + torch.arange(num)) % drawn[:, None] + (0 if itself else 1)
    return order[start[:, None] + (own[:, None] + steps) % size[:, None]]


class _Served(Dataset[Batch]):
    """A split as DataLoader reads it: a whole batch at a time. Without a seed the transform draws nothing."""

    def __init__(self, split: Split, transform: Transform, seed: int | None, beside: Beside | None) -> None:
        self.split, self.transform, self.seed, self.beside = split, transform, seed, beside

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, positions: list[tuple[int, int]]) -> Batch | _Failed:
        chosen = np.array([position for _, position in positions])
        epoch = positions[0][0]
        try:
            with _generators_kept():
                images = self._images(chosen, epoch, self.seed)
                views = {
                    name: self._images(self.beside.positions(name, epoch, chosen), epoch, self.beside.seed_of(name))
                    for name in (self.beside.views if self.beside else ())
                    if self.beside is not None
                }
        except UserError as error:
            if get_worker_info() is None:
                raise
            return _Failed(error)
        labels, index = self.split.labels[chosen], self.split.index[chosen]
        return Batch(images, torch.from_numpy(labels), torch.from_numpy(index), views)

    def _images(self, positions: NDArray[np.int64], epoch: int, seed: int | None) -> Tensor:
        images = []
        for position, index in zip(positions.tolist(), self.split.index[positions].tolist(), strict=True):
            if seed is not None:
                _seed_generators(key(seed, epoch, index))
            images.append(self.transform(self.split.image(position)))
        return torch.stack(images)


def batches_as_they_are(batch: Any) -> Any:
    return batch


def _seed_generators(seed: int) -> None:
    """Seeds every generator that transforms draw from: torchvision's use torch's, timm's use Python's and NumPy's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would also seed the GPU's generator, which dropout draws from.
    torch.default_generator.manual_seed(seed)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Restores the generators: in the main process, other code draws from them too."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
