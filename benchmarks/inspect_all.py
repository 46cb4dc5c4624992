"""Inspects every timm architecture at its default size and writes one row for each.

    OMP_NUM_THREADS=1 python benchmarks/inspect_all.py                    docs/models.csv, about 20 minutes on one core
    python benchmarks/inspect_all.py --pattern 'resnet*'                  only these rows; the others stay
    python benchmarks/inspect_all.py --pattern 'test_*' --forward         also runs each with exits, on the meta device

No weights and no network are needed.
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

from sdcli.backbones import create, resolve
from sdcli.errors import UserError
from sdcli.stages import StagePlan, find_stages

COLUMNS = (
    *("model", "family", "input_size", "found_by", "num_stages", "clean", "stages", "reductions", "num_chs", "shares"),
    *("params_m", "macs_g", "classifier", "unused", "seconds", "notes", "forward", "error"),
)


def inspect(name: str, forward: bool) -> dict[str, Any]:
    """One row: the plan, or why there is none."""
    row: dict[str, Any] = {"model": name, "family": _registry._model_to_module[name]}
    start = time.perf_counter()
    try:
        architecture = resolve(name, num_classes=None, image_size=None)
        row["input_size"] = "x".join(map(str, architecture.input_size))
        model = create(architecture)
        plan = find_stages(model, architecture.input_size, name=name)
        row |= describe(plan)
        if forward:
            row["forward"] = run_with_exits(model, plan)
    except (UserError, TimeoutError) as error:
        row["error"] = " ".join(str(error).split())
    row["seconds"] = f"{time.perf_counter() - start:.2f}"
    return row


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


def run_with_exits(model: torch.nn.Module, plan: StagePlan) -> str:
    """Whether every exit answers for two images with logits [2, 10]."""
    from sdcli.exits import attach, choose_heads

    network = attach(model, plan, choose_heads(plan), num_classes=10).to("meta").eval()
    with torch.no_grad():
        signals = network(torch.empty(2, *plan.input_size, device="meta"))
    wrong = [p for p, signal in signals.items() if p != "final" and tuple(signal.logits.shape) != (2, 10)]
    wrong += [p for p, signal in signals.items() if signal.features.ndim != 4 or signal.embedding.ndim != 2]
    return f"wrong shapes at {', '.join(wrong)}" if wrong else "ok"


def too_late(signum: int, frame: Any) -> None:
    raise TimeoutError("took longer than the time limit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", nargs="+", default=["*"], help="architectures to inspect")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "models.csv")
    parser.add_argument("--forward", action="store_true", help="attach exits and run each model once")
    parser.add_argument("--limit-s", type=int, default=120, help="seconds for one architecture")
    options = parser.parse_args()

    warnings.simplefilter("ignore")  # timm's remarks about renamed models
    everything = timm.list_models(pretrained=False)
    names = [name for name in everything if any(fnmatch.fnmatch(name, pattern) for pattern in options.pattern)]
    rows = {}
    if options.output.exists() and names != everything:
        with options.output.open(newline="") as file:
            rows = {row["model"]: row for row in csv.DictReader(file)}

    signal.signal(signal.SIGALRM, too_late)
    for number, name in enumerate(names, 1):
        signal.alarm(options.limit_s)
        rows[name] = inspect(name, options.forward)
        signal.alarm(0)
        outcome = rows[name].get("error") or rows[name]["found_by"]
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
    ):
        for value, count in Counter(str(row[column]) for row in rows.values() if row.get(column)).most_common():
            print(f"  {title}: {value}: {count}")


if __name__ == "__main__":
    main()
