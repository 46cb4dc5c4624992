"""The device of a run, its memory, and the exchange between its processes."""

from __future__ import annotations

import ctypes
import mmap
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
from torch import Tensor

from sdcli.errors import UserError, unknown

TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")

Precision = Literal["fp32", "bf16", "fp16"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3): how much free memory to keep at the top of the heap, and the maximum number of
blocks outside the heap (mmap)."""
MADV_COLLAPSE = 25
"""Advice of Linux's madvise(2), from 6.1 on: put these pages together to huge ones now."""

T = TypeVar("T")


def accelerator_for(
    device: str | None, precision: Precision = "fp32", tracker: str | None = None, folder: Path | None = None
) -> Accelerator:
    """An accelerator on `device` (`cpu`, `cuda`, `cuda:1`, `mps`, …), or on the best device available.

    Joins the other processes if a launcher has started several. A `tracker` writes to `folder`. Raises UserError for a
    device that this machine does not have, a precision that the device cannot train in, and a tracker that is not
    installed.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if device is not None:
        if launched and ":" in device:
            raise UserError(
                f"--device {device} puts every process of this launch on the same device",
                "one device per process, chosen by the launcher",
                f"leave out --device, or --device {device.partition(':')[0]}",
            )
        try:
            # The only reliable way to know whether a device exists, its number included.
            torch.empty(1, device=torch.device(device))
        except (RuntimeError, AssertionError, NotImplementedError):
            raise _no_device(device) from None
        if not launched:
            os.environ["ACCELERATE_TORCH_DEVICE"] = device
    on_cpu = device == "cpu" or (device is None and _present() == ["cpu"])
    if precision == "fp16" and on_cpu:
        raise UserError("--precision fp16 is not available on a CPU", "fp32 or bf16", "--precision bf16")
    if tracker is not None:
        _check_tracker(tracker)
    mixed = "no" if precision == "fp32" else precision
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=mixed,
        log_with=tracker,
        project_dir=folder,
        # No broadcast at each update: batch norms keep the statistics of their own process until scoring
        # (`training.share_buffers`), and what signals remember is the same in every process.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"launched with {accelerator.distributed_type.value}, which shards the network",
            "processes that each hold the whole network (DistributedDataParallel)",
            "accelerate launch --multi_gpu, or torchrun",
        )
    return accelerator


def everyones(own: Tensor) -> Tensor:
    """This tensor from all processes, concatenated [B of all, …]."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return own
    shares = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(shares, own.contiguous())
    return torch.cat(shares)


def keep_freed_memory(device: torch.device) -> None:
    """Makes a process that computes on a CPU with glibc keep the memory that it frees, in huge pages where Linux has
    them, unless the environment configures malloc. For commands: they end, while a process that goes on would also keep
    what other networks freed.

    Every activation is a separate block. glibc returns large blocks to the system at once, so each batch has to get
    them again, page by page. Keeping them makes a training step 1.2 to 1.7 times as fast and takes 1.1 to 1.3 times the
    memory; huge pages make it faster again, above all in a virtual machine (benchmarks/allocator.py;
    docs/performance.md).
    """
    if device.type != "cpu" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if libc is None or not hasattr(libc, "mallopt"):
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        _heap_of_huge_pages(libc)


def _heap_of_huge_pages(libc: ctypes.CDLL) -> None:
    """Grows the heap by half of the machine's memory, of which nothing is used yet, and asks for huge pages in it.

    What is freed stays in the heap, so later blocks lie there. Without huge pages nothing changes. The heap stays as
    large as it is where unused memory counts: a process may have only so much, or Linux promises no more than there is
    (overcommit_memory is 2).
    """
    import resource

    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    used = _heaps()
    strict = _read_system("/proc/sys/vm/overcommit_memory").strip() == "2"
    if not strict and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        libc.free(libc.malloc(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2))
    for start, end in _heaps():
        libc.madvise(start, end - start, mmap.MADV_HUGEPAGE)
    # What is used by now lies in small pages, and has holes that blocks will be put into.
    for start, end in used:
        libc.madvise(start, end - start, MADV_COLLAPSE)


def _heaps() -> list[tuple[int, int]]:
    """Start and end of each part of the heap, as Linux lists them."""
    found = re.findall(r"^(\w+)-(\w+) .*\[heap\]$", _read_system("/proc/self/maps"), re.MULTILINE)
    return [(int(start, 16), int(end, 16)) for start, end in found]


def _read_system(path: str) -> str:
    """A file of the system; empty where it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def memory_wanted(error: Exception) -> str | None:
    """The failed allocation (": failed to allocate 2.50 GiB (1.25 GiB free)", or "" if unknown) for an out-of-memory
    error; None for any other error."""
    text = str(error)
    ran_out = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if not ran_out and not re.search(r"out of memory|can't allocate memory", text):
        return None
    # On a CPU torch's message gives bytes.
    text = re.sub(r"(\d+) bytes", lambda bytes_: f"{int(bytes_[1]) / 2**20:.0f} MiB", text)
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    free = re.search(r"of which ([\d.]+ \w+) is free", text)
    return (f": failed to allocate {asked[1]}" if asked else "") + (f" ({free[1]} free)" if asked and free else "")


@contextmanager
def short_of_memory(doing: str, expected: str, fix: str) -> Iterator[None]:
    """Turns an out-of-memory error in the block into a UserError; `doing` says when and where it happened."""
    try:
        yield
    except Exception as error:  # each device has errors of its own for it
        if (wanted := memory_wanted(error)) is None:
            raise
        raise UserError(f"out of memory {doing}{wanted}", expected, fix) from error


def _check_tracker(tracker: str) -> None:
    if tracker not in TRACKERS:
        raise unknown("tracker", tracker, TRACKERS)
    if tracker not in {str(getattr(known, "value", known)) for known in get_available_trackers()}:
        raise UserError(f"--track {tracker}: {tracker} is not installed", "its package", f"pip install {tracker}")


def _no_device(device: str) -> UserError:
    """The error for a device that is not available: torch's own message lists the twenty types that it knows instead of
    the devices present."""
    kind, colon, _ = device.partition(":")
    meant = {"gpu": "cuda", "nvidia": "cuda", "metal": "mps", "apple": "mps"}.get(kind.lower(), kind)
    present = _present()
    same = [other for other in present if meant and other.startswith(meant)]
    wrong = f"--device {device} is not available" + (f": torch's name for it is {meant}" if meant != kind else "")
    if same:
        fix = f"--device {same[0] if colon else meant}"
    else:
        if meant in ("cuda", "mps"):
            wrong += f", and torch finds no {meant} device" if meant != kind else f": torch finds no {meant} device"
        fix = f"leave out --device to run on {present[-1]}"
    return UserError(wrong, " or ".join(present), fix)


def _present() -> list[str]:
    found = ["cpu"]
    if torch.cuda.is_available():
        found += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def from_first(accelerator: Accelerator, value: T) -> T:
    """The first process's value, in all processes."""
    if accelerator.num_processes == 1:
        return value
    values = [value]
    broadcast_object_list(values)
    return values[0]


def interleaved(accelerator: Accelerator, own: Sequence[T]) -> list[T]:
    """The items of all processes in the order of a single process; process i of n holds every n-th item, from the i-th
    on."""
    if accelerator.num_processes == 1:
        return list(own)
    shares: list[list[T]] = gather_object([list(own)])
    longest = max(map(len, shares))
    return [share[turn] for turn in range(longest) for share in shares if turn < len(share)]
