"""Times an exit's head on a CPU against variants with other implementations of the same arithmetic.

    python benchmarks/heads.py                                                 three exits of resnet18, small-image stem
    python benchmarks/heads.py --head patch --inference                        without gradients
    python benchmarks/heads.py --model resnet50 --image-size 224 --batch-size 8 --head patch --inference

On a CPU `sdcli.network.heads` uses the channels_last layout, and computes patches as one matrix product where that is
faster (`PatchConv`). The variants: without the layout, always torch's convolution, always the matrix product (which
training uses anyway). All alternate on the same random maps, forward and backward or forward only; the result is the
median of the ratios of adjacent measurements to the head as it is.
"""

import argparse
import json
import statistics
import time

import torch
from torch import nn

from sdcli.devices import keep_freed_memory
from sdcli.network import heads
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


class AlwaysMatrix(OwnLayout):
    """Patches as one matrix product also without gradients."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        usual, heads.LONG_PATCH = heads.LONG_PATCH, 0
        try:
            return super().forward(features)
        finally:
            heads.LONG_PATCH = usual


def seconds(head: nn.Module, features: torch.Tensor, inference: bool) -> float:
    start = time.perf_counter()
    with torch.set_grad_enabled(not inference):
        answer = head(features)
    if not inference:
        answer.sum().backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--head", default="bottleneck")
    parser.add_argument("--inference", action="store_true", help="forward only, in eval mode")
    options = parser.parse_args()
    keep_freed_memory(torch.device("cpu"))
    plan = Blueprint.draft(Network(), options.model, image_size=options.image_size).plan
    print(f"{'exit':8} {'map':>14} {'sdcli, ms':>11} {'in NCHW order':>15} {'convolution':>13} {'matrix':>8}")
    rows = []
    for point, stage in list(stages_by_point(plan).items())[:-1]:
        features = torch.randn(options.batch_size, stage.num_chs, *stage.size, requires_grad=not options.inference)
        # As a stage's map is where networks are in channels_last.
        if options.inference:
            features = features.to(memory_format=torch.channels_last)
        own, outermost, patches, matrix = (
            build_head(options.head, plan, stage, 100).train(not options.inference) for _ in range(4)
        )
        ways = {
            "own": OwnLayout(own),
            "outermost": ChannelsOutermost(outermost),
            "convolution": OwnLayout(with_torch_patches(patches)),
            "matrix": AlwaysMatrix(matrix),
        }
        if options.inference:
            ways = {name: way.to(memory_format=torch.channels_last) for name, way in ways.items()}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds + 2):
            for name, head in ways.items():
                value = seconds(head, features, options.inference)
                if turn >= 2:
                    times[name].append(value)
        ratios = {
            name: round(statistics.median(a / b for a, b in zip(times[name], times["own"], strict=True)), 2)
            for name in list(ways)[1:]
        }
        rows.append({"point": point, "own_ms": round(1000 * statistics.median(times["own"]), 2), **ratios})
        shape = "x".join(map(str, (stage.num_chs, *stage.size)))
        cells = f"{ratios['outermost']:14}x {ratios['convolution']:12}x {ratios['matrix']:7}x"
        print(f"{point:8} {shape:>14} {rows[-1]['own_ms']:11} {cells}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
