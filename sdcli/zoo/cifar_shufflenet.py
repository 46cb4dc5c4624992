"""ShuffleNets for images of 32 pixels: version 1 (Zhang et al. 2018, arXiv:1707.01083) and 2 (Ma et al. 2018,
arXiv:1807.11164)."""

from __future__ import annotations

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn

from sdcli.zoo.shell import Parts, Stage, register


class UnitV1(nn.Module):
    """Grouped 1x1 convolutions around a depthwise one, with the channels shuffled in between.

    A unit that shrinks the map has the pooled input beside its own channels instead of adding it.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int, groups: int) -> None:
        super().__init__()
        middle, own = out_chs // 4, out_chs - in_chs if stride > 1 else out_chs
        # The paper groups no convolution whose input is as narrow as the stem's.
        self.reduce = ConvNormAct(in_chs, middle, groups=1 if in_chs == 24 else groups)
        self.shuffle = nn.ChannelShuffle(groups)
        self.depthwise = ConvNormAct(middle, middle, 3, stride, groups=middle, apply_act=False)
        self.expand = ConvNormAct(middle, own, groups=groups, apply_act=False)
        self.pool = nn.AvgPool2d(3, stride, 1) if stride > 1 else None
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.depthwise(self.shuffle(self.reduce(x))))
        joined: Tensor = self.act(x + y if self.pool is None else torch.cat((self.pool(x), y), 1))
        return joined


class UnitV2(nn.Module):
    """Half of the channels go through convolutions, the others past them, and all are shuffled.

    A unit that shrinks the map sends all channels through both branches.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        half = out_chs // 2
        self.past = None
        if stride > 1:
            depthwise = ConvNormAct(in_chs, in_chs, 3, stride, groups=in_chs, apply_act=False)
            self.past = nn.Sequential(depthwise, ConvNormAct(in_chs, half))
        self.through = nn.Sequential(
            ConvNormAct(in_chs if stride > 1 else half, half),
            ConvNormAct(half, half, 3, stride, groups=half, apply_act=False),
            ConvNormAct(half, half),
        )
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.past is None:
            past, through = x.chunk(2, 1)
        else:
            past, through = self.past(x), x
        joined: Tensor = self.shuffle(torch.cat((past, self.through(through)), 1))
        return joined


REPEATS = (4, 8, 4)


def shufflenet_v1(*, in_chans: int = 3) -> Parts:
    """Three groups, width 1. The stem has stride 1 and no pooling behind it: maps of 16, 8 and 4."""
    stages, before = [], 24
    for number, (after, repeats) in enumerate(zip((240, 480, 960), REPEATS, strict=True)):
        blocks = [UnitV1(before, after, 2, 3), *(UnitV1(after, after, 1, 3) for _ in range(repeats - 1))]
        stages.append(Stage(blocks, after, 2 ** (number + 1), middle_chs=after if number == 1 else 0))
        before = after
    return Parts(ConvNormAct(in_chans, 24, 3), stages)


def shufflenet_v2(*, in_chans: int = 3) -> Parts:
    """Width 1. The stem has stride 1 and no pooling behind it: maps of 16, 8 and 4."""
    stages, before = [], 24
    for number, (after, repeats) in enumerate(zip((116, 232, 464), REPEATS, strict=True)):
        blocks = [UnitV2(before, after, 2), *(UnitV2(after, after, 1) for _ in range(repeats - 1))]
        stages.append(Stage(blocks, after, 2 ** (number + 1), middle_chs=after if number == 1 else 0))
        before = after
    return Parts(ConvNormAct(in_chans, 24, 3), stages, ConvNormAct(before, 1024), 1024)


register(__name__, {"cifar_shufflenetv1": shufflenet_v1, "cifar_shufflenetv2": shufflenet_v2})
