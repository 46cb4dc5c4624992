"""DenseNet-BC for CIFAR (Huang et al. 2017, arXiv:1608.06993), of timm's dense blocks."""

from __future__ import annotations

from functools import partial

from timm.layers import BatchNormAct2d
from timm.models.densenet import DenseBlock, DenseTransition
from torch import nn

from sdcli.zoo.shell import Parts, Stage, register


def densenet_bc(depth: int, growth: int, *, in_chans: int = 3) -> Parts:
    """6n + 4 layers: three dense blocks of n bottlenecks, and transitions that halve channels and map.

    A dense block cannot be cut: each of its layers reads all that precede it.
    """
    num_layers, width = (depth - 4) // 6, 2 * growth
    stem = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
    stages = []
    for number in range(3):
        blocks: list[nn.Module] = []
        if number:
            blocks.append(DenseTransition(width, width // 2, BatchNormAct2d))
            width //= 2
        blocks.append(DenseBlock(num_layers, width, 4, growth))
        width += num_layers * growth
        stages.append(Stage(blocks, width, 2**number))
    return Parts(stem, stages, BatchNormAct2d(width))


register(__name__, {"cifar_densenet_bc_100_12": partial(densenet_bc, 100, 12)})
