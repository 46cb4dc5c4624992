"""Early exit on the clock: time saved against MACs saved, what it costs when nobody can leave, and the whole-batch way.

    python benchmarks/early_exit.py                                     resnet18 at 224 px, random weights
    python benchmarks/early_exit.py --checkpoint runs/first             a trained one, on images of its data set
    python benchmarks/early_exit.py --quick                             whether it runs

Per batch size and number of threads four ways through one network take turns on the same images: plain (the timm model
without taps and heads), early exit, early exit with thresholds that nobody reaches, and early exit where a batch leaves
only once all of its images are sure (as earlyon does it). A turn is `--in-a-row` batches, as whoever classifies many
images has them: the weights of a network that has just run are still in the cache. Thresholds of random weights are
chosen so that `--shares` of all images leave at each exit; a checkpoint's are those of sdcli calibrate, or else
`--shares` of its images leave. Times are medians over the turns of the time divided by the plain network's on the same
batches. `saved, cpu` and `over, cpu` are the same of processor time, which other programs on the machine disturb less;
with several threads it counts all of them.

MACs are not time: the first stages of a convolutional network take more time per MAC. `possible` is what could be saved
at best, time / MACs, if each image went through the exit alone at which it leaves (`upto`, timed in the same rounds).

Wanted: time saved / MACs saved of at least 0.85, and when nobody can leave at most 3 % above the plain network plus the
MACs of its heads.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdcli.devices import keep_freed_memory
from sdcli.evaluation.bench import current_load, device_name, real_images, timed
from sdcli.network.blueprint import Blueprint
from sdcli.network.checkpoint import find_checkpoint
from sdcli.network.multi_exit import MultiExit, build
from sdcli.network.policies import Judge, Policy
from sdcli.network.routing import Router, visiting
from sdcli.network.taps import Reached
from sdcli.network.weights import rebuild
from sdcli.recipe.address import FINAL
from sdcli.recipe.schema import Network

SHARES = [0.3, 0.3, 0.2]
ENOUGH, TOO_SLOW = 0.85, 1.03


class WholeBatch(Router):
    """Nobody leaves before all images of the batch are sure at the same exit."""

    def visit(self, point: str, tensor: Tensor) -> Tensor:
        if point not in self.points[:-1] or point in self._visited:
            return tensor
        self._visited.add(point)
        verdict = self.judge.read(point, self.logits_at(point, tensor))
        if bool(self.policy.lets_go(point, verdict).all()):
            self.left.append((None, verdict.answer, self.points.index(point)))
            raise Reached
        return tensor


@torch.no_grad()
def route_whole_batch(network: MultiExit, images: Tensor, policy: Policy) -> int:
    """The place of the exit at which the batch has left."""
    router = WholeBatch(policy, network._logits_at, len(images))
    with suppress(Reached), visiting(network._store, router.visit):
        router.finish(network.plain(images))
    return router.left[0][2]


def random_network(model: str, head: str, size: int | None) -> MultiExit:
    """With classifiers that have opinions: fresh ones are close to zero, and all images alike to them."""
    torch.manual_seed(0)
    classes = [str(number) for number in range(100)]
    network = build(Blueprint.draft(Network(head=head), model, classes, image_size=size)).eval()
    for module in network.modules():
        if isinstance(module, nn.Linear) and module.out_features == 100:
            nn.init.normal_(module.weight)
    return network


def varied_images(network: MultiExit, count: int) -> Tensor:
    """Noise of all scales and colours: to random weights, plain noise is always the same."""
    generator = torch.Generator().manual_seed(0)
    channels, height, width = network.plan.input_size
    coarse = torch.randn(count, channels, 8, 8, generator=generator)
    scale = torch.rand(count, 1, 1, 1, generator=generator) * 3
    return nn.functional.interpolate(coarse * scale, (height, width), mode="bilinear")


@torch.no_grad()
def forced(network: MultiExit, images: Tensor, shares: list[float]) -> Policy:
    """The policy by which these shares of `images` leave at the first exits."""
    exits = [point for point in network.exits if point != FINAL][: len(shares)]
    outputs = [network(part) for part in images.split(32)]
    policy = Policy(dict.fromkeys(exits, -math.inf))
    judge, here = Judge(policy), torch.arange(len(images))
    limits: dict[str, float | None] = {}
    for point, share in zip(exits, shares, strict=True):
        logits = torch.cat([signals[point].logits for signals in outputs])[here]
        order = judge.read(point, logits).score.sort(descending=True)
        leaving = min(round(share * len(images)), len(here) - 1)
        # Halfway between two images.
        limits[point] = float(order.values[leaving - 1 : leaving + 1].mean()) if leaving else None
        going = order.indices[leaving:].sort().values
        here = here[going]
        judge.keep(going)
    return policy.at(limits)


def measure(
    network: MultiExit,
    plain: Callable[[Tensor], Any],
    policy: Policy,
    images: Tensor,
    batch_size: int,
    seconds: float,
    in_a_row: int,
) -> dict[str, Any]:
    """One row: ratios of times and of MACs to the plain network's."""
    device = images.device
    nobody = policy.at({point: math.inf for point in policy.exits})
    ways: dict[str, Callable[[Tensor], Any]] = {
        "plain": plain,
        "early": lambda batch: network.route(batch, policy),
        "nobody": lambda batch: network.route(batch, nobody),
        "whole": lambda batch: route_whole_batch(network, batch, policy),
    }
    points = (*policy.exits, FINAL)
    alone = {point: network.upto(point) for point in policy.exits}
    ways |= alone
    batches = [part for part in images.split(batch_size) if len(part) == batch_size]
    turns = [batches[start : start + in_a_row] for start in range(0, len(batches), in_a_row)]
    passing, full = network.blueprint.passing(policy.exits), network.plan.macs
    macs: dict[str, list[float]] = {"early": [], "whole": []}
    left = dict.fromkeys(points, 0)
    # Before the clock runs, all batches, and so all sizes that a batch shrinks to: each is prepared once.
    for batch in batches:
        for way in ways.values():
            way(batch)
        for place in network.route(batch, policy).exits.tolist():
            left[points[place]] += 1
            macs["early"].append(passing[points[place]] / full)
        macs["whole"].append(passing[points[route_whole_batch(network, batch, policy)]] / full)
    times: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    names, start, number = list(ways), time.perf_counter(), 0
    # As many turns for each batch: they differ in how many leave.
    while number % len(turns) or number < 5 or time.perf_counter() - start < seconds:
        turn = turns[number % len(turns)]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            before = time.process_time()
            times[name].append(sum(timed(ways[name], batch, device)[0] for batch in turn) / len(turn))
            cpu[name].append((time.process_time() - before) / len(turn))
        number += 1
    ratios, cpu_ratios = ratios_of(times), ratios_of(cpu)
    means = {name: statistics.mean(own) for name, own in macs.items()}
    heads = passing[FINAL] / full
    total = sum(left.values())
    possible = 1 - sum(count / total * (ratios[point] if point in alone else 1.0) for point, count in left.items())
    return {
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "rounds": number,
        "plain_ms": 1000 * statistics.median(times["plain"]),
        "early_time": ratios["early"],
        "early_macs": means["early"],
        "saved": (1 - ratios["early"]) / (1 - means["early"]) if means["early"] < 1 else None,
        "saved_cpu": (1 - cpu_ratios["early"]) / (1 - means["early"]) if means["early"] < 1 else None,
        "possible": possible / (1 - means["early"]) if means["early"] < 1 else None,
        "nobody_time": ratios["nobody"],
        "nobody_macs": heads,
        "overhead": ratios["nobody"] / heads,
        "overhead_cpu": cpu_ratios["nobody"] / heads,
        "whole_time": ratios["whole"],
        "whole_macs": means["whole"],
    }


def ratios_of(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians over the rounds of each way's time divided by the plain network's."""
    return {
        name: statistics.median(own / plain for own, plain in zip(times[name], times["plain"], strict=True))
        for name in times
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--head", default="auto", help="of the exits; see sdcli recipes heads")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of all images, at each exit")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each batch size and number of threads")
    parser.add_argument("--in-a-row", type=int, default=4, help="batches that a way takes when it has its turn")
    parser.add_argument("--image-size", type=int, help="of a network with random weights")
    parser.add_argument("--channels-last", action="store_true", help="faster on most CPUs, the first stages above all")
    parser.add_argument("--quick", action="store_true", help="small batches, five rounds: the figures mean nothing")
    options = parser.parse_args()
    if options.quick:
        options.batch_size, options.threads, options.images, options.seconds = [4], options.threads[:1], 8, 0.0
    load, device = current_load(), torch.device(options.device)
    if options.checkpoint:
        path = find_checkpoint(options.checkpoint)
        network, about = rebuild(path)
        images, name = real_images(path, about, network, options.images)
        network.eval()
    else:
        network = random_network(options.model, options.head, options.image_size)
        images, name = varied_images(network, options.images), "noise"
    network, images = network.to(device), images.to(device)
    keep_freed_memory(device)
    if options.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.to(memory_format=torch.channels_last)
    if network.calibration is not None and network.calibration.policy.exits:
        policy = network.calibration.policy
    else:
        policy = forced(network, images, options.shares[: len(network.exits) - 1])
    plain = network.upto(FINAL)
    model = network.blueprint.architecture.model
    print(f"{model}, {'x'.join(map(str, network.plan.input_size))}, {name}, on {device_name(device)}; load {load}")
    titles = ("batch", "threads", "plain ms", "early: time", "MACs", "saved", "saved, cpu", "possible",
              "nobody: time", "MACs", "over", "over, cpu", "whole batch: time", "MACs")  # fmt: skip
    print("  ".join(titles))
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for batch_size in options.batch_size:
            row = measure(network, plain, policy, images, batch_size, options.seconds, options.in_a_row)
            rows.append(row)
            numbers = [f"{row['plain_ms']:.1f}"] + [
                "-" if row[key] is None else f"{row[key]:.3f}" for key in list(row)[4:]
            ]
            cells = [str(batch_size), str(threads), *numbers]
            print("  ".join(f"{cell:>{len(title)}}" for cell, title in zip(cells, titles, strict=True)), flush=True)
    good = all((row["saved"] or 0) >= ENOUGH and row["overhead"] <= TOO_SLOW for row in rows)
    print("as wanted" if good else f"wanted: saved of {ENOUGH} or more, over of {TOO_SLOW} or less")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
