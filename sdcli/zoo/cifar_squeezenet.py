"""SqueezeNet (Iandola et al. 2016, arXiv:1602.07360) for images of 32 pixels, with batch norm."""

from __future__ import annotations

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn

from sdcli.zoo.shell import Parts, Stage, register


class Fire(nn.Module):
    """A 1x1 convolution that squeezes, then 1x1 and 3x3 convolutions side by side."""

    def __init__(self, in_chs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = ConvNormAct(in_chs, squeezed)
        self.expand1x1 = ConvNormAct(squeezed, expanded)
        self.expand3x3 = ConvNormAct(squeezed, expanded, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        return torch.cat((self.expand1x1(x), self.expand3x3(x)), 1)


def squeezenet(*, in_chans: int = 3) -> Parts:
    """Version 1.0, its eight fire modules between the paper's three poolings.

    The stem is a 3x3 convolution instead of 7x7 with stride 2. The paper has no batch norm; without, the recipes' rates
    are too high. Its classifier is a 1x1 convolution before the pooling, which is a linear layer behind it, but for a
    ReLU.
    """
    poolings = [nn.MaxPool2d(3, 2, 1) for _ in range(3)]
    first = [nn.Sequential(poolings[0], Fire(96, 16, 64)), Fire(128, 16, 64), Fire(128, 32, 128)]
    second = [nn.Sequential(poolings[1], Fire(256, 32, 128)), Fire(256, 48, 192), Fire(384, 48, 192)]
    second.append(Fire(384, 64, 256))
    third = [nn.Sequential(poolings[2], Fire(512, 64, 256))]
    stages = [Stage(first, 256, 2), Stage(second, 512, 4, middle_chs=384), Stage(third, 512, 8)]
    return Parts(ConvNormAct(in_chans, 96, 3), stages, nn.Dropout(0.5))


register(__name__, {"cifar_squeezenet": squeezenet})
