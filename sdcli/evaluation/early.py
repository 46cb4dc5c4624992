"""Early exit decided from the logits of a full pass: as a checkpoint is calibrated, and along its curve.

N images
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sdcli.data.batch import Batch
from sdcli.evaluation.answers import Answers, Tally
from sdcli.evaluation.dynamic import EARLY_EXIT
from sdcli.evaluation.evaluate import ExitResult, result_of
from sdcli.network.blueprint import Blueprint, Cost
from sdcli.network.calibration import Calibration
from sdcli.network.policies import Policy, decide
from sdcli.recipe.address import FINAL


@dataclass(frozen=True)
class Spot:
    """Early exit at one point of the calibrated curve, on the images of this split."""

    macs: float
    """Mean per image, heads included."""
    top1: float
    """In percent."""
    expected: float
    """What it cost when it was calibrated, as a share of the plain network's MACs: what budgets are compared with."""


@dataclass(frozen=True)
class Early:
    """Early exit as the checkpoint is calibrated."""

    calibration: Calibration
    result: ExitResult
    """`macs` is the mean per image."""
    points: tuple[str, ...]
    """The exits in use, and `final`."""
    exits: Tensor
    """For each image the position of the point that answers among `points` [N]."""
    curve: tuple[Spot, ...]
    """Cheapest first."""

    @property
    def leaves(self) -> bool:
        """Whether the calibrated policy lets any image leave."""
        return bool(self.calibration.policy.exits)


class Watch:
    """Early exit decided from the logits of a full pass, batch after batch: as calibrated, and along the curve.

    Only counts and a few numbers per image are kept. They stay on the device until the end.
    """

    def __init__(self, calibration: Calibration, blueprint: Blueprint) -> None:
        self.calibration, self.blueprint = calibration, blueprint
        policy = calibration.policy
        self.settings = [policy.at(point.thresholds) for point in calibration.curve]
        self.counts: list[list[Tensor]] = [[] for _ in self.settings]
        self.right: list[list[Tensor]] = [[] for _ in self.settings]
        self.tally = Tally()
        self.exits: list[Tensor] = []

    def __call__(self, batch: Batch, logits: Mapping[str, Tensor]) -> None:
        decided = decide(self.calibration.policy, logits)
        self.tally.add(decided.answers, batch.labels)
        self.exits.append(decided.exits)
        for place, policy in enumerate(self.settings):
            decided = decide(policy, logits)
            numbers = torch.arange(len(decided.points), device=decided.exits.device)
            self.counts[place].append((decided.exits[:, None] == numbers).sum(dim=0))
            self.right[place].append((decided.answers.argmax(dim=1) == batch.labels).sum())

    def early(self, answers: Answers) -> Early:
        """What was seen; `answers` are those of the same images."""
        policy = self.calibration.policy
        points, exits = (*policy.exits, FINAL), torch.cat(self.exits).cpu()
        own = Answers({EARLY_EXIT: self.tally.answered(), FINAL: answers.points[FINAL]}, answers.labels, answers.index)
        alone, heads = self.blueprint.costs(), self.blueprint.head_costs()
        params = alone[FINAL].params + sum(heads[point].params for point in policy.exits)
        macs = self._macs(policy, torch.bincount(exits, minlength=len(points)))
        result = result_of(own, EARLY_EXIT, Cost(params, round(macs)), alone[FINAL].macs)
        settings = (
            Spot(
                self._macs(setting, torch.stack(counts).sum(dim=0).cpu()),
                100 * int(torch.stack(right).sum()) / len(answers),
                point.cost,
            )
            for point, setting, counts, right in zip(
                self.calibration.curve, self.settings, self.counts, self.right, strict=True
            )
        )
        return Early(self.calibration, result, points, exits, tuple(sorted(settings, key=lambda s: s.macs)))

    def _macs(self, policy: Policy, counts: Tensor) -> float:
        """Mean MACs per image, where so many leave at each exit of the policy."""
        costs = torch.tensor(list(self.blueprint.passing(policy.exits).values()), dtype=torch.float64)
        return float((costs * counts).sum() / counts.sum())
