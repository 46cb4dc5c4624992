"""ResNeXt-29 for CIFAR (Xie et al. 2017, arXiv:1611.05431, section 5.3), of timm's bottlenecks."""

from __future__ import annotations

from functools import partial

from timm.layers import ConvNormAct
from timm.models.resnet import Bottleneck, downsample_conv

from sdcli.zoo.shell import Parts, Stage, register


def resnext29(cardinality: int, *, in_chans: int = 3) -> Parts:
    """Three stages of three bottlenecks, each with `cardinality` groups of 64, 128 and 256 channels."""
    block = partial(Bottleneck, cardinality=cardinality, base_width=64)
    stages, before = [], 64
    for number, planes in enumerate((64, 128, 256)):
        after, stride = 4 * planes, 1 if number == 0 else 2
        first = block(before, planes, stride, downsample_conv(before, after, 1, stride))
        blocks = [first, *(block(after, planes) for _ in range(2))]
        stages.append(Stage(blocks, after, 2**number, middle_chs=after if number == 1 else 0))
        before = after
    return Parts(ConvNormAct(in_chans, 64, 3), stages)


register(__name__, {f"cifar_resnext29_{groups}x64d": partial(resnext29, groups) for groups in (8, 16)})
