"""What a recipe's tables have to agree on among themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from sdcli import toml
from sdcli.errors import UserError, did_you_mean, unknown
from sdcli.recipe.address import AVERAGE, OTHER_TARGETS, STUDENT, TEACHER, Address
from sdcli.recipe.explain import blaming, explained
from sdcli.recipe.schema import Recipe, as_list

POINTS = "'final', 'exits', 'all', 'exit1', 'exit2', … or a list of these"
POINT = "'label', 'next' (the next deeper point), 'final', or one exit such as 'exit1'"


def check_recipe(tables: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> Recipe:
    """The recipe that plain tables make, checked. `origins` maps a dotted key to the file or option that set it.

    Raises UserError for an unknown key, a wrong type or range, and tables that contradict each other.
    """
    try:
        recipe = Recipe.model_validate(dict(tables))
    except ValidationError as error:
        raise explained(error, origins or {}) from None
    if not recipe.losses:
        raise UserError("the recipe has no losses", "at least one [losses.NAME] table", 'add extends = "baseline"')
    with blaming(origins or {}):
        _check_networks(recipe)
        _check_names(recipe)
        _check_phases(recipe)
        _check_learning(recipe)
        _check_rules(recipe)
        _check_shares(recipe)
        _check_weights(recipe)
        _check_batch(recipe)
        for name, signal in recipe.signals.items():
            _check_addresses(f"signals.{name}.of", signal.of, recipe, POINTS, groups=True)
        words = (*OTHER_TARGETS, *recipe.signals)
        for name, loss in recipe.losses.items():
            _check_addresses(f"losses.{name}.on", loss.on, recipe, POINTS, tuple(recipe.signals), groups=True)
            _check_addresses(f"losses.{name}.target", loss.target, recipe, POINT, words, groups=False)
    return recipe


def _check_networks(recipe: Recipe) -> None:
    """Raises UserError for a student with a model of its own or that does not learn, and another without a model."""
    if recipe.student.model is not None:
        raise UserError(
            f"networks.student.model = {recipe.student.model!r}",
            "nothing: the command line names the student's model",
            f"sdcli train {recipe.student.model} …",
            key="networks.student.model",
        )
    if not recipe.student.learns:
        raise UserError("networks.student.learns = false", "a student that learns", key="networks.student.learns")
    for part in ("optimizer", "schedule"):
        if getattr(recipe.student, part) is not None:
            key = f"networks.student.{part}"
            raise UserError(f"[{key}]: the recipe's [{part}] is the student's", f"the table [{part}]", key=key)
    for name, network in recipe.others.items():
        if network.model is None and network.learns and network.trains == "all":
            raise UserError(
                f"networks.{name}.model is missing",
                "the name of a timm model; only the student's comes from the command line",
                f'add model = "resnet18" to [networks.{name}]',
                key=f"networks.{name}.model",
            )
    if recipe.ema is not None and AVERAGE in recipe.networks:
        raise UserError(f"[networks.{AVERAGE}]: [ema] makes this network", "another name", key=f"networks.{AVERAGE}")


def _check_names(recipe: Recipe) -> None:
    """Raises UserError for a signal that is called like a point."""
    for name in recipe.signals:
        if Address.find(name) is not None or name in OTHER_TARGETS:
            raise UserError(f"signals.{name}: this is the name of a point", "another name", key=f"signals.{name}")


def _check_phases(recipe: Recipe) -> None:
    """Raises UserError for a phase with an unknown loss, one that reads a teacher before there is one, and a network
    that is called like the one that a phase makes."""
    taught = False
    for number, phase in enumerate(recipe.phases):
        key = f"phases.{number}"
        for name in phase.losses or ():
            if name not in recipe.losses:
                raise unknown("loss", name, recipe.losses).within(f"{key}.losses", key=f"{key}.losses")
        if number == 0 and phase.teacher:
            raise UserError(
                "phases.0.teacher = true: there is no student before the first phase",
                "a later phase",
                key="phases.0.teacher",
            )
        taught = taught or phase.teacher
        losses = phase.losses or list(recipe.losses)
        reading = [name for name in losses if recipe.reads(TEACHER, [name])]
        if reading and not taught and TEACHER not in recipe.networks:
            others = [name for name in losses if name not in reading]
            raise UserError(
                f"{key} has losses.{reading[0]}, which reads {TEACHER}.…, and there is no teacher yet",
                "losses without a teacher, until a phase has teacher = true",
                f"losses = {toml.write_value(others)} in this phase" if others else "",
                key=f"{key}.losses",
            )
    if taught and TEACHER in recipe.networks:
        raise UserError(
            f"[networks.{TEACHER}]: a phase with teacher = true makes this network",
            "another name",
            key=f"networks.{TEACHER}",
        )


def _check_learning(recipe: Recipe) -> None:
    """Raises UserError for a phase in which a network that never learns is to learn, or that teaches one that rests."""
    able = [name for name, learns in recipe.taking_part.items() if learns]
    for number, phase in enumerate(recipe.phases):
        for name in phase.learns or ():
            if name not in able:
                key = f"phases.{number}.learns"
                raise unknown("network", name, able).within(f"{key}: of those that learn", key=key)
        if phase.prune and phase.prune.network not in able:
            key = f"phases.{number}.prune.network"
            raise unknown("network", phase.prune.network, able).within(f"{key}: of those that learn", key=key)
    for number, phase in enumerate(recipe.all_phases):
        learning = recipe.learning(number)
        for name in phase.losses or ():
            resting = [a.network for a in recipe.addresses_on(name) if a.network in able and a.network not in learning]
            if resting:
                raise UserError(
                    f"phase '{phase.name}' has losses.{name}, which teaches {resting[0]}, and {resting[0]} does not "
                    "learn in it",
                    "losses of the networks that learn in a phase",
                    "losses = [...] in this phase",
                    key="phases",
                )
    if STUDENT not in recipe.learning(len(recipe.all_phases) - 1):
        raise UserError(
            "the student does not learn in the last phase",
            "a last phase in which it learns: it is what is scored and saved",
            key=f"phases.{len(recipe.phases) - 1}.learns",
        )


def _check_rules(recipe: Recipe) -> None:
    """Raises UserError for a rule on a network that does not learn, and for turns that cannot be taken."""
    able = [name for name, learns in recipe.taking_part.items() if learns]
    for name, rule in recipe.rules.items():
        key = f"rules.{name}"
        if rule.network not in able:
            raise unknown("network", rule.network, able).within(f"{key}.network: of those that learn", key=key)
        _check_addresses(f"{key}.behind", rule.behind, recipe, POINT, groups=False)
    if recipe.updates == "sequential" and recipe.optimizer.nonfinite == "skip":
        raise UserError(
            'updates = "sequential" with optimizer.nonfinite = "skip": half of an update cannot be skipped',
            "one of them",
            '--set optimizer.nonfinite="stop"',
            key="updates",
        )


def _check_shares(recipe: Recipe) -> None:
    """Raises UserError for a weight that finds itself and cannot: without a loss to compare with, or a backbone to
    measure on."""
    for name, loss in recipe.losses.items():
        key = f"losses.{name}.weight"
        for weight in loss.weights:
            if (weight.share is None) != (weight.of is None):
                there, lacks = ("of", "share") if weight.share is None else ("share", "of")
                raise UserError(f"{key} has {there} without {lacks}", 'both: { share = 0.1, of = "task" }', key=key)
            if weight.share is None:
                continue
            if weight.to is not None or "value" in weight.model_fields_set:
                raise UserError(
                    f"{key} has share and {'to' if weight.to is not None else 'value'}", "one of them", key=key
                )
            if loss.share is None:
                raise UserError(f"{key}: a list with a share", "one share for all points of the loss", key=key)
            if weight.of not in recipe.losses:
                raise unknown("loss", str(weight.of), recipe.losses).within(f"{key}.of", key=f"{key}.of")
            if recipe.losses[str(weight.of)].share is not None:
                raise UserError(
                    f"{key}.of = '{weight.of}', whose weight finds itself too",
                    "a loss whose weight is a number",
                    key=f"{key}.of",
                )
            _check_measurable(recipe, name, str(weight.of))


def _check_measurable(recipe: Recipe, name: str, of: str) -> None:
    """Raises UserError for a phase in which the gradients of two losses cannot be compared on the backbone."""
    for number, phase in enumerate(recipe.all_phases):
        if name not in (phase.losses or ()):
            continue
        where = f"phases.{number}: " if recipe.phases else ""
        if of not in (phase.losses or ()):
            raise UserError(
                f"{where}losses.{name} has a share of losses.{of}, which is not in this phase",
                "both losses, or a number as the weight",
                key=f"losses.{name}.weight",
            )
        heard = {
            other: phase.trains == "all" and (recipe.student.gradients != "detached" or not recipe.only_on_exits(other))
            for other in (name, of)
        }
        for other, is_heard in heard.items():
            if not is_heard:
                why = 'trains = "heads"' if phase.trains != "all" else 'gradients = "detached"'
                raise UserError(
                    f"{where}losses.{name} has a share of losses.{of}, but with {why} no gradient of losses.{other} "
                    "reaches the backbone, where it is measured",
                    "a number as the weight",
                    key=f"losses.{name}.weight",
                )


def _check_weights(recipe: Recipe) -> None:
    """Raises UserError for weights over time that random weights would replace."""
    for name, loss in recipe.losses.items():
        if recipe.random_weights and any(weight.varies for weight in loss.weights):
            raise UserError(
                f"random_weights = true replaces losses.{name}.weight, which changes over time",
                "weights that are constant, or no random weights",
                f"--set losses.{name}.weight=1.0, or --set random_weights=false",
                key="random_weights",
            )


def _check_batch(recipe: Recipe) -> None:
    """Raises UserError for a batch that its groups do not fill, and for views of other images where classes mix."""
    group = recipe.batch.mates + 1
    if recipe.batch.size % group:
        raise UserError(
            f"batch.size = {recipe.batch.size}: batch.mates = {recipe.batch.mates} makes groups of {group} images",
            f"a multiple of {group}",
            f"--batch-size {max(1, recipe.batch.size // group) * group}",
            key="batch.size",
        )
    for name, view in recipe.batch.views.items():
        if view.of == "class" and recipe.batch.mixes:
            raise UserError(
                f"batch.views.{name} shows another image of the class, and batch.mixup and batch.cutmix mix classes",
                "a recipe that mixes nothing, or views with of = 'itself'",
                "--set batch.mixup=0 --set batch.cutmix=0",
                key=f"batch.views.{name}",
            )


def _check_addresses(
    key: str, given: str | list[str], recipe: Recipe, expected: str, words: Sequence[str] = (), *, groups: bool
) -> None:
    """Raises UserError for an `on`, a `target` or an `of` that can be no point, whatever the model.

    `words` are what it may be besides a point; `groups` says whether `exits` and `all` are allowed.
    """
    signals = [word for word in words if word in recipe.signals]
    for name in as_list(given):
        if name in words:
            continue
        address = Address.find(name)
        if address is None or (address.is_group and not groups):
            known = f", or a signal: {', '.join(signals)}" if signals else ""
            near = did_you_mean(name, [*signals, *re.findall(r"'([^']+)'", expected)])
            raise UserError(f"{key} = {given!r}", expected + known, near, key=key)
        views, images = recipe.batch.views, address.images
        if images and images not in views:
            raise UserError(
                f"{key} = {given!r}: there are no images '{images}'",
                f"one of {', '.join(views)}" if views else "a [batch.views.NAME] table",
                did_you_mean(images, views) or f"add a [batch.views.{images}] table",
                key=key,
            )
