"""What a recipe's tables have to agree on among themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from sdcli import toml
from sdcli.errors import UserError, did_you_mean, unknown
from sdcli.recipe.explain import blaming, explained
from sdcli.recipe.schema import AVERAGE, POINT, POINTS, TEACHER, Recipe, as_list


def check_recipe(tables: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> Recipe:
    """The checked recipe of plain tables. `origins` tells which file or flag brought a dotted key."""
    try:
        recipe = Recipe.model_validate(dict(tables))
    except ValidationError as error:
        raise explained(error, origins or {}) from None
    if not recipe.losses:
        raise UserError("the recipe has no losses", "at least one [losses.NAME] table", 'add extends = "baseline"')
    with blaming(origins or {}):
        _check_phases(recipe)
        _check_batch(recipe)
    if recipe.student.model is not None:
        raise UserError(
            f"networks.student.model = {recipe.student.model!r}",
            "nothing: the command line names the student's model",
            f"sdcli train {recipe.student.model} …",
        )
    if not recipe.student.learns:
        raise UserError("networks.student.learns = false", "a student that learns")
    for name, images in recipe.batch.views.items():
        if images.of == "class" and recipe.batch.mixes:
            raise UserError(
                f"batch.views.{name} shows another image of the class, and batch.mixup and batch.cutmix mix classes",
                "a recipe that mixes nothing, or further images of = 'itself'",
                "--set batch.mixup=0 --set batch.cutmix=0",
            )
    _check_addresses(recipe, origins or {})
    for name, network in recipe.others.items():
        if network.model is None:
            raise UserError(
                f"networks.{name}.model is missing",
                "the name of a timm model; only the student's comes from the command line",
                f'add model = "resnet18" to [networks.{name}]',
            )
    return recipe


def _check_phases(recipe: Recipe) -> None:
    """Raises UserError for a phase that names a loss that there is not, or reads a teacher that there is not yet, and
    for a network that is called as one that phases or `[ema]` make."""
    taught = False
    for number, phase in enumerate(recipe.phases):
        for name in phase.losses or ():
            if name not in recipe.losses:
                refusal = unknown("loss", name, recipe.losses)
                raise UserError(f"phases.{number}.losses: {refusal.wrong}", refusal.expected, refusal.fix)
        if number == 0 and phase.teacher:
            raise UserError("phases.0.teacher = true: there is no student before the first phase", "a later phase")
        taught = taught or phase.teacher
        losses = phase.losses or list(recipe.losses)
        reading = [name for name in losses if any(p.startswith(f"{TEACHER}.") for p in recipe.places([name]))]
        if reading and not taught and TEACHER not in recipe.networks:
            others = [name for name in losses if name not in reading]
            raise UserError(
                f"phases.{number} has losses.{reading[0]}, which reads {TEACHER}.…, and there is no teacher yet",
                "losses without one, until a phase has teacher = true",
                f"losses = {toml.write_value(others)} in this phase" if others else "",
            )
    if taught and TEACHER in recipe.networks:
        raise UserError(f"[networks.{TEACHER}]: this is what a phase with teacher = true makes", "another name")
    if recipe.ema is not None and AVERAGE in recipe.networks:
        raise UserError(f"[networks.{AVERAGE}]: this is what [ema] makes", "another name")


def _check_batch(recipe: Recipe) -> None:
    """Raises UserError for a batch that its groups do not fill."""
    group = recipe.batch.mates + 1
    if recipe.batch.size % group:
        raise UserError(
            f"batch.size = {recipe.batch.size}: batch.mates = {recipe.batch.mates} makes groups of {group} images",
            f"a multiple of {group}",
            f"--batch-size {max(1, recipe.batch.size // group) * group}",
        )


def _check_addresses(recipe: Recipe, origins: Mapping[str, str]) -> None:
    """Raises UserError for an `on`, a `target` or an `of` that cannot be a point, whatever the model."""
    points = "'final', 'exits', 'all', 'exit1', 'exit2', … or a list of these"
    point = "'label', 'next' (the next deeper point), 'final', or one exit such as 'exit1'"
    for name, signal in recipe.signals.items():
        _check_places(f"signals.{name}.of", signal.of, POINTS, (), points, recipe, origins)
    for name, loss in recipe.losses.items():
        known = tuple(recipe.signals)
        _check_places(f"losses.{name}.on", loss.on, POINTS, known, points, recipe, origins)
        _check_places(f"losses.{name}.target", loss.target, POINT, ("label", "next", *known), point, recipe, origins)


def _check_places(
    where: str,
    given: str | list[str],
    pattern: re.Pattern[str],
    words: Sequence[str],
    expected: str,
    recipe: Recipe,
    origins: Mapping[str, str],
) -> None:
    source = next((f"{origins[o]}: " for o in (where, where.rpartition(".")[0]) if o in origins), "")
    signals = [word for word in words if word in recipe.signals]
    for place in as_list(given):
        if place in words:
            continue
        if not pattern.fullmatch(place):
            known = f", or a signal: {', '.join(signals)}" if signals else ""
            near = did_you_mean(place, [*signals, *re.findall(r"'([^']+)'", expected)])
            raise UserError(f"{source}{where} = {given!r}", expected + known, near)
        images = place.partition("@")[2]
        if images and images not in recipe.batch.views:
            raise UserError(
                f"{source}{where} = {given!r}: there are no images '{images}'",
                f"one of {', '.join(recipe.batch.views)}" if recipe.batch.views else "a [batch.views.NAME] table",
                did_you_mean(images, recipe.batch.views) or f"add a [batch.views.{images}] table",
            )
