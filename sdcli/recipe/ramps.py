"""How the weight of a loss changes over a run: plain functions of time.

`epoch` is the time gone by, in epochs as a float (0.0 before the first batch, `epochs` after the last). Other times are
shares of the run below 1 and epochs from 1 on, as in `[schedule]`: a recipe keeps its shape when `--epochs` changes.
"""

from __future__ import annotations

import math


def linear_warmup(epoch: float, epochs: float, length: float) -> float:
    """From 0 to 1 in a straight line over `length`, then 1 (DKD: 20 epochs, arXiv:2203.08679)."""
    return 1.0 if length == 0 else min(epoch / in_epochs(length, epochs), 1.0)


def sigmoid_ramp(epoch: float, epochs: float, length: float) -> float:
    """From exp(-5) to 1 along exp(-5 (1 - t)^2) over `length`, then 1.

    Laine and Aila 2017 (arXiv:1610.02242), used by ONE (Lan et al. 2018, arXiv:1806.04606) with 80 epochs.
    """
    return 1.0 if length == 0 else math.exp(-5.0 * (1.0 - min(epoch / in_epochs(length, epochs), 1.0)) ** 2)


def on_from(epoch: float, epochs: float, start: float) -> float:
    """0 before `start`, then 1 (SAD: once attention means something, arXiv:1908.00821)."""
    return float(epoch >= in_epochs(start, epochs))


def off_from(epoch: float, epochs: float, end: float) -> float:
    """1 before `end`, then 0 (Cho and Hariharan 2019, arXiv:1910.01348: teaching stops before training does)."""
    return float(epoch < in_epochs(end, epochs))


def linear_decay(epoch: float, epochs: float, start: float) -> float:
    """1 before `start`, then down to 0 in a straight line that ends with the run."""
    left = epochs - in_epochs(start, epochs)
    return min(max((epochs - epoch) / left, 0.0), 1.0) if left > 0 else 1.0


def between(epoch: float, epochs: float, first: float, last: float) -> float:
    """From `first` to `last` in a straight line over the whole run (PS-KD, arXiv:2006.12000: 0 to 0.8).

    PS-KD's code holds the value of epoch t of T at last * t / T, counted from 1: ask for the epoch's end.
    """
    return first + (last - first) * min(epoch / epochs, 1.0)


def in_epochs(time: float, epochs: float) -> float:
    """A time of a recipe in epochs: below 1 it is a share of the run."""
    return time * epochs if time < 1 else time
