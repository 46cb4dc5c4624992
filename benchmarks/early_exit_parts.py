"""What early exit on a ResNet-18 saves at best at the sizes its batches shrink to, and what pooling and copies add.

    python benchmarks/early_exit_parts.py                 resnet18 at 224 px, 30, 30 and 20 % leave at the exits
    python benchmarks/early_exit_parts.py --quick         whether it runs

Each stage runs alone: on the whole batch, and on the images that would be left. `at best` is the time that this saves
divided by the share of MACs that early exit saves: what `early_exit.py` calls saved, without heads, decisions and
copies. `pooling` and `copies` are the time for the means of the maps at the exits, and for taking out those who go on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from sdcli.devices import keep_freed_memory
from sdcli.network.cuts import find_stages

SHARES = (0.3, 0.3, 0.2)


def shortest(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each way, taken in turns."""
    least = dict.fromkeys(ways, float("inf"))
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                least[name] = min(least[name], 1000 * (time.perf_counter() - start))
    return least


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.batch_size, options.threads, options.image_size, options.rounds = [4], [1], 64, 1
    keep_freed_memory(torch.device("cpu"))
    network = timm.create_model("resnet18", num_classes=100).eval().to(memory_format=torch.channels_last)
    size = (3, options.image_size, options.image_size)
    plan = find_stages(network, size)
    stem = [network.conv1, network.bn1, network.act1, network.maxpool, network.layer1]
    parts = [nn.Sequential(*stem), network.layer2, network.layer3]
    parts.append(nn.Sequential(network.layer4, network.global_pool, network.fc))
    macs = sum(share * stage.macs for share, stage in zip((*SHARES, 1 - sum(SHARES)), plan.stages, strict=True))
    saved = 1 - macs / plan.macs
    print(f"{'batch':>5} {'threads':>7} {'plain ms':>9} {'at best':>8} {'pooling ms':>11} {'copies ms':>10}")
    for batch in options.batch_size:
        left = [round(batch * share) for share in (1, 1 - SHARES[0], 1 - SHARES[0] - SHARES[1], 1 - sum(SHARES))]
        shapes = [size, *((stage.num_chs, *stage.size) for stage in plan.stages[:-1])]
        whole, some = ([_maps(count, shape) for count, shape in zip(counts, shapes, strict=True)]
                       for counts in ([batch] * 4, left))  # fmt: skip
        # What each exit reads, and who of them go on.
        read = [_maps(count, shape) for count, shape in zip(left[:-1], shapes[1:], strict=True)]
        going = [torch.randperm(len(maps))[:count].sort().values for maps, count in zip(read, left[1:], strict=True)]
        for threads in options.threads:
            torch.set_num_threads(threads)
            ways: dict[str, Callable[[], object]] = {}
            for number, part in enumerate(parts):
                ways[f"plain{number}"] = lambda part=part, maps=whole[number]: part(maps)
                ways[f"early{number}"] = lambda part=part, maps=some[number]: part(maps)
            for number, maps in enumerate(read):
                ways[f"pooling{number}"] = lambda maps=maps: maps.mean(dim=(2, 3))
                ways[f"copies{number}"] = lambda maps=maps, rows=going[number]: maps[rows]
            took = shortest(ways, options.rounds)
            sums = {kind: sum(own for name, own in took.items() if name.startswith(kind))
                    for kind in ("plain", "early", "pooling", "copies")}  # fmt: skip
            best = (1 - sums["early"] / sums["plain"]) / saved
            numbers = f"{sums['plain']:>9.1f} {best:>8.2f} {sums['pooling']:>11.1f} {sums['copies']:>10.1f}"
            print(f"{batch:>5} {threads:>7} {numbers}", flush=True)


def _maps(count: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(count, *shape).to(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
