"""What `[networks]`, `[optimizer]` and `[schedule]` ask for: networks made, loaded and given an optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdcli.backbones import Architecture, create
from sdcli.checkpoint import Description, load_checkpoint, read_tensors
from sdcli.errors import UserError, unknown
from sdcli.exits import BRANCH, MultiExit, attach
from sdcli.heads import HEADS, POOLED
from sdcli.recipe import Network, Optimizer, Schedule
from sdcli.stages import StagePlan, find_stages


def plan_network(network: Network, architecture: Architecture) -> StagePlan:
    """Where the network will be cut, found on the meta device: no weights, no data."""
    backbone = create(architecture, device="meta")
    exits: int | list[str] | None = None
    if isinstance(network.exits, (int, list)):
        exits = network.exits
    elif network.exits == "none":
        exits = 1
    plan = find_stages(backbone, architecture.input_size, exits=exits, name=architecture.model)
    if network.branches is not None:
        if len(plan.stages) < 2:
            raise UserError(
                f"branches: {architecture.model} has one stage", "two or more: branches are copies of the last"
            )
        # One and the same stage is the exits' beginning, as often as there are branches beside the last stage itself.
        plan = replace(plan, stages=(*plan.stages[-2:-1] * (network.branches - 1), plan.stages[-1]))
    return plan


def head_kind(network: Network) -> str:
    """What `choose_heads` is to give the network's exits."""
    return network.head if network.branches is None else BRANCH


def build_network(
    network: Network, architecture: Architecture, plan: StagePlan, heads: dict[str, str], num_classes: int
) -> tuple[MultiExit, list[str]]:
    """A network with the weights that its table asks for, and what is to be said about them."""
    another = partial(create, architecture, device="cpu", pretrained=network.weights == "pretrained")
    model = attach(another(), plan, heads, num_classes, another)
    notes: list[str] = []
    if network.weights not in ("random", "pretrained"):
        notes = load_weights(model, Path(network.weights).expanduser())
    return model, notes


def rebuild(path: Path) -> tuple[MultiExit, Description]:
    """The network that a checkpoint holds; raises UserError where tensors and description do not belong together."""
    tensors, description = load_checkpoint(path)
    architecture = description.architecture
    for point, kind in description.heads.items():
        if kind not in (POOLED, BRANCH) and kind not in HEADS.entries:
            raise UserError(
                f"'{path}': the head of {point} is '{kind}', which this sdcli does not have",
                "the file that registers it, which it was trained with",
                f"sdcli eval {path} --import FILE.py",
            )
    model = attach(create(architecture, device="cpu"), description.plan, description.heads, len(description.classes))
    own = model.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    other = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    for names, what in ((missing, "lacks"), (extra, "has a stray"), (sorted(other), "has another shape for")):
        if names:
            raise UserError(
                f"'{path}' {what} tensor '{names[0]}'" + (f" and {len(names) - 1} more" if names[1:] else ""),
                f"the tensors of {architecture.model} as timm {_timm_version()} builds it",
                "use the timm version that the checkpoint was trained with",
            )
    model.load_state_dict(tensors)
    return model, description


def load_weights(model: MultiExit, path: Path) -> list[str]:
    """Starts `model` from a safetensors file: a checkpoint of ours or timm's own format.

    Only classifiers and heads may differ (other classes, other exits): they stay fresh, and the notes say so. Raises
    UserError where the backbone does not fit.
    """
    tensors, _ = read_tensors(path)
    if not any(name.startswith("backbone.") for name in tensors):
        tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    own = model.state_dict()
    fits = {name: tensor for name, tensor in tensors.items() if name in own and own[name].shape == tensor.shape}
    left = [name for name in own if name not in fits]
    free = ("heads.", *(f"backbone.{name}." for name in _classifier_names(model.backbone)))
    for name in left:
        if not name.startswith(free):
            found = f"of shape {list(tensors[name].shape)}" if name in tensors else "missing"
            raise UserError(
                f"'{path}' does not fit {model.plan.model}: tensor '{name.removeprefix('backbone.')}' is {found}",
                f"shape {list(own[name].shape)}",
                "use a file of the same model; a stem changed by --stem has weights of another shape",
            )
    model.load_state_dict(fits, strict=False)
    # "heads.exit1.classifier.weight" is said as "heads.exit1", "backbone.fc.weight" as "fc".
    fresh = dict.fromkeys(
        ".".join(name.removeprefix("backbone.").split(".")[: 2 if "heads." in name else 1]) for name in left
    )
    return [f"weights from {path}" + (f"; {', '.join(fresh)} stay fresh" if fresh else "")]


FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Optimizers that update all weights in one kernel where they are asked to."""


def check_optimizer(table: Optimizer) -> None:
    """Raises UserError for an optimizer that timm does not have."""
    import timm.optim

    if table.opt not in timm.optim.list_optimizers():
        raise _at("optimizer.opt", unknown("optimizer", table.opt, timm.optim.list_optimizers()))


def create_optimizer(modules: Iterable[nn.Module], table: Optimizer) -> torch.optim.Optimizer:
    """timm's optimizer over every parameter of `modules` that is trained; torch's own are fused."""
    import timm.optim

    check_optimizer(table)
    together = nn.ModuleList(modules)
    parameters: Any = [parameter for parameter in together.parameters() if parameter.requires_grad]
    if not table.decay_norm_and_bias:
        parameters = timm.optim.param_groups_weight_decay(together, table.weight_decay)
    optimizer = timm.optim.create_optimizer_v2(
        parameters, opt=table.opt, lr=table.lr, weight_decay=table.weight_decay, momentum=table.momentum
    )
    assert isinstance(optimizer, torch.optim.Optimizer)
    if type(optimizer) in FUSED:
        takes = inspect.signature(type(optimizer)).parameters
        options = {name: value for name, value in optimizer.defaults.items() if name in takes}
        options |= {"fused": True, "foreach": False}
        # Groups differ in their weight decay only.
        groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in optimizer.param_groups]
        optimizer = type(optimizer)(groups, **options)
    return optimizer


def check_schedule(table: Schedule, epochs: int) -> None:
    """Raises UserError for a warm-up that lasts as long as the run."""
    if table.warmup >= epochs:
        raise _too_long(table, epochs)


def _too_long(table: Schedule, epochs: int) -> UserError:
    return UserError(
        f"schedule.warmup = {table.warmup:g} lasts as long as the run of {epochs} epochs",
        "fewer epochs than the run has, or a share of it below 1",
        "--set schedule.warmup=0.05",
    )


def create_schedule(optimizer: torch.optim.Optimizer, table: Schedule, epochs: int, updates_per_epoch: int) -> Any:
    """timm's learning-rate schedule, counted in updates; `step(update)` sets the rate of the update that follows."""
    from timm.scheduler import create_scheduler_v2

    total = epochs * updates_per_epoch

    def updates(time: float) -> int:
        # From 1 on a time is in epochs, below it is a share of the run.
        return round(time * (updates_per_epoch if time >= 1 else total))

    if updates(table.warmup) >= total:
        raise _too_long(table, epochs)
    schedule, _ = create_scheduler_v2(
        optimizer,
        # A step that is never reached holds the rate and keeps the warm-up.
        sched="step" if table.sched == "none" else table.sched,
        num_epochs=total,
        decay_epochs=updates(table.decay_time) if table.sched == "step" else 2 * total,
        decay_milestones=[updates(time) for time in table.milestones],
        decay_rate=table.decay_rate,
        min_lr=table.min_lr,
        warmup_lr=table.warmup_lr,
        warmup_epochs=updates(table.warmup),
        # timm's unit here is an epoch; giving it updates makes every rate a function of one number.
        step_on_epochs=True,
    )
    schedule.step(0)
    return schedule


def _classifier_names(backbone: nn.Module) -> list[str]:
    """Where timm's classifier lies in its own names."""
    names: str | tuple[str, ...] = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    return [names] if isinstance(names, str) else list(names)


def _timm_version() -> str:
    import timm

    return str(timm.__version__)


def _at(place: str, error: UserError) -> UserError:
    error.wrong = f"{place}: {error.wrong}"
    return error
