"""When images may leave early: temperatures, thresholds and a promise, from held-out images.

Half A of the images chooses: temperatures, the policy, and a path of settings from nearly nobody leaving to the
cheapest. Half B measures and certifies; it only decides how far to go along the path.

E exits, N images, K classes
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sdcli.errors import UserError, counted
from sdcli.evaluation.latency import Latency
from sdcli.evaluation.metrics import auroc, confidence_and_correct, ece
from sdcli.evaluation.outputs import Outputs
from sdcli.evaluation.promise import betting, bound_of, fixed_sequence, images_for
from sdcli.evaluation.search import Costs, Found, best_policy, best_steps, passing_ms, safest_path, spaced
from sdcli.network.blueprint import Blueprint
from sdcli.network.calibration import TEMPERATURES, Calibration, OperatingPoint, Promise
from sdcli.network.policies import Policy, decide
from sdcli.recipe.address import FINAL

LEAST_IMAGES = 20
ROWS = 9
"""Trade-offs that are printed."""


@dataclass(frozen=True)
class Goal:
    """What is asked for; one of the first three."""

    max_drop: float | None = None
    """In points."""
    budget: float | None = None
    """Mean cost, as a share of the plain network's MACs."""
    latency_ms: float | None = None
    """Mean per image, at batch size 1."""
    confidence: float = 0.9
    loss: Literal["drop", "change"] = "drop"
    """See `Promise.loss`."""
    test: Literal["clopper-pearson", "betting"] = "clopper-pearson"
    guarantee: bool = True
    """False: the cheapest setting that keeps `max_drop` on the images it was found on, without a promise."""


@dataclass(frozen=True)
class ExitRow:
    """One exit by itself, on half B."""

    point: str
    cost: float
    """MACs when it is shipped alone, as a share of the plain network's."""
    top1: float
    temperature: float
    ece: float
    """Before the temperature."""
    scaled_ece: float
    auroc: float | None
    """How well its confidence separates its right answers from its wrong ones."""


@dataclass(frozen=True)
class TradeOff:
    """One setting, on half B."""

    thresholds: dict[str, float | None]
    cost: float
    """Mean, as a share of the plain network's MACs."""
    cost_error: float
    """Half the width of its 90 % interval."""
    p95_cost: float
    top1: float
    """In percent; without labels, the share of answers that are the plain network's."""
    drop: float
    """In points, against the plain network."""
    certified: float
    """An upper bound on `drop` at the goal's confidence, for this setting alone, in points."""
    shares: dict[str, float]
    """Of the images that leave at each exit; `final` last."""
    latency_ms: float | None = None
    """Mean of an image, from the latencies of the exits; None if they were not measured."""
    chosen: bool = False


@dataclass(frozen=True)
class Calibrated:
    """What `sdcli calibrate` prints, and what the checkpoint keeps of it."""

    calibration: Calibration
    exits: tuple[ExitRow, ...]
    trade_offs: tuple[TradeOff, ...]
    """Cheapest first, the plain network last."""
    tried: dict[str, float]
    """For each policy its mean accuracy over all budgets, in percent, on half A."""
    notes: tuple[str, ...]


def calibrate(
    outputs: Outputs,
    blueprint: Blueprint,
    exits: Sequence[str],
    goal: Goal,
    *,
    data: str,
    kind: str | None = None,
    agreement: bool | None = None,
    latencies: Mapping[str, Latency] | None = None,
) -> Calibrated:
    """Finds when images may leave at `exits`, from what the network answered to held-out images.

    `kind` and `agreement` choose the policy, by default the one with the best accuracy over all budgets on half A.
    `latencies` are needed for a goal in milliseconds. Raises UserError for a budget below the cheapest exit, and for
    fewer than 20 images.
    """
    check_enough(len(outputs), "hold out more images with --val-fraction when training")
    if goal.loss == "change":
        # The plain network's answers take the place of the labels.
        outputs = replace(outputs, labels=outputs.logits[FINAL].argmax(dim=1))
    first, second = outputs.halves()
    temperatures = {point: temperature_of(first.logits[point], first.labels) for point in exits}
    # The plain network agrees with itself at any temperature.
    temperatures[FINAL] = 1.0 if goal.loss == "change" else temperature_of(first.logits[FINAL], first.labels)
    costs = Costs(blueprint, latencies if goal.latency_ms is not None else None)
    found, tried = best_policy(first, tuple(exits), temperatures, costs, kind, agreement)
    shown = spaced(best_steps(found))
    chosen, promise, notes = choose(goal, found, len(first), second, costs)
    shown += [chosen] if chosen not in shown else []
    measured = [(_row(step.policy, second, blueprint, latencies, goal, chosen=step == chosen), step) for step in shown]
    measured.sort(key=lambda pair: pair[0].cost)
    rows = [row for row, _ in measured]
    return Calibrated(
        Calibration(
            policy=chosen.policy,
            curve=tuple(
                OperatingPoint(row.thresholds, row.cost, row.top1, 100 * step.setting.top1) for row, step in measured
            ),
            num_images=len(outputs),
            data=data,
            date=date.today().isoformat(),
            promise=promise,
        ),
        tuple(_exit_row(point, second, blueprint, temperatures[point]) for point in (*exits, FINAL)),
        tuple(_thinned(rows)),
        tried,
        tuple(notes),
    )


def check_enough(num: int, fix: str) -> None:
    """Raises UserError, with this fix, for too few images to calibrate on."""
    if num < LEAST_IMAGES:
        raise UserError(
            f"only {counted(num, 'held-out image')}",
            f"at least {LEAST_IMAGES}, and some thousands for a useful promise",
            fix,
        )


def temperature_of(logits: Tensor, labels: Tensor) -> float:
    """The temperature within `TEMPERATURES` that minimises the negative log-likelihood (Guo et al. 2017,
    arXiv:1706.04599)."""
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_temperature), labels))

    coldest, hottest = TEMPERATURES
    found = minimize_scalar(loss, bounds=(math.log(coldest), math.log(hottest)), method="bounded")
    return round(math.exp(float(found.x)), 4)


def losses(policy: Policy, outputs: Outputs) -> NDArray[np.int64]:
    """For each image [N]: 1 where leaving early made the plain network's answer wrong, -1 where right, else 0."""
    early = decide(policy, outputs.logits).answers.argmax(dim=1) == outputs.labels
    plain = outputs.logits[FINAL].argmax(dim=1) == outputs.labels
    return (plain.long() - early.long()).numpy()


def _within(goal: Goal, path: Sequence[Found], costs: Costs) -> Found:
    """The best setting within a budget; raises UserError, with the nearest that can be met, if there is none."""
    if goal.budget is not None:
        limit, unit, asked = goal.budget, "of the plain network's MACs", f"a budget of {goal.budget:g}"
    else:
        assert goal.latency_ms is not None and costs.latencies is not None
        plain_ms = costs.latencies[FINAL].reach
        limit, unit, asked = goal.latency_ms / plain_ms, "", f"a latency of {goal.latency_ms:g} ms"
    fitting = [step for step in path if step.cost <= limit]
    if not fitting:
        least = min(step.cost for step in path)
        if goal.budget is not None:
            raise UserError(
                f"{asked} cannot be met: the cheapest exit costs {least:.3f} {unit}",
                f"a budget of at least {least:.3f}",
                f"--budget {math.ceil(1000 * least) / 1000:g}, or a cheaper head when training (--head linear)",
            )
        raise UserError(
            f"{asked} cannot be met: the cheapest exit takes {least * plain_ms:.3g} ms and the plain network "
            f"{plain_ms:.3g} ms",
            f"at least {least * plain_ms:.3g} ms",
            f"--latency-ms {1.05 * least * plain_ms:.3g}, or a faster device",
        )
    return max(fitting, key=lambda step: (step.setting.top1, -step.cost))


def points(number: float) -> str:
    """ "1 point", "0.5 points"."""
    return f"{number:g} point{'s' * (number != 1)}"


def choose(
    goal: Goal, found: Sequence[Found], num: int, outputs: Outputs, costs: Costs
) -> tuple[Found, Promise | None, list[str]]:
    """The setting for a goal among those that `num` images have `found`, its promise, and notes.

    `outputs` are those of other images, which certify. Raises UserError for a budget below the cheapest exit.
    """
    if goal.max_drop is not None and goal.guarantee:
        return _certify(goal, safest_path(found, num, 1 - goal.confidence), outputs)
    steps = best_steps(found)
    if goal.max_drop is None:
        return _within(goal, steps, costs), None, []
    least = found[0].setting.top1 - goal.max_drop / 100
    return min((step for step in steps if step.setting.top1 >= least), key=lambda step: step.cost), None, []


def _certify(goal: Goal, path: Sequence[Found], outputs: Outputs) -> tuple[Found, Promise | None, list[str]]:
    """The cheapest setting on the path before the first whose loss may exceed the goal, and its promise."""
    assert goal.max_drop is not None
    limit, delta, num = goal.max_drop / 100, 1 - goal.confidence, len(outputs)
    steps: list[NDArray[np.int64]] = []

    def tested() -> Iterator[NDArray[np.int64]]:
        for step in path[1:]:
            steps.append(losses(step.policy, outputs))
            yield steps[-1]

    def kept(loss: NDArray[np.int64], limit: float = limit) -> bool:
        if goal.test == "betting":
            return betting(loss, delta, limit)
        return bound_of(loss, delta) <= limit

    passed, notes = fixed_sequence(tested(), kept), list[str]()
    if passed == 0:
        notes.append(
            f"no saving can be certified at {points(goal.max_drop)} with {num:,} images: the plain network is kept"
        )
    if passed < len(steps):
        cost = f"a cost of {path[passed + 1].cost:.2f}"
        notes += _wanted(f"the next setting, with {cost}," if passed else cost, steps[passed], goal.max_drop, delta)
    if passed == 0:
        return path[0], None, notes
    half, own = goal.max_drop / 2, steps[passed - 1]
    if kept(own, half / 100):
        notes.append(f"this setting by itself passes at {points(half)} too, with these images")
    else:
        notes += _wanted("this setting", own, half, delta)
    promise = Promise(goal.loss, goal.max_drop, 100 * float(own.mean()), goal.confidence, goal.test, num)
    return path[passed], promise, notes


def _wanted(what: str, loss: NDArray[np.int64], limit: float, delta: float) -> list[str]:
    """How many images would certify `what`, which these did not, at a limit in points."""
    needed = images_for(loss, limit / 100, delta)
    if needed is None:
        return [f"no number of images will do at {points(limit)}: {what} lost {100 * float(loss.mean()):.2f} points"]
    # Betting may fail where the bounds, by which images are counted, hold.
    return [f"about {2 * needed:,} held-out images would certify {what} at {points(limit)}"] * (needed > len(loss))


def _row(
    policy: Policy,
    outputs: Outputs,
    blueprint: Blueprint,
    latencies: Mapping[str, Latency] | None,
    goal: Goal,
    *,
    chosen: bool,
) -> TradeOff:
    decided = decide(policy, outputs.logits)
    costs = Costs(blueprint, None).of(decided.points[:-1])[decided.exits.numpy()]
    loss = losses(policy, outputs)
    num = len(loss)
    counts = torch.bincount(decided.exits, minlength=len(decided.points)).tolist()
    milliseconds = None
    if latencies is not None:
        milliseconds = float(passing_ms(latencies, decided.points[:-1])[decided.exits.numpy()].mean())
    return TradeOff(
        thresholds=policy.thresholds,
        cost=float(costs.mean()),
        cost_error=1.645 * float(costs.std(ddof=1)) / math.sqrt(num),
        p95_cost=float(np.quantile(costs, 0.95, method="higher")),
        top1=100 * float((decided.answers.argmax(dim=1) == outputs.labels).double().mean()),
        drop=100 * float(loss.mean()),
        certified=100 * bound_of(loss, 1 - goal.confidence) if policy.exits else 0.0,
        shares={point: count / num for point, count in zip(decided.points, counts, strict=True)},
        latency_ms=milliseconds,
        chosen=chosen,
    )


def _exit_row(point: str, outputs: Outputs, blueprint: Blueprint, temperature: float) -> ExitRow:
    logits, labels = outputs.logits[point], outputs.labels
    confidence, correct = confidence_and_correct(logits, labels)
    scaled, _ = confidence_and_correct(logits / temperature, labels)
    return ExitRow(
        point=point,
        cost=blueprint.costs()[point].macs / blueprint.plan.macs,
        top1=100 * float(correct.double().mean()),
        temperature=temperature,
        ece=ece(confidence, correct),
        scaled_ece=ece(scaled, correct),
        auroc=auroc(scaled, correct),
    )


def _thinned(rows: Sequence[TradeOff]) -> list[TradeOff]:
    """At most `ROWS`, evenly spaced, the chosen one and both ends among them."""
    if len(rows) <= ROWS:
        return list(rows)
    kept = {round(place * (len(rows) - 1) / (ROWS - 1)) for place in range(ROWS)}
    return [row for place, row in enumerate(rows) if place in kept or row.chosen]
