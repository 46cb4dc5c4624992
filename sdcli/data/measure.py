"""The size of a data set's images, and their mean and standard deviation per channel.

C channels, H W an image's height and width in pixels
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdcli.data.dataset import ImageData
from sdcli.data.images import all_of
from sdcli.data.transforms import SMALL, Colour, Size
from sdcli.errors import UserError


def measure(data: ImageData) -> tuple[Size | None, Colour, Colour]:
    """Image size (None where images differ), mean and standard deviation per channel of the training images.

    The published values for CIFAR; for others measured on up to 2,000 evenly spaced images, fewer if they are large:
    about 50 million pixels, which takes a second or two. Raises one UserError for all of them that cannot be read.
    """
    if data.measured:
        return data.measured
    split = data.splits.get("train") or next(iter(data.splits.values()))
    errors: dict[int, UserError] = {}

    def read(i: int) -> Image.Image | None:
        try:
            return split.image(i)
        except UserError as error:
            errors[i] = error
            return None

    first = next(filter(None, map(read, range(min(len(split), 100)))), None)
    if first is None:
        raise all_of(list(errors.values()))
    count = min(len(split), 2000, max(100, 50_000_000 // (first.width * first.height)))
    sizes = set()
    pixels, total, squares = 0, np.zeros(3), np.zeros(3)
    for i in np.linspace(0, len(split) - 1, count).round().astype(int).tolist():
        if (image := read(i)) is None:
            continue
        sizes.add((image.height, image.width))
        values = np.asarray(image, dtype=np.float32).reshape(-1, 3) / 255
        pixels += len(values)
        total += values.sum(axis=0, dtype=np.float64)
        squares += np.square(values).sum(axis=0, dtype=np.float64)
    if errors:
        raise all_of(list(errors.values()))
    mean = total / pixels
    # Images of a single colour have no spread to divide by.
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 1e-6))
    size = sizes.pop() if len(sizes) == 1 else None
    return size, _colour(mean), _colour(std)


def _colour(values: NDArray[np.float64]) -> Colour:
    red, green, blue = (round(float(value), 4) for value in values)
    return red, green, blue


def natural_size(size: Size | None) -> int | None:
    """The input size for images of this size, unless pretrained weights require another; None: the model's own.

    Small images keep their size: enlarging them costs much and adds nothing.
    """
    return None if size is None or max(size) > SMALL else max(size)
