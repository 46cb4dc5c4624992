"""What scoring all exits costs beside a plain evaluation of the backbone: time against MACs.

    python benchmarks/evaluate.py                                   resnet18 and vit_tiny_patch16_224 at 224 px
    python benchmarks/evaluate.py --models convnext_atto --quick    whether it runs

Per model two ways take turns on the same batches in memory, and each round begins with the other one. `plain` is the
timm model without taps and heads, scored as timm's validate.py scores it (cross-entropy, top-1, top-5). `all exits` is
what `sdcli eval --exits all` does with its batches: every exit and the ensemble, with all metrics. Weights are random.
`time` is the median over the rounds of one divided by the other; `cpu` is the same of processor time, which other
programs on the machine disturb less; `time / MACs` divides it by what the heads add in MACs.

Wanted: time / MACs of at most 1.10.

Measured on a Xeon whose two cores other programs used as well (load 4), one thread, 3 batches of 32, 7 rounds: resnet18
1.01 (cpu 1.03), vit_tiny_patch16_224 1.00 (cpu 1.00). With two threads, which wait for each other there (load 6), 2
batches and 11 rounds: 1.03 (cpu 1.06) and 1.09 (cpu 1.07); while tests ran beside it, 1.22 (cpu 1.13) for vit_tiny.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from sdcli.data.batch import Batch
from sdcli.devices import accelerator_for, keep_freed_memory
from sdcli.evaluation.bench import current_load, device_name
from sdcli.evaluation.evaluate import evaluate
from sdcli.evaluation.latency import now
from sdcli.evaluation.metrics import topk_correct
from sdcli.network.blueprint import Blueprint
from sdcli.network.multi_exit import MultiExit, build
from sdcli.recipe.address import FINAL
from sdcli.recipe.schema import Network

TOO_SLOW = 1.10
CLASSES = [str(number) for number in range(100)]


@torch.inference_mode()
def score_plain(backbone: torch.nn.Module, batches: list[Batch]) -> tuple[float, float, float]:
    """Mean loss, top-1 and top-5 of the backbone, as numbers."""
    loss = first = five = torch.zeros(())
    for batch in batches:
        logits = backbone(batch.images)
        loss = loss + F.cross_entropy(logits, batch.labels, reduction="sum").cpu()
        first = first + topk_correct(logits, batch.labels, 1).sum().cpu()
        five = five + topk_correct(logits, batch.labels, 5).sum().cpu()
    total = sum(len(batch.labels) for batch in batches)
    return float(loss) / total, float(first) / total, float(five) / total


def score_all(network: MultiExit, batches: list[Batch], device: torch.device) -> None:
    """What `sdcli eval` computes of its batches."""
    blueprint = network.blueprint
    evaluate(
        network, batches, points=network.classifiers, costs=blueprint.costs(), device=device,
        model=blueprint.architecture.model, dataset="random", split="test",
    )  # fmt: skip


def turns(ways: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[list[float]]]:
    """Seconds and seconds of the processor of every way in every round."""
    spent: dict[str, list[list[float]]] = {name: [] for name in ways}
    for call in ways.values():
        call()
    names = list(ways)
    for number in range(rounds):
        for name in names[number % 2 :] + names[: number % 2]:
            start, cpu = now(device), time.process_time()
            ways[name]()
            spent[name].append([now(device) - start, time.process_time() - cpu])
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet18", "vit_tiny_patch16_224"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device")
    parser.add_argument("--quick", action="store_true", help="one round of small batches")
    args = parser.parse_args()
    if args.quick:
        args.batch_size, args.batches, args.rounds = 4, 1, 1
    device = accelerator_for(args.device).device
    keep_freed_memory(device)
    load = current_load()
    print(f"on {device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads, load {load}")
    print(f"{'model':24} {'exits':>5} {'time':>6} {'cpu':>6} {'MACs':>6} {'time / MACs':>12} {'cpu / MACs':>11}")
    for model in args.models:
        torch.manual_seed(0)
        network = build(Blueprint.draft(Network(), model, CLASSES)).to(device).eval()
        plain = build(Blueprint.draft(Network(exits="none"), model, CLASSES)).eject().to(device).eval()
        plain.load_state_dict(network.backbone.state_dict())
        size, number = network.plan.input_size, args.batch_size
        batches = [
            Batch(torch.randn(number, *size, device=device), torch.randint(100, (number,), device=device),
                  torch.arange(number, device=device))
            for _ in range(args.batches)
        ]  # fmt: skip
        ways = {
            "plain": lambda plain=plain, batches=batches: score_plain(plain, batches),
            "all": lambda network=network, batches=batches: score_all(network, batches, device),
        }
        spent = turns(ways, args.rounds, device)
        ratios = [
            statistics.median(
                every[kind] / alone[kind] for every, alone in zip(spent["all"], spent["plain"], strict=True)
            )
            for kind in (0, 1)
        ]
        heads = sum(cost.macs for point, cost in network.blueprint.head_costs().items() if point != FINAL)
        macs = 1 + heads / network.blueprint.costs()[FINAL].macs
        verdict = "ok" if ratios[0] / macs <= TOO_SLOW else f"above {TOO_SLOW}"
        print(
            f"{model:24} {len(network.classifiers):5} {ratios[0]:6.3f} {ratios[1]:6.3f} {macs:6.3f} "
            f"{ratios[0] / macs:12.3f} {ratios[1] / macs:11.3f}  {verdict}"
        )


if __name__ == "__main__":
    main()
