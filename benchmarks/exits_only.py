"""Exits on a finished network: a step in which only heads learn against a forward pass; logits before and after.

    python benchmarks/exits_only.py --weights ../shared/data/weights/tf_efficientnet_lite0.safetensors
    python benchmarks/exits_only.py --model resnet18 --batch-size 32        random weights

Steps of the recipe `exits-only` and forward passes of the plain network (eval mode, no gradients) take turns on the
same random images; the result is the median of the ratios of neighbours.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sdcli.data.batch import Batch
from sdcli.devices import keep_freed_memory
from sdcli.method.learner import Learner, build_objectives, what_trains
from sdcli.method.optimizer import create_optimizer
from sdcli.network.blueprint import Blueprint
from sdcli.network.weights import build_network
from sdcli.recipe.load import load_recipe


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    recipe = load_recipe(["exits-only"], [f"networks.student.weights={options.weights or 'pretrained'}"])
    table = recipe.student if options.weights else recipe.student.model_copy(update={"weights": "random"})
    blueprint = Blueprint.draft(table, options.model)
    network, loaded = build_network(table, blueprint)
    keep_freed_memory(torch.device("cpu"))
    specs = {f"student.{point}": spec for point, spec in network.specs.items()}
    (objective,), made = build_objectives(recipe, specs, len(blueprint.classes), 1)
    learner = Learner({"student": network}, objective, (), made)
    learner.teach(objective, what_trains(recipe, 0))
    learner.to(memory_format=torch.channels_last).train()
    optimizer = create_optimizer([learner], recipe.optimizer)
    images = torch.randn(options.batch_size, *blueprint.plan.input_size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, len(blueprint.classes), (options.batch_size,))
    batch = Batch(images, labels, torch.arange(options.batch_size))

    def step() -> None:
        learner(batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return network.plain(images)

    before = forward()
    for call in (step, forward, step, forward):
        call()
    pairs = [(timed(step), timed(forward)) for _ in range(options.rounds)]
    ratio = statistics.median(one / other for one, other in pairs)
    macs = blueprint.plan.macs + 3 * sum(cost.macs for p, cost in blueprint.head_costs().items() if p != "final")
    print(f"{options.model}: fresh: {', '.join(loaded.fresh) or 'everything'}")
    print(f"a step takes {ratio:.2f} x the time of a forward pass; its MACs are {macs / blueprint.plan.macs:.2f} x")
    same = "equal bit for bit" if torch.equal(before, forward()) else "DIFFER"
    print(f"logits after {options.rounds + 2} steps: {same}")


if __name__ == "__main__":
    main()
