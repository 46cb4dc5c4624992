"""How long a network takes at each exit, as a whole and with early exit: measured in turns, compared within a round.

B images of a batch, C channels, H W the input's height and width in pixels
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from sdcli.data.dataset import Split
from sdcli.data.open import open_dataset
from sdcli.data.splits import training_splits
from sdcli.evaluation.latency import now
from sdcli.evaluation.opened import recorded_source
from sdcli.network.checkpoint import Description
from sdcli.network.multi_exit import MultiExit
from sdcli.network.predict import Strategy
from sdcli.recipe.address import FINAL

PLAIN, ALL, EARLY = "plain", "all exits", "early exit"
"""The timm model alone; the network with every exit's head; images that leave."""

Mode: TypeAlias = Literal["eager", "compiled"]

LEAST_ROUNDS, MOST_ROUNDS = 5, 200
IMAGES = 512
"""Different images that early exit is measured on, where there are so many: how many leave differs between batches."""
BUSY = 0.3
"""Load of others, in cores, from which on the machine counts as shared."""


@dataclass(frozen=True)
class Timing:
    """One way through the network at one batch size."""

    subject: str
    """A point, "plain", "all exits" or "early exit"."""
    batch_size: int
    mode: Mode
    rounds: int
    median_ms: float
    p95_ms: float
    """Per batch."""
    images_per_s: float
    """At the median."""
    ratio: float
    """Median over the rounds of its time divided by that of the plain network, eager, in the same round."""
    macs_ratio: float
    """MACs per image divided by those of the plain network; with early exit of the images that were measured."""


@dataclass(frozen=True)
class Bench:
    """All that was measured in one run."""

    model: str
    device: str
    threads: int
    torch: str
    images: str
    """What was shown to the network."""
    leaving: dict[str, float]
    """With early exit, the share of images that leave at each point."""
    left_out: dict[str, str]
    """What could not be compiled, and why."""
    timings: tuple[Timing, ...]
    load: tuple[float, float] | None
    """How many processes wanted to run, on average over a minute, before and after; None where it is not known."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "timings": [asdict(timing) for timing in self.timings]}


def real_images(path: Path, about: Description, network: MultiExit, count: int) -> tuple[Tensor, str]:
    """Up to `count` prepared images [B, C, H, W] of the data that a checkpoint was trained on, and their name.

    Of the test split, else of the validation split. Raises UserError for data that cannot be opened or read.
    """
    split, name = _scored_split(path, about)
    # Spread over the split, which may be sorted by class.
    places = torch.linspace(0, len(split) - 1, min(count, len(split))).long().tolist()
    transform = network.transform
    return torch.stack([transform(split.image(place)) for place in places]), name


def _scored_split(path: Path, about: Description) -> tuple[Split, str]:
    trained_on = about.dataset
    source = trained_on.source or recorded_source(path)
    data = open_dataset(source, image_key=trained_on.image_key, label_key=trained_on.label_key)
    if "test" in data.splits:
        return data.splits["test"], f"{trained_on.name} (test)"
    train, validation = training_splits(data, trained_on.val_fraction, trained_on.seed)
    return validation or train, f"{trained_on.name} ({'validation' if validation else 'train'})"


def random_images(network: MultiExit, count: int) -> Tensor:
    """Noise [B, C, H, W], always the same."""
    return torch.randn(count, *network.plan.input_size, generator=torch.Generator().manual_seed(0))


def bench(
    network: MultiExit,
    images: Tensor,
    strategy: Strategy | None,
    *,
    about_images: str,
    batch_sizes: Sequence[int],
    device: torch.device,
    compiled: bool = False,
    seconds: float = 10.0,
    load: float | None = None,
    progress: Callable[[str], None] = lambda doing: None,
) -> Bench:
    """Measures every exit alone (`MultiExit.upto`), the plain network, that with all exits, and `strategy`.

    At each batch size and mode all of them take turns for about `seconds`; images come in turn from `images`, the same
    for all within a round. Early exit is not compiled: how many images go on is known only when it runs. `load` is the
    machine's before anything was loaded.
    """
    network = network.eval().to(device)
    images = images.to(device)
    subjects = _subjects(network, strategy)
    timings: list[Timing] = []
    exits: Counter[str] = Counter()
    left_out: dict[str, str] = {}
    for batch_size in batch_sizes:
        for mode in ("eager", "compiled") if compiled else ("eager",):
            progress(f"{mode}, batch {batch_size}")
            batches = _batches(images, batch_size)
            turns = subjects if mode == "eager" else _compiled(subjects, next(batches), left_out)
            spent, leaving = _spend(turns, batches, device, seconds)
            exits.update(leaving)
            macs = _macs(network, strategy, leaving)
            timings += _timings(spent, macs, batch_size, mode)
    now = current_load()
    return Bench(
        model=network.blueprint.architecture.model,
        device=device_name(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        images=about_images,
        leaving={point: exits[point] / exits.total() for point in network.exits if exits[point]},
        left_out=left_out,
        timings=tuple(timings),
        load=(load, now) if load is not None and now is not None else None,
    )


def _subjects(network: MultiExit, strategy: Strategy | None) -> dict[str, Callable[[Tensor], Any]]:
    subjects: dict[str, Callable[[Tensor], Any]] = {
        point: network.upto(point) for point in network.exits if point != FINAL
    }
    subjects[PLAIN] = network.upto(FINAL)
    if len(network.exits) > 1:
        subjects[ALL] = _Logits(network)
    if strategy is not None:
        subjects[EARLY] = lambda images: network.answer(images, strategy)
    return subjects


class _Logits(nn.Module):
    """All logits of a network, without the maps, which a compiler would have to return."""

    def __init__(self, network: MultiExit) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        signals = self.network(images)
        return [logits for point in self.network.exits if (logits := signals[point].logits) is not None]


REFERENCE = "plain, eager"


def _compiled(
    subjects: Mapping[str, Callable[[Tensor], Any]], batch: Tensor, left_out: dict[str, str]
) -> dict[str, Callable[[Tensor], Any]]:
    """The subjects that can be compiled, for batches of this shape, and the plain network as it is."""
    turns = {REFERENCE: subjects[PLAIN]}
    for name, call in subjects.items():
        if name == EARLY:
            continue
        torch.compiler.reset()
        own: Callable[[Tensor], Any] = torch.compile(call, dynamic=False)
        try:
            with torch.inference_mode():
                own(batch)
        except Exception as error:  # compilers raise anything
            left_out[name] = " ".join(str(error).split())[:200] or type(error).__name__
        else:
            turns[name] = own
    return turns


def _spend(
    turns: Mapping[str, Callable[[Tensor], Any]], batches: Iterator[Tensor], device: torch.device, seconds: float
) -> tuple[dict[str, list[float]], Counter[str]]:
    """Seconds of every subject in every round, and where images have left."""
    for call in turns.values():
        for _ in range(2):  # the first passes of a process are slower
            timed(call, next(batches), device)
    spent: dict[str, list[float]] = {name: [] for name in turns}
    leaving: Counter[str] = Counter()
    names, start, number = list(turns), time.perf_counter(), 0
    while number < LEAST_ROUNDS or (number < MOST_ROUNDS and time.perf_counter() - start < seconds):
        batch = next(batches)
        # Each round begins with another one: what else runs on the machine may come and go in step with the rounds.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken, answered = timed(turns[name], batch, device)
            spent[name].append(taken)
            if name == EARLY:
                leaving.update(answered.points[place] for place in answered.exits.tolist())
        number += 1
    return spent, leaving


def _timings(spent: dict[str, list[float]], macs: Mapping[str, float], batch_size: int, mode: Mode) -> Iterator[Timing]:
    reference = spent.pop(REFERENCE, None) or spent[PLAIN]
    for name, times in spent.items():
        median = statistics.median(times)
        yield Timing(
            subject=name,
            batch_size=batch_size,
            mode=mode,
            rounds=len(times),
            median_ms=1000 * median,
            p95_ms=1000 * sorted(times)[round(0.95 * (len(times) - 1))],
            images_per_s=batch_size / median,
            ratio=statistics.median(own / plain for own, plain in zip(times, reference, strict=True)),
            macs_ratio=macs[name],
        )


def _macs(network: MultiExit, strategy: Strategy | None, exits: Counter[str]) -> dict[str, float]:
    """MACs of every subject as a share of the plain network's."""
    blueprint = network.blueprint
    plain = blueprint.costs()[FINAL].macs
    heads = sum(cost.macs for point, cost in blueprint.head_costs().items() if point != FINAL)
    macs: dict[str, float] = {point: cost.macs for point, cost in blueprint.costs().items()}
    macs |= {PLAIN: plain, ALL: plain + heads}
    if strategy is not None and strategy.policy is not None and exits:
        passing = blueprint.passing(strategy.policy.exits)
        macs[EARLY] = sum(passing[point] * count for point, count in exits.items()) / exits.total()
    return {name: own / plain for name, own in macs.items()}


def _batches(images: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Batches of this size for ever; where there are fewer images they are repeated."""
    if len(images) < batch_size:
        images = images.repeat(-(-batch_size // len(images)), 1, 1, 1)
    batches = [images[start : start + batch_size] for start in range(0, len(images) - batch_size + 1, batch_size)]
    while True:
        yield from batches


@torch.inference_mode()
def timed(call: Callable[[Tensor], Any], images: Tensor, device: torch.device) -> tuple[float, Any]:
    """Seconds until the device has done what `call` asks for, and what it returns."""
    start = now(device)
    result = call(images)
    return now(device) - start, result


def current_load() -> float | None:
    """How many processes wanted to run, on average over the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def busiest(count: int = 3, seconds: float = 0.3) -> list[str]:
    """The other programs that take most of the processor's time, and how much; none where the system does not say."""
    before, start = _spent(), time.perf_counter()
    time.sleep(seconds)
    after, passed = _spent(), time.perf_counter() - start
    per_second = os.sysconf("SC_CLK_TCK") * passed if after else 1.0
    shares = [
        ((ticks - before[number][1]) / per_second, name)
        for number, (name, ticks) in after.items()
        if number in before and number != os.getpid()
    ]
    return [f"{name} {share:.0%} of a core" for share, name in sorted(shares, reverse=True)[:count] if share > 0.1]


def _spent() -> dict[int, tuple[str, int]]:
    """By process its name and its processor time in ticks; empty on systems without /proc."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        # A process may end meanwhile.
        with suppress(OSError, ValueError, IndexError):
            name, _, rest = file.read_text(encoding="utf-8", errors="replace").partition("(")[2].rpartition(")")
            fields = rest.split()
            found[int(file.parent.name)] = name, int(fields[11]) + int(fields[12])
    return found


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({_processor()}, {os.cpu_count()} cores)" if device.type == "cpu" else str(device)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
