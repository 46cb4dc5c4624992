"""Random loss weights: the control for every way of choosing weights."""

from __future__ import annotations

import math
from statistics import NormalDist

from sdcli.data.augment import key


def random_weights(seed: int, epoch: float, count: int) -> list[float]:
    """`count` weights that sum to 1, drawn anew at every update: softmax(N(0, 1)^K), random loss weighting (Lin et al.
    2022, arXiv:2111.10603).

    A function of `seed` and `epoch`, the time of the update: all processes draw the same weights, and so does a run
    that is resumed.
    """
    draws = [NormalDist().inv_cdf((key(seed, epoch, number) + 0.5) / 2**64) for number in range(count)]
    shares = [math.exp(draw) for draw in draws]
    return [share / sum(shares) for share in shares]
