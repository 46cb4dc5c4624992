"""Checks a recipe before any data are read: names, keys, types and ranges; given a model, its exits and widths too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from sdcli.data.transforms import check_policy
from sdcli.errors import UserError, did_you_mean
from sdcli.method.learner import build_objectives, check_signals, read_densely
from sdcli.method.objective import Objective
from sdcli.method.optimizer import check_optimizer, check_schedule
from sdcli.method.terms import check_losses, check_mixing, check_networks
from sdcli.network.backbones import names_weights, resolve
from sdcli.network.blueprint import BRANCH, ENSEMBLE, Blueprint, WeightsFile
from sdcli.network.checkpoint import open_tensors
from sdcli.network.foreign import draft_foreign
from sdcli.network.heads import POOLED, check_head, find_head
from sdcli.network.multi_exit import MultiExit, build
from sdcli.network.weights import file_of
from sdcli.recipe.address import FINAL, STUDENT, TEACHER, Address
from sdcli.recipe.schema import MEAN, Network, Recipe

CHANNELS = 3
"""Of every image that a network gets."""

CLASSES = 2
"""The number of classes to build heads with before the data are known; no check depends on it."""


def check_names(recipe: Recipe) -> None:
    """Raises UserError for mistakes that show without data and without the student's model: losses and their keys,
    points of unknown networks, heads, the models of other networks, augmentation, optimizer, schedule."""
    check_losses(recipe.losses)
    check_signals(recipe.signals, recipe.batch.mixes)
    check_networks(recipe)
    check_mixing(recipe.losses, recipe.batch.mixes)
    for kind, names in (("networks", recipe.others), ("signals", recipe.signals)):
        for name in names:
            # These names become attributes of torch modules and must not clash with torch's own.
            if hasattr(nn.ModuleDict, name) or name in nn.ModuleDict().__dict__:
                raise UserError(f"{kind}.{name}: this name is reserved by torch", "another name", key=f"{kind}.{name}")
    for name, network in {STUDENT: recipe.student, **recipe.others}.items():
        if network.head not in ("auto", "none"):
            find_head(network.head, f"networks.{name}.head")
        if network.branches is not None and (network.head, network.exits) != ("auto", "auto"):
            given = "head" if network.head != "auto" else "exits"
            raise UserError(
                f"networks.{name} has branches and {given}",
                "one of the two: branches are copies of the last stage that replace the exits",
                f'--set networks.{name}.{given}="auto"',
            )
        _check_weights(f"networks.{name}.weights", network.weights)
        channels = network.model_args.get("in_chans", CHANNELS)
        if channels != CHANNELS:
            raise UserError(
                f"networks.{name}.model_args.in_chans = {channels!r}",
                f"{CHANNELS}: images are read as RGB, grey ones too",
                "leave in_chans out",
                key=f"networks.{name}.model_args.in_chans",
            )
    _check_finished(recipe)
    for name, network in recipe.others.items():
        if network.model is None:
            # A checkpoint of sdcli names its own; without one the command line is to name it.
            continue
        if not network.learns and network.weights == "random" and recipe.reads(name):
            raise UserError(
                f"networks.{name} does not learn and has random weights: it would teach noise",
                "weights: pretrained, a run, or a .safetensors file",
                f"--set networks.{name}.weights=pretrained",
                key=f"networks.{name}.weights",
            )
        try:
            resolve(network.model, num_classes=None, image_size=None)
        except UserError as error:
            raise error.within(f"networks.{name}.model", key=f"networks.{name}.model") from None
    try:
        check_policy(recipe.batch.augment.aa)
    except UserError as error:
        raise error.within("batch.augment.aa", key="batch.augment.aa") from None
    check_optimizer(recipe.optimizer)
    for epochs in recipe.phase_epochs:
        check_schedule(recipe.schedule, epochs)


def _check_finished(recipe: Recipe) -> None:
    """Raises UserError where only the heads of a network with random weights would be trained."""
    student = recipe.student
    trained = {name: table.trains for name, table in recipe.others.items() if table.learns}
    first = recipe.all_phases[0].trains or student.trains
    for name, trains in {STUDENT: first, **trained}.items():
        if name in recipe.awaited:
            continue
        if trains == "heads" and recipe.networks.get(name, student).weights == "random":
            raise UserError(
                f'networks.{name}: trains = "heads" with random weights: the exits would read noise',
                "the weights of a trained network",
                "--weights CHECKPOINT or --pretrained"
                if name == STUDENT
                else f"--set networks.{name}.weights=CHECKPOINT",
                key="phases.0.trains" if recipe.phases and recipe.phases[0].trains else f"networks.{name}.trains",
            )


def check_named(recipe: Recipe) -> None:
    """Raises UserError for a teacher that is still to be named, as in the recipes whose teacher can be any network."""
    for name in recipe.awaited:
        raise UserError(
            f"the recipe has a network '{name}', and it is not said which",
            "a network that was trained on these classes: a run, or a checkpoint",
            f"{_naming(name)}, or --set networks.{name}.model=MODEL --set networks.{name}.weights=FILE",
            key=f"networks.{name}.weights",
        )


def left_open(recipe: Recipe) -> list[str]:
    """A note for each network that is still to be named."""
    return [f"networks.{name} is to be named: {_naming(name)}" for name in recipe.awaited]


def _naming(name: str) -> str:
    """The option that says which network this is."""
    return "--teacher RUN" if name == TEACHER else f"--set networks.{name}.weights=RUN"


def check_files(recipe: Recipe) -> None:
    """Raises UserError for starting weights that do not exist or are no safetensors file."""
    for name, network in recipe.networks.items():
        if network.from_file:
            try:
                with open_tensors(file_of(network)):
                    pass
            except UserError as error:
                raise error.within(f"networks.{name}.weights", key=f"networks.{name}.weights") from None


def _check_weights(where: str, weights: str) -> None:
    # A plain word is not a path: the path of a checkpoint has a dot or a slash.
    if weights not in ("random", "pretrained") and not set("./~") & set(weights):
        known = ("random", "pretrained")
        raise UserError(
            f"{where} = '{weights}'",
            "random, pretrained, or a .safetensors file",
            did_you_mean(weights, known),
            key=where,
        )


@dataclass(frozen=True)
class Checked:
    """A recipe with a model, on the meta device: no weights, no data, no memory."""

    student: MultiExit
    notes: list[str]
    """What has no effect with this model."""


def check_with_model(
    recipe: Recipe, model: str, *, image_size: int | None = None, file: WeightsFile | None = None
) -> Checked:
    """Builds the recipe's networks with `model` as the student, on the meta device.

    `file` is what the file of the student's weights asks for, if there is one.
    Raises UserError for what only shows with a model: exits that it does not have, widths that do not match, exits that
    no loss teaches, and a `best` that names an exit without a classifier.
    """
    networks = {STUDENT: _on_meta(recipe.student, model, image_size, file)}
    for name, table in recipe.others.items():
        student = networks[STUDENT].plan.input_size[1]
        networks[name] = _other_on_meta(name, table, recipe, model, student)
    own = {name: networks.get(name, networks[STUDENT]) for name in recipe.taking_part}
    specs = {str(Address(name, p)): spec for name, network in own.items() for p, spec in network.specs.items()}
    with torch.device("meta"):
        objectives, derived = build_objectives(recipe, specs, CLASSES, 1)
    read_densely(own, derived)
    known = [MEAN, ENSEMBLE, *networks[STUDENT].classifiers]
    if recipe.best not in known:
        raise UserError(
            f"best = '{recipe.best}': the network has no such classifier",
            f"one of {', '.join(known)}",
            did_you_mean(recipe.best, known),
            key="best",
        )
    return Checked(networks[STUDENT], idle_losses(objectives))


def idle_losses(objectives: Iterable[Objective]) -> list[str]:
    """A note for each loss that none of the networks has a point for, such as BYOT's hint with `exits = "none"`."""
    idle = dict.fromkeys(name for objective in objectives for name in objective.idle)
    return [f"losses.{name} has no effect: the network has none of the points that it is on" for name in idle]


def _on_meta(table: Network, model: str, image_size: int | None, file: WeightsFile | None = None) -> MultiExit:
    blueprint = Blueprint.draft(table, model, image_size=image_size, file=file)
    network = build(blueprint, device="meta")
    network.gradients = table.gradients
    for point, kind in blueprint.heads.items():
        if kind not in (POOLED, BRANCH):
            check_head(kind, network.heads[point], network.stages[point], len(blueprint.classes))
    return network


def _other_on_meta(name: str, table: Network, recipe: Recipe, student: str, image_size: int) -> MultiExit:
    """Another network than the student; one that is still to be named is taken to be like the student."""
    points = recipe.points_of(name)
    if table.finished:
        try:
            return build(draft_foreign(table, name, points), device="meta")
        except UserError as error:
            raise error.within(f"networks.{name}", key=error.key or f"networks.{name}.weights") from None
    if table.awaited and points <= {FINAL}:
        table = table.model_copy(update={"exits": "none"})
    return _on_meta(table, table.model or student, image_size)


def remarks(recipe: Recipe, model: str | None = None) -> list[str]:
    """Settings that are allowed but have no effect, one note for each; `model` is the student's, if it is known."""
    found = []
    for name, network in {STUDENT: recipe.student, **recipe.others}.items():
        named = model if name == STUDENT else network.model
        if named is not None and names_weights(named) and network.weights == "random":
            how = "--pretrained" if name == STUDENT else f"--set networks.{name}.weights=pretrained"
            found.append(f"{named} starts from random weights; {how} loads the weights that it names")
    schedule, epochs = recipe.schedule, max(recipe.phase_epochs)
    late = [time for time in schedule.decay_milestones if time >= 1 and time >= epochs]
    if schedule.sched == "multistep" and late:
        times = ", ".join(f"{time:g}" for time in late)
        found.append(
            f"schedule.decay_milestones: the run ends at epoch {epochs} without reaching {times}; "
            "values below 1 are fractions of the run"
        )
    if schedule.decay_milestones and schedule.sched != "multistep":
        found.append(f"schedule.decay_milestones has no effect with sched = '{schedule.sched}'")
    found += [
        f"losses.{name} has no effect: its weight is 0"
        for name, loss in recipe.losses.items()
        if all(not weight.varies and weight.value == 0 for weight in loss.weights)
    ]
    if recipe.random_weights:
        found += [
            f"losses.{name}.weight has no effect: random_weights = true draws all weights"
            for name, loss in recipe.losses.items()
            if any(weight.value not in (0, 1) for weight in loss.weights)
        ]
    read = recipe.named(recipe.losses)
    found += [f"signals.{name} has no effect: no loss reads it" for name in recipe.signals if name not in read]
    found += [
        f"batch.views.{name} has no effect but its images are loaded: no loss reads final@{name}"
        for name in recipe.batch.views
        if all(address.images != name for address in recipe.addresses(recipe.losses))
    ]
    found += [
        f"networks.{name} has no effect but takes memory: nothing reads {name}.…"
        for name in recipe.others
        if not recipe.reads(name)
    ]
    if any(phase.teacher for phase in recipe.phases) and not recipe.reads(TEACHER):
        found.append(f"phases: teacher = true has no effect: nothing reads {TEACHER}.…")
    if recipe.batch.mixup_prob != 1.0 and not recipe.batch.mixes:
        found.append("batch.mixup_prob has no effect: nothing is mixed")
    if recipe.phases:
        used = {name for phase in recipe.all_phases for name in phase.losses or ()}
        found += [f"losses.{name} has no effect: no phase uses it" for name in recipe.losses if name not in used]
    for name, loss in recipe.losses.items():
        signal = recipe.signals.get(loss.target) if isinstance(loss.target, str) else None
        own, other = loss.options.get("temperature"), signal.options.get("temperature") if signal else None
        if None not in (own, other) and own != other:
            found.append(
                f"losses.{name}.temperature = {own:g} should equal signals.{loss.target}.temperature = {other:g}"
            )
    return found
