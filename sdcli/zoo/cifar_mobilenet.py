"""MobileNets for images of 32 pixels: version 1 (Howard et al. 2017, arXiv:1704.04861) and 2 (Sandler et al. 2018,
arXiv:1801.04381), of timm's blocks."""

from __future__ import annotations

from functools import partial

from timm.layers import ConvNormAct
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from torch import nn

from sdcli.zoo.shell import Parts, Stage, register


def mobilenet_v1(*, in_chans: int = 3) -> Parts:
    """The stem and the first depthwise convolution of stride 2 have stride 1 here: maps of 32, 16, 8 and 4."""
    block = partial(DepthwiseSeparableConv, noskip=True, pw_act=True)
    stages, before = [], 32
    for number, widths in enumerate(((64, 128, 128), (256, 256), (512,) * 6, (1024, 1024))):
        blocks = []
        for position, after in enumerate(widths):
            blocks.append(block(before, after, stride=2 if number > 0 and position == 0 else 1))
            before = after
        stages.append(Stage(blocks, before, 2**number))
    return Parts(ConvNormAct(in_chans, 32, 3), stages)


# Expansion, channels, blocks, stride in the paper's table 2.
TABLE = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def mobilenet_v2(width: float, stem_stride: int, *, in_chans: int = 3) -> Parts:
    """`stem_stride` 1 leaves maps of 32, 16, 8 and 4. With 2 they are half as large, as in the distillation literature,
    whose network has half the width. The first stride of the blocks is 1 in both."""
    block = partial(InvertedResidual, act_layer=nn.ReLU6)
    before = int(32 * width)
    stem = ConvNormAct(in_chans, before, 3, stem_stride, act_layer=nn.ReLU6)
    stages: list[Stage] = []
    blocks: list[nn.Module] = []
    reduction = stem_stride
    for number, (expansion, channels, repeats, stride) in enumerate(TABLE):
        after = int(channels * width)
        if number > 1 and stride > 1:
            stages.append(Stage(blocks, before, reduction))
            blocks, reduction = [], 2 * reduction
        for position in range(repeats):
            step = stride if number > 1 and position == 0 else 1
            if expansion == 1:
                blocks.append(DepthwiseSeparableConv(before, after, act_layer=nn.ReLU6, noskip=True))
            else:
                blocks.append(block(before, after, stride=step, exp_ratio=expansion))
            before = after
    stages.append(Stage(blocks, before, reduction))
    return Parts(stem, stages, ConvNormAct(before, 1280, act_layer=nn.ReLU6), 1280)


register(
    __name__,
    {
        "cifar_mobilenetv1": mobilenet_v1,
        "cifar_mobilenetv2": partial(mobilenet_v2, 1.0, 1),
        "cifar_mobilenetv2_050": partial(mobilenet_v2, 0.5, 2),
    },
)
