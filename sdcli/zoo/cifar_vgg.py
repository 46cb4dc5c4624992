"""VGG networks with batch norm (Simonyan and Zisserman 2015, arXiv:1409.1556) as the distillation literature has them
for CIFAR: one linear layer, and no pooling before the last group (Tian et al. 2020, arXiv:1910.10699)."""

from __future__ import annotations

from functools import partial

from timm.layers import ConvNormAct
from torch import nn

from sdcli.zoo.shell import Parts, Stage, register

CONVS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def vgg(depth: int, *, in_chans: int = 3) -> Parts:
    """Five groups of 3x3 convolutions, with max pooling before the second, third and fourth."""
    stages, before = [], in_chans
    for number, (convs, after) in enumerate(zip(CONVS[depth], (64, 128, 256, 512, 512), strict=True)):
        blocks: list[nn.Module] = []
        for _ in range(convs):
            blocks.append(ConvNormAct(before, after, 3, bias=True))
            before = after
        if 0 < number < 4:
            blocks[0] = nn.Sequential(nn.MaxPool2d(2), blocks[0])
        stages.append(Stage(blocks, after, 2 ** min(number, 3)))
    return Parts(nn.Identity(), stages)


register(__name__, {f"cifar_vgg{depth}_bn": partial(vgg, depth) for depth in CONVS})
