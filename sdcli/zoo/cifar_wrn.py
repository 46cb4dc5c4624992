"""Wide ResNets (Zagoruyko and Komodakis 2016, arXiv:1605.07146), of timm's blocks of pre-activations."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.resnetv2 import DownsampleConv, PreActBasic
from torch import nn

from sdcli.zoo.shell import Parts, Stage, register


def wide_resnet(num_blocks: int, factor: int, *, in_chans: int = 3) -> Parts:
    """Three stages of `num_blocks` blocks, `factor` times as wide as those of a ResNet for CIFAR."""
    block = partial(PreActBasic, conv_layer=create_conv2d, norm_layer=BatchNormAct2d, proj_layer=DownsampleConv)
    widths = (16, 16 * factor, 32 * factor, 64 * factor)
    stages = []
    for number, (before, after) in enumerate(pairwise(widths)):
        first = block(before, after, stride=1 if number == 0 else 2)
        blocks = [first, *(block(after, after) for _ in range(num_blocks - 1))]
        stages.append(Stage(blocks, after, 2**number, middle_chs=after if number == 1 else 0))
    return Parts(nn.Conv2d(in_chans, 16, 3, padding=1, bias=False), stages, BatchNormAct2d(widths[-1]))


# By their papers' names. Zagoruyko's depth is 6n + 4; BYOT's 20 and 44 are 6n + 2, which counts no shortcuts.
BLOCKS = {(16, 2): 2, (40, 1): 6, (40, 2): 6, (28, 10): 4, (28, 12): 4, (20, 8): 3, (44, 8): 7}

register(
    __name__,
    {f"cifar_wrn_{depth}_{factor}": partial(wide_resnet, n, factor) for (depth, factor), n in BLOCKS.items()},
)
