"""Which families of timm can have branches (recipe `one`) and votes of places (recipe `zipf`).

    python benchmarks/tails.py

The smallest model of each of the families in docs/families.csv, on the meta device: no weights, about four minutes.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import torch

from sdcli.errors import UserError
from sdcli.network.backbones import Architecture, create, resolve
from sdcli.network.blueprint import plan_network
from sdcli.network.multi_exit import BRANCH, attach, choose_heads
from sdcli.recipe.schema import Network

FAMILIES = Path(__file__).parents[1] / "docs" / "families.csv"


def branches(architecture: Architecture) -> None:
    plan = plan_network(Network(branches=3), architecture)
    network = attach(create(architecture), plan, choose_heads(plan, BRANCH), 10)
    network.eval()(torch.zeros(1, *architecture.input_size))


def places(architecture: Architecture) -> None:
    network = attach(create(architecture), plan_network(Network(exits="none"), architecture), {}, 10)
    network.read_densely()


def refused(build: Callable[[Architecture], None], model: str) -> str:
    try:
        with torch.device("meta"):
            build(resolve(model, num_classes=10, image_size=None))
    except UserError as error:
        return error.wrong
    return ""


def main() -> None:
    models = [row["model"] for row in csv.DictReader(FAMILIES.open())]
    reasons = {what.__name__: {model: refused(what, model) for model in models} for what in (branches, places)}
    for what, found in reasons.items():
        print(f"{what}: {sum(not reason for reason in found.values())} of {len(found)} families")
        for reason in filter(None, found.values()):
            print(f"    {reason}")
    print(json.dumps({what: {m: not reason for m, reason in found.items()} for what, found in reasons.items()}))


if __name__ == "__main__":
    main()
