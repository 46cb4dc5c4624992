"""How a network's exits are used on images: one exit alone, all of them together, or early exit; and what comes out.

B images, C channels, H W map, K classes
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor

from sdcli.data.images import reason_of
from sdcli.data.photos import Prepared, read_photo
from sdcli.errors import UserError, shown, unknown
from sdcli.network.blueprint import ENSEMBLE
from sdcli.network.calibration import Calibration, Promise
from sdcli.network.policies import Decided, Policy
from sdcli.recipe.address import FINAL

Photo: TypeAlias = Image.Image | str | os.PathLike[str]

OPTIONS = ("exit", "ensemble", "budget", "threshold", "early_exit=False")
"""What `choose` takes; each of them says all."""
IMAGES = "PIL images, paths, or a tensor as `transform` makes them"
"""What can be classified."""


@dataclass(frozen=True)
class Prediction:
    """What a network says about one image."""

    label: str
    """The likeliest class."""
    confidence: float
    """Its probability."""
    exit: str
    """The point that has answered: an exit, `final` or `ensemble`."""
    top: tuple[tuple[str, float], ...]
    """The likeliest classes and their probabilities, the label first."""


@dataclass(frozen=True)
class Strategy:
    """Which of a network's exits answer."""

    policy: Policy | None
    """Where images leave; None: nowhere, and the answer is that of the mean of all exits' logits."""
    alone: bool = False
    """Whether all images leave at one point, so that nothing has to go on from there."""
    note: str = ""
    """What a user should know about it, if nothing was asked for."""


def choose(
    calibration: Calibration | None,
    exits: Sequence[str],
    why_not: Callable[[], Mapping[str, str]],
    *,
    exit: str | None = None,
    ensemble: bool = False,
    budget: float | None = None,
    threshold: float | None = None,
    early_exit: bool = True,
) -> Strategy:
    """The strategy that a user's options ask for; by default the calibrated policy, or `final` without one.

    `exits` are the points that have logits, and `why_not` says of each why images cannot leave there. Raises UserError
    for options that contradict each other, an exit that does not exist, a budget without a calibration or below the
    cheapest setting, and numbers out of range.
    """
    asked = (exit is not None, ensemble, budget is not None, threshold is not None, not early_exit)
    if sum(asked) > 1:
        first, second, *_ = (name for name, is_asked in zip(OPTIONS, asked, strict=True) if is_asked)
        raise UserError(f"{first} and {second} contradict each other", f"one of {', '.join(OPTIONS)}")
    temperatures = calibration.policy.temperatures if calibration else {}
    if exit is not None or not early_exit:
        point = FINAL if exit is None else exit
        if point not in exits:
            raise unknown("exit", point, exits)
        thresholds: dict[str, float | None] = {} if point == FINAL else {point: -math.inf}
        return Strategy(Policy(thresholds, "confidence", temperatures), alone=True)
    if ensemble and len(exits) < 2:
        raise UserError(
            "an ensemble without effect: the network has no exit but final", "a network with exits", "leave it out"
        )
    if ensemble:
        return Strategy(None)
    if threshold is not None:
        return Strategy(_shared_threshold(calibration, exits, why_not, threshold))
    if budget is not None:
        return Strategy(_within(calibration, budget))
    if calibration is None:
        note = "not calibrated for early exit: the final exit answers (sdcli calibrate finds when images may leave)"
        return Strategy(Policy({}, "confidence"), alone=True, note=note if len(exits) > 1 else "")
    if not calibration.policy.exits:
        return Strategy(calibration.policy, note=f"calibrated on {calibration.data}: no image may leave early")
    promise = "; no promise" if calibration.promise is None else f"; promise: {promised(calibration.promise)}"
    return Strategy(calibration.policy, note=f"early exit as calibrated on {calibration.data}{promise}")


def _shared_threshold(
    calibration: Calibration | None,
    exits: Sequence[str],
    why_not: Callable[[], Mapping[str, str]],
    threshold: float,
) -> Policy:
    """One threshold wherever images can leave, with the calibrated policy's temperatures and score."""
    if not isinstance(threshold, Real) or not 0 <= threshold <= 1:
        raise UserError(f"a threshold of {_shown(threshold)}", "a number from 0 to 1")
    policy = calibration.policy if calibration else Policy({})
    reasons = why_not()
    exits = [point for point in exits if point != FINAL]
    possible = [point for point in exits if not reasons[point]]
    if not possible:
        why = next((f": {reasons[point]}" for point in exits), "")
        raise UserError(
            f"a threshold of {threshold:g} without effect: images can leave at no exit{why}",
            "a network with such an exit",
        )
    return policy.at(dict.fromkeys(possible, threshold))


def _within(calibration: Calibration | None, budget: float) -> Policy:
    if not isinstance(budget, Real) or not (math.isfinite(budget) and budget > 0):
        raise UserError(f"a budget of {_shown(budget)}", "a share of the plain network's MACs above 0, such as 0.5")
    if calibration is None:
        raise UserError(
            f"a budget of {budget:g}: the checkpoint is not calibrated",
            "thresholds that sdcli calibrate has found for this network",
            "sdcli calibrate RUN, or a threshold instead",
        )
    if not calibration.curve:
        raise UserError(
            f"a budget of {budget:g} cannot be met: the checkpoint's calibration has no settings to choose from",
            "settings that sdcli calibrate has found for this network",
            "sdcli calibrate RUN, or a threshold instead",
        )
    policy = calibration.at_budget(budget)
    if policy is None:
        least = min(point.cost for point in calibration.curve)
        raise UserError(
            f"a budget of {budget:g} cannot be met",
            f"{math.ceil(least * 1000) / 1000:g} or more",
            "a larger budget, one exit alone (sdcli predict --exit), or exits with a cheaper head (--head linear)",
        )
    return policy


def promised(promise: Promise) -> str:
    """A promise in a short sentence."""
    points = "point" if promise.limit == 1 else "points"
    what = f"at most {promise.limit:g} {points} of top-1 accuracy lost"
    if promise.loss == "change":
        what = f"at most {promise.limit:g} % of the answers changed"
    return f"{what} against the plain network, with {promise.confidence:.0%} confidence"


def without_exits(path: Path) -> UserError:
    """What is wrong with a checkpoint whose images can leave nowhere."""
    return UserError(
        f"'{path}' has no exits: images cannot leave it early",
        "a network that was trained with exits",
        "train one with a recipe that has exits, such as --recipe default",
    )


def ensemble_of(logits: Iterable[Tensor]) -> Decided:
    """The answer of the mean of the points' logits [B, K], as `sdcli eval` scores it."""
    answers = torch.log_softmax(torch.stack([own.float() for own in logits]).mean(dim=0), dim=1)
    return Decided(answers, answers.new_zeros(len(answers), dtype=torch.long), (ENSEMBLE,))


def predictions(decided: Decided, classes: Sequence[str], top: int = 5) -> list[Prediction]:
    """One prediction per image, with its `top` likeliest classes; waits for the device.

    Raises UserError for answers that are not finite.
    """
    check_count("top", top)
    likeliest = decided.answers.float().exp().topk(min(top, len(classes)), dim=1)
    if not bool(torch.isfinite(likeliest.values).all()):
        raise UserError(
            "the network's answers are not finite",
            "a network whose outputs are finite",
            "train it again with a lower learning rate",
        )
    values, numbers = likeliest.values.tolist(), likeliest.indices.tolist()
    found = []
    for place, shares, rows in zip(decided.exits.tolist(), values, numbers, strict=True):
        names = tuple((classes[row], share) for row, share in zip(rows, shares, strict=True))
        found.append(Prediction(*names[0], decided.points[place], names))
    return found


def batches(
    images: Photo | Iterable[Photo] | Tensor, prepare: Prepared, input_size: tuple[int, int, int], batch_size: int
) -> Iterator[Tensor]:
    """What `MultiExit.predict` is given, as batches [B, C, H, W]; each image is read when its batch is due.

    Raises UserError for a file that cannot be read, a tensor of another shape or type, and a batch size below 1.
    """
    check_count("batch_size", batch_size)
    if isinstance(images, Tensor):
        if images.shape[-3:] != input_size or images.ndim not in (3, 4) or not images.is_floating_point():
            raise UserError(
                f"a tensor {list(images.shape)} of {str(images.dtype).removeprefix('torch.')}",
                f"images as `transform` makes them: float [B, {', '.join(map(str, input_size))}]",
            )
        yield from torch.split(images.reshape(-1, *input_size), batch_size)
        return
    if isinstance(images, (str, os.PathLike, Image.Image)):
        images = [images]
    if not isinstance(images, Iterable):
        raise UserError(f"images of type {type(images).__name__}", IMAGES)
    photos = iter(images)
    while batch := [_read(photo, prepare) for photo in islice(photos, batch_size)]:
        yield torch.stack(batch)


def check_count(name: str, value: int) -> None:
    """Raises UserError for what is no whole number from 1 on."""
    if not isinstance(value, Integral):
        raise UserError(f"{name} = {shown(value)[:100]}", "a whole number, 1 or more")
    if value < 1:
        raise UserError(f"{name} = {value}", "1 or more")


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, Real) else shown(value)[:100]


def _read(photo: Photo, prepare: Prepared) -> Tensor:
    if isinstance(photo, Image.Image):
        try:
            return prepare(photo)
        except ValueError as error:
            raise UserError(f"an image cannot be used: {error}", "an image with 8 or 16 bits per channel") from None
        except (OSError, SyntaxError) as error:
            raise UserError(f"an image cannot be read: {reason_of(error)}", "an image that Pillow can read") from None
    if isinstance(photo, (str, os.PathLike)):
        return read_photo(photo, prepare)
    raise UserError(f"an image of type {type(photo).__name__}", IMAGES)
