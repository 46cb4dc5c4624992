"""How long one image takes to each exit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from sdcli.network.multi_exit import MultiExit
from sdcli.network.policies import Policy
from sdcli.network.signals import signal_at
from sdcli.recipe.address import FINAL

ROUNDS, WARM_UP = 30, 3


@dataclass(frozen=True)
class Latency:
    """Milliseconds at one point, at batch size 1."""

    reach: float
    """From the image to the stage's tensor; for `final`, to the logits."""
    head: float
    """Of the exit's head; 0 for `final`."""
    routing: float = 0.0
    """Of `final`: what early exit takes beside stages and heads, once for an image; 0 where it was not measured."""


def now(device: torch.device) -> float:
    """The time in seconds when all that the device was asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def measure_latencies(
    network: MultiExit, exits: Sequence[str], device: torch.device, *, routed: bool = False
) -> dict[str, Latency]:
    """The medians of `exits` and `final`, at batch size 1, in rounds that take all of them in turn.

    With `routed` also what early exit itself takes; images have to be able to leave at the first of `exits`. Leaves the
    network in eval mode.
    """
    network.eval()
    image = torch.randn(1, *network.plan.input_size, device=device)
    parts: dict[str, Callable[[], object]] = {FINAL: lambda: network.plain(image)}
    kept = network.tensors(image)
    if routed:
        everyone = Policy({exits[0]: -math.inf}, "confidence")
        parts["routed"] = lambda: network.route(image, everyone)
    for point in exits:
        alone = network.upto(point)
        parts[point] = lambda alone=alone: alone(image)  # type: ignore[misc]
        stage, head, tensor = network.stages[point], network.heads[point], kept[point]
        parts[f"{point} head"] = lambda stage=stage, head=head, tensor=tensor: signal_at(stage, head, tensor)  # type: ignore[misc]
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(WARM_UP + ROUNDS):
        for name, run in parts.items():
            start = now(device)
            run()
            if number >= WARM_UP:
                taken[name].append(1000 * (now(device) - start))
    middle = {name: median(times) for name, times in taken.items()}
    found = {}
    for point in exits:
        own = middle[f"{point} head"]
        found[point] = Latency(max(middle[point] - own, 0.0), own)
    routing = max(middle["routed"] - middle[exits[0]], 0.0) if routed else 0.0
    return {**found, FINAL: Latency(middle[FINAL], 0.0, routing)}
