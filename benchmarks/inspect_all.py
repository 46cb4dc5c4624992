"""Inspects every timm architecture at its default size, runs it with exits, and writes one row per architecture.

    OMP_NUM_THREADS=1 python benchmarks/inspect_all.py               docs/models.csv, about an hour on one core
    python benchmarks/inspect_all.py --pattern 'resnet*'             only these rows; the others are kept
    python benchmarks/inspect_all.py --heads                         only what `head = "auto"` chooses

Each model runs without and with exits on the meta device: the backbone must run the same operations on the same tensors
in the same order, so that its logits are the same for any weights. Models of at most `--real-gmacs` also run on real
numbers (random weights and images), where the logits must be bitwise equal; a row keeps this from an earlier run if the
operations are still the same (`--real-gmacs 0` runs none). No pretrained weights and no network
connection are needed.
"""

import argparse
import csv
import fnmatch
import signal
import sys
import time
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import _registry
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdcli.data.transforms import Preprocess
from sdcli.errors import UserError
from sdcli.network.backbones import Architecture, create, resolve
from sdcli.network.blueprint import Blueprint, choose_heads
from sdcli.network.cuts import find_stages
from sdcli.network.head_choice import EACH, TOGETHER
from sdcli.network.multi_exit import attach
from sdcli.network.stages import StagePlan
from sdcli.recipe.schema import Network
from sdcli.zoo import NAMES

COLUMNS = (
    *("model", "family", "input_size", "found_by", "num_stages", "clean", "stages", "reductions", "num_chs", "shares"),
    *("params_m", "macs_g", "classifier", "unused", "seconds", "notes", "forward", "logits", "error"),
    *("heads", "head_shares", "heads_together", "exits_ascend"),
)
CLASSES = 10
LARGEST_REAL_PARAMS = 1.0e9


def inspect(name: str, real_gmacs: float) -> dict[str, Any]:
    """One row: the plan, and whether exits leave the model's computation unchanged; or the error.

    `seconds` is the time to find the stages.
    """
    row: dict[str, Any] = {"model": name, "family": _registry._model_to_module[name]}
    start = time.perf_counter()
    try:
        architecture = resolve(name, num_classes=None, image_size=None)
        row["input_size"] = "x".join(map(str, architecture.input_size))
        model = create(architecture)
        plan = find_stages(model, architecture.input_size, name=name)
        row |= describe(plan) | describe_heads(architecture, plan)
        row["seconds"] = f"{time.perf_counter() - start:.2f}"
        row["forward"], row["logits"] = run_with_exits(model, architecture, plan)
        affordable = plan.macs <= 1e9 * real_gmacs and plan.params <= LARGEST_REAL_PARAMS
        if row["logits"] == SAME_OPERATIONS and affordable:
            with QuickWeights():
                real = create(architecture, device="cpu")
            row["logits"] = compare_logits(real, architecture, plan)
    except (UserError, TimeoutError) as error:
        row["error"] = " ".join(str(error).split())
    return row


def heads_of(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the columns of the heads measured anew; the others are kept."""
    try:
        architecture = resolve(row["model"], num_classes=None, image_size=None)
        plan = find_stages(create(architecture), architecture.input_size, name=row["model"])
        return row | describe_heads(architecture, plan)
    except (UserError, TimeoutError) as error:
        return row | {"error": " ".join(str(error).split())}


def describe(plan: StagePlan) -> dict[str, Any]:
    ends = [0, *(stage.macs for stage in plan.stages)]
    shares = [after - before for before, after in pairwise(ends)]
    return {
        "found_by": plan.found_by,
        "num_stages": len(plan.stages),
        "clean": sum(stage.clean for stage in plan.stages),
        "stages": " ".join(
            stage.module + ("" if stage.tensor is None else f"[{stage.tensor}]") for stage in plan.stages
        ),
        "reductions": " ".join(str(stage.reduction) for stage in plan.stages),
        "num_chs": " ".join(f"{stage.num_chs}:{stage.output_fmt}+{stage.num_prefix_tokens}" for stage in plan.stages),
        "shares": " ".join(f"{100 * share / plan.macs:.0f}" for share in shares),
        "params_m": f"{plan.params / 1e6:.2f}",
        "macs_g": f"{plan.macs / 1e9:.3f}",
        "classifier": plan.classifier or "",
        "unused": len(plan.unused),
        "notes": " ".join(plan.notes),
    }


def describe_heads(architecture: Architecture, plan: StagePlan) -> dict[str, Any]:
    """What `head = "auto"` chooses with a thousand classes: kinds, shares of the model's MACs in percent, and whether
    each exit deployed alone costs less than the next."""
    blueprint = blueprint_of(architecture, plan, 1000)
    own, costs = blueprint.head_costs(), blueprint.costs()
    points = blueprint.points
    shares = [100 * own[point].macs / max(plan.macs, 1) for point in points[:-1]]
    ascending = all(costs[one].macs < costs[other].macs for one, other in pairwise(points))
    return {
        "heads": " ".join(blueprint.heads[point] for point in points[:-1]),
        "head_shares": " ".join(f"{share:.2f}" for share in shares),
        "heads_together": f"{sum(shares):.2f}",
        "exits_ascend": "yes" if ascending else "no",
    }


SAME_OPERATIONS = "same operations"


def blueprint_of(architecture: Architecture, plan: StagePlan, num_classes: int = CLASSES) -> Blueprint:
    preprocess = Preprocess(architecture.input_size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    classes = tuple(str(number) for number in range(num_classes))
    return Blueprint(architecture, plan, choose_heads(plan, Network(), len(classes)), classes, preprocess)


def run_with_exits(model: nn.Module, architecture: Architecture, plan: StagePlan) -> tuple[str, str]:
    """On the meta device: whether every exit has outputs of the right shape, and whether the backbone runs the same
    operations as without exits."""
    images = torch.empty(2, *plan.input_size, device="meta")
    model.eval()
    with torch.no_grad():
        with Operations(model) as plain:
            logits = model(images)
        network = attach(model, blueprint_of(architecture, plan)).to("meta").eval()
        with Operations(network.backbone) as attached:
            signals = network(images)
    wrong = [p for p, signal in signals.items() if p != "final" and tuple(signal.logits.shape) != (2, CLASSES)]
    wrong += [p for p, signal in signals.items() if signal.features.ndim != 4 or signal.embedding.ndim != 2]
    if not plan.encoder and isinstance(logits, torch.Tensor):
        # The final logits must be the tensor that the backbone computed, not just an equal one.
        same_tensor = attached.number(signals["final"].logits) == plain.number(logits)
    else:
        same_tensor = True
    same = same_tensor and attached.log[: len(plain.log)] == plain.log
    return f"wrong shapes at {', '.join(wrong)}" if wrong else "ok", SAME_OPERATIONS if same else "other operations"


def compare_logits(model: nn.Module, architecture: Architecture, plan: StagePlan) -> str:
    """On real numbers: whether the plain model's output is bitwise unchanged when it has exits."""
    images = torch.randn(1, *plan.input_size)
    model.eval()
    with torch.no_grad():
        plain = model(images)
        network = attach(model, blueprint_of(architecture, plan)).eval()
        kept: list[Any] = []
        network.backbone.register_forward_hook(lambda module, args, output: kept.append(output))
        signals = network(images)
    # sdcli adds a head to an encoder's output, and averages the two predictions of a distilled model.
    after = signals["final"].logits if isinstance(plain, torch.Tensor) and not plan.encoder else kept[0]
    pairs = zip(tree_leaves(plain), tree_leaves(after), strict=True)
    return "equal" if all(torch.equal(one, other) for one, other in pairs) else "differ"


class Operations(TorchDispatchMode):
    """Logs every operation in order, with the numbers of its input and output tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.log: list[tuple[Any, ...]] = []
        self.kept: list[torch.Tensor] = []  # so that no id is used twice
        self.numbers: dict[int, Any] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.numbers[id(tensor)] = name

    def number(self, tensor: torch.Tensor) -> Any:
        if id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = len(self.kept)
            self.kept.append(tensor)
        return self.numbers[id(tensor)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [self.number(x) if isinstance(x, torch.Tensor) else repr(x) for x in tree_leaves((args, kwargs))]
        result = func(*args, **kwargs)
        self.log.append((func, *given, *(self.number(x) for x in tree_leaves(result) if isinstance(x, torch.Tensor))))
        return result


class QuickWeights(TorchDispatchMode):
    """Copies one block of random numbers instead of drawing billions for an initialisation, whose values do not matter
    here."""

    block = torch.randn(1 << 20).mul_(0.02)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::normal_", "aten::uniform_") and args[0].numel() > len(self.block):
            flat = args[0].view(-1)
            whole = flat[: len(flat) // len(self.block) * len(self.block)].view(-1, len(self.block))
            whole.copy_(self.block)
            flat[whole.numel() :].copy_(self.block[: len(flat) - whole.numel()])
            return args[0]
        if func._schema.name in ("aten::erfinv_", "aten::clamp_") and args[0].numel() > len(self.block):
            return args[0]
        return func(*args, **(kwargs or {}))


def too_late(signum: int, frame: Any) -> None:
    raise TimeoutError("took longer than the time limit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", nargs="+", default=["*"], help="architectures to inspect")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "models.csv")
    parser.add_argument(
        "--real-gmacs", type=float, default=20, help="also run models of at most this many GMACs on real numbers"
    )
    parser.add_argument("--heads", action="store_true", help="only the columns of the heads, the others are kept")
    parser.add_argument("--limit-s", type=int, default=300, help="time limit per architecture, in seconds")
    options = parser.parse_args()

    warnings.simplefilter("ignore")  # timm's warnings about renamed models
    everything = [name for name in timm.list_models(pretrained=False) if name not in NAMES]
    names = [name for name in everything if any(fnmatch.fnmatch(name, pattern) for pattern in options.pattern)]
    former = {}
    if options.output.exists():
        with options.output.open(newline="") as file:
            former = {row["model"]: row for row in csv.DictReader(file)}
    rows = dict(former) if names != everything else {}

    signal.signal(signal.SIGALRM, too_late)
    for number, name in enumerate(names, 1):
        signal.alarm(options.limit_s)
        rows[name] = heads_of(former[name]) if options.heads else inspect(name, options.real_gmacs)
        signal.alarm(0)
        if rows[name].get("logits") == SAME_OPERATIONS and former.get(name, {}).get("logits") == "equal":
            rows[name]["logits"] = "equal"
        outcome = rows[name].get("error") or f"{rows[name]['found_by']}, {rows[name]['logits']}"
        print(f"{number}/{len(names)} {name}: {outcome}", file=sys.stderr)

    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))
    done = [row for row in rows.values() if not row.get("error")]
    print(f"{len(done)} of {len(rows)} inspected")
    for title, column in (
        ("found by", "found_by"),
        ("stages", "num_stages"),
        ("error", "error"),
        ("forward", "forward"),
        ("logits", "logits"),
    ):
        for value, count in Counter(str(row[column]) for row in rows.values() if row.get(column)).most_common():
            print(f"  {title}: {value}: {count}")
    heads = [row for row in done if row.get("head_shares")]
    dear = [row["model"] for row in heads if max(map(float, row["head_shares"].split())) > 100 * EACH]
    together = [row["model"] for row in heads if float(row["heads_together"]) > 100 * TOGETHER]
    tangled = [row["model"] for row in heads if row["exits_ascend"] == "no"]
    for title, models in (
        (f"a head over {EACH:.0%}", dear),
        (f"heads over {TOGETHER:.0%} together", together),
        ("an exit no cheaper than the next", tangled),
    ):
        print(f"  {title}: {len(models)} {' '.join(models)}")


if __name__ == "__main__":
    main()
