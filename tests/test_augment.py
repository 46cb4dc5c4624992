from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdcli.data import augment, transforms
from sdcli.data.augment import Augmentation, Mixing
from sdcli.data.transforms import Preprocess
from sdcli.recipe.schema import Augment

CPU = torch.device("cpu")
PLAIN = Preprocess((3, 32, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
SMALLER = Preprocess((3, 16, 24), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))


def noise(count: int, preprocess: Preprocess = PLAIN) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, *preprocess.input_size), dtype=torch.uint8, generator=generator)


def uniform(index: torch.Tensor, draw: int, *, seed: int = 0, epoch: int = 0) -> np.ndarray[Any, Any]:
    bits = augment.random_bits(seed, epoch, index, torch.tensor(draw))
    return (bits.numpy() >> 11 & 2**53 - 1) / 2**53


def chi_square_is_fair(counts: np.ndarray[Any, Any]) -> bool:
    """Within five standard deviations of what equal chances give."""
    expected, freedom = counts.sum() / counts.size, counts.size - 1
    return abs(((counts - expected) ** 2 / expected).sum() - freedom) < 5 * math.sqrt(2 * freedom)


# Draws


def test_random_bits_are_splitmix64(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first numbers of the published generator from state 0.
    monkeypatch.setattr(augment, "key", lambda *_: 0)
    bits = augment.random_bits(0, 0, torch.tensor(0), torch.arange(1, 4))
    assert [int(value) % 2**64 for value in bits] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("draw", [augment.CROP_TOP, augment.HFLIP, augment.MIX_SHARE, augment.NOISE])
def test_draws_are_uniform(draw: int) -> None:
    values = uniform(torch.arange(2**16), draw)
    deviation = 1 / math.sqrt(len(values))
    assert abs(values.mean() - 1 / 2) < 4 * deviation * math.sqrt(1 / 12)
    assert abs(values.var() - 1 / 12) < 4 * deviation * math.sqrt(1 / 180)
    assert chi_square_is_fair(np.bincount((values * 256).astype(int), minlength=256))


def test_every_bit_is_set_half_of_the_time() -> None:
    bits = augment.random_bits(0, 0, torch.arange(2**16), torch.tensor(0)).numpy()
    shares = np.array([(bits >> place & 1).mean() for place in range(64)])
    assert np.abs(shares - 1 / 2).max() < 5 * 0.5 / 2**8


def test_neighbouring_images_draws_epochs_and_seeds_are_not_correlated() -> None:
    index = torch.arange(2**16)
    here = uniform(index, 0)
    others = {
        "the next image": uniform(index + 1, 0),
        "64 images on": uniform(index + 64, 0),
        "the next draw": uniform(index, 1),
        "the next epoch": uniform(index, 0, epoch=1),
        "the next seed": uniform(index, 0, seed=1),
    }
    for name, other in others.items():
        assert abs(np.corrcoef(here, other)[0, 1]) < 4 / 2**8, name
        pairs = np.bincount((here * 16).astype(int) * 16 + (other * 16).astype(int), minlength=256)
        assert chi_square_is_fair(pairs), name


def test_no_two_images_of_an_epoch_share_a_draw() -> None:
    bits = augment.random_bits(7, 3, torch.arange(2000), torch.arange(augment.NOISE)[:, None])
    assert len(bits.unique()) == 2000 * augment.NOISE


def test_other_random_numbers_are_not_disturbed() -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    varied = Augmentation(PLAIN, CPU, crop="pad", hflip=0.5, cutout=8, reprob=0.5)(noise(4), torch.arange(4), 0)
    Mixing(10, CPU, seed=0, mixup=0.2, cutmix=1.0)([varied], torch.arange(4), torch.arange(4), 0)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


# Variations


def test_without_variation_bits_are_those_of_evaluation() -> None:
    images = noise(8, SMALLER)
    seen = Augmentation(SMALLER, CPU)(images, torch.arange(8), 0)
    alone = transforms.eval_transform(SMALLER)
    for image, expected in zip(images, seen, strict=True):
        assert torch.equal(alone(Image.fromarray(image.permute(1, 2, 0).numpy())), expected)


def test_every_window_appears_equally_often_mirrored_and_not() -> None:
    places = torch.arange(32, dtype=torch.uint8)
    image = torch.stack([places[:, None].expand(32, 32), places.expand(32, 32), torch.zeros(32, 32, dtype=torch.uint8)])
    varies = Augmentation(PLAIN, CPU, crop="pad", hflip=0.5)
    counts = np.zeros((9, 9, 2))
    for start in range(0, 162 * 100, 1620):
        seen = (
            (varies(image.expand(1620, -1, -1, -1), torch.arange(start, start + 1620), 0) * 255).round().int().numpy()
        )
        # Around the centre no border is in the way. Mirrored, column 16 shows what column 15 does otherwise.
        top, left = seen[:, 0, 16, 16] - 12, seen[:, 1, 16, 16] - 12
        mirrored = seen[:, 1, 16, 16] > seen[:, 1, 16, 17]
        np.add.at(counts, (top, left + mirrored, mirrored.astype(int)), 1)
    assert counts.sum() == 16200 and chi_square_is_fair(counts.ravel())


def test_batch_moves_each_image_as_padding_cropping_and_mirroring_alone_would() -> None:
    images, index = noise(64, SMALLER), torch.arange(100, 164)
    seen = Augmentation(SMALLER, CPU, seed=5, crop="pad", hflip=0.5, fill=128)(images, index, 2)
    normalised = Augmentation(SMALLER, CPU)
    for image, number, expected in zip(images, index, seen, strict=True):
        bits = augment.random_bits(5, 2, number, torch.arange(3)).numpy() >> 32 & 2**32 - 1
        top, left, mirrored = int(bits[0]) * 5 >> 32, int(bits[1]) * 7 >> 32, bits[2] < 2**31
        window = torch.nn.functional.pad(image, (3, 3, 2, 2), value=128)[:, top : top + 16, left : left + 24]
        window = window.flip(2) if mirrored else window
        assert torch.equal(normalised(window[None], number[None], 0)[0], expected)


def test_no_two_images_of_a_batch_share_draws_by_design() -> None:
    # One picture 512 times: what differs is drawn. Two draws of 162 may fall on the same window, which is chance.
    same = noise(1).expand(512, -1, -1, -1)
    for crop, cutout, least in (("pad", 0, 140), ("pad", 16, 500), ("none", 16, 300)):
        seen = Augmentation(PLAIN, CPU, crop=crop, hflip=0.5, cutout=cutout)(same, torch.arange(512), 0)
        assert len(seen.flatten(1).unique(dim=0)) >= least, (crop, cutout)


@pytest.mark.parametrize("options", [{"crop": "pad", "hflip": 0.5, "cutout": 8}, {"reprob": 1.0}])
def test_image_depends_on_seed_epoch_and_index_alone(options: dict[str, Any]) -> None:
    images, index = noise(12), torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:12]
    varies = Augmentation(PLAIN, CPU, seed=1, **options)
    together = varies(images, index, 4)
    apart = torch.cat([varies(images[i : i + 5], index[i : i + 5], 4) for i in (0, 5, 10)])
    assert torch.equal(together, apart)
    assert torch.equal(together.flip(0), varies(images.flip(0), index.flip(0), 4))
    for other in (varies(images, index, 5), Augmentation(PLAIN, CPU, seed=2, **options)(images, index, 4)):
        assert not torch.equal(together, other)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_mirror_is_as_frequent_as_asked(share: float) -> None:
    images = noise(1).expand(4000, -1, -1, -1)
    seen = Augmentation(PLAIN, CPU, hflip=share)(images, torch.arange(4000), 0)
    mirrored = float(
        (seen == Augmentation(PLAIN, CPU)(images.flip(3), torch.arange(4000), 0)).all(dim=(1, 2, 3)).float().mean()
    )
    assert abs(mirrored - share) <= 5 * math.sqrt(share * (1 - share) / 4000)


@pytest.mark.parametrize("side", [1, 8, 15, 40])
def test_cutout_is_the_one_of_single_images(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images, index = noise(32, SMALLER), torch.arange(32)
    seen = Augmentation(SMALLER, CPU, seed=1, cutout=side)(images, index, 0)
    plain = Augmentation(SMALLER, CPU)(images, index, 0)
    for image, number, expected in zip(plain, index, seen, strict=True):
        draws = augment.random_bits(1, 0, number, torch.tensor([augment.CUTOUT_TOP, augment.CUTOUT_LEFT]))
        centre = iter((draws.numpy() >> 32 & 2**32 - 1).tolist())
        monkeypatch.setattr(random, "randrange", lambda size, centre=centre: next(centre) * size >> 32)
        assert torch.equal(transforms.Cutout(side)(image.clone()), expected)


def test_cutout_has_its_centre_on_every_pixel() -> None:
    grey = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8).expand(6400, -1, -1, -1)
    preprocess = Preprocess((3, 8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    black = Augmentation(preprocess, CPU, cutout=1)(grey, torch.arange(6400), 0)[:, 0] == 0
    assert (black.sum(dim=(1, 2)) == 1).all() and chi_square_is_fair(black.sum(dim=0).numpy().ravel())


def test_erase_replaces_a_rectangle_by_normal_noise() -> None:
    grey = torch.zeros((1, 3, 32, 32), dtype=torch.uint8).expand(2000, -1, -1, -1)
    seen = Augmentation(PLAIN, CPU, reprob=0.25)(grey, torch.arange(2000), 0)
    erased = (seen != 0).any(dim=1)
    happened = erased.any(dim=2).any(dim=1)
    assert abs(float(happened.float().mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 2000)
    heights, widths = erased.any(dim=2).sum(dim=1)[happened], erased.any(dim=1).sum(dim=1)[happened]
    area = erased.sum(dim=(1, 2))[happened]
    assert torch.equal(area, heights * widths)
    # timm's bounds, and what rounding to whole pixels adds to them.
    assert area.min() >= 0.01 * 1024 and area.max() <= 0.37 * 1024
    assert 0.14 < float(area.float().mean()) / 1024 < 0.21
    values = seen[erased[:, None].expand(-1, 3, -1, -1)]
    assert abs(float(values.mean())) < 0.02 and abs(float(values.std()) - 1) < 0.02 and 3.5 < values.abs().max() < 4.5
    left, right = values[:-1] - values.mean(), values[1:] - values.mean()
    assert abs(float((left * right).mean())) < 0.02


def test_erase_has_the_sizes_that_timm_draws() -> None:
    from timm.data.random_erasing import RandomErasing

    random.seed(0)
    torch.manual_seed(0)
    theirs = RandomErasing(1.0, mode="pixel", device="cpu")
    areas = [int((theirs(torch.zeros(3, 32, 32)) != 0).any(dim=0).sum()) for _ in range(2000)]
    grey = torch.zeros((1, 3, 32, 32), dtype=torch.uint8).expand(2000, -1, -1, -1)
    ours = (Augmentation(PLAIN, CPU, reprob=1.0)(grey, torch.arange(2000), 0) != 0).any(dim=1).sum(dim=(1, 2)).numpy()
    deviation = math.sqrt(np.var(areas) / 2000 * 2)
    assert abs(np.mean(areas) - ours.mean()) < 5 * deviation
    # The largest distance of the two distributions (Kolmogorov and Smirnov), far beyond the usual bounds.
    places = np.arange(1025)
    theirs_below = np.searchsorted(np.sort(areas), places) / 2000
    assert np.abs(theirs_below - np.searchsorted(np.sort(ours), places) / 2000).max() < 2.0 * math.sqrt(2 / 2000)


@pytest.mark.parametrize(
    "table, size, can",
    [
        ({}, 32, True),
        ({"crop": "pad", "cutout": 16, "reprob": 0.5, "fill": 128}, 32, True),
        ({"crop": "none"}, 96, True),
        ({"crop": "resized"}, 32, False),
        ({"aa": "cifar10"}, 32, False),
        ({}, 97, False),
    ],
)
def test_policies_resized_crops_and_large_inputs_need_one_image_at_a_time(
    table: dict[str, Any], size: int, can: bool
) -> None:
    preprocess = Preprocess((3, size, size), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert augment.can_batch(Augment(**table), preprocess) == can


# Mixing


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4, 1.0, 2.0, 8.0])
def test_beta_quantiles_have_the_moments_of_the_beta_distribution(alpha: float) -> None:
    values = augment.beta_quantiles(alpha).double()
    assert len(values) == augment.GRAIN and (values.diff() >= 0).all() and values[0] >= 0 and values[-1] <= 1
    centred = values - 0.5
    assert abs(float(values.mean()) - 0.5) < 1e-6
    variance = 1 / (4 * (2 * alpha + 1))
    assert float(centred.square().mean()) == pytest.approx(variance, rel=1e-3)
    # The fourth moment of Beta(alpha, alpha): 3 variance^2 (2 alpha + 1) / (2 alpha + 3).
    fourth = 3 * variance**2 * (2 * alpha + 1) / (2 * alpha + 3)
    assert float((centred**4).mean()) == pytest.approx(fourth, rel=2e-3)


def test_beta_of_one_is_uniform() -> None:
    levels = (torch.arange(augment.GRAIN) + 0.5) / augment.GRAIN
    assert torch.allclose(augment.beta_quantiles(1.0), levels, atol=1e-6)


def test_mixup_mixes_pixels_and_labels_with_the_same_share() -> None:
    images, labels = torch.rand(64, 3, 8, 8), torch.arange(64) % 10
    (mixed,), shares = Mixing(10, CPU, seed=0, mixup=1.0)([images], labels, torch.arange(64), 0)
    assert torch.allclose(shares.sum(dim=1), torch.ones(64))
    assert len(shares.amax(dim=1).unique()) > 50, "each image has its own share"
    for place in range(64):
        partner = 63 - place
        if labels[place] != labels[partner]:
            share = shares[place, labels[place]]
            assert shares[place, labels[partner]] == pytest.approx(float(1 - share), abs=1e-6)
            expected = share * images[place] + (1 - share) * images[partner]
            assert torch.allclose(mixed[place], expected, atol=1e-6)


def test_cutmix_shares_labels_by_the_pixels_that_were_cut() -> None:
    images = torch.arange(64.0)[:, None, None, None].expand(-1, 3, 16, 16) + 1
    labels = torch.arange(64)
    (mixed,), shares = Mixing(64, CPU, seed=0, cutmix=1.0)([images], labels, torch.arange(64), 0)
    assert len(shares.diagonal().unique()) > 30
    for place in range(64):
        own, others = mixed[place, 0] == place + 1, mixed[place, 0] == 64 - place
        assert (own | others).all()
        rows, columns = others.any(dim=1).sum(), others.any(dim=0).sum()
        assert others.sum() == rows * columns, "a box"
        assert shares[place, place] == pytest.approx(float(own.float().mean()), abs=1e-6)
        assert shares[place, 63 - place] == pytest.approx(float(others.float().mean()), abs=1e-6)


def test_cutmix_box_has_the_size_that_timm_cuts() -> None:
    from timm.data.mixup import rand_bbox

    start, stop = augment._span(torch.tensor([16] * 100), torch.sqrt(1 - torch.linspace(0.3, 1, 100)), 32)
    for share, first, last in zip(torch.linspace(0.3, 1, 100), start.tolist(), stop.tolist(), strict=True):
        top, bottom, _, _ = rand_bbox((3, 32, 32), float(share), count=200)
        assert last - first == int((bottom - top).max())


def test_both_take_half_of_the_images_each() -> None:
    images = torch.arange(2000.0)[:, None, None, None].expand(-1, 1, 8, 8)
    (mixed,), _ = Mixing(2, CPU, seed=0, mixup=8.0, cutmix=1.0)(
        [images], torch.zeros(2000).long(), torch.arange(2000), 0
    )
    blended = ((mixed != images) & (mixed != images.flip(0))).flatten(1).any(dim=1)
    assert abs(float(blended.float().mean()) - 0.5) < 5 * math.sqrt(0.25 / 2000)


def test_images_that_are_not_mixed_stay_what_they_were_bit_for_bit() -> None:
    images, labels, index = torch.randn(2000, 1, 4, 4), torch.arange(2000) % 5, torch.arange(2000)
    (mixed,), shares = Mixing(5, CPU, seed=0, mixup=1.0, cutmix=1.0, probability=0.25)([images], labels, index, 0)
    same = (mixed == images).flatten(1).all(dim=1)
    alone = shares.gather(1, labels[:, None])[:, 0] == 1
    assert (same <= alone).all() and 0.68 < float(same.float().mean()) < 0.85


def test_views_of_the_same_images_are_mixed_alike():
    view = torch.rand(6, 3, 8, 8)
    mixing = Mixing(10, CPU, seed=0, mixup=0.5, cutmix=1.0)
    (one, other), _ = mixing([view, view + 1], torch.arange(6), torch.arange(6), 3)
    torch.testing.assert_close(other - one, torch.ones_like(one))
    assert not torch.allclose(one, view)
