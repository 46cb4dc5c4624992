"""GoogLeNet (Szegedy et al. 2015, arXiv:1409.4842, table 1) for images of 32 pixels, with batch norm."""

from __future__ import annotations

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn

from sdcli.zoo.shell import Parts, Stage, register


class Inception(nn.Module):
    """Four branches side by side: 1x1, 3x3 and 5x5 convolutions, and pooling; `widths` as in the paper's table: 1x1,
    3x3 reduced, 3x3, 5x5 reduced, 5x5, behind the pooling."""

    def __init__(self, in_chs: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        one, before3, three, before5, five, pooled = widths
        self.branch1 = ConvNormAct(in_chs, one)
        self.branch3 = nn.Sequential(ConvNormAct(in_chs, before3), ConvNormAct(before3, three, 3))
        self.branch5 = nn.Sequential(ConvNormAct(in_chs, before5), ConvNormAct(before5, five, 5))
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), ConvNormAct(in_chs, pooled))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(x)), 1)


TABLE = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


def googlenet(*, in_chans: int = 3) -> Parts:
    """The nine inception modules of the paper; a 3x3 convolution is the stem, and there are no auxiliary classifiers,
    whose place exits take."""
    stages, before = [], 192
    for number, modules in enumerate(TABLE):
        blocks: list[nn.Module] = []
        widths = []
        for row in modules:
            blocks.append(Inception(before, row))
            before = row[0] + row[2] + row[4] + row[5]
            widths.append(before)
        if number:
            blocks[0] = nn.Sequential(nn.MaxPool2d(3, 2, 1), blocks[0])
        middle = widths[(len(modules) - 1) // 2] if number == 1 else 0
        stages.append(Stage(blocks, before, 2**number, middle_chs=middle))
    return Parts(ConvNormAct(in_chans, 192, 3), stages)


register(__name__, {"cifar_googlenet": googlenet})
