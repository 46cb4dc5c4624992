"""Promises about early exit: upper bounds on what it loses, valid with a given confidence.

The loss of an image is 1 where leaving early made its answer wrong, -1 where it made it right, else 0; its mean is the
drop in accuracy. For images drawn like the N tested ones. N images
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.int64]


def clopper_pearson(worse: int, better: int, num: int, delta: float) -> float:
    """An upper bound on the mean loss that is too low with probability `delta` at most: exact, whatever the order.

    `worse` and `better` of `num` images lost and won. Two bounds of Clopper and Pearson (1934), each at delta / 2: an
    upper one on the share that lost, minus a lower one on the share that won.
    """
    from scipy.stats import beta

    upper = 1.0 if worse == num else float(beta.ppf(1 - delta / 2, worse + 1, num - worse))
    lower = 0.0 if better == 0 else float(beta.ppf(delta / 2, better, num - better + 1))
    return upper - lower


def bound_of(losses: Losses, delta: float) -> float:
    """`clopper_pearson` of the losses [N]."""
    return clopper_pearson(int((losses > 0).sum()), int((losses < 0).sum()), len(losses), delta)


def betting(losses: Losses, delta: float, limit: float, seed: int = 0) -> bool:
    """Whether the mean loss is at most `limit`: wrong with probability `delta` at most.

    The capital of a bet against a mean of `limit` grows beyond 1 / delta only if the mean is lower: the upper
    confidence bound of Waudby-Smith and Ramdas (2024, arXiv:2010.09686), as a test. Sharper than Clopper-Pearson; the
    order of the images matters, and is drawn once by `seed`.
    """
    drawn = np.random.default_rng(seed).permutation(losses).astype(float)
    count = np.arange(1, len(drawn) + 1)
    mean = (0.5 + drawn.cumsum()) / (count + 1)
    variance = (0.25 + ((drawn - mean) ** 2).cumsum()) / (count + 1)
    before = np.concatenate([[0.25], variance[:-1]])
    stake = np.minimum(np.sqrt(2 * math.log(1 / delta) / (len(drawn) * before)), 0.75 / (1 - limit))
    capital = np.log1p(-stake * (drawn - limit)).cumsum()
    return bool(capital.max(initial=-np.inf) >= math.log(1 / delta))


def fixed_sequence(steps: Iterable[Losses], kept: Callable[[Losses], bool]) -> int:
    """How many steps of a path pass one after the other before the first that does not.

    Learn-then-Test (Angelopoulos et al. 2021, arXiv:2110.01052) with fixed-sequence testing: each step may be tested at
    the full level, as long as the path was made without these images.
    """
    passed = 0
    for losses in steps:
        if not kept(losses):
            break
        passed += 1
    return passed


def least_images(limit: float, delta: float) -> int:
    """How many images the exact bound needs for a `limit` if not one of them changes."""
    return math.ceil(math.log(delta / 2) / math.log1p(-limit))


def images_for(losses: Losses, limit: float, delta: float) -> int | None:
    """About how many images would show that the loss is at most `limit`, if further ones are like these; None if the
    measured loss is not below it. From the normal approximation."""
    from scipy.stats import norm

    spread, drop = float(np.mean(losses != 0)), float(np.mean(losses))
    if drop >= limit:
        return None
    needed = float(norm.ppf(1 - delta)) ** 2 * spread / (limit - drop) ** 2
    return max(math.ceil(needed), least_images(limit, delta))
