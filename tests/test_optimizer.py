"""Which parameters an optimizer decays."""

from __future__ import annotations

from typing import Any

import pytest
import timm.optim
import torch
from torch import nn

from sdcli.errors import UserError
from sdcli.method.optimizer import base_rate, check_optimizer, create_optimizer, create_schedule
from sdcli.network.blueprint import Blueprint
from sdcli.network.multi_exit import MultiExit, build
from sdcli.recipe.schema import Network, Optimizer, Schedule

TABLE = Optimizer(opt="adamw", lr=0.001, weight_decay=0.05, decay_norm_and_bias=False)
SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2}
HIERA = {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}


def network(model: str, **table: Any) -> MultiExit:
    return build(Blueprint.draft(Network(stem="imagenet", **table), model, ["no", "yes"], image_size=64))


def decayed(optimizer: Any, module: nn.Module) -> set[str]:
    groups = [group for group in optimizer.param_groups if group["weight_decay"]]
    chosen = {id(parameter) for group in groups for parameter in group["params"]}
    return {name for name, parameter in module.named_parameters() if id(parameter) in chosen}


@pytest.mark.parametrize(("model", "arguments", "exempt"), [
    ("test_vit", {}, "pos_embed"),
    ("swin_tiny_patch4_window7_224", SWIN, "layers.3.blocks.0.attn.relative_position_bias_table"),
    ("hiera_tiny_224", HIERA, "pos_embed"),
    ("test_resnet", {}, "bn1.weight"),
])  # fmt: skip
def test_a_network_with_exits_decays_what_timm_decays(model: str, arguments: dict[str, Any], exempt: str) -> None:
    networks = nn.ModuleDict(
        {"student": network(model, model_args=arguments), "peer": network(model, model_args=arguments)}
    )
    ours = decayed(create_optimizer([networks], TABLE), networks)
    plain = networks.get_submodule("student.backbone")
    timms = timm.optim.create_optimizer_v2(plain, "adamw", lr=TABLE.lr, weight_decay=TABLE.weight_decay)
    expected = decayed(timms, plain)
    assert expected and exempt not in expected and exempt in dict(plain.named_parameters())
    for name in ("student", "peer"):
        start = f"{name}.backbone."
        assert {n.removeprefix(start) for n in ours if n.startswith(start)} == expected


@pytest.mark.parametrize(("model", "arguments"), [("swin_tiny_patch4_window7_224", SWIN), ("hiera_tiny_224", HIERA)])
def test_a_branch_decays_what_the_part_it_copies_decays(model: str, arguments: dict[str, Any]) -> None:
    module = network(model, model_args=arguments, branches=2)
    ours = decayed(create_optimizer([module], TABLE), module)
    start = "heads.exit1.rest."
    copied = [name.removeprefix(start) for name, _ in module.named_parameters() if name.startswith(start)]
    assert copied
    for name in copied:
        assert (start + name in ours) == (f"backbone.{name}" in ours), name


def test_a_user_head_may_exempt_parameters_too() -> None:
    class Head(nn.Linear):
        def no_weight_decay(self) -> set[str]:
            return {"weight"}

    module = nn.ModuleDict({"head": Head(4, 4), "other": nn.Linear(4, 4)})
    assert decayed(create_optimizer([module], TABLE), module) == {"other.weight"}


@pytest.mark.filterwarnings("ignore:It is highly recommended")
@pytest.mark.parametrize("opt", timm.optim.list_optimizers())
def test_an_optimizer_takes_a_step_or_is_refused(opt: str) -> None:
    """Of timm's, some need CUDA, other packages or second derivatives."""
    table = Optimizer(opt=opt, lr=0.001)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    try:
        check_optimizer(table)
    except UserError as error:
        assert error.wrong.startswith(f"optimizer.opt = '{opt}' cannot be used: ")
        assert opt == "adahessian" or opt.startswith(("bnb", "fused"))
        return
    optimizer = create_optimizer([module], table)
    module(torch.ones(5, 3, 3, 3)).square().sum().backward()
    optimizer.step()


def test_everything_is_decayed_where_the_recipe_asks_for_it() -> None:
    module = network("test_vit")
    optimizer = create_optimizer([module], TABLE.model_copy(update={"decay_norm_and_bias": True}))
    assert decayed(optimizer, module) == {n for n, p in module.named_parameters() if p.requires_grad}


def rates(optimizer: Any, module: nn.Module) -> dict[str, float]:
    scales = {p: group.get("lr_scale", 1.0) for group in optimizer.param_groups for p in group["params"]}
    return {name: scales[parameter] for name, parameter in module.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lamb"])
def test_heads_and_the_final_classifier_have_a_rate_of_their_own(opt: str) -> None:
    module = network("test_resnet")
    table = Optimizer(opt=opt, lr=0.001, weight_decay=0.05, head_lr=10.0, decay_norm_and_bias=False)
    optimizer = create_optimizer([module], table)
    for name, scale in rates(optimizer, module).items():
        fresh = name.startswith("heads.") or name.startswith(f"backbone.{module.plan.classifier}.")
        assert scale == (10.0 if fresh else 1.0), name
    schedule = create_schedule(optimizer, Schedule(sched="cosine", warmup_epochs=1), 4, 10)
    for update in (0, 5, 20, 39):
        schedule.step(update)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(base_rate(optimizer) * group["lr_scale"], rel=1e-12)
    plain = create_optimizer([module], table.model_copy(update={"head_lr": 1.0}))
    assert decayed(optimizer, module) == decayed(plain, module)


@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
def test_early_layers_learn_slower(model: str) -> None:
    module = network(model)
    table = Optimizer(opt="adamw", lr=0.001, layer_decay=0.5, head_lr=4.0, decay_norm_and_bias=False)
    ours = rates(create_optimizer([module], table), module)
    timms = timm.optim.create_optimizer_v2(module.backbone, "adamw", lr=0.001, layer_decay=0.5)
    expected = rates(timms, module.backbone)
    assert min(expected.values()) < 0.5 < max(expected.values()) == 1.0
    for name, scale in expected.items():
        if not name.startswith(f"{module.plan.classifier}."):
            assert ours[f"backbone.{name}"] == scale
    assert {scale for name, scale in ours.items() if name.startswith("heads.")} == {4.0}


def test_losses_with_weights_learn_as_heads_do() -> None:
    module = nn.ModuleDict({"networks": network("test_resnet"), "adapt": nn.Linear(2, 2)})
    ours = rates(create_optimizer([module], Optimizer(head_lr=3.0)), module)
    assert ours["adapt.weight"] == 3.0 and ours["networks.backbone.layer1.0.conv1.weight"] == 1.0
