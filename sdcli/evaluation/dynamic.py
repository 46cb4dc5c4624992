"""Early exit scored as it is used: images leave, and the time that passes is compared with the plain network's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sdcli.data.batch import Batch
from sdcli.evaluation.evaluate import ExitResult
from sdcli.evaluation.latency import now
from sdcli.evaluation.metrics import auroc, confidence_and_correct, ece, nll, topk_correct
from sdcli.network.multi_exit import MultiExit
from sdcli.network.policies import Decided, Policy
from sdcli.recipe.address import FINAL

EARLY_EXIT = "early exit"
TIMED = 8
"""Batches on which each exit alone is timed."""


@dataclass(frozen=True)
class Leaving:
    """The images that leave at one exit."""

    point: str
    share: float
    top1: float | None
    """Of their answers, in percent; None if nobody leaves here."""
    plain_top1: float | None
    """Of the plain network's answers to the same images."""


@dataclass(frozen=True)
class Dynamic:
    """The scores of early exit on a split."""

    result: ExitResult
    """`macs` is the mean per image, with the heads that it passes."""
    exits: tuple[Leaving, ...]
    seconds: float
    """Of all forward passes, without loading images."""
    plain_seconds: float
    """The plain network's, on the same batches, taken in turn."""
    times: dict[str, float]
    """The time of every exit alone, as a share of the plain network's on the first batches."""


@torch.inference_mode()
def evaluate_dynamic(
    network: MultiExit,
    batches: Iterable[Batch],
    policy: Policy,
    device: torch.device,
    progress: Callable[[int], None] = lambda images: None,
) -> Dynamic:
    """Scores early exit, and times it against the plain network. Leaves the network in eval mode."""
    network.check(policy)
    network.eval()
    decided, plain, labels = list[Decided](), list[Tensor](), list[Tensor]()
    router, seconds, plain_seconds = network.router(policy), 0.0, 0.0
    alone = {point: network.strategy(exit=point) for point in network.exits if point != FINAL}
    spent: dict[str, list[float]] = {point: [] for point in alone}
    done = 0
    for number, batch in enumerate(batches):
        batch = batch.to(device)
        if number == 0:
            # The first passes of a process are slower.
            network.route(batch.images, policy)
            network.plain(batch.images)
            for strategy in alone.values():
                network.answer(batch.images, strategy)
        start = now(device)
        found = router.take(batch.images)
        between = now(device)
        own = network.plain(batch.images)
        end = now(device)
        seconds, plain_seconds = seconds + between - start, plain_seconds + end - between
        if number < TIMED:
            for point, strategy in alone.items():
                start = now(device)
                network.answer(batch.images, strategy)
                spent[point].append((now(device) - start) / (end - between))
        decided += [own.cpu() for own in found]
        plain.append(own.argmax(dim=1).cpu())
        labels.append(batch.labels.cpu())
        done += len(batch.labels)
        progress(done)
    start = now(device)
    found = router.rest()
    seconds += now(device) - start
    decided += [own.cpu() for own in found]
    answers, where = torch.cat([own.answers for own in decided]), torch.cat([own.exits for own in decided])
    truth = torch.cat(labels)
    return Dynamic(
        _scores(network, answers, where, truth, router.points, torch.cat(plain)),
        tuple(_leaving(router.points, answers, where, torch.cat(plain), truth)),
        seconds,
        plain_seconds,
        {point: statistics.median(shares) for point, shares in spent.items()},
    )


def _scores(
    network: MultiExit, answers: Tensor, exits: Tensor, labels: Tensor, points: tuple[str, ...], plain: Tensor
) -> ExitResult:
    blueprint = network.blueprint
    passing, heads = blueprint.passing(points[:-1]), blueprint.head_costs()
    macs = float(torch.tensor([passing[point] for point in points], dtype=torch.float64)[exits].mean())
    confidence, correct = confidence_and_correct(answers, labels)
    return ExitResult(
        point=EARLY_EXIT,
        top1=100 * float(correct.double().mean()),
        top5=100 * float(topk_correct(answers, labels, 5).double().mean()),
        nll=float(nll(answers, labels).double().mean()),
        ece=ece(confidence, correct),
        params=blueprint.costs()["final"].params + sum(heads[point].params for point in points[:-1]),
        macs=round(macs),
        speedup=blueprint.costs()["final"].macs / macs,
        auroc=auroc(confidence, correct),
        agreement=100 * float((answers.argmax(dim=1) == plain).double().mean()),
    )


def _leaving(
    points: tuple[str, ...], answers: Tensor, exits: Tensor, plain: Tensor, labels: Tensor
) -> Iterator[Leaving]:
    right, plain_right = answers.argmax(dim=1) == labels, plain == labels
    for place, point in enumerate(points):
        here = exits == place
        count = int(here.sum())
        yield Leaving(
            point,
            count / len(exits),
            100 * float(right[here].double().mean()) if count else None,
            100 * float(plain_right[here].double().mean()) if count else None,
        )
