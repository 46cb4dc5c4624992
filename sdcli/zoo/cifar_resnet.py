"""ResNets for CIFAR (He et al. 2016, arXiv:1512.03385, section 4.2), and the four times wider ones of the distillation
literature (Tian et al. 2020, arXiv:1910.10699)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

from timm.models.resnet import BasicBlock, downsample_conv
from torch import Tensor, nn
from torch.nn.functional import pad

from sdcli.zoo.shell import Parts, Stage, register

Shortcut = Literal["pad", "project"]


class PadShortcut(nn.Module):
    """The paper's option A: every second pixel, and zeros for the new channels, half before and half behind. Where
    there are fewer channels than before, those at both ends are left out."""

    def __init__(self, num_new: int, stride: int) -> None:
        super().__init__()
        self.num_new, self.stride = num_new, stride

    def forward(self, x: Tensor) -> Tensor:
        before = self.num_new // 2
        return pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.num_new - before))


def resnet(depth: int, *, widths: Sequence[int], shortcut: Shortcut = "pad", in_chans: int = 3) -> Parts:
    """6n + 2 layers: a convolution, three stages of n blocks, and the classifier; the four `widths` begin with the
    stem's.

    `shortcut` is what joins stages: "pad" adds no parameters (option A), "project" is a 1x1 convolution with norm
    (option B), which most of the distillation literature has.
    """
    num_blocks, rest = divmod(depth - 2, 6)
    assert not rest, "6n + 2 layers"
    if len(widths) != 4:
        raise ValueError(f"widths are those of the stem and of three stages, not {list(widths)}")
    if shortcut not in ("pad", "project"):
        raise ValueError(f'shortcut is "pad" or "project", not {shortcut!r}')
    stem = nn.Sequential()
    stem.add_module("conv1", nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False))
    stem.add_module("bn1", nn.BatchNorm2d(widths[0]))
    stem.add_module("act1", nn.ReLU(inplace=True))
    stages = []
    for number, (before, after) in enumerate(pairwise(widths)):
        stride = 1 if number == 0 else 2
        if stride == 1 and before == after:
            join = None
        elif shortcut == "pad":
            join = PadShortcut(after - before, stride)
        else:
            join = downsample_conv(before, after, 1, stride)
        blocks = [BasicBlock(before, after, stride, join), *(BasicBlock(after, after) for _ in range(num_blocks - 1))]
        stages.append(Stage(blocks, after, 2**number, middle_chs=after if number == 1 else 0))
    return Parts(stem, stages)


WIDTHS, HALF, FOURFOLD = (16, 16, 32, 64), (8, 8, 16, 32), (32, 64, 128, 256)

register(
    __name__,
    {
        **{f"cifar_resnet{depth}": partial(resnet, depth, widths=WIDTHS) for depth in (8, 14, 20, 32, 44, 56, 110)},
        "cifar_resnet20_half": partial(resnet, 20, widths=HALF),
        **{f"cifar_resnet{depth}x4": partial(resnet, depth, widths=FOURFOLD, shortcut="project") for depth in (8, 32)},
    },
)
