"""Early exit: when an image may leave, decided from the logits of the exits that it has passed.

B images, K classes, E exits
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdcli.errors import UserError
from sdcli.recipe.address import FINAL
from sdcli.registry import Registry

POLICIES = Registry("policy")
"""Functions (own, mean) -> (answer, score) of log-probabilities [B, K]: those of the exit itself, and those of the
geometric mean of all exits so far, normalised. `answer` [B, K] is what an image that leaves here is answered with, and
`score` [B] is larger the surer it is."""

DEFAULT = "ensemble"
ALONE = ("confidence", "margin", "entropy")
"""Policies that read the exit itself only, and not the mean: their earlier exits need not be remembered."""


@POLICIES.register("ensemble")
def ensemble(own: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Largest probability of the geometric mean of the exits so far.

    The mean of ZTW (Wolczyk et al. 2021, arXiv:2106.05409) with equal weights: there they are trained.
    """
    return mean, mean.amax(dim=1).exp()


@POLICIES.register("confidence")
def confidence(own: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Largest probability of the exit alone, as in SDN (Kaya et al. 2019, arXiv:1810.07052)."""
    return own, own.amax(dim=1).exp()


@POLICIES.register("margin")
def margin(own: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Largest minus second largest probability of the exit alone."""
    first, second = own.topk(2, dim=1).values.exp().unbind(dim=1)
    return own, first - second


@POLICIES.register("entropy")
def entropy(own: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """1 - H / log K, with the entropy H of the exit alone, as in BranchyNet (Teerapittayanon et al. 2016,
    arXiv:1709.01686), scaled to [0, 1]."""
    # 0 log 0 is 0: the probability of a class may underflow.
    spread = -(own.exp() * own.clamp(min=-1e4)).sum(dim=1)
    # Rounding may bring it below 0 where all classes are equally likely: a threshold of 0 is for all.
    return own, (1 - spread / math.log(own.shape[1])).clamp(min=0)


class Verdict(NamedTuple):
    """What a policy makes of one exit's logits."""

    answer: Tensor
    """Log-probabilities of the answer [B, K]."""
    score: Tensor
    """[B]"""
    agrees: Tensor
    """Whether the answer's class is that of the exit before [B]; false at the first exit, and if nobody asks for
    agreement."""


@dataclass(frozen=True)
class Policy:
    """When an image may leave the network before its end.

    An image leaves at the first exit whose score is at least its threshold. Images that leave nowhere get the answer
    of `final` alone, so that a policy that lets nobody leave answers as the plain network.
    """

    thresholds: dict[str, float | None]
    """The exits in use, shallowest first. At None nobody leaves, but the exit's opinion counts for later ones."""
    kind: str = DEFAULT
    """A name in `POLICIES`."""
    temperatures: dict[str, float] = field(default_factory=dict)
    """What the logits of each point are divided by first (Guo et al. 2017, arXiv:1706.04599); 1.0 if it is missing."""
    agreement: bool = False
    """Whether an image may leave only where the class is also that of the exit before; never at the first exit."""

    @property
    def exits(self) -> tuple[str, ...]:
        """The exits whose heads have to be run, shallowest first: none after the last at which an image can leave."""
        last = max((i for i, limit in enumerate(self.thresholds.values()) if limit is not None), default=-1)
        own = tuple(self.thresholds)[: last + 1]
        if self.kind not in ALONE or self.agreement:
            return own
        return tuple(point for point in own if self.thresholds[point] is not None)

    def lets_go(self, point: str, verdict: Verdict) -> Tensor:
        """Which images leave at this exit [B]."""
        limit = self.thresholds[point]
        sure = verdict.score >= (math.inf if limit is None else limit)
        return sure & verdict.agrees if self.agreement else sure

    def at(self, thresholds: Mapping[str, float | None]) -> Policy:
        """The same policy with other thresholds."""
        return replace(self, thresholds=dict(thresholds))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `Policy(**table)` gives the equal policy back."""
        return {
            "thresholds": self.thresholds,
            "kind": self.kind,
            "temperatures": self.temperatures,
            "agreement": self.agreement,
        }


def check_policy(policy: Policy, classifiers: Sequence[str]) -> None:
    """Raises UserError for an unknown kind, exit or temperature that no network with these `classifiers` can use."""
    POLICIES.find(policy.kind)
    exits = [point for point in classifiers if point != FINAL]
    for point in policy.thresholds:
        if point not in exits:
            raise UserError(f"policy: there is no exit '{point}'", "one of " + ", ".join(exits))
    if list(policy.thresholds) != [point for point in exits if point in policy.thresholds]:
        raise UserError("policy: its exits are not in the network's order", ", ".join(exits))
    for point, temperature in policy.temperatures.items():
        if not math.isfinite(temperature) or temperature <= 0:
            raise UserError(f"policy: the temperature of {point} is {temperature}", "a number above 0")


class Judge:
    """A policy applied to the images of a batch, exit after exit."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._read = POLICIES.find(policy.kind).call
        self._sum: Tensor | None = None
        self._before: Tensor | None = None
        self._seen = 0

    def read(self, point: str, logits: Tensor) -> Verdict:
        """What the policy makes of the logits [B, K] of the next point, for the images that are left."""
        # On small networks every operation counts: none is done for something that the policy does not read.
        temperature = self.policy.temperatures.get(point, 1.0)
        own = torch.log_softmax(logits.float() if temperature == 1 else logits.float() / temperature, dim=1)
        if point == FINAL:
            answer, score = own, own.amax(dim=1).exp()
        elif self.policy.kind in ALONE:
            answer, score = self._read(own, own)
        else:
            self._sum = own if self._sum is None else self._sum + own
            self._seen += 1
            mean = own if self._seen == 1 else torch.log_softmax(self._sum / self._seen, dim=1)
            answer, score = self._read(own, mean)
        agrees = own.new_zeros(len(own), dtype=torch.bool)
        if self.policy.agreement:
            guess = answer.argmax(dim=1)
            agrees = agrees if self._before is None else guess == self._before
            self._before = guess
        return Verdict(answer, score, agrees)

    def part(self, rows: Tensor) -> Judge:
        """What it knows of the images at `rows`, indices into those that are left."""
        own = copy.copy(self)
        own._sum = None if self._sum is None else self._sum[rows]
        own._before = None if self._before is None else self._before[rows]
        return own

    @staticmethod
    def joined(judges: Sequence[Judge]) -> Judge:
        """One for the images of all of them, which have read the same points."""
        own = copy.copy(judges[0])
        own._sum = _joined([judge._sum for judge in judges])
        own._before = _joined([judge._before for judge in judges])
        return own


def _joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    return None if tensors[0] is None else torch.cat([tensor for tensor in tensors if tensor is not None])


class Decided(NamedTuple):
    """Where images leave and what they are answered with."""

    answers: Tensor
    """Log-probabilities [B, K]."""
    exits: Tensor
    """For each image the position of the point that answered among `points` [B]."""
    points: tuple[str, ...]
    """The exits in use, and `final`."""

    def cpu(self) -> Decided:
        """The same on the CPU."""
        return Decided(self.answers.cpu(), self.exits.cpu(), self.points)


def decide(policy: Policy, logits: Mapping[str, Tensor]) -> Decided:
    """The policy applied to the logits [B, K] of a full pass, at all its exits and `final`.

    What `MultiExit.route` answers without computing what is not needed.
    """
    judge, points = Judge(policy), (*policy.exits, FINAL)
    verdicts = [judge.read(point, logits[point]) for point in points]
    answers = verdicts[-1].answer.clone()
    exits = torch.full((len(answers),), len(points) - 1, device=answers.device)
    for place in reversed(range(len(points) - 1)):
        leaving = policy.lets_go(points[place], verdicts[place])
        exits[leaving] = place
        answers[leaving] = verdicts[place].answer[leaving]
    return Decided(answers, exits, points)
