"""Promises about early exit: upper bounds on what it loses, valid with a given confidence.

The loss of an image is 1 where leaving early made its answer wrong, -1 where it made it right, else 0; its mean is the
drop in accuracy. For images drawn like the N tested ones. N images
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.int64]

MOST_IMAGES = 10**9
"""More are no number that anyone has."""


def clopper_pearson(worse: float, better: float, num: int, delta: float) -> float:
    """An upper bound on the mean loss that is too low with probability `delta` at most: exact, whatever the order.

    `worse` and `better` of `num` images lost and won. Two bounds of Clopper and Pearson (1934), each at delta / 2: an
    upper one on the share that lost, minus a lower one on the share that won.
    """
    # The quantiles of beta distributions, without what scipy.stats checks at every call.
    from scipy.special import betaincinv

    upper = 1.0 if worse == num else float(betaincinv(worse + 1, num - worse, 1 - delta / 2))
    lower = 0.0 if better == 0 else float(betaincinv(better, num - better + 1, delta / 2))
    return upper - lower


def bound_of(losses: Losses, delta: float) -> float:
    """`clopper_pearson` of the losses [N]."""
    return clopper_pearson(int((losses > 0).sum()), int((losses < 0).sum()), len(losses), delta)


def betting(losses: Losses, delta: float, limit: float, seed: int = 0) -> bool:
    """Whether the mean loss is at most `limit`: wrong with probability `delta` at most.

    The capital of a bet against a mean of `limit` grows beyond 1 / delta only if the mean is lower: the upper
    confidence bound of Waudby-Smith and Ramdas (2024, arXiv:2010.09686), as a test. Sharper than Clopper-Pearson; the
    order of the images matters, and is drawn once by `seed`. A limit of 1 or more always holds.
    """
    if limit >= 1:
        return True
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


def images_for(losses: Losses, limit: float, delta: float) -> int | None:
    """About how many images bring `bound_of` to at most `limit`, if further ones are like these: no more than there are
    where it is there already, and None where the measured loss is not below the limit, so that no number will do."""
    if float(np.mean(losses)) >= limit:
        return None
    worse, better = float(np.mean(losses > 0)), float(np.mean(losses < 0))

    def holds(num: int) -> bool:
        # The quantiles are defined between whole images too.
        return clopper_pearson(worse * num, better * num, num, delta) <= limit

    enough = 1
    while not holds(enough):
        enough *= 2
        if enough > MOST_IMAGES:
            return None
    return bisect_left(range(enough + 1), True, lo=enough // 2, key=holds)
