"""Which device to run on and which other processes run along: accelerate's choice, or the user's."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    broadcast_object_list,
    gather_object,
)

from sdcli.errors import UserError, unknown

TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")

Precision = Literal["fp32", "bf16", "fp16"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3): the free memory that stays at the heap's end, the blocks that lie beside it."""

T = TypeVar("T")


def accelerator_for(
    device: str | None, precision: Precision = "fp32", tracker: str | None = None, folder: Path | None = None
) -> Accelerator:
    """An accelerator on `device` (`cpu`, `cuda`, `cuda:1`, `mps`, …), or on the best there is.

    It meets the other processes where a launcher has started several. A `tracker` writes to `folder`. Raises UserError
    for a device that this machine does not have, a precision that the device cannot train in, and a tracker that is not
    installed.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if device is not None:
        if launched and ":" in device:
            raise UserError(
                f"--device {device} under a launcher of several processes",
                "a device for each: its launcher's choice",
                f"leave --device out, or --device {device.partition(':')[0]}",
            )
        try:
            # The only sure way to know whether a device is there, its number included.
            torch.empty(1, device=torch.device(device))
        except (RuntimeError, AssertionError, NotImplementedError):
            raise _no_device(device) from None
        if not launched:
            os.environ["ACCELERATE_TORCH_DEVICE"] = device
    on_cpu = device == "cpu" or (device is None and _present() == ["cpu"])
    if precision == "fp16" and on_cpu:
        raise UserError("--precision fp16 on a CPU", "fp32, or bf16", "--precision bf16")
    if tracker is not None:
        _check_tracker(tracker)
    mixed = "no" if precision == "fp32" else precision
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=mixed,
        log_with=tracker,
        project_dir=folder,
        # Batch norms keep to their own images until they are scored (`training.share_buffers`), and what a signal
        # remembers of each image is the same everywhere: nothing to be sent at every update.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"launched with {accelerator.distributed_type.value}, which shards the network",
            "processes that hold all of it: DistributedDataParallel",
            "accelerate launch --multi_gpu, or torchrun",
        )
    return accelerator


def keep_freed_memory(device: torch.device) -> None:
    """Has this process keep the memory that it frees, where it trains on a CPU with glibc and the environment leaves
    that open. For processes that train and then end: what another network has left behind is kept too.

    Every activation is a block of its own. glibc gives large ones back to the system at once, and a training step
    would get them anew, page by page: it is 1.2 to 1.7 times as fast without, and takes 1.1 to 1.3 times the memory
    (benchmarks/allocator.py; docs/performance.md).
    """
    if device.type != "cpu" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def memory_wanted(error: Exception) -> str | None:
    """What is known of the memory that ran out (": 2.50 GiB more were needed, …", or ""); None for any other error."""
    text = str(error)
    ran_out = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if not ran_out and not re.search(r"out of memory|can't allocate memory", text):
        return None
    # On a CPU torch counts bytes.
    text = re.sub(r"(\d+) bytes", lambda bytes_: f"{int(bytes_[1]) / 2**20:.0f} MiB", text)
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    free = re.search(r"of which ([\d.]+ \w+) is free", text)
    return (f": {asked[1]} more were needed" if asked else "") + (f", {free[1]} were free" if asked and free else "")


@contextmanager
def short_of_memory(doing: str, expected: str, fix: str) -> Iterator[None]:
    """Turns memory that runs out while `doing` something into a UserError."""
    try:
        yield
    except Exception as error:
        if (wanted := memory_wanted(error)) is None:
            raise
        raise UserError(f"out of memory {doing}{wanted}", expected, fix) from error


def _check_tracker(tracker: str) -> None:
    if tracker not in TRACKERS:
        raise unknown("tracker", tracker, TRACKERS)
    if tracker not in {str(getattr(known, "value", known)) for known in get_available_trackers()}:
        raise UserError(f"--track {tracker}: {tracker} is not installed", "its package", f"pip install {tracker}")


def _no_device(device: str) -> UserError:
    """The error for a device that is not available. torch's own words name the twenty types that it knows of."""
    kind, colon, _ = device.partition(":")
    meant = {"gpu": "cuda", "nvidia": "cuda", "metal": "mps", "apple": "mps"}.get(kind.lower(), kind)
    present = _present()
    same = [other for other in present if other.startswith(meant)]
    wrong = f"--device {device} is not available" + (f": torch's name for it is {meant}" if meant != kind else "")
    if same:
        fix = f"--device {same[0] if colon else meant}"
    else:
        if meant in ("cuda", "mps"):
            wrong += f", and it finds no {meant} device" if meant != kind else f": torch finds no {meant} device"
        fix = f"leave --device out to run on {present[-1]}"
    return UserError(wrong, " or ".join(present), fix)


def _present() -> list[str]:
    found = ["cpu"]
    if torch.cuda.is_available():
        found += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def from_first(accelerator: Accelerator, value: T) -> T:
    """What the first process has, on all of them."""
    if accelerator.num_processes == 1:
        return value
    values = [value]
    broadcast_object_list(values)
    return values[0]


def interleaved(accelerator: Accelerator, own: Sequence[T]) -> list[T]:
    """What all processes have, where the i-th of n has every n-th from i on: in the order of one process."""
    if accelerator.num_processes == 1:
        return list(own)
    shares: list[list[T]] = gather_object([list(own)])
    longest = max(map(len, shares))
    return [share[turn] for turn in range(longest) for share in shares if turn < len(share)]
