"""What `sdcli calibrate` finds out about a network's exits, as a checkpoint stores it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sdcli.network.policies import Policy


@dataclass(frozen=True)
class OperatingPoint:
    """One setting of the thresholds, and what it gave on held-out images that played no part in finding it."""

    thresholds: dict[str, float | None]
    """The exits in use, shallowest first; see `Policy.thresholds`."""
    cost: float
    """Mean MACs per image, heads included, as a share of the plain network's."""
    top1: float
    """In percent; without labels, the share of answers that are the plain network's."""


@dataclass(frozen=True)
class Promise:
    """An upper bound that holds with a given confidence for images like those it was tested on."""

    loss: Literal["drop", "change"]
    """"drop": how many points of top-1 accuracy are lost against the plain network; "change": the share of images, in
    percent, whose answer differs from the plain network's, which needs no labels."""
    limit: float
    """What was asked for, in points."""
    measured: float
    """The loss on the images of the certificate, in points."""
    confidence: float
    """Between 0 and 1."""
    test: Literal["clopper-pearson", "betting"]
    num_images: int
    """Images of the certificate, none of which was used to find the thresholds."""


@dataclass(frozen=True)
class Calibration:
    """How images leave this network early, and what that is worth."""

    policy: Policy
    curve: tuple[OperatingPoint, ...]
    """What else the same policy can do, cheapest first."""
    num_images: int
    """Held-out images: half of them chose, the other half measured."""
    data: str
    """The data set and split, as tables show them."""
    date: str
    """ISO 8601, of the day."""
    promise: Promise | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the checkpoint reads them back."""
        return asdict(self)

    def at_budget(self, budget: float) -> Policy | None:
        """The policy whose mean cost is the largest within `budget`, a share of the plain network's MACs; None where
        even the cheapest costs more."""
        fitting = [point for point in self.curve if point.cost <= budget]
        return self.policy.at(fitting[-1].thresholds) if fitting else None


def problems(calibration: Calibration) -> Iterator[str]:
    """What is not plausible about a calibration of the right types."""
    numbers = [number for point in calibration.curve for number in (point.cost, point.top1)]
    for policy in (calibration.policy, *(calibration.policy.at(point.thresholds) for point in calibration.curve)):
        numbers += [limit for limit in policy.thresholds.values() if limit is not None]
    if calibration.promise is not None:
        numbers += [calibration.promise.limit, calibration.promise.measured, calibration.promise.confidence]
    if not all(map(math.isfinite, numbers)):
        yield "early_exit has a number that is not finite"
    if [point.cost for point in calibration.curve] != sorted(point.cost for point in calibration.curve):
        yield "early_exit.curve is not sorted by cost"
