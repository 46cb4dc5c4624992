"""Scores a network's exits on a data set, and whatever else a user asks to know about them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sdcli.data.batch import Batch
from sdcli.data.dataset import Split
from sdcli.devices import accelerator_for, keep_freed_memory, short_of_memory
from sdcli.errors import UserError, counted, unknown
from sdcli.evaluation.answers import Answers, Beside, answer
from sdcli.evaluation.bench import device_name
from sdcli.evaluation.dynamic import Dynamic, evaluate_dynamic
from sdcli.evaluation.early import Early, Watch
from sdcli.evaluation.ensembles import PROBABILITIES, WEIGHTED, Ensembles, Mixed, fit_weights
from sdcli.evaluation.evaluate import Report, report_of, result_of
from sdcli.evaluation.fidelity import Against, Follow, check_same_classes
from sdcli.evaluation.latency import measure_latencies
from sdcli.evaluation.opened import Opened, open_checkpoint
from sdcli.evaluation.outputs import collect
from sdcli.evaluation.sharpness import BATCH, IMAGES, Sharpness, measure_sharpness
from sdcli.network.blueprint import ENSEMBLE, Blueprint
from sdcli.network.checkpoint import find_checkpoint
from sdcli.network.multi_exit import MultiExit
from sdcli.network.policies import Policy
from sdcli.network.predict import without_exits
from sdcli.network.weights import rebuild
from sdcli.recipe.address import FINAL

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What is scored besides the exits and the ensemble."""

    dynamic: bool = False
    """Early exit as it is used, as calibrated."""
    budget: float | None = None
    """With `dynamic`: within this share of the plain network's MACs."""
    curve: bool = False
    """Early exit at every calibrated setting, where the checkpoint has a calibration."""
    against: Path | None = None
    """Another run or checkpoint, whose answers are compared."""
    ensembles: bool = False
    latency: bool = False
    sharpness: bool = False


NOTHING_ELSE = Wanted()


@dataclass(frozen=True)
class Scored:
    """The scores of a network, and notes about them."""

    report: Report
    notes: list[str]
    opened: Opened
    answers: Answers
    images: Split
    """Those that were scored."""
    dynamic: Dynamic | None = None
    early: Early | None = None
    against: Against | None = None
    ensembles: Ensembles | None = None
    sharpness: Sharpness | None = None
    latency_on: str = ""
    """The device of the latencies, in words."""

    @property
    def classes(self) -> tuple[str, ...]:
        return self.opened.data.classes


def score_checkpoint(
    path: Path,
    *,
    dataset: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    points: list[str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 256,
    device: str | None = None,
    workers: int | None = None,
) -> Report:
    """The scores of `points` (None: all) of a checkpoint, on the data set that it was trained on or on another one.

    Raises UserError as `open_checkpoint` and `score` do.
    """
    opened = open_checkpoint(path, dataset=dataset, image_key=image_key, label_key=label_key)
    scored = score(
        opened, points=points, split=split, limit=limit, batch_size=batch_size, device=device, workers=workers
    )
    return scored.report


def score(
    opened: Opened,
    wanted: Wanted = NOTHING_ELSE,
    *,
    points: list[str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 256,
    device: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scored:
    """Scores `points` (None: all) of a network and what else is `wanted`, in one pass over the images where it can be.

    `split` can be any usual name of a split (`dataset.SPLITS`); None means the test split or, for data without one, the
    validation split. Raises UserError for a point that the network does not have, a split that the data set does not
    have, and whatever is wanted of a network or data set that does not allow it.
    """
    network, blueprint = opened.network, opened.about.blueprint
    points = _points(network, points)
    policy = calibrated_policy(network, opened.path, wanted.budget) if wanted.dynamic else None
    split, notes = opened.choose(split)
    if policy and network.calibration and network.calibration.data == f"{opened.name} ({split})":
        notes.append("early exit was calibrated on these images: its scores are optimistic, and do not test a promise")
    if wanted.ensembles:
        _check_ensembles(opened, points, split)
    other = _other(wanted.against, opened) if wanted.against is not None else None
    place = accelerator_for(device).device
    network.to(place).eval()
    chosen, loader, loader_notes = opened.batches(split, limit, batch_size, workers, place)
    policies = 2 if policy else 1
    at_once = min(batch_size, len(chosen))
    doing, smaller = f"on {place} with {at_once} images at a time", f"--batch-size {at_once // 2}"
    with short_of_memory(doing, "a network and a batch that fit", smaller if at_once > 1 else "another --device"):
        mixed = None
        if wanted.ensembles:
            held_out, held_out_loader, _ = opened.batches(opened.held_out, None, batch_size, workers, place)
            _LOG.info("fitting the weights of an ensemble on %s", counted(len(held_out), "validation image"))
            mixed = Mixed(fit_weights(collect(network, held_out_loader, points, place)), len(held_out))
        follow = None
        if other is not None:
            theirs = other.blueprint.preprocess
            follow = Follow(other, opened.batches(split, limit, batch_size, workers, place, theirs)[1], place)
        watch = None
        if wanted.curve and network.calibration and {*network.calibration.policy.exits, FINAL} <= set(points):
            watch = Watch(network.calibration, blueprint)
        answers = answer(
            network,
            loader,
            points=points,
            device=place,
            progress=lambda done: progress(done, len(chosen) * policies),
            beside=_each(mixed, follow, watch),
        )
        costs = blueprint.costs(points)
        report = report_of(answers, costs, model=blueprint.architecture.model, dataset=opened.name, split=split)
        check_finite(report, opened.path)
        leaving = None
        if policy is not None:
            leaving = evaluate_dynamic(
                network, loader, policy, place, lambda done: progress(len(chosen) + done, len(chosen) * policies)
            )
        if wanted.latency:
            _LOG.info("measuring latencies")
            report = _timed(report, network, place)
        sharpness = None
        if wanted.sharpness:
            _LOG.info("measuring sharpness")
            keep_freed_memory(place)
            _, fewer, _ = opened.batches(split, min(limit or IMAGES, IMAGES), BATCH, workers, place)
            sharpness = measure_sharpness(network, list(fewer), place)
    return Scored(
        report,
        [*opened.notes, *notes, *loader_notes],
        opened,
        answers,
        chosen,
        dynamic=leaving,
        early=watch.early(answers) if watch else None,
        against=follow.against(str(wanted.against)) if follow else None,
        ensembles=_ensembles(mixed, answers, blueprint) if mixed else None,
        sharpness=sharpness,
        latency_on=device_name(place) if wanted.latency else "",
    )


def _points(network: MultiExit, asked: list[str] | None) -> list[str]:
    """The points to score, shallowest first."""
    for point in asked or ():
        if point not in network.classifiers:
            raise unknown("exit", point, network.classifiers)
    return [point for point in network.classifiers if asked is None or point in asked]


def _check_ensembles(opened: Opened, points: Sequence[str], split: str) -> None:
    """Raises UserError where ensembles cannot be formed, or their weights not be fitted on other images than those
    that are scored."""
    if len(points) < 2:
        raise UserError("--ensembles: only one exit is scored", "two exits or more", "--exits all")
    if split == opened.held_out:
        raise fitted_there(split, "--split test" if "test" in opened.splits else "leave --ensembles out")


def fitted_there(split: str, fix: str) -> UserError:
    """The error for weights that would be scored on the images that they were fitted on."""
    return UserError(
        f"--ensembles: the weights are fitted on the {split} split, which is scored here", "other images to score", fix
    )


def _other(path: Path, opened: Opened) -> MultiExit:
    """The network to compare with; raises UserError unless it has the same classes."""
    network, about = rebuild(find_checkpoint(path))
    check_same_classes(opened.about.blueprint.classes, about.blueprint.classes, opened.path, path)
    return network


def _each(*asides: Beside | None) -> Beside:
    def beside(batch: Batch, logits: Mapping[str, Tensor]) -> None:
        for aside in asides:
            if aside is not None:
                aside(batch, logits)

    return beside


def _timed(report: Report, network: MultiExit, device: torch.device) -> Report:
    """The report with the time of every exit alone."""
    taken = measure_latencies(network, [r.point for r in report.exits if r.point != FINAL], device)
    exits = (replace(r, latency_ms=taken[r.point].reach + taken[r.point].head) for r in report.exits)
    return replace(report, exits=tuple(exits))


def _ensembles(mixed: Mixed, answers: Answers, blueprint: Blueprint) -> Ensembles:
    """The further ensembles scored as the exits are; an exit with a weight of 0 costs nothing."""
    every = [point for point in answers.points if point != ENSEMBLE]
    used = {PROBABILITIES: every, WEIGHTED: [point for point in every if mixed.weights[point] > 0]}
    both = replace(answers, points=answers.points | mixed.answered())
    plain = blueprint.costs()[FINAL].macs
    results = (result_of(both, name, blueprint.costs(points)[ENSEMBLE], plain) for name, points in used.items())
    return Ensembles(tuple(results), mixed.weights, mixed.num_images)


def check_finite(report: Report, path: Path) -> None:
    """Raises UserError where an exit's outputs are not finite."""
    for result in report.exits:
        if not math.isfinite(result.nll):
            raise UserError(
                f"'{path}': {result.point} has an NLL of {result.nll} on {report.num_images} images",
                "a network whose outputs are finite",
                "train it again with a lower learning rate",
            )


def calibrated_policy(network: MultiExit, path: Path, budget: float | None) -> Policy:
    """When images leave early, as `sdcli calibrate` has found, or within a budget.

    Raises UserError for a checkpoint that was not calibrated, and for a budget that it cannot meet.
    """
    if len(network.classifiers) == 1:
        raise without_exits(path)
    if network.calibration is None:
        raise UserError(
            f"'{path}' is not calibrated: it does not say when an image may leave early",
            "a calibrated checkpoint",
            f"sdcli calibrate {path}",
        )
    policy = network.strategy(budget=budget).policy
    assert policy is not None
    return policy
