"""Checks that a saved state is complete and fits the run that resumes from it, before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from sdcli.errors import UserError
from sdcli.method.optimizer import FUSED
from sdcli.run.state import Position, try_random_states, unusable


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)


class _Optimizer(_Table):
    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class _Random(_Table):
    python: list[Any]
    numpy: list[Any]
    torch: Tensor
    cuda: Tensor | None


class _Made(_Table):
    settings: dict[str, Any]
    recipe: dict[str, Any]


class _State(_Table):
    """The entries of a state; `Position` checks its own table."""

    position: dict[str, Any]
    learner: dict[str, Tensor]
    optimizers: Annotated[dict[str, _Optimizer], Field(min_length=1)]
    ema: dict[str, Tensor] | None
    scaler: dict[str, float] | None
    random: Annotated[list[_Random], Field(min_length=1)]
    data: dict[str, int]
    images_per_epoch: Annotated[int, Field(ge=1)]
    imports: dict[str, str]
    loaded: dict[str, str]
    phase: Annotated[int, Field(ge=0)]
    threads: Annotated[int, Field(ge=1)]
    made: _Made


def check_form(path: Path, state: Mapping[str, Any]) -> None:
    """Raises UserError for a state with a missing entry, an unknown one, or one of the wrong type."""
    at: tuple[str, ...] = ()
    try:
        _State.model_validate(state)
        at = ("position",)
        Position(**state["position"])
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, (*at, *problem["loc"])))
        raise unusable(path, f"{place}: {problem['msg'].lower()}") from None
    for field in fields(Position):
        # All fields have defaults, meant for a new run: a state must have every one.
        if field.name not in state["position"]:
            raise unusable(path, f"position.{field.name}: field required")
    for states in state["random"]:
        try:
            try_random_states(states)
        except Exception as error:  # generators raise all kinds of errors
            raise unusable(path, f"random: {' '.join(str(error).split())}") from None


def check_tensors(path: Path, name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises UserError if names, shapes or types of the tensors of `name` differ from those of the run."""
    missing, stray = [key for key in expected if key not in found], [key for key in found if key not in expected]
    for keys, what in ((missing, "is missing"), (stray, "is not part of this run")):
        if keys:
            raise _misfit(path, f"{name}.{keys[0]} {what}" + (f" ({len(keys)} in all)" if keys[1:] else ""))
    for key, tensor in found.items():
        _check_tensor(path, f"{name}.{key}", tensor, expected[key])


def check_optimizer(path: Path, network: str, saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Raises UserError if the saved state of a network's optimizer does not fit its parameters."""
    at = f"optimizers.{network}"
    groups = optimizer.state_dict()["param_groups"]
    # The kernels of torch's fused optimizers do not check what they read.
    fused = type(optimizer) in FUSED
    if len(saved["param_groups"]) != len(groups):
        raise _misfit(path, f"{at} has {len(saved['param_groups'])} groups of parameters, not {len(groups)}")
    parameters: dict[int, tuple[Tensor, dict[str, Any]]] = {}
    for number, (found, own) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        where = f"{at}.param_groups.{number}"
        # Other optimizers add values of their own to a group at their first step.
        if not own.keys() <= found.keys() or (fused and own.keys() != found.keys()):
            raise _misfit(path, f"{where} has the keys {', '.join(found)}, not {', '.join(own)}")
        if found["params"] != own["params"]:
            raise _misfit(path, f"{where} has other parameters")
        for key, value in own.items():
            if _kind(found[key]) != _kind(value):
                raise _misfit(path, f"{where}.{key} is {_kind(found[key])}, not {_kind(value)}")
        pairs = zip(own["params"], optimizer.param_groups[number]["params"], strict=True)
        parameters |= {index: (parameter, own) for index, parameter in pairs}
    for index, entry in saved["state"].items():
        if index not in parameters:
            raise _misfit(path, f"{at}.state.{index} belongs to no parameter")
        if fused:
            _check_entry(path, f"{at}.state.{index}", entry, *parameters[index])
    if not fused:
        _try_step(path, saved, optimizer)


def _try_step(path: Path, saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Raises UserError where an update fails with the saved state: what belongs into it only the optimizer knows.

    It is tried on copies, which take the memory of the weights and their state for a moment.
    """
    trial = copy.deepcopy(optimizer)
    try:
        trial.load_state_dict(copy.deepcopy(dict(saved)))
        for group in trial.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        trial.step()
    except Exception as error:  # optimizers raise whatever comes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise _misfit(path, f"the optimizer cannot take a step with it: {reason}") from None


def check_scaler(path: Path, saved: Mapping[str, float] | None, scaler: Any) -> None:
    """Raises UserError if the gradient scaler's saved state has other keys. A run that changes its device may gain or
    lose the scaler."""
    if saved is not None and scaler is not None and saved.keys() != scaler.state_dict().keys():
        raise _misfit(path, f"scaler has {', '.join(saved)}, not {', '.join(scaler.state_dict())}")


def _check_entry(path: Path, where: str, entry: Mapping[str, Any], parameter: Tensor, group: Mapping[str, Any]) -> None:
    """Checks one parameter's state in SGD, Adam or AdamW."""
    if "momentum" in group:
        expected = {"momentum_buffer": parameter} if group["momentum"] else {}
    else:
        expected = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        expected |= {"max_exp_avg_sq": parameter} if group["amsgrad"] else {}
    for key in entry:
        if not isinstance(entry[key], Tensor):
            raise _misfit(path, f"{where}.{key} is {_kind(entry[key])}, not a tensor")
    check_tensors(path, where, entry, expected)


def _check_tensor(path: Path, where: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise _misfit(path, f"{where} has shape {list(found.shape)}, not {list(expected.shape)}")
    if (found.dtype, found.layout, found.device.type) != (expected.dtype, torch.strided, "cpu"):
        raise _misfit(path, f"{where} is {_form(found)}, not {str(expected.dtype).removeprefix('torch.')}")


def _form(tensor: Tensor) -> str:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return " ".join(
        str(part).removeprefix("torch.")
        for part in (tensor.dtype, *(() if plain else (tensor.layout, tensor.device.type)))
    )


def _kind(value: Any) -> str:
    """The kind of a value, for comparison and for messages; all numbers are one kind."""
    if value is None or isinstance(value, bool):
        return "nothing" if value is None else "true or false"
    return "a number" if isinstance(value, (int, float)) else type(value).__name__


def _misfit(path: Path, reason: str) -> UserError:
    """The error for a state of a different network, optimizer or version."""
    return UserError(
        f"state cannot be used: '{path}': {reason}",
        "the state of this run, saved with the same versions of sdcli, timm and torch",
        "resume with those versions, or start a new run",
    )
