"""Whether the runner beside a staged export lets every image leave where the network does.

B batch, K classes
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdcli.errors import UserError
from sdcli.export.compare import Figures, logits_of
from sdcli.export.job import Job
from sdcli.export.manifest import policy_of
from sdcli.network.policies import Judge, Policy
from sdcli.recipe.address import FINAL

NEAR = 20
"""An image may leave or stay where its score is as near to a threshold as this many times the largest difference of two
logits: rounding decides. Times what the score is short of 1, since rounding changes less where an exit is sure."""


@dataclass(frozen=True)
class Routed:
    """How many images the runner lets leave where `MultiExit.route` does, with the same class."""

    policy: str
    images: str
    num_images: int
    same: int
    near: int
    """Images left out of the comparison, at a threshold up to rounding."""
    shares: dict[str, float]
    """Of the images, by the exit that answered."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def compare_routes(job: Job, folder: Path, images: Mapping[str, Tensor], figures: Sequence[Figures]) -> list[Routed]:
    """The runner in `folder` against the network: with the checkpoint's policy, if it has one, and with thresholds at
    which about a third of the images that reach an exit leave there.

    Raises UserError where an image leaves at another exit or with another class.
    """
    spec = importlib.util.spec_from_file_location("sdcli_exported_runner", folder / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = []
    for what, batch in images.items():
        logits = logits_of(job.network, batch)
        rounding = max(row.difference for row in figures if row.images == what)
        policies = {"a third of the rest at each exit": _spread(policy_of(job), job.cuts, logits)}
        if job.network.calibration:
            policies["the checkpoint's"] = job.network.calibration.policy
        for name, policy in policies.items():
            runner = module.Network(folder)
            for section in runner.sections[:-1]:
                exit = section["exit"]
                section.update(threshold=policy.thresholds.get(exit), asked=exit in policy.exits)
            found.append(_compare(job, runner, name, policy, what, batch, logits, rounding))
    return found


def _compare(
    job: Job,
    runner: Any,
    name: str,
    policy: Policy,
    what: str,
    images: Tensor,
    logits: Mapping[str, Tensor],
    rounding: float,
) -> Routed:
    decided = job.network.route(images, policy)
    answers, places = runner.route(images.numpy())
    where = [decided.points[place] for place in decided.exits.tolist()]
    there = [runner.sections[place]["exit"] for place in places]
    classes = zip(decided.answers.argmax(dim=1).tolist(), answers.argmax(1).tolist(), strict=True)
    same = [a == b and ours == theirs for a, b, (ours, theirs) in zip(where, there, classes, strict=True)]
    near = _near(policy, logits, rounding).tolist()
    for number, (equal, undecided) in enumerate(zip(same, near, strict=True)):
        if not equal and not undecided:
            raise UserError(
                f"run.py lets image {number} of '{what}' leave at {there[number]}, and the network at {where[number]}, "
                f"or with another class (policy: {name})",
                "the same exit and class; the files were removed",
            )
    shares = {exit: where.count(exit) / len(where) for exit in decided.points}
    return Routed(name, what, len(where), sum(same), sum(near), shares)


def _near(policy: Policy, logits: Mapping[str, Tensor], rounding: float) -> Tensor:
    """Images [B] of which rounding decides where they leave, or with which class."""
    judge, near = Judge(policy), torch.zeros(len(next(iter(logits.values()))), dtype=torch.bool)
    for point in (*policy.exits, FINAL):
        verdict = judge.read(point, logits[point])
        first, second = verdict.answer.exp().topk(2, dim=1).values.unbind(dim=1)
        near |= first - second < NEAR * rounding
        if (limit := policy.thresholds.get(point)) is not None:
            near |= (verdict.score - limit).abs() < NEAR * rounding * (1 - verdict.score) + 1e-6
    return near


def _spread(policy: Policy, exits: tuple[str, ...], logits: Mapping[str, Tensor]) -> Policy:
    """The same policy at all `exits`, with thresholds by which about a third of the images that reach an exit leave.

    Each lies in the middle of the widest gap between two scores near the third, so that rounding decides little. Where
    agreement is asked for and no image agrees, the threshold is that of all: only the agreement keeps them.
    """
    policy = policy.at(dict.fromkeys(exits))
    judge, here = Judge(policy), torch.arange(len(next(iter(logits.values()))))
    thresholds: dict[str, float | None] = {}
    for point in exits:
        verdict = judge.read(point, logits[point][here])
        may = verdict.agrees if policy.agreement and bool(verdict.agrees.any()) else torch.ones_like(verdict.agrees)
        scores, most = verdict.score[may].sort(descending=True).values, len(here) - 1
        if most < 1:
            # One image is left, and somebody has to reach the end.
            break
        first, last = max(1, len(here) // 4), min(max(1, 5 * len(here) // 12), most)
        # Beyond the last one that may leave, all scores are lower.
        scores = torch.cat([scores, scores.new_zeros(1)])
        first, last = min(first, len(scores) - 1), min(last, len(scores) - 1)
        gaps = scores[first - 1 : last] - scores[first : last + 1]
        place = first + int(gaps.argmax())
        thresholds[point] = float(scores[place - 1 : place + 1].mean())
        leaving = policy.at(thresholds).lets_go(point, verdict)
        going = (~leaving).nonzero().flatten()
        judge = judge.part(going)
        here = here[going]
    return policy.at(dict.fromkeys(exits) | thresholds)
