"""Resumes a run from its folder; refuses any change that would make it a different run."""

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
from sdcli.run.prepare import BEFORE, accelerator_of, build, check, settled, start_tracker, write_choices
from sdcli.run.settings import FREE, MAY_CHANGE, Settings, unchanging
from sdcli.run.state import load_state
from sdcli.run.training import Training, restore
from sdcli.run.verify import check_form


def resume(folder: Path, settings: Settings, recipe: Recipe) -> Training:
    """The run in `folder` as it was when its state was saved; `settings` and `recipe` come from `resumed`.

    On a CPU it ends with bitwise the same weights as a run that was never stopped. Raises UserError for a state that is
    damaged or of another version, edited files, fewer epochs than are done, missing weights that are still needed, and
    training data that have changed.
    """
    for name, table in recipe.others.items():
        if table.finished:
            _check_there(recipe, name, f"networks.{name} is loaded from it")
    check(settings, recipe)
    accelerator = accelerator_of(settings, folder)
    run = Run(folder)
    if accelerator.is_main_process:
        run.lock()
    state = read_state(folder, settings, recipe)
    if any(later.fresh for later in recipe.all_phases[state["phase"] + 1 :]):
        _check_there(recipe, STUDENT, "a later phase starts from it")
    with short_of_memory(f"on {accelerator.device} {BEFORE}", "networks that fit", "another --device"):
        training = build(settings, recipe, accelerator, run, state["data"])
        restore(training, state)
    if training.accelerator.device.type == "cpu" and (threads := torch.get_num_threads()) != state["threads"]:
        training.notes.append(
            f"{state['threads']} CPU threads before, {threads} now: results differ in the last digits, by rounding"
        )
    training.notes += _changed_imports(state["imports"], training.imports)
    if training.is_first:
        training.run.go_on(training.position.epoch - 1, training.epochs)
        write_choices(training)
    accelerator.wait_for_everyone()
    start_tracker(training)
    return training


def read_state(folder: Path, settings: Settings, recipe: Recipe) -> dict[str, Any]:
    """The state of the run in `folder`; raises UserError for everything that can be checked before the run is built."""
    state = load_state(state_file(folder))
    check_form(state_file(folder), state)
    _check_same(folder, unchanging(settings, recipe), state["made"])
    done = state["position"]["epoch"] - (0 if state["position"]["update"] else 1)
    if (epochs := sum(recipe.phase_epochs)) < done:
        raise UserError(
            f"epochs = {epochs}, but the run in '{folder}' has already started epoch {done}",
            f"{done} or more",
            "leave --epochs out, or start a new run",
        )
    return state


def resumed(
    folder: Path, given: Mapping[str, Any], recipe: Recipe | None, overrides: Sequence[str | Override]
) -> tuple[Settings, Recipe]:
    """Settings and recipe of a resumed run, with the changes that the command line asks for.

    `given` are settings by name. `recipe` replaces the run's own recipe; if it is None, `overrides` change single keys
    of that. Raises UserError for a change that would make it a different run, and if the run was started with files to
    import that are not in `given`: a run folder from elsewhere may name any file, so only the user's own `--import`
    runs code.
    """
    former = _former_settings(folder)
    if former.imports and "imports" not in given:
        options = " ".join(f"--import {shlex.quote(file)}" for file in former.imports)
        raise UserError(
            f"the run in '{folder}' was started with {options}",
            "the same --import again: for safety, files named in a run folder are not imported automatically",
            f"if you trust these files: sdcli train --resume {shlex.quote(str(folder))} {options}",
        )
    # The run has settled on a format.
    given = {name: value for name, value in given.items() if (name, value) != ("memory_format", "auto")}
    settings = replace(former, **given)
    for name in given:
        was, value = getattr(former, name), getattr(settings, name)
        if value != was and name not in MAY_CHANGE:
            raise UserError(
                f"the run in '{folder}' was started with {name} = {was!r}, not {value!r}",
                f"the same value; only these may change: --epochs, {', '.join(map(_flag, MAY_CHANGE))}",
                f"leave {_flag(name)} out, or start a new run",
            )
    load_imports(settings.imports)
    own = settled(load_recipe([str(folder / "recipe.toml")]))
    wanted = settled(recipe or load_recipe([str(folder / "recipe.toml")], overrides))
    if own.phases and own.epochs != wanted.epochs:
        raise UserError(
            f"the recipe of the run in '{folder}' has phases, and epochs = {own.epochs}, not {wanted.epochs}",
            "the number of epochs that it was started with",
            "leave it out, or start a new run",
        )
    changed = first_difference(own.model_dump(exclude=FREE), wanted.model_dump(exclude=FREE))
    if changed:
        key, was, now = changed
        raise UserError(
            f"the recipe of the run in '{folder}' has {key} = {was!r}, not {now!r}",
            "the recipe that it was started with; only epochs may change",
            "leave it out, or start a new run",
        )
    return settings, check_recipe({**own.model_dump(exclude_none=True), "epochs": wanted.epochs})


def _former_settings(folder: Path) -> Settings:
    """The settings that the run was started with."""
    table = read_settings(folder)
    try:
        return Settings(**{f.name: table[f.name] for f in fields(Settings) if f.name in table})
    except TypeError:
        reason = "it does not hold a table"
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}"
    file = folder / "run.json"
    raise UserError(f"'{file}' is damaged: {reason}", "the file as the run wrote it", "restore it from a copy")


def _changed_imports(former: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Notes on imported files whose content has changed; both arguments map paths to digests."""
    names = {Path(file).name for file in former}
    return [
        f"{file} has changed since the run was last saved; the run resumes with the new version"
        for file, digest in now.items()
        if Path(file).name in names and digest not in former.values()
    ]


def _flag(setting: str) -> str:
    """The command-line option of a setting."""
    return {"model": "MODEL", "imports": "--import"}.get(setting, f"--{setting.replace('_', '-')}")


def _check_same(folder: Path, now: dict[str, Any], made: dict[str, Any]) -> None:
    """Raises UserError if the files of a run have been edited."""
    for name, file in (("settings", "run.json"), ("recipe", "recipe.toml")):
        if changed := first_difference(made[name], now[name]):
            key, was, value = changed
            raise UserError(
                f"'{folder / file}' has {key} = {value!r}, but the run was started with {was!r}",
                "the file as the run wrote it",
                f"set {key} back, or start a new run",
            )


def _check_there(recipe: Recipe, name: str, why: str) -> None:
    """Raises UserError if a network's file of weights is missing that is still needed."""
    weights = (recipe.networks.get(name) or recipe.student).weights
    if weights not in ("random", "pretrained") and not Path(weights).is_file():
        raise UserError(
            f"networks.{name}.weights = '{weights}': file not found, and {why}",
            "the file that the run was started from",
            "restore the file",
        )


def first_difference(one: Any, other: Any, at: str = "") -> tuple[str, Any, Any] | None:
    """The dotted key of the first value that differs, and both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            found = first_difference(one.get(key), other.get(key), f"{at}.{key}" if at else str(key))
            if found:
                return found
        return None
    return None if one == other else (at, one, other)
