"""What `sdcli calibrate` finds out about a network's exits, as a checkpoint stores it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sdcli.network.policies import Policy

TEMPERATURES = (0.05, 20.0)
"""The lowest and the highest temperature that a point can get."""


@dataclass(frozen=True)
class OperatingPoint:
    """One setting of the thresholds, and what it gave on held-out images that played no part in finding it."""

    thresholds: dict[str, float | None]
    """The exits in use, shallowest first; see `Policy.thresholds`."""
    cost: float
    """Mean MACs per image, heads included, as a share of the plain network's."""
    top1: float
    """In percent; without labels, the share of answers that are the plain network's."""
    chosen_by: float | None = None
    """The same on the images that chose, by which a budget chooses; None where it is not known."""


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
        """The setting within `budget`, a share of the plain network's MACs, that was best on the images that chose; of
        equally good ones the cheapest. None where even the cheapest costs more.

        A dearer setting may be worse, and so may the plain network. Where a point does not say what it gave on the
        images that chose, what they gave on the other half counts.
        """
        fitting = [point for point in self.curve if point.cost <= budget]
        if not fitting:
            return None
        gave = [point.chosen_by for point in fitting if point.chosen_by is not None]
        if len(gave) < len(fitting):
            gave = [point.top1 for point in fitting]
        # The first of equally good ones is the cheapest.
        return self.policy.at(fitting[gave.index(max(gave))].thresholds)


def problems(calibration: Calibration) -> Iterator[str]:
    """What is not plausible about a calibration of the right types."""
    curve, promise = calibration.curve, calibration.promise
    shares = [share for point in curve for share in (point.top1, point.chosen_by) if share is not None]
    numbers = [*shares, *(point.cost for point in curve)]
    for policy in (calibration.policy, *(calibration.policy.at(point.thresholds) for point in curve)):
        numbers += [limit for limit in policy.thresholds.values() if limit is not None]
    if promise is not None:
        numbers += [promise.limit, promise.measured, promise.confidence]
    if not all(map(math.isfinite, numbers)):
        yield "early_exit has a number that is not finite"
    if [point.cost for point in curve] != sorted(point.cost for point in curve):
        yield "early_exit.curve is not sorted by cost"
    if any(point.cost <= 0 for point in curve) or not all(0 <= share <= 100 for share in shares):
        yield "early_exit.curve has a cost or an accuracy that is out of range"
    coldest, hottest = TEMPERATURES
    for name, temperature in calibration.policy.temperatures.items():
        if not coldest <= temperature <= hottest:
            yield f"early_exit: the temperature of {name[:100]} is {temperature}"
    if calibration.num_images < 1:
        yield f"early_exit.num_images = {calibration.num_images}"
    if promise is not None:
        if not 0 < promise.limit <= 100 or not -100 <= promise.measured <= 100:
            yield f"early_exit.promise has a limit of {promise.limit:g} points, and {promise.measured:g} measured"
        if not 0 < promise.confidence < 1:
            yield f"early_exit.promise.confidence = {promise.confidence:g}"
        if promise.num_images < 1:
            yield f"early_exit.promise.num_images = {promise.num_images}"
