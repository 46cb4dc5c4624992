"""Thresholds of early exit: what they cost and answer, and the best ones for every budget.

E exits, N images; costs are shares of the plain network's MACs
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SWEEPS = 3
"""How often the thresholds of all exits are found one after the other: each depends on the others'."""
PRICES = (0.0, *np.geomspace(1e-3, 10.0, 39).tolist())
"""What a whole network's MACs are worth, in right answers."""
BUDGETS = np.linspace(0.025, 1.0, 40)


@dataclass(frozen=True)
class Exits:
    """A network's exits on N images, as thresholds see them."""

    scores: Floats
    """How sure each exit is [E, N], at least 0; -inf where an image may not leave."""
    right: Floats
    """1 where the answer of an exit, and last of the whole network, counts as right, else 0 [E + 1, N]."""
    costs: Floats
    """Of an image that leaves at each exit, or goes through the whole network [E + 1]."""

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """The images of each exit, the surest first [E, N]."""
        return np.argsort(-self.scores, axis=1, kind="stable")

    @cached_property
    def limits(self) -> Floats:
        """The threshold at which the first i + 1 images of `order` leave [E, N]; NaN where the next is as sure.

        It lies halfway to the next image's score, so that the last bits of a score do not matter; where all leave, 0.
        """
        ordered = np.take_along_axis(self.scores, self.order, axis=1)
        following = np.concatenate([ordered[:, 1:], np.full((len(ordered), 1), -np.inf)], axis=1)
        middle = np.where(np.isfinite(following), (ordered + np.maximum(following, 0.0)) / 2, 0.0)
        return np.where((ordered > following) & np.isfinite(ordered), middle, np.nan)

    def leaving(self, limits: Floats) -> NDArray[np.int64]:
        """The exit at which each image leaves [N], E for none."""
        sure = self.scores >= limits[:, None]
        return np.where(sure.any(axis=0), sure.argmax(axis=0), len(limits))


@dataclass(frozen=True)
class Setting:
    """Thresholds of E exits, inf where nobody leaves, and what they gave."""

    limits: tuple[float, ...]
    top1: float
    """Between 0 and 1."""
    cost: float
    worse: int = 0
    """Images whose answer leaving early made wrong."""
    better: int = 0
    """Images whose answer leaving early made right."""


def measure(exits: Exits, limits: Floats) -> Setting:
    """What thresholds [E] give on the images."""
    where = exits.leaving(limits)
    right = np.take_along_axis(exits.right, where[None], axis=0)[0]
    change = right - exits.right[-1]
    return Setting(
        tuple(limits.tolist()),
        float(right.mean()),
        float(exits.costs[where].mean()),
        int((change < 0).sum()),
        int((change > 0).sum()),
    )


def lagrangian(exits: Exits, price: float) -> Floats:
    """Thresholds [E] that maximise right answers minus `price` times the cost, exit by exit from the deepest.

    For each exit the images that reach it are sorted by their score, and it takes as many of the surest as gain by
    leaving, given the other exits' thresholds. A local optimum: no exit can improve by itself.
    """
    num_exits = len(exits.scores)
    limits = np.full(num_exits, np.inf)
    worth = exits.right - price * exits.costs[:, None]
    for _ in range(SWEEPS):
        before = limits.copy()
        later = worth[-1].copy()
        for k in reversed(range(num_exits)):
            reached = ~(exits.scores[:k] >= limits[:k, None]).any(axis=0)
            gain = np.where(reached & np.isfinite(exits.scores[k]), worth[k] - later, 0.0)[exits.order[k]].cumsum()
            gain[np.isnan(exits.limits[k])] = -np.inf
            best = int(gain.argmax())
            limits[k] = exits.limits[k, best] if gain[best] > 1e-9 else np.inf
            later = np.where(exits.scores[k] >= limits[k], worth[k], later)
        if np.array_equal(before, limits):
            break
    return limits


def geometric(exits: Exits, ratio: float) -> Floats:
    """Thresholds [E] at which the shares of images that leave form a geometric series, the surest first (Huang et al.
    2018, arXiv:1703.09844): `ratio` from one exit to the next, the whole network included. Labels play no part."""
    num_exits, num_images = exits.scores.shape
    shares = ratio ** np.arange(num_exits + 1)
    takes = np.floor(num_images * shares / shares.sum()).astype(int)
    left = np.ones(num_images, dtype=bool)
    limits = np.full(num_exits, np.inf)
    for k in range(num_exits):
        order = exits.order[k]
        possible = left[order] & np.isfinite(exits.scores[k][order])
        taken = np.flatnonzero((possible.cumsum() >= takes[k]) & ~np.isnan(exits.limits[k]))
        if takes[k] > 0 and len(taken):
            limits[k] = exits.limits[k, taken[0]]
            left &= exits.scores[k] < limits[k]
    return limits


def candidates(exits: Exits) -> Iterator[Setting]:
    """Settings over the whole range of costs, by both rules."""
    for price in PRICES:
        yield measure(exits, lagrangian(exits, price))
    for ratio in np.linspace(0.05, 1.95, 39):
        yield measure(exits, geometric(exits, float(ratio)))


def frontier(settings: Sequence[Setting]) -> list[Setting]:
    """Those that no other beats at the same or a lower cost, cheapest first."""
    best: list[Setting] = []
    for setting in sorted(settings, key=lambda setting: (setting.cost, -setting.top1)):
        if not best or setting.top1 > best[-1].top1:
            best.append(setting)
    return best


def area(settings: Sequence[Setting]) -> float:
    """The mean accuracy within budgets from 0.025 to 1, 0 where a budget cannot be met: between 0 and 1."""
    costs, top1 = np.array([s.cost for s in settings]), np.array([s.top1 for s in settings])
    return float(np.mean([top1[costs <= budget].max(initial=0.0) for budget in BUDGETS]))
