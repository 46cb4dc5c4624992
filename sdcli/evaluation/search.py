"""Which policy and which thresholds: everything that may be chosen on the images that choose.

E exits
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sdcli.errors import UserError
from sdcli.evaluation.latency import Latency
from sdcli.evaluation.outputs import Outputs
from sdcli.evaluation.promise import clopper_pearson
from sdcli.evaluation.thresholds import Exits, Setting, area, candidates, frontier
from sdcli.network.blueprint import Blueprint
from sdcli.network.policies import DEFAULT, POLICIES, Judge, Policy
from sdcli.recipe.address import FINAL

STEP = 0.025
"""How far the settings on a path lie apart, as a share of the plain network's cost."""


@dataclass(frozen=True)
class Costs:
    """What an image costs that leaves at an exit: as a share of the plain network's MACs, or of its time."""

    blueprint: Blueprint
    latencies: Mapping[str, Latency] | None

    def of(self, exits: Sequence[str]) -> NDArray[np.float64]:
        """With early exit at these exits, for each of them and for `final` [E + 1]."""
        if self.latencies is None:
            passing, plain = self.blueprint.passing(exits), self.blueprint.plan.macs
            shares = [passing[point] / plain for point in (*exits, FINAL)]
        else:
            shares = [float(ms) / self.latencies[FINAL].reach for ms in passing_ms(self.latencies, exits)]
        return np.array(shares, dtype=np.float64)


def passing_ms(latencies: Mapping[str, Latency], exits: Sequence[str]) -> NDArray[np.float64]:
    """Milliseconds of an image that leaves at each of `exits` or at `final` [E + 1].

    Every head on the way counts, and what early exit itself takes.
    """
    heads = np.cumsum([*(latencies[point].head for point in exits), 0.0])
    if len(exits):
        heads += latencies[FINAL].routing
    total: NDArray[np.float64] = np.array([latencies[point].reach for point in (*exits, FINAL)]) + heads
    return total


@dataclass(frozen=True)
class Found:
    """A policy with its thresholds, and what it gave on half A."""

    policy: Policy
    setting: Setting

    @property
    def cost(self) -> float:
        return self.setting.cost


def _area(found: Sequence[Found]) -> float:
    return area([step.setting for step in found])


def best_policy(
    outputs: Outputs,
    exits: tuple[str, ...],
    temperatures: dict[str, float],
    costs: Costs,
    kind: str | None,
    agreement: bool | None,
) -> tuple[list[Found], dict[str, float]]:
    """The settings of the policy with the largest area under its frontier, the plain network first, and the areas of
    all policies tried, in percent."""
    if agreement and len(exits) < 2:
        raise UserError(
            f"--agreement with one exit, {exits[0]}: nothing comes before it with which it could agree",
            "two or more exits at which images can leave",
            "leave it out",
        )
    tried: dict[str, list[Found]] = {}
    for name in [kind] if kind is not None else POLICIES.entries:
        if agreement is not True:
            tried[name] = _search(Policy({}, name, temperatures), outputs, exits, costs)
    if agreement is not False and len(exits) > 1:
        name = max(tried, key=lambda name: _area(tried[name])) if tried else kind or DEFAULT
        agreeing = Policy({}, name, temperatures, agreement=True)
        found = [_plain(agreeing, outputs), *_settings(agreeing, outputs, exits, costs)]
        tried[f"{name}, agreeing with the exit before"] = found
    best = max(tried, key=lambda name: _area(tried[name]))
    return tried[best], {name: 100 * _area(found) for name, found in tried.items()}


def _plain(policy: Policy, outputs: Outputs) -> Found:
    """Nobody leaves."""
    right = outputs.logits[FINAL].argmax(dim=1) == outputs.labels
    return Found(policy.at({}), Setting((), float(right.double().mean()), 1.0))


def _search(policy: Policy, outputs: Outputs, exits: tuple[str, ...], costs: Costs) -> list[Found]:
    """Settings over all budgets: exits are switched on one after the other, as long as that improves the area."""
    pool = [_plain(policy, outputs)]
    chosen: tuple[str, ...] = ()
    best = _area(pool)
    while len(chosen) < len(exits):
        trials = {}
        for point in exits:
            if point not in chosen:
                on = tuple(other for other in exits if other in (*chosen, point))
                trials[on] = _settings(policy, outputs, on, costs)
        areas = {on: _area(pool + found) for on, found in trials.items()}
        for found in trials.values():
            pool += found
        on = max(areas, key=lambda on: areas[on])
        if areas[on] <= best + 1e-4:
            break
        chosen, best = on, areas[on]
    return pool


def _settings(policy: Policy, outputs: Outputs, on: tuple[str, ...], costs: Costs) -> list[Found]:
    """Settings with these exits switched on."""
    judge = Judge(policy.at(dict.fromkeys(on)))
    scores, right = [], []
    for point in on:
        verdict = judge.read(point, outputs.logits[point])
        score = verdict.score.double()
        scores.append(torch.where(verdict.agrees, score, -math.inf) if policy.agreement else score)
        right.append(verdict.answer.argmax(dim=1) == outputs.labels)
    right.append(outputs.logits[FINAL].argmax(dim=1) == outputs.labels)
    exits = Exits(torch.stack(scores).numpy(), torch.stack(right).double().numpy(), costs.of(on))
    found = []
    for setting in candidates(exits):
        limits = {point: None if math.isinf(limit) else limit for point, limit in zip(on, setting.limits, strict=True)}
        if any(limit is not None for limit in limits.values()):
            found.append(Found(policy.at(limits), setting))
    return found


def best_steps(found: Sequence[Found]) -> list[Found]:
    """Those that no other beats at the same or a lower cost, cheapest first, and last the plain network."""
    best = {id(setting) for setting in frontier([step.setting for step in found])}
    kept = sorted(
        (step for step in found[1:] if id(step.setting) in best and step.cost < 1), key=lambda step: step.cost
    )
    return [*kept, found[0]]


def spaced(steps: Sequence[Found]) -> list[Found]:
    """The last of `best_steps` in every stretch of the cost, and the first of all."""
    last = {math.ceil(step.cost / STEP): step for step in steps[:-1]}
    first = [] if len(steps) == 1 or steps[0] in last.values() else [steps[0]]
    return [*first, *last.values(), steps[-1]]


def safest_path(found: Sequence[Found], num: int, delta: float) -> list[Found]:
    """The plain network, and then settings by their upper bound on half A, each cheaper than all before it.

    The order of a fixed-sequence test is free, as long as other images test it: what is safest comes first, and what
    is neither safer nor cheaper is left out. The bound counts answers that change in either direction, which makes
    careful settings come first where there are few images.
    """
    stretches: dict[int, tuple[float, Found]] = {}
    for step in found[1:]:
        place = math.ceil(step.cost / STEP)
        bound = clopper_pearson(step.setting.worse, step.setting.better, num, delta)
        if step.cost < 1 and (place not in stretches or bound < stretches[place][0]):
            stretches[place] = bound, step
    path = [found[0]]
    for _, step in sorted(stretches.values(), key=lambda pair: (pair[0], pair[1].cost)):
        if step.cost < path[-1].cost:
            path.append(step)
    return path
