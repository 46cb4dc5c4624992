"""Times a bottleneck head on a CPU, forward and backward, against variants with torch's standard implementations.

    python benchmarks/heads.py                                       the three exits of resnet18, small-image stem
    python benchmarks/heads.py --model resnet50 --batch-size 32

On a CPU `sdcli.network.heads` uses the channels_last layout, and computes patches as one matrix product (`PatchConv`).
Each variant leaves one of these out. All three alternate on the same random maps; the result is the median of the
ratios of adjacent measurements.
"""

import argparse
import json
import statistics
import time

import torch
from torch import nn

from sdcli.devices import keep_freed_memory
from sdcli.network.blueprint import Blueprint, stages_by_point
from sdcli.network.heads import PatchConv, build_head
from sdcli.recipe.schema import Network


class ChannelsOutermost(nn.Module):
    """The head without the change to channels_last."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.head.classifier(self.head.body(features).mean(dim=(2, 3)))


class OwnLayout(ChannelsOutermost):
    """The head as in sdcli."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(features, features)[1]


def with_torch_patches(head: nn.Module) -> nn.Module:
    """The same head with torch's convolution for the patches."""
    for parent in list(head.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PatchConv):
                plain = nn.Conv2d(child.in_channels, child.out_channels, child.kernel_size, child.stride, bias=False)
                setattr(parent, name, plain)
    return head


def seconds(head: nn.Module, features: torch.Tensor) -> float:
    start = time.perf_counter()
    head(features).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    keep_freed_memory(torch.device("cpu"))
    plan = Blueprint.draft(Network(), options.model, image_size=options.image_size).plan
    print(f"{'exit':8} {'map':>14} {'sdcli, ms':>13} {'in NCHW order':>19} {'torch patches':>14}")
    rows = []
    for point, stage in list(stages_by_point(plan).items())[:-1]:
        features = torch.randn(options.batch_size, stage.num_chs, *stage.size, requires_grad=True)
        own, outermost, patches = (build_head("bottleneck", plan, stage, 100) for _ in range(3))
        ways = {
            "own": OwnLayout(own),
            "outermost": ChannelsOutermost(outermost),
            "patches": OwnLayout(with_torch_patches(patches)),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds + 2):
            for name, head in ways.items():
                value = seconds(head, features)
                if turn >= 2:
                    times[name].append(value)
        ratios = {
            name: round(statistics.median(a / b for a, b in zip(times[name], times["own"], strict=True)), 2)
            for name in ("outermost", "patches")
        }
        rows.append({"point": point, "own_ms": round(1000 * statistics.median(times["own"]), 2), **ratios})
        shape = "x".join(map(str, (stage.num_chs, *stage.size)))
        print(f"{point:8} {shape:>14} {rows[-1]['own_ms']:13} {ratios['outermost']:18}x {ratios['patches']:13}x")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
