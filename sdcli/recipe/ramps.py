"""How the weight of a loss changes over a run: plain functions of time.

`epoch` is the elapsed time in epochs as a float (0.0 before the first batch, `epochs` after the last). Other times are
fractions of the run below 1 and epochs from 1 on, as in `[schedule]`: a recipe keeps its shape when `--epochs` changes.
"""

from __future__ import annotations

import math


def linear_warmup(epoch: float, epochs: float, length: float) -> float:
    """Rises linearly from 0 to 1 over `length`, then stays at 1 (DKD: 20 epochs, arXiv:2203.08679)."""
    return 1.0 if length == 0 else min(epoch / in_epochs(length, epochs), 1.0)


def sigmoid_ramp(epoch: float, epochs: float, length: float) -> float:
    """Rises from exp(-5) to 1 along exp(-5 (1 - t)^2) over `length`, then stays at 1.

    Laine and Aila 2017 (arXiv:1610.02242), used by ONE (Lan et al. 2018, arXiv:1806.04606) with 80 epochs.
    """
    return 1.0 if length == 0 else math.exp(-5.0 * (1.0 - min(epoch / in_epochs(length, epochs), 1.0)) ** 2)


def on_from(epoch: float, epochs: float, start: float) -> float:
    """0 before `start`, then 1 (SAD: once the attention maps are meaningful, arXiv:1908.00821)."""
    return float(epoch >= in_epochs(start, epochs))


def off_from(epoch: float, epochs: float, end: float) -> float:
    """1 before `end`, then 0 (Cho and Hariharan 2019, arXiv:1910.01348: teaching stops before training does)."""
    return float(epoch < in_epochs(end, epochs))


def linear_decay(epoch: float, epochs: float, start: float) -> float:
    """1 before `start`, then falls linearly to 0 at the end of the run."""
    left = epochs - in_epochs(start, epochs)
    return min(max((epochs - epoch) / left, 0.0), 1.0) if left > 0 else 1.0


def between(epoch: float, epochs: float, first: float, last: float) -> float:
    """Moves linearly from `first` to `last` over the whole run (PS-KD, arXiv:2006.12000: 0 to 0.8).

    In epoch t of T, counted from 1, PS-KD's code uses last * t / T throughout: the value at the end of that epoch.
    """
    return first + (last - first) * min(epoch / epochs, 1.0)


def in_epochs(time: float, epochs: float) -> float:
    """A time from a recipe, in epochs: a value below 1 is a fraction of the run."""
    return time * epochs if time < 1 else time
