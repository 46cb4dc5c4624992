"""Transforms from images to tensors, one by one, for evaluation and training.

C channels, H W an image's height and width in pixels
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from PIL import Image
from torch import Tensor

from sdcli.errors import UserError, did_you_mean, unknown

Size: TypeAlias = tuple[int, int]
"""Height and width."""
Colour: TypeAlias = tuple[float, float, float]
"""One value per channel; 1 is the brightest."""
Transform: TypeAlias = Callable[[Image.Image], Tensor]

SMALL = 96
"""Images of at most this many pixels a side are shown whole: cropping would lose too much of them."""

POLICIES = {
    "cifar10": "AutoAugment's policy for CIFAR-10 (Cubuk et al. 2019, arXiv:1805.09501), torchvision's",
    "trivial": "TrivialAugment Wide (Müller and Hutter 2021, arXiv:2103.10158), torchvision's",
}
TIMM_POLICIES = {
    "rand": "RandAugment (Cubuk et al. 2019, arXiv:1909.13719), timm's; with options: rand-m9-mstd0.5-inc1",
    "augmix": "AugMix (Hendrycks et al. 2019, arXiv:1912.02781), timm's; with options: augmix-m3-w3",
    "original": "AutoAugment's policy for ImageNet (Cubuk et al. 2018, arXiv:1805.09501), timm's",
    "originalr": "`original`, posterizing as the authors' research code does, timm's",
    "v0": "AutoAugment's policy for ImageNet as TensorFlow's TPU code has it, timm's",
    "v0r": "`v0`, posterizing as the authors' research code does, timm's",
    "3a": "ThreeAugment: grayscale, solarize or blur (DeiT III, Touvron et al. 2022, arXiv:2204.07118), timm's",
}


@dataclass(frozen=True)
class Preprocess:
    """How images are prepared for a model, in the terms of timm's data config. Stored in checkpoints."""

    input_size: tuple[int, int, int]
    """Channels, height, width."""
    mean: Colour
    std: Colour
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    """Share of a large image's shorter side that evaluation sees."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_dict`, also after a round trip through JSON."""
        return cls(
            input_size=tuple(values["input_size"]),
            mean=tuple(values["mean"]),
            std=tuple(values["std"]),
            interpolation=values["interpolation"],
            crop_pct=values["crop_pct"],
        )

    @property
    def size(self) -> Size:
        """Height and width."""
        return self.input_size[1], self.input_size[2]


@dataclass(frozen=True)
class _BySize:
    """One transform for small images (`SMALL`), another for large ones."""

    small: Transform
    large: Transform

    def __call__(self, image: Image.Image) -> Any:
        return (self.small if max(image.size) <= SMALL else self.large)(image)


class Cutout:
    """Paints a grey square, centred anywhere in the image (DeVries and Taylor 2017, arXiv:1708.04552).

    It is clipped at the border, so it mostly covers less than `side` pixels a side. Applied after normalisation, where
    0 is the data's mean.
    """

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Tensor) -> Tensor:
        _, height, width = image.shape
        top = random.randrange(height) - self.side // 2
        left = random.randrange(width) - self.side // 2
        image[:, max(top, 0) : max(top + self.side, 0), max(left, 0) : max(left + self.side, 0)] = 0
        return image


def eval_transform(preprocess: Preprocess) -> Transform:
    """Image to normalised tensor [C, H, W], the same each time.

    Large images as in timm: the shorter side resized to size / `crop_pct`, then a centre crop. Small ones (`SMALL`)
    whole, resized to the input size.
    """
    from timm.data import create_transform
    from torchvision import transforms

    large = create_transform(
        preprocess.input_size,
        is_training=False,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=preprocess.crop_pct,
    )
    return _BySize(transforms.Compose([squash(preprocess), *_to_tensor(preprocess)]), large)


def train_transform(
    preprocess: Preprocess,
    *,
    crop: Literal["auto", "pad", "resized", "none"] = "auto",
    hflip: float = 0.5,
    aa: str = "none",
    cutout: int = 0,
    reprob: float = 0.0,
    fill: int = 0,
) -> Transform:
    """Image to normalised tensor [C, H, W], different each time: crop, flip, policy, cutout, erasing.

    crop     "pad": padding of an eighth of the size, then a crop of the size; "resized": a part of 8 to 100 % of the
             area, resized (timm's default); "auto": "pad" for small images (`SMALL`), else "resized"; "none": small
             images as in evaluation, the centre of large ones
    hflip    probability of a horizontal flip, 0 to 1
    aa       "none", one of `POLICIES`, or timm's `--aa`: "rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original", "v0", "3a"
    cutout   side of the square in pixels of the input; 0: none
    reprob   probability that a rectangle becomes noise (Zhong et al. 2017, arXiv:1708.04896; timm's `reprob`), 0 to 1
    fill     grey value of padding, 0 to 255; also for timm's policies, whose own default is the data's mean

    Raises UserError for an unknown crop or policy.
    """
    from timm.data.random_erasing import RandomErasing
    from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio
    from torchvision import transforms

    height, width = preprocess.size
    whole = squash(preprocess)
    shorter = ResizeKeepRatio((height, width), longest=0.0, interpolation=preprocess.interpolation)
    window = transforms.RandomCrop((height, width), padding=(width // 8, height // 8), fill=fill)
    pad = transforms.Compose([whole, window]), transforms.Compose([shorter, window])
    resized = RandomResizedCropAndInterpolation((height, width), interpolation=preprocess.interpolation)
    crops: dict[str, Transform] = {
        "auto": _BySize(pad[0], resized),
        "pad": _BySize(*pad),
        "resized": resized,
        "none": _BySize(whole, transforms.Compose([shorter, transforms.CenterCrop((height, width))])),
    }
    if crop not in crops:
        raise unknown("crop", crop, crops)
    steps: list[Any] = [crops[crop]]
    if hflip:
        steps.append(transforms.RandomHorizontalFlip(hflip))
    steps += [*_policy(aa, preprocess, fill), *_to_tensor(preprocess)]
    if cutout:
        steps.append(Cutout(cutout))
    if reprob:
        steps.append(RandomErasing(reprob, mode="pixel", device="cpu"))
    transform: Transform = transforms.Compose(steps)
    return transform


def check_policy(policy: str) -> None:
    """Raises UserError for an unknown augmentation policy, before any data are opened."""
    _policy(policy, Preprocess((3, 32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), fill=0)


def _policy(policy: str, preprocess: Preprocess, fill: int) -> list[Any]:
    from timm.data import create_transform
    from torchvision import transforms

    if policy == "none":
        return []
    if policy == "cifar10":
        return [transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=[fill] * 3)]
    if policy == "trivial":
        return [transforms.TrivialAugmentWide(fill=[fill] * 3)]
    kind, *options = policy.split("-")
    # timm ignores an option without a number and an unknown set of operations: a misspelt one would have no effect.
    wrong = [option for option in options if not re.fullmatch(r"[a-z]+\d[\d.]*|t(weights|3aw?)", option)]
    if kind in TIMM_POLICIES and not wrong:
        try:
            # The middle one of timm's three parts; it takes its fill from the mean.
            _, augment, _ = create_transform(
                preprocess.input_size,
                is_training=True,
                auto_augment=policy,
                color_jitter=None,
                interpolation=preprocess.interpolation,
                mean=(fill / 255,) * 3,
                separate=True,
            )
            _mend_posterize(augment.transforms[0])
            return [augment]
        except (AssertionError, ValueError):
            pass  # an unknown option or not a number: the error below lists the policies
    raise UserError(
        f"unknown augmentation policy '{policy}'",
        f"none, {', '.join(POLICIES)}, or timm's {', '.join(TIMM_POLICIES)} with their options (rand-m9-mstd0.5-inc1)",
        did_you_mean(policy, ["none", *POLICIES, *TIMM_POLICIES]) or "see --aa in timm's documentation",
    )


def _mend_posterize(augment: Any) -> None:
    """Lets timm's policies posterize to 0 bits, as "rand-m9-mstd0.5-inc1" does for one image in a thousand.

    The image becomes black; Pillow 13 raises an error instead.
    """
    from timm.data import auto_augment

    nested = augment.policy if isinstance(augment, auto_augment.AutoAugment) else [augment.ops]
    for operation in (operation for operations in nested for operation in operations):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Any:
    from timm.data import auto_augment

    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **options)


def squash(preprocess: Preprocess) -> Any:
    """Resizes small images to the input size, whole; image to image."""
    from timm.data.transforms import str_to_interp_mode
    from torchvision import transforms

    return transforms.Resize(preprocess.size, interpolation=str_to_interp_mode(preprocess.interpolation))


def _to_tensor(preprocess: Preprocess) -> list[Any]:
    from torchvision import transforms

    return [transforms.ToTensor(), transforms.Normalize(preprocess.mean, preprocess.std)]
