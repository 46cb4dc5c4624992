"""Training images varied a batch at a time, on whichever device they are; each image has draws of its own.

A draw is a hash of (seed, epoch, image, purpose): no generator has a state, so nothing is disturbed, nothing has to be
remembered to resume, neither the batch nor the number of processes changes what an image looks like, and all devices
draw the same bits. Nothing here waits for the device.

B batch, C channels, H W an image's height and width in pixels, K classes
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from sdcli.data.transforms import SMALL, Preprocess
from sdcli.recipe.schema import Augment

# What an image's draws are for; the noise of `reprob` takes all from NOISE on.
CROP_TOP, CROP_LEFT, HFLIP, CUTOUT_TOP, CUTOUT_LEFT = range(5)
MIX, MIX_SWITCH, MIX_SHARE, MIX_TOP, MIX_LEFT = range(8, 13)
ERASE, ERASE_TOP, ERASE_LEFT = range(16, 19)
ERASE_AREA, ERASE_ASPECT = 32, 48
NOISE = 64

ATTEMPTS = 10
"""How often `reprob` tries to find a rectangle that fits, as timm does."""
GRAIN = 2**16
"""How many different values a looked-up distribution has."""


def can_batch(augment: Augment, preprocess: Preprocess) -> bool:
    """Whether small images (`SMALL`) can be varied here: "resized" crops and policies need one image at a time."""
    return augment.aa == "none" and augment.crop != "resized" and max(preprocess.size) <= SMALL


def key(*parts: float | str) -> int:
    """64 bits that look random and are the same for the same numbers and names, everywhere and for good."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def random_bits(seed: int, epoch: int, index: Tensor, draws: Tensor) -> Tensor:
    """64 random bits as int64 for draws of images, both by their number; the two are broadcast against each other.

    Seed and epoch start a SplitMix64 (Steele, Lea and Flood 2014), whose `index`-th number starts the image's own.
    """
    golden = _signed(0x9E3779B97F4A7C15)
    start = _scrambled(index * golden + _signed(key(seed, epoch)))
    return _scrambled(start + draws * golden)


def _scrambled(state: Tensor) -> Tensor:
    """SplitMix64's output for its state, the same on every device: integers wrap around."""
    bits = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shifted(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shifted(bits, 31)


def _first_bits(seed: int, epoch: int, index: Tensor, count: int) -> Tensor:
    """The first `count` draws of each image [`count`, B]: all at once takes little longer than one."""
    return random_bits(seed, epoch, index, torch.arange(count, device=index.device)[:, None])


def _signed(number: int) -> int:
    """The same 64 bits as torch reads them."""
    return (number + 2**63) % 2**64 - 2**63


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, filled with zeros: torch's own shift keeps the sign."""
    shifted: Tensor = (bits >> by) & (2 ** (64 - by) - 1)
    return shifted


def _below(bits: Tensor, limit: int | Tensor) -> Tensor:
    """Whole numbers from 0 to `limit` - 1, each as often as the next, but for one in 2**32 / `limit`."""
    return (_shifted(bits, 32) * limit) >> 32


def _happens(bits: Tensor, probability: float) -> Tensor:
    """True with this probability, always at 1 and never at 0."""
    return _shifted(bits, 40) < round(probability * 2**24)


def _looked_up(bits: Tensor, values: Tensor, part: int = 3) -> Tensor:
    """One of `GRAIN` equally likely values, by one of the four 16-bit parts of `bits`."""
    return values[(bits >> 16 * part) & (GRAIN - 1)]


def _quantile_levels() -> Tensor:
    return (torch.arange(GRAIN, dtype=torch.float64) + 0.5) / GRAIN


def beta_quantiles(alpha: float) -> Tensor:
    """`GRAIN` equally likely values of Beta(alpha, alpha), rising. Tabled, so that all devices draw the same ones."""
    # With s = t**(1/alpha) the integral of (s (1 - s))**(alpha - 1) over s loses its pole at 0; the half above 1/2 is
    # the mirror image of the half below.
    t = torch.linspace(0, 0.5**alpha, 2**18 + 1, dtype=torch.float64)
    s = t ** (1 / alpha)
    density = (1 - s) ** (alpha - 1)
    area = torch.cumulative_trapezoid(density, t)
    area = torch.cat([area.new_zeros(1), area])
    area = area / area[-1] / 2
    levels = _quantile_levels()[: GRAIN // 2]
    right = torch.searchsorted(area, levels)
    part = (levels - area[right - 1]) / (area[right] - area[right - 1])
    lower = torch.lerp(t[right - 1], t[right], part) ** (1 / alpha)
    return torch.cat([lower, 1 - lower.flip(0)]).float()


def _box(top: Tensor, bottom: Tensor, left: Tensor, right: Tensor, height: int, width: int) -> Tensor:
    """1 in each image's box, as far as it is in the image, 0 outside [B, 1, H, W].

    Not booleans: on a CPU these take several times as long.
    """
    rows = torch.arange(height, device=top.device)
    columns = torch.arange(width, device=top.device)
    in_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    in_columns = (columns >= left[:, None]) & (columns < right[:, None])
    return in_rows.float()[:, None, :, None] * in_columns.float()[:, None, None, :]


class Augmentation:
    """Images as bytes to normalised ones, varied as `transforms.train_transform` does, by the same keys.

    Given nothing but `preprocess` and `device` it only normalises, which is what evaluation sees. The variations are
    the same in kind, not in their draws: those of `train_transform` come from other generators.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        device: torch.device,
        *,
        seed: int = 0,
        crop: str = "none",
        hflip: float = 0.0,
        aa: str = "none",
        cutout: int = 0,
        reprob: float = 0.0,
        fill: int = 0,
    ) -> None:
        assert aa == "none" and crop != "resized", "ask can_batch first"
        self.preprocess, self.seed = preprocess, seed
        self.pads, self.hflip, self.cutout, self.reprob, self.fill = crop != "none", hflip, cutout, reprob, fill
        # Made once: every copy of a constant to the device would wait for it.
        self.brightest = torch.tensor(255.0, device=device)
        self.mean = torch.tensor(preprocess.mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(preprocess.std, device=device).view(-1, 1, 1)
        if reprob:
            levels = _quantile_levels()
            lowest = math.log(0.3)
            self.aspect_roots = torch.exp((lowest - 2 * lowest * levels) / 2).float().to(device)
            self.normal = torch.special.ndtri(levels).float().to(device)

    @property
    def varies(self) -> bool:
        """Whether an image looks different from epoch to epoch."""
        return bool(self.pads or self.hflip or self.cutout or self.reprob)

    def __call__(self, images: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Images of the input size as bytes [B, C, H, W] and their numbers [B], on the device; float32 [B, C, H, W].

        An image's number is its place in the split that the data set came with. Without variation the bits are those
        of `transforms.eval_transform`.
        """
        if not self.varies:
            return self._normalised(images)
        bits = _first_bits(self.seed, epoch, index, NOISE if self.reprob else MIX)
        varied = self._normalised(self._moved(images, bits))
        if self.cutout:
            varied = self._cut_out(varied, bits)
        if self.reprob:
            varied = self._erased(varied, bits, index, epoch)
        return varied

    def _normalised(self, images: Tensor) -> Tensor:
        # By 255 as a tensor: a GPU multiplies by the reciprocal of a number, which is not the same bits.
        return images.float().div_(self.brightest).sub_(self.mean).div_(self.std)

    def _moved(self, images: Tensor, bits: Tensor) -> Tensor:
        """Each image's own window of the padded image, mirrored or not, in one gather."""
        _, chs, height, width = images.shape
        device = images.device
        rows = torch.arange(height, device=device)
        columns = torch.arange(width, device=device)
        columns = torch.where(_happens(bits[HFLIP], self.hflip)[:, None], columns.flip(0), columns)
        stride = width
        if self.pads:
            pad_x, pad_y = width // 8, height // 8
            images = torch.nn.functional.pad(images, (pad_x, pad_x, pad_y, pad_y), value=self.fill)
            rows = rows + _below(bits[CROP_TOP], 2 * pad_y + 1)[:, None]
            columns = columns + _below(bits[CROP_LEFT], 2 * pad_x + 1)[:, None]
            stride = width + 2 * pad_x
        places = (rows * stride)[..., :, None] + columns[:, None, :]
        # Four times as fast on a CPU as indexing by image, channel, row and column.
        moved = images.flatten(2).gather(2, places.flatten(1)[:, None].expand(-1, chs, -1))
        return moved.view(-1, chs, height, width)

    def _cut_out(self, images: Tensor, bits: Tensor) -> Tensor:
        """`transforms.Cutout`: a square with its centre anywhere, cut off at the border, painted with the mean."""
        _, _, height, width = images.shape
        top = _below(bits[CUTOUT_TOP], height) - self.cutout // 2
        left = _below(bits[CUTOUT_LEFT], width) - self.cutout // 2
        box = _box(top, top + self.cutout, left, left + self.cutout, height, width)
        return images.mul_(1 - box)

    def _erased(self, images: Tensor, bits: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Some images with a rectangle of noise: Zhong et al. 2017, arXiv:1708.04896, timm's mode "pixel"."""
        count, chs, height, width = images.shape
        share = _shifted(bits[ERASE_AREA : ERASE_AREA + ATTEMPTS], 40).float() / 2**24
        side = torch.sqrt((0.02 + (1 / 3 - 0.02) * share) * (height * width))
        root = _looked_up(bits[ERASE_ASPECT : ERASE_ASPECT + ATTEMPTS], self.aspect_roots)
        heights, widths = torch.round(side * root).long(), torch.round(side / root).long()
        fits = (heights < height) & (widths < width)
        chosen = fits.byte().argmax(0, keepdim=True)
        high, wide = heights.gather(0, chosen)[0], widths.gather(0, chosen)[0]
        # Not torch.where with a number, which is copied to the device and waited for.
        high = high.masked_fill(~(_happens(bits[ERASE], self.reprob) & fits.any(0)), 0)
        top = _below(bits[ERASE_TOP], height - high + 1)
        left = _below(bits[ERASE_LEFT], width - wide + 1)
        box = _box(top, top + high, left, left + wide, height, width)
        # Of every image, erased or not: to choose would wait for the device. Four values from each draw.
        draws = torch.arange(NOISE, NOISE + math.ceil(chs * height * width / 4), device=index.device)
        noise_bits = random_bits(self.seed, epoch, index[:, None], draws)
        noise = torch.cat([_looked_up(noise_bits, self.normal, part) for part in range(4)], dim=1)
        noise = noise[:, : chs * height * width].view(count, chs, height, width)
        return images * (1 - box) + noise * box


class Mixing:
    """Images mixed with others of their batch, and labels with theirs: mixup (Zhang et al. 2017, arXiv:1710.09412) and
    cutmix (Yun et al. 2019, arXiv:1905.04899), as timm does with `--mixup-mode elem`.

    `mixup` and `cutmix` are the alpha of the Beta(alpha, alpha) that says how much of an image stays; 0: not used.
    Where both are used, each takes half of the images. `probability` is how often an image is mixed at all.

    Each image has its own share and box, but its partner is the one at the same place from the batch's other end: so
    here, and only here, what an image looks like depends on its batch.
    """

    def __init__(
        self,
        num_classes: int,
        device: torch.device,
        *,
        seed: int,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        probability: float = 1.0,
    ) -> None:
        assert mixup or cutmix
        self.num_classes, self.seed, self.probability = num_classes, seed, probability
        self.switch = 1.0 if not mixup else 0.5 if cutmix else 0.0
        self.mixup_shares = beta_quantiles(mixup or cutmix).to(device)
        self.cutmix_shares = beta_quantiles(cutmix or mixup).to(device)

    def __call__(
        self, images: Sequence[Tensor], labels: Tensor, index: Tensor, epoch: int
    ) -> tuple[list[Tensor], Tensor]:
        """Images [B, C, H, W] in several variations, labels [B] and numbers [B] to images mixed alike and every class's
        share of each [B, K]."""
        _, _, height, width = images[0].shape
        bits = _first_bits(self.seed, epoch, index, ERASE)
        cuts = _happens(bits[MIX_SWITCH], self.switch)
        share = torch.where(
            cuts, _looked_up(bits[MIX_SHARE], self.cutmix_shares), _looked_up(bits[MIX_SHARE], self.mixup_shares)
        )
        share = share.masked_fill(~_happens(bits[MIX], self.probability), 1.0)
        top, bottom = _span(_below(bits[MIX_TOP], height), torch.sqrt(1 - share), height)
        left, right = _span(_below(bits[MIX_LEFT], width), torch.sqrt(1 - share), width)
        box = _box(top, bottom, left, right, height, width)
        # A box that the border cuts off takes less than its share.
        share = torch.where(cuts, 1 - (bottom - top) * (right - left) / (height * width), share)
        stays = torch.where(cuts[:, None, None, None], 1 - box, share[:, None, None, None])
        mixed = [each * stays + each.flip(0) * (1 - stays) for each in images]
        classes = torch.arange(self.num_classes, device=labels.device)
        own, partners = labels[:, None] == classes, labels.flip(0)[:, None] == classes
        shares = own * share[:, None] + partners * (1 - share[:, None])
        return mixed, shares


def _span(centre: Tensor, part: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Start and stop [B] of `part` of `size`, around `centre` [B], cut off at the border."""
    length = (size * part).long()
    return (centre - length // 2).clamp(0, size), (centre + (length + 1) // 2).clamp(0, size)
