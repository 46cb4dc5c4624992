"""What a difference between recipes is worth, from scores of runs that were paired by seed.

S seeds, N images, T tasks. Reviewed in Bouthillier et al. 2021 (arXiv:2103.03098) and Agarwal et al. 2021
(arXiv:2108.13264).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

CONFIDENCE, POWER = 0.95, 0.8
RESAMPLES = 2000
QUANTILES = 20_000
ALL_FLIPS = 15
"""Up to this many seeds all 2^S flips of signs are tried."""


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences."""

    num_seeds: int
    mean: float
    sd: float | None
    """Of the differences; None for one pair."""
    low: float | None
    """Of the t interval of the mean, at 95 %; None for one pair."""
    high: float | None
    p: float | None
    """Two-sided, by flipping signs, so never below `least_p`. None for one pair."""


def paired_difference(differences: Sequence[float]) -> Difference:
    """The mean of differences [S] of runs with the same seeds, its t interval (S - 1 degrees of freedom) and the
    p-value of a sign-flip test."""
    from scipy import stats

    values = np.asarray(differences, dtype=float)
    count, mean = len(values), float(values.mean())
    if count < 2:
        return Difference(count, mean, None, None, None, None)
    sd = float(values.std(ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * sd / sqrt(count)
    return Difference(count, mean, sd, mean - half, mean + half, sign_flip_p(values))


def sign_flip_p(differences: Sequence[float] | NDArray[np.float64]) -> float:
    """The share of sign patterns whose mean is at least as far from 0 as the one seen: exact up to 15 seeds.

    A permutation test for pairs: under the null hypothesis either run of a pair might have had either recipe.
    """
    from scipy.stats import permutation_test

    values = np.asarray(differences, dtype=float)
    exact = len(values) <= ALL_FLIPS
    found = permutation_test(
        (values,),
        lambda flipped, axis: flipped.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf if exact else 10 * RESAMPLES,
        rng=None if exact else np.random.default_rng(0),
    )
    return float(found.pvalue)


def least_p(num_seeds: int) -> float:
    """The smallest p-value that flipping the signs of so many pairs can give."""
    return float(2.0 ** (1 - num_seeds))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for how many there are (Holm 1979): the chance that any of them is wrong stays below them."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def detectable(sd: float, num_seeds: int) -> float:
    """The smallest true difference that a paired t-test of this many seeds finds with 80 % power, at 5 %.

    `sd` is that of the paired differences. Infinite for fewer than two seeds.
    """
    from scipy import stats
    from scipy.optimize import brentq

    if num_seeds < 2:
        return float("inf")
    freedom = num_seeds - 1
    limit = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
    # scipy's noncentral t fails for two seeds: the mean over the sample's standard deviation, at its quantiles.
    quantiles = (np.arange(QUANTILES) + 0.5) / QUANTILES
    limits = limit * np.sqrt(stats.chi2.ppf(quantiles, freedom) / freedom)

    def lacking(shift: float) -> float:
        return float(np.mean(stats.norm.sf(limits - shift) + stats.norm.cdf(-limits - shift))) - POWER

    return sd * float(brentq(lacking, 0.0, 100.0)) / sqrt(num_seeds)


@dataclass(frozen=True)
class McNemar:
    """Two networks on the same images."""

    only_first: int
    """Images that only the first classifies right."""
    only_second: int
    p: float
    """Two-sided and exact: whether these two networks differ, which says nothing about their recipes."""


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> McNemar:
    """McNemar's exact test of which images [N] two networks classify right."""
    from scipy.stats import binomtest

    one, other = int((first & ~second).sum()), int((second & ~first).sum())
    return McNemar(one, other, float(binomtest(one, one + other).pvalue) if one + other else 1.0)


@dataclass(frozen=True)
class Overall:
    """A recipe over several tasks."""

    iqm: float
    """The mean of the middle half of all its scores."""
    low: float
    """Of a 95 % interval, by resampling runs within each task."""
    high: float
    improves: float
    """The probability that a run of it beats a run of the baseline, averaged over the tasks; a tie counts half."""


def over_tasks(scores: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]]) -> Overall:
    """The interquartile mean of scores by task, with a stratified bootstrap (Agarwal et al. 2021, arXiv:2108.13264).

    Both arguments have the same tasks, with the scores of the runs of each; from three tasks on this means something.
    """
    from scipy.stats import mannwhitneyu

    runs = [np.asarray(values, dtype=float) for values in scores.values()]
    generator = np.random.default_rng(0)
    means = [iqm([generator.choice(values, len(values)) for values in runs]) for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    wins = [
        mannwhitneyu(scores[task], baseline[task]).statistic / (len(scores[task]) * len(baseline[task]))
        for task in scores
    ]
    return Overall(iqm(runs), float(low), float(high), float(np.mean(wins)))


def iqm(runs: Sequence[NDArray[np.float64]]) -> float:
    """The interquartile mean of all values of all tasks."""
    from scipy.stats import trim_mean

    return float(trim_mean(np.concatenate(runs), 0.25))
