"""Finds out which timm families support branches (recipe `one`) and dense votes (recipe `zipf`).

    python benchmarks/tails.py

Tries the smallest model of each family in docs/families.csv on the meta device: no weights, about four minutes.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import torch

from sdcli.errors import UserError
from sdcli.network.blueprint import Blueprint
from sdcli.network.multi_exit import build
from sdcli.recipe.schema import Network

FAMILIES = Path(__file__).parents[1] / "docs" / "families.csv"


CLASSES = [str(number) for number in range(10)]


def branches(model: str) -> None:
    network = build(Blueprint.draft(Network(branches=3), model, CLASSES), device="meta")
    network.eval()(torch.zeros(1, *network.plan.input_size, device="meta"))


def places(model: str) -> None:
    build(Blueprint.draft(Network(exits="none"), model, CLASSES), device="meta").read_densely()


def refused(grow: Callable[[str], None], model: str) -> str:
    try:
        grow(model)
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
