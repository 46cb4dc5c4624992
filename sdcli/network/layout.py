"""Interprets tensors as maps of an image: layout, size and reduction.

C channels, H W map, N tokens, P prefix tokens
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    output_fmt: str
    num_chs: int
    size: tuple[int, int]
    num_prefix_tokens: int = 0


def _grid(length: int, image: tuple[int, int]) -> tuple[int, int] | None:
    """H and W of a grid of `length` tokens with the proportions of `image`; None if there is no such grid."""
    height = round(math.sqrt(length * image[0] / image[1]))
    for rows in (height, height - 1, height + 1):
        if rows > 0 and length % rows == 0 and _proportional((rows, length // rows), image):
            return rows, length // rows
    return None


def _proportional(size: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether one reduction of both sides, rounded up or down, takes `image` to `size`."""
    height, width = size
    return height <= image[0] and width <= image[1] and abs(image[1] * height / image[0] - width) < 1


def reduction_of(image: int, rows: int) -> int:
    """How many rows of the image one row of the map covers: 64 rather than 56 if 224 rows became 4 by halving."""
    power: int = 2 ** round(math.log2(image / rows))
    if rows in (image // power, -(-image // power)):
        return power
    # 299 rows became 37 by halving three times without padding: the reduction is 8.
    near = image % rows and abs(math.log2(image / rows / power)) < 0.25
    return power if near else round(image / rows)


def layout_of(shape: Sequence[int], axis: int | None, image: tuple[int, int], prefixes: Iterable[int]) -> Layout | None:
    """The layout of a tensor of this shape as a map of `image`; None if it is not a map.

    `axis` is the channel axis if it is known; `prefixes` are the numbers of prefix tokens to try, in order.
    """
    if shape[0] != 1:
        # Windows or attention heads are folded into the batch axis.
        return None
    if len(shape) == 3 and shape[2] > 1:
        for prefix in prefixes:
            grid = _grid(shape[1] - prefix, image) if prefix < shape[1] else None
            if grid is not None:
                return Layout("NLC", shape[2], grid, prefix)
    if len(shape) != 4:
        return None
    layouts = [
        Layout("NCHW", shape[1], (shape[2], shape[3])),
        Layout("NHWC", shape[3], (shape[1], shape[2])),
    ]
    fitting = [layout for layout in layouts if _proportional(layout.size, image)]
    # If both fit, the channel axis decides; if that is unknown: most models are NCHW.
    return fitting[-1 if axis == 3 else 0] if fitting else None
