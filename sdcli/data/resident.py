"""Batches of small images from their cached bytes, varied and normalised on the device.

B batch, C channels, H W the input's height and width in pixels, N images of a split
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdcli.data.augment import Augmentation, can_batch
from sdcli.data.batch import Batch
from sdcli.data.cached import MEMORY, Pixels, cached_pixels
from sdcli.data.dataset import Split
from sdcli.data.loaders import Beside, EpochBatches, Loader, make_loader, suitable_workers
from sdcli.data.transforms import Preprocess, eval_transform, train_transform
from sdcli.recipe.schema import Augment

SHARE = 0.25
"""How much of a GPU's free memory images may take; the network needs the rest."""


def suitable_loader(
    split: Split,
    preprocess: Preprocess,
    augment: Augment | None,
    batches: EpochBatches,
    *,
    seed: int,
    workers: int | None,
    device: torch.device,
    views: Mapping[str, str] | None = None,
) -> tuple[Loader | ResidentLoader, list[str]]:
    """Batches of a split for training, or for evaluation where `augment` is None, and what to tell the user.

    From cached bytes where images are small and can be varied in batches. Else each image is read and varied on its
    own, by `workers` processes, as many as suit where that is None. The two draw their variations from different
    generators. `views` names the images that are shown beside each batch's own, and says which (`schema.View.of`).
    """
    beside = Beside(split.labels, seed, views) if views else None
    pixels, notes = None, list[str]()
    if augment is None or can_batch(augment, preprocess):
        pixels, notes = cached_pixels(split, preprocess)
    options = augment.model_dump() if augment else {}
    if pixels is not None:
        if workers:
            notes.append(f"--workers {workers} has no effect on split '{split.name}': small images are decoded once")
        augmentation = Augmentation(preprocess, device, seed=seed, **options)
        others = {
            name: Augmentation(preprocess, device, seed=beside.seed_of(name), **options)
            for name in views or {}
            if beside is not None
        }
        return ResidentLoader(split, pixels, augmentation, batches, device, beside, others), notes
    transform = train_transform(preprocess, **options) if augment else eval_transform(preprocess)
    if workers is None:
        workers = suitable_workers(device, preprocess)
    loader = make_loader(
        split,
        transform,
        batches,
        seed=seed if augment else None,
        workers=workers,
        beside=beside,
        pin=device.type == "cuda",
    )
    return loader, notes


class ResidentLoader:
    """What `loaders.Loader` is to images that are decoded each time; until `set_epoch` is called the epoch is 0."""

    def __init__(
        self,
        split: Split,
        pixels: Pixels,
        augmentation: Augmentation,
        batches: EpochBatches,
        device: torch.device,
        beside: Beside | None = None,
        others: Mapping[str, Augmentation] | None = None,
    ) -> None:
        """`others` vary the images that `beside` shows beside the batch's own, by name."""
        self.split, self.pixels, self.augmentation, self.batches = split, pixels, augmentation, batches
        self.beside, self.others = beside, dict(others or {})
        self.device = device
        self.resident = _on_device(pixels, device) if _fits(pixels, device) else None

    def set_epoch(self, epoch: int, skip_updates: int = 0) -> None:
        """The next pass is this epoch's, without its first updates where a run goes on in the middle of it."""
        self.batches.set_epoch(epoch, skip_updates)

    def __len__(self) -> int:
        """How many batches this process gets in a whole epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.batches.epoch
        shares = list(self.batches.positions())
        if not shares:
            return
        order = np.concatenate(shares)
        # To the device at once: a copy per batch would wait for it.
        places = torch.from_numpy(order).to(self.device)
        index = torch.from_numpy(self.split.index[order]).to(self.device)
        labels = torch.from_numpy(self.split.labels[order]).to(self.device)
        start = 0
        for share in shares:
            own = slice(start, start + len(share))
            start += len(share)
            images = self.augmentation(self._images(share, places[own]), index[own], epoch)
            yield Batch(images, labels[own], index[own], self._views(share, epoch))

    def _views(self, share: NDArray[np.int64], epoch: int) -> dict[str, Tensor]:
        """The images beside those at `share`, varied on their own."""
        views = {}
        for name, augmentation in self.others.items():
            assert self.beside is not None
            chosen = self.beside.positions(name, epoch, share)
            places = torch.from_numpy(chosen).to(self.device, non_blocking=True)
            index = torch.from_numpy(self.split.index[chosen]).to(self.device, non_blocking=True)
            views[name] = augmentation(self._images(chosen, places), index, epoch)
        return views

    def _images(self, own: NDArray[np.int64], places: Tensor) -> Tensor:
        """Bytes of the images at these places [B, C, H, W], on the device."""
        if self.resident is not None:
            return self.resident.index_select(0, places)
        images = torch.from_numpy(self.pixels.take(own))
        if self.device.type == "cuda":
            images = images.pin_memory()
        return images.to(self.device, non_blocking=True)


def _fits(pixels: Pixels, device: torch.device) -> bool:
    """Whether the images can live on the device; on a CPU they stay where they are."""
    if device.type == "cpu":
        return False
    room = torch.cuda.mem_get_info(device)[0] * SHARE if device.type == "cuda" else MEMORY
    return bool(len(pixels) * pixels.array[0].nbytes <= room)


def _on_device(pixels: Pixels, device: torch.device) -> Tensor:
    """The split's images [N, C, H, W], copied in parts: the memory of the host may be smaller."""
    resident = torch.empty((len(pixels), *pixels.array.shape[1:]), dtype=torch.uint8, device=device)
    for start in range(0, len(pixels), 4096):
        places = np.arange(start, min(start + 4096, len(pixels)))
        resident[start : start + len(places)] = torch.from_numpy(pixels.take(places))
    return resident
