"""Runs a training step of the smallest model of each timm family on the CPU: does every parameter get a gradient?

    python benchmarks/train_families.py                          docs/families.csv, about ten minutes on two cores
    python benchmarks/train_families.py --family resnet vgg      only these

Each model gets exits, two random images of its own input size and the losses of the recipe `default`. Every trained
parameter must get a finite gradient; this is checked again with gradient checkpointing if the family supports it. The
loss is recorded. No weights, data or network connection are needed. `tests/test_families.py` asserts the same (slow).
"""

import argparse
import csv
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdcli.data.batch import Batch
from sdcli.errors import UserError
from sdcli.method.objective import Objective
from sdcli.method.optimizer import create_optimizer
from sdcli.network.blueprint import Blueprint
from sdcli.network.multi_exit import MultiExit, build
from sdcli.recipe.load import load_recipe
from sdcli.recipe.schema import Network

DOCS = Path(__file__).parents[1] / "docs"
COLUMNS = ("family", "model", "input_size", "macs_g", "params_m", "exits", "trained", "without_gradient",
           "checkpointing", "loss", "seconds", "error")  # fmt: skip
CLASSES = 10


def smallest_members() -> dict[str, str]:
    """The model with the fewest MACs of each family, from `docs/models.csv`."""
    with (DOCS / "models.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["macs_g"]]
    rows.sort(key=lambda row: (float(row["macs_g"]), float(row["params_m"])))
    smallest: dict[str, str] = {}
    for row in rows:
        smallest.setdefault(row["family"], row["model"])
    return dict(sorted(smallest.items()))


def train_one_step(model: str) -> dict[str, Any]:
    """One row: the number of trained parameters, and the names of those without a finite gradient."""
    torch.manual_seed(0)
    start = time.perf_counter()
    row: dict[str, Any] = {"model": model}
    try:
        recipe = load_recipe(["default"], ["optimizer.lr=0.001"])
        network = build(Blueprint.draft(Network(), model, [str(number) for number in range(CLASSES)])).train()
        plan = network.plan
        objective = Objective(recipe.losses, network.specs).train()
        optimizer = create_optimizer([network, objective], recipe.optimizer)
        batch = Batch(torch.randn(2, *plan.input_size), torch.tensor([1, 2]), torch.arange(2))
        total, lost = backward(network, objective, batch)
        checkpointing = "none"
        if can_checkpoint(network.backbone):
            again = backward(network, objective, batch)[1]
            checkpointing = "ok" if again == lost else f"without gradient: {' '.join(again)}"
        optimizer.step()
        row |= {
            "input_size": "x".join(map(str, plan.input_size)),
            "macs_g": f"{plan.macs / 1e9:.3f}",
            "params_m": f"{plan.params / 1e6:.2f}",
            "exits": len(network.points),
            "trained": sum(p.requires_grad for p in network.parameters()),
            "without_gradient": " ".join(lost),
            "checkpointing": checkpointing,
            "loss": f"{total:.3f}",
        }
    except UserError as error:
        row["error"] = " ".join(str(error).split())
    return row | {"seconds": f"{time.perf_counter() - start:.1f}"}


def backward(network: MultiExit, objective: Objective, batch: Batch) -> tuple[float, list[str]]:
    """The loss, and the names of the trained parameters without a finite gradient."""
    network.zero_grad()
    total, _ = objective(network(batch.images), batch)
    total.backward()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    return total.item(), [n for n, p in trained.items() if p.grad is None or not bool(p.grad.isfinite().all())]


def can_checkpoint(backbone: nn.Module) -> bool:
    """Turns gradient checkpointing on; False for families without it."""
    try:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", help="timm's families, such as resnet and vision_transformer")
    parser.add_argument("--output", type=Path, default=DOCS / "families.csv")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # timm's warnings about renamed models
    members = smallest_members()
    rows: dict[str, dict[str, Any]] = {}
    if options.family and options.output.exists():
        with options.output.open(newline="") as file:
            rows = {row["family"]: row for row in csv.DictReader(file)}
    for family in options.family or members:
        rows[family] = {"family": family, **train_one_step(members[family])}
        print({key: value for key, value in rows[family].items() if value}, file=sys.stderr, flush=True)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[family] for family in sorted(rows))
    good = [row for row in rows.values() if not row.get("error") and not row["without_gradient"]]
    print(f"{len(good)} of {len(rows)} families train with a gradient for every trained parameter")


if __name__ == "__main__":
    main()
