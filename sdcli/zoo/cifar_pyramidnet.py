"""PyramidNets (Han et al. 2017, arXiv:1610.02915), additive: every block is a little wider than the one before."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn.functional import pad

from sdcli.zoo.shell import Parts, Stage, register


class PyramidBlock(nn.Module):
    """Norm, convolutions with a norm behind each, and a shortcut that is padded with zeros; no ReLU before the first
    convolution. `expansion` 1 has two 3x3 convolutions, 4 a bottleneck."""

    def __init__(self, in_chs: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        out_chs = width * expansion
        shapes = [(in_chs, width, 3), (width, out_chs, 3)]
        if expansion > 1:
            shapes = [(in_chs, width, 1), (width, width, 3), (width, out_chs, 1)]
        strided = 0 if expansion == 1 else 1
        self.body = nn.Sequential(nn.BatchNorm2d(in_chs))
        for number, (before, after, size) in enumerate(shapes):
            step = stride if number == strided else 1
            self.body.append(nn.Conv2d(before, after, size, step, size // 2, bias=False))
            self.body.append(nn.BatchNorm2d(after))
            if number < len(shapes) - 1:
                self.body.append(nn.ReLU(inplace=True))
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.num_new = out_chs - in_chs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = pad(self.pool(x), (0, 0, 0, 0, 0, self.num_new))
        joined: Tensor = self.body(x) + shortcut
        return joined


def pyramidnet(num_blocks: int, alpha: int, expansion: int, *, in_chans: int = 3) -> Parts:
    """Three stages of `num_blocks` blocks, whose width grows from 16 to 16 + `alpha` in equal steps."""
    stages, before, width = [], 16, 16.0
    for number in range(3):
        blocks, widths = [], []
        for position in range(num_blocks):
            width += alpha / (3 * num_blocks)
            stride = 2 if number > 0 and position == 0 else 1
            blocks.append(PyramidBlock(before, round(width), stride, expansion))
            before = round(width) * expansion
            widths.append(before)
        middle = widths[(num_blocks - 1) // 2] if number == 1 else 0
        stages.append(Stage(blocks, before, 2**number, middle_chs=middle))
    stem = nn.Sequential(nn.Conv2d(in_chans, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
    return Parts(stem, stages, nn.Sequential(nn.BatchNorm2d(before), nn.ReLU(inplace=True)))


register(
    __name__,
    {
        # 9n + 2 and 6n + 2 layers.
        "cifar_pyramidnet101_240": partial(pyramidnet, 11, 240, 4),
        "cifar_pyramidnet110_270": partial(pyramidnet, 18, 270, 1),
    },
)
