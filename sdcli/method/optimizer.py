"""Builds the optimizer and the learning-rate schedule from the recipe's `[optimizer]` and `[schedule]`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from sdcli.errors import UserError, unknown
from sdcli.network.multi_exit import MultiExit
from sdcli.recipe.schema import Optimizer, Schedule

LR_SCALE = "lr_scale"
"""timm's schedules multiply the learning rate of a group by this entry."""

FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Optimizers that can update all weights in one kernel."""


def check_optimizer(table: Optimizer) -> None:
    """Raises UserError for an optimizer that timm does not have, or that cannot be used here."""
    import timm.optim

    if table.opt not in timm.optim.list_optimizers():
        raise unknown("optimizer", table.opt, timm.optim.list_optimizers()).within("optimizer.opt", key="optimizer.opt")
    try:
        optimizer = _of_timm([nn.Parameter(torch.zeros(1))], table)
    except (AssertionError, ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
    else:
        if not getattr(optimizer, "is_second_order", False):
            return
        reason = "it needs second derivatives"
    raise UserError(
        f"optimizer.opt = '{table.opt}' cannot be used: {reason}",
        "an optimizer that needs gradients and the installed packages only, with values that it takes",
        "--set optimizer.opt=adamw",
        key="optimizer.opt",
    )


def create_optimizer(modules: Iterable[nn.Module], table: Optimizer) -> torch.optim.Optimizer:
    """timm's optimizer for all trainable parameters of `modules`; SGD, Adam and AdamW run fused."""
    check_optimizer(table)
    together = nn.ModuleList(modules)
    parameters: Any = [parameter for parameter in together.parameters() if parameter.requires_grad]
    if not table.decay_norm_and_bias or table.head_lr != 1.0 or table.layer_decay != 1.0:
        parameters = _groups(together, table)
    optimizer = _of_timm(parameters, table)
    if type(optimizer) in FUSED:
        takes = inspect.signature(type(optimizer)).parameters
        options = {name: value for name, value in optimizer.defaults.items() if name in takes}
        options |= {"fused": True, "foreach": False}
        own = ("params", "weight_decay", LR_SCALE)
        groups = [{key: group[key] for key in own if key in group} for group in optimizer.param_groups]
        optimizer = type(optimizer)(groups, **options)
    return optimizer


def _groups(together: nn.Module, table: Optimizer) -> list[dict[str, Any]]:
    """Parameters of the same weight decay and the same factor of the learning rate, in the model's order."""
    import timm.optim

    decays = dict.fromkeys(together.parameters(), table.weight_decay)
    if not table.decay_norm_and_bias:
        exempt = list(undecayed(together))
        for group in timm.optim.param_groups_weight_decay(together, table.weight_decay, no_weight_decay_list=exempt):
            decays |= dict.fromkeys(group["params"], group["weight_decay"])
    scales = dict(_scales(together, table))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in together.parameters():
        if parameter.requires_grad:
            groups.setdefault((scales[parameter], decays[parameter]), []).append(parameter)
    scaled = any(scale != 1.0 for scale, _ in groups)
    return [
        {"params": own, "weight_decay": decay} | ({LR_SCALE: scale} if scaled else {})
        # As timm orders them: first those without decay.
        for (scale, decay), own in sorted(groups.items(), key=lambda item: item[0][1] != 0)
    ]


def _scales(together: nn.Module, table: Optimizer) -> Iterator[tuple[nn.Parameter, float]]:
    """The factor of every parameter's learning rate: `head_lr`, and on backbones `layer_decay`."""
    from timm.optim import param_groups_layer_decay

    yield from ((parameter, table.head_lr) for parameter in together.parameters())
    for network in (module for module in together.modules() if isinstance(module, MultiExit)):
        yield from ((parameter, 1.0) for parameter in network.backbone.parameters())
        if table.layer_decay != 1.0:
            for group in param_groups_layer_decay(network.backbone, layer_decay=table.layer_decay):
                yield from ((parameter, group[LR_SCALE]) for parameter in group["params"])
        if (classifier := network.plan.classifier) is not None:
            own = network.backbone.get_submodule(classifier).parameters()
            yield from ((parameter, table.head_lr) for parameter in own)


def base_rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of parameters whose factor is 1."""
    group = optimizer.param_groups[0]
    return float(group["lr"] / group.get(LR_SCALE, 1.0))


def _of_timm(parameters: Any, table: Optimizer) -> torch.optim.Optimizer:
    import timm.optim

    optimizer = timm.optim.create_optimizer_v2(
        parameters, opt=table.opt, lr=table.lr, weight_decay=table.weight_decay, momentum=table.momentum
    )
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def complete_momentum(optimizer: torch.optim.SGD) -> None:
    """Gives every parameter of torch's SGD a momentum buffer if any has one: the fused kernel takes all or none."""
    started = any("momentum_buffer" in state for state in optimizer.state.values())
    for group in optimizer.param_groups if started else []:
        for parameter in group["params"]:
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def undecayed(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the parameters that timm's models exempt from weight decay (`no_weight_decay`), such as `pos_embed`.

    As in timm, the outermost module with such a list decides. Names may be patterns.
    """
    if callable(names := getattr(module, "no_weight_decay", None)):
        yield from (prefix + name for name in names())
        return
    for name, child in module.named_children():
        yield from undecayed(child, f"{prefix}{name}.")


def check_schedule(table: Schedule, epochs: int) -> None:
    """Raises UserError if the warm-up takes the whole run."""
    if table.warmup_epochs >= epochs:
        raise _too_long(table, epochs)


def _too_long(table: Schedule, epochs: int) -> UserError:
    return UserError(
        f"schedule.warmup_epochs = {table.warmup_epochs:g} lasts as long as the run (epochs = {epochs})",
        "fewer epochs than the run, or a fraction of the run (below 1)",
        "--set schedule.warmup_epochs=0.05",
        key="schedule.warmup_epochs",
    )


def create_schedule(optimizer: torch.optim.Optimizer, table: Schedule, epochs: int, updates_per_epoch: int) -> Any:
    """timm's learning-rate schedule, counted in updates; `step(update)` sets the rate of the next update."""
    from timm.scheduler import create_scheduler_v2

    total = epochs * updates_per_epoch

    def updates(time: float) -> int:
        # A time below 1 is a fraction of the run; from 1 on it is in epochs.
        return round(time * (updates_per_epoch if time >= 1 else total))

    if updates(table.warmup_epochs) >= total:
        raise _too_long(table, epochs)
    schedule, _ = create_scheduler_v2(
        optimizer,
        # A step that is never reached keeps the rate constant after the warm-up.
        sched="step" if table.sched == "none" else table.sched,
        num_epochs=total,
        decay_epochs=max(1, updates(table.decay_epochs)) if table.sched == "step" else 2 * total,
        decay_milestones=[updates(time) for time in table.decay_milestones],
        decay_rate=table.decay_rate,
        min_lr=table.min_lr,
        warmup_lr=table.warmup_lr,
        warmup_epochs=updates(table.warmup_epochs),
        # timm counts epochs here; counting updates instead makes every rate a function of one number.
        step_on_epochs=True,
    )
    schedule.step(0)
    return schedule
