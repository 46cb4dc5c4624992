"""A run that was stopped, brought back from its folder; whatever would make it another run is refused."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from sdcli.devices import short_of_memory
from sdcli.errors import UserError
from sdcli.extensions import load_imports
from sdcli.recipe.address import STUDENT
from sdcli.recipe.check import check_recipe
from sdcli.recipe.load import load_recipe
from sdcli.recipe.merge import Override
from sdcli.recipe.schema import Recipe
from sdcli.run.folder import Run, read_settings, state_file
from sdcli.run.prepare import BEFORE, build, check, settled, start_tracker, write_choices
from sdcli.run.settings import FREE, MAY_CHANGE, Settings, unchanging
from sdcli.run.state import load_state
from sdcli.run.training import Training, restore
from sdcli.run.verify import check_form


def resume(folder: Path, settings: Settings, recipe: Recipe) -> Training:
    """The run in `folder` as it was when its state was saved; `resumed` tells what to pass on.

    On a CPU it ends with the bits of a run that was never stopped. Raises UserError for a state that is damaged or of
    another version, edited files, fewer epochs than are done, starting weights that a later phase needs and that are
    gone, and data that are not those that it was trained on.
    """
    accelerator = check(settings, recipe, folder)
    run = Run(folder)
    if accelerator.is_main_process:
        run.lock()
    state = read_state(folder, settings, recipe)
    _check_weights_ahead(recipe, state["phase"])
    with short_of_memory(f"on {accelerator.device} {BEFORE}", "networks that fit", "another --device"):
        training = build(settings, recipe, accelerator, run, state["data"])
        restore(training, state)
    if training.accelerator.device.type == "cpu" and (threads := torch.get_num_threads()) != state["threads"]:
        training.notes.append(
            f"{state['threads']} CPU threads before, {threads} now: sums are rounded differently, in their last digits"
        )
    training.notes += _changed_imports(state["imports"], training.imports)
    if training.is_first:
        training.run.go_on(training.position.epoch - 1)
        write_choices(training)
    accelerator.wait_for_everyone()
    start_tracker(training)
    return training


def read_state(folder: Path, settings: Settings, recipe: Recipe) -> dict[str, Any]:
    """The state of the run in `folder`; raises UserError, as `resume` does, for all that shows before it is built."""
    state = load_state(state_file(folder))
    check_form(state_file(folder), state)
    _check_same(folder, unchanging(settings, recipe), state["made"])
    done = state["position"]["epoch"] - (0 if state["position"]["update"] else 1)
    if (epochs := sum(recipe.phase_epochs)) < done:
        raise UserError(
            f"epochs = {epochs}, and the run in '{folder}' has begun or done {done}",
            f"{done} or more",
            "leave --epochs out, or start a new run",
        )
    return state


def resumed(
    folder: Path, given: Mapping[str, Any], recipe: Recipe | None, overrides: Sequence[str | Override]
) -> tuple[Settings, Recipe]:
    """Settings and recipe of a run that goes on, with what the command line gives anew.

    `given` are settings by name; `recipe` is a whole one, where one is named, and `overrides` refine the run's own
    where none is. Raises UserError for a change that would make it another run, and for files to import that are not
    given: whoever made the folder may have named any file in it, so that only the user's own `--import` runs one.
    """
    former = _former_settings(folder)
    if former.imports and "imports" not in given:
        options = " ".join(f"--import {shlex.quote(file)}" for file in former.imports)
        raise UserError(
            f"the run in '{folder}' was started with {options}",
            "--import for its files again: no file that a run folder names is run by itself",
            f"if you trust them: sdcli train --resume {shlex.quote(str(folder))} {options}",
        )
    settings = replace(former, **given)
    for name in given:
        was, value = getattr(former, name), getattr(settings, name)
        if value != was and name not in MAY_CHANGE:
            raise UserError(
                f"the run in '{folder}' was started with {name} = {was!r}, not {value!r}",
                f"the same; what may change is --epochs, {', '.join(map(_flag, MAY_CHANGE))}",
                f"leave {_flag(name)} out, or start a new run",
            )
    load_imports(settings.imports)
    own = settled(load_recipe([str(folder / "recipe.toml")]))
    wanted = settled(recipe or load_recipe([str(folder / "recipe.toml")], overrides))
    if own.phases and own.epochs != wanted.epochs:
        raise UserError(
            f"the recipe of the run in '{folder}' has phases, and epochs = {own.epochs}, not {wanted.epochs}",
            "as many epochs as it was started with",
            "leave it out, or start a new run",
        )
    changed = _first_difference(own.model_dump(exclude=FREE), wanted.model_dump(exclude=FREE))
    if changed:
        key, was, now = changed
        raise UserError(
            f"the recipe of the run in '{folder}' has {key} = {was!r}, not {now!r}",
            "the recipe that it was started with; only epochs may change",
            "leave it out, or start a new run",
        )
    return settings, check_recipe({**own.model_dump(exclude_none=True), "epochs": wanted.epochs})


def _former_settings(folder: Path) -> Settings:
    """What the command line chose when the run was started."""
    table = read_settings(folder)
    try:
        return Settings(**{f.name: table[f.name] for f in fields(Settings) if f.name in table})
    except TypeError:
        reason = "it holds no table"
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}"
    file = folder / "run.json"
    raise UserError(f"'{file}' is not what a run has written: {reason}", "the file as the run wrote it", "put it back")


def _changed_imports(former: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Remarks on files to import that are not what they were, by their paths and digests."""
    names = {Path(file).name for file in former}
    return [
        f"{file} has changed since the run was last saved; the run resumes with what it is now"
        for file, digest in now.items()
        if Path(file).name in names and digest not in former.values()
    ]


def _flag(setting: str) -> str:
    """A setting as the command line has it."""
    return {"model": "MODEL", "imports": "--import"}.get(setting, f"--{setting.replace('_', '-')}")


def _check_same(folder: Path, now: dict[str, Any], made: dict[str, Any]) -> None:
    """Raises UserError where somebody has edited the files of a run."""
    for name, file in (("settings", "run.json"), ("recipe", "recipe.toml")):
        if changed := _first_difference(made[name], now[name]):
            key, was, value = changed
            raise UserError(
                f"'{folder / file}' has {key} = {value!r}, and the run was started with {was!r}",
                "the file as the run wrote it",
                "put it back, or start a new run",
            )


def _check_weights_ahead(recipe: Recipe, phase: int) -> None:
    """Raises UserError where a file of weights is gone that is still needed: by a network that does not learn, or by a
    fresh phase that is still ahead."""
    ahead = any(later.fresh for later in recipe.all_phases[phase + 1 :])
    needed = {name: f"networks.{name} is loaded from it" for name, table in recipe.others.items() if not table.learns}
    needed |= {STUDENT: "a fresh phase is to begin from it"} if ahead else {}
    for name, why in needed.items():
        weights = (recipe.networks.get(name) or recipe.student).weights
        if weights not in ("random", "pretrained") and not Path(weights).is_file():
            raise UserError(
                f"networks.{name}.weights = '{weights}': there is no such file, and {why}",
                "the file that the run was started from",
                "put it back",
            )


def _first_difference(one: Any, other: Any, at: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            found = _first_difference(one.get(key), other.get(key), f"{at}.{key}" if at else str(key))
            if found:
                return found
        return None
    return None if one == other else (at, one, other)
