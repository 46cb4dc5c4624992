"""Early exit on the clock: time saved against MACs saved, what it costs when nobody can leave, and the whole-batch way.

    python benchmarks/early_exit.py                                     resnet18 at 224 px, random weights
    python benchmarks/early_exit.py --checkpoint runs/first             a trained one, on images of its data set
    python benchmarks/early_exit.py --quick                             whether it runs

Per batch size and number of threads six ways through one network take turns on the same images: plain (the timm model
without taps and heads), a stream (`MultiExit.stream`: small batches enter together, and where few images would go on
they wait for more, as in sdcli predict and eval), each batch by itself (`MultiExit.route`), both of these with
thresholds that nobody reaches, and each batch leaving only once all of its images are sure (as earlyon does it). A turn
is `--in-a-row` batches, the last of which takes along all who wait: the more there are, the less that counts.
Thresholds of random weights are chosen so that `--shares` of all images leave at each exit; a checkpoint's are those of
sdcli calibrate, or else `--shares` of its images leave. Every turn is taken several times, the shortest counts, and a
way's time is the sum over all turns divided by the plain network's: what else runs on a machine makes things slower,
and some ways more than others. `spread` is how much longer the plain network's median turn took than its shortest:
above 1.1 the machine was too busy for these figures.

`saved` is the time saved divided by the MACs saved, and `over` the time when nobody can leave divided by the plain
network's and the MACs of its heads; `alone` beside each of them is the same for every batch by itself. MACs are not
time: the first stages of a convolutional network take more time per MAC. `possible` is what could be saved at best, if
each image went through the exit alone at which it leaves (`upto`, timed in the same rounds).

Wanted: time saved / MACs saved of at least 0.85, and when nobody can leave at most 3 % above the plain network plus the
MACs of its heads.
"""

from __future__ import annotations

import argparse
import json
import math
import re
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
from sdcli.network.routing import visiting
from sdcli.network.taps import Reached
from sdcli.network.weights import rebuild
from sdcli.recipe.address import FINAL
from sdcli.recipe.schema import Network

SHARES = [0.3, 0.3, 0.2]
ENOUGH, TOO_SLOW = 0.85, 1.03
ROUNDS = 5


@torch.no_grad()
def route_whole_batch(network: MultiExit, images: Tensor, policy: Policy) -> int:
    """The place of the exit at which a batch has left: the first one where all of its images are sure."""
    judge, visited = Judge(policy), list[str]()

    def visit(point: str, tensor: Tensor) -> Tensor:
        if point in policy.exits and point not in visited:
            verdict = judge.read(point, network._logits_at(point, tensor))
            if bool(policy.lets_go(point, verdict).all()):
                raise Reached
            visited.append(point)
        return tensor

    with suppress(Reached), visiting(network._store, visit):
        judge.read(FINAL, network.plain(images))
    return len(visited)


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
    outputs = [{point: signal.logits for point, signal in network(part).items()} for part in images.split(32)]
    policy = Policy(dict.fromkeys(exits, -math.inf))
    judge, here = Judge(policy), torch.arange(len(images))
    limits: dict[str, float | None] = {}
    for point, share in zip(exits, shares, strict=True):
        logits = torch.cat([own[point] for own in outputs])[here]
        order = judge.read(point, logits).score.sort(descending=True)
        leaving = min(round(share * len(images)), len(here) - 1)
        # Halfway between two images.
        limits[point] = float(order.values[leaving - 1 : leaving + 1].mean()) if leaving else None
        going = order.indices[leaving:].sort().values
        here = here[going]
        judge = judge.part(going)
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
    ways: dict[str, Callable[[list[Tensor]], Any]] = {
        "plain": each(plain),
        "early": lambda turn: list(network.stream(turn, policy)),
        "alone": each(lambda batch: network.route(batch, policy)),
        "nobody": lambda turn: list(network.stream(turn, nobody)),
        "nobody alone": each(lambda batch: network.route(batch, nobody)),
        "whole": each(lambda batch: route_whole_batch(network, batch, policy)),
    }
    points = (*policy.exits, FINAL)
    ways |= {point: each(tied(network, point)) for point in policy.exits}
    batches = [part for part in images.split(batch_size) if len(part) == batch_size]
    turns = [batches[start : start + in_a_row] for start in range(0, len(batches), in_a_row)]
    passing, full = network.blueprint.passing(policy.exits), network.plan.macs
    macs: dict[str, list[float]] = {"early": [], "whole": []}
    left = dict.fromkeys(points, 0)
    # Before the clock runs, all batches, and so all sizes that a batch shrinks to: each is prepared once.
    for turn in turns:
        for way in ways.values():
            timed(way, turn, device)
    for batch in batches:
        for place in network.route(batch, policy).exits.tolist():
            left[points[place]] += 1
            macs["early"].append(passing[points[place]] / full)
        macs["whole"].append(passing[points[route_whole_batch(network, batch, policy)]] / full)
    # By way and turn.
    times: dict[str, list[list[float]]] = {name: [[] for _ in turns] for name in ways}
    names, start, number = list(ways), time.perf_counter(), 0
    while number < ROUNDS or time.perf_counter() - start < seconds:
        for place, turn in enumerate(turns):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                times[name][place].append(timed(ways[name], turn, device)[0])
        number += 1
    least = {name: sum(map(min, own)) for name, own in times.items()}
    ratios = {name: own / least["plain"] for name, own in least.items()}
    means = {name: statistics.mean(own) for name, own in macs.items()}
    heads = passing[FINAL] / full
    total = sum(left.values())
    possible = 1 - sum(count / total * ratios.get(point, 1.0) for point, count in left.items())
    macs_saved = 1 - means["early"]
    return {
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "rounds": number,
        "plain_ms": 1000 * least["plain"] / len(batches),
        "spread": statistics.median(statistics.median(own) / min(own) for own in times["plain"]),
        "early_time": ratios["early"],
        "early_macs": means["early"],
        "saved": (1 - ratios["early"]) / macs_saved,
        "alone": (1 - ratios["alone"]) / macs_saved,
        "possible": possible / macs_saved,
        "nobody_time": ratios["nobody"],
        "nobody_macs": heads,
        "overhead": ratios["nobody"] / heads,
        "overhead_alone": ratios["nobody alone"] / heads,
        "whole_time": ratios["whole"],
        "whole_macs": means["whole"],
    }


def tied(network: MultiExit, point: str) -> nn.Module:
    """The network up to `point`, with the very same weights: where in memory a copy lies is worth some percent."""
    own = network.upto(point)
    shared = dict(network.named_parameters()) | dict(network.named_buffers())
    for name, tensor in [*own.named_parameters(), *own.named_buffers()]:
        # A truncated network has one head, without a name.
        tensor.data = shared[re.sub(r"^head\.", f"heads.{point}.", name)].data
    return own


def each(way: Callable[[Tensor], Any]) -> Callable[[list[Tensor]], Any]:
    """A way that takes batches one by one."""
    return lambda turn: [way(batch) for batch in turn]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--head", default="auto", help="of the exits; see sdcli recipes heads")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of all images, at each exit")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each batch size and number of threads")
    parser.add_argument("--in-a-row", type=int, default=8, help="batches that a way takes when it has its turn")
    parser.add_argument("--image-size", type=int, help="of a network with random weights")
    parser.add_argument("--channels-last", action="store_true", help="faster on most CPUs, the first stages above all")
    parser.add_argument("--quick", action="store_true", help="small batches, five rounds: the figures mean nothing")
    options = parser.parse_args()
    if options.quick:
        options.batch_size, options.threads, options.images, options.seconds = [4], options.threads[:1], 8, 0.0
    load, device = current_load(), torch.device(options.device)
    # First, so that the weights of all ways lie in the same kind of memory.
    keep_freed_memory(device)
    if options.checkpoint:
        path = find_checkpoint(options.checkpoint)
        network, about = rebuild(path)
        images, name = real_images(path, about, network, options.images)
        network.eval()
    else:
        network = random_network(options.model, options.head, options.image_size)
        images, name = varied_images(network, options.images), "noise"
    network, images = network.to(device), images.to(device)
    if options.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.to(memory_format=torch.channels_last)
    if network.calibration is not None and network.calibration.policy.exits:
        policy = network.calibration.policy
    else:
        policy = forced(network, images, options.shares[: len(network.exits) - 1])
    if not policy.exits:
        raise SystemExit("no image may leave early: there is no time to save")
    plain = tied(network, FINAL)
    model = network.blueprint.architecture.model
    print(f"{model}, {'x'.join(map(str, network.plan.input_size))}, {name}, on {device_name(device)}; load {load}")
    titles = ("batch", "threads", "plain ms", "spread", "early: time", "MACs", "saved", "alone", "possible",
              "nobody: time", "MACs", "over", "alone", "whole batch: time", "MACs")  # fmt: skip
    print("  ".join(titles))
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for batch_size in options.batch_size:
            row = measure(network, plain, policy, images, batch_size, options.seconds, options.in_a_row)
            rows.append(row)
            numbers = [f"{row['plain_ms']:.1f}"] + [f"{row[key]:.3f}" for key in list(row)[4:]]
            cells = [str(batch_size), str(threads), *numbers]
            print("  ".join(f"{cell:>{len(title)}}" for cell, title in zip(cells, titles, strict=True)), flush=True)
    good = all(row["saved"] >= ENOUGH and row["overhead"] <= TOO_SLOW for row in rows)
    print("as wanted" if good else f"wanted: saved of {ENOUGH} or more, over of {TOO_SLOW} or less")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
