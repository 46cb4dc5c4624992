"""What follows a stage: copied as a branch, or shown one place at a time."""

from __future__ import annotations

import copy

import pytest
import torch

from sdcli.errors import UserError
from sdcli.method.check import check_names, check_with_model
from sdcli.network.backbones import create
from sdcli.network.blueprint import Blueprint
from sdcli.network.multi_exit import MultiExit, attach, build
from sdcli.recipe.address import FINAL
from sdcli.recipe.load import load_recipe
from sdcli.recipe.schema import Network

MODELS = [
    "test_resnet",
    "test_vit",
    "test_convnext",
    "test_efficientnet",
    "test_mambaout",
    "swin_tiny_patch4_window7_224",
]


CLASSES = [str(number) for number in range(7)]


def grown(name: str, branches: int = 3, *, copies: bool = False) -> MultiExit:
    """A network with branches, with weights of their own or with copies of the last stage's."""
    torch.manual_seed(0)
    table = Network(branches=branches)
    blueprint = Blueprint.draft(table, name, CLASSES)
    if copies:
        return attach(create(blueprint.architecture, device="cpu"), blueprint)
    return build(blueprint)


def images_for(network: MultiExit) -> torch.Tensor:
    return torch.randn(2, *network.plan.input_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_of_the_rest_says_what_the_network_says(name):
    network = grown(name, 2, copies=True).eval()
    with torch.no_grad():
        signals = network(images_for(network))
    assert torch.equal(signals["exit1"].logits, signals[FINAL].logits)
    assert torch.equal(signals["exit1"].embedding, signals[FINAL].embedding)
    backbone = {id(parameter) for parameter in network.backbone.parameters()}
    assert not backbone & {id(parameter) for parameter in network.heads.parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_branches_begin_with_weights_of_their_own_and_all_learn(name):
    network = grown(name)
    # A normalisation that begins at zero leaves all branches alike until it has learned.
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    signals = network(images_for(network))
    assert list(signals) == ["exit1", "exit2", FINAL]
    assert torch.equal(signals["exit1"].features, signals["exit2"].features)
    logits = [signal.logits for signal in signals.values()]
    assert all(not torch.allclose(one, other) for one, other in zip(logits, [*logits[1:], logits[0]], strict=True))
    sum(each.square().sum() for each in logits).backward()
    assert [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", MODELS)
def test_a_branch_costs_what_follows_its_stage(name):
    network = grown(name)
    plan, stage = network.plan, network.plan.stages[0]
    costs = network.blueprint.costs()
    assert costs["exit1"] == costs["exit2"]
    assert costs["exit1"].macs == plan.macs
    assert sum(p.numel() for p in network.heads["exit1"].parameters()) == plan.params - stage.params
    assert costs["ensemble"].macs == 3 * plan.macs - 2 * stage.macs
    assert costs["ensemble"].params == sum(p.numel() for p in network.parameters())


def test_the_branching_stage_is_the_last_but_one():
    assert [stage.module for stage in grown("test_resnet").plan.stages] == ["layer3", "layer3", "layer4"]


def test_a_network_with_branches_can_be_copied_and_its_copy_is_whole():
    network = grown("test_resnet").eval()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        assert network(images_for(network))["exit1"].logits.abs().sum() == 0
        assert twin(images_for(twin))["exit1"].logits.abs().sum() > 0


@pytest.mark.parametrize(("name", "reason"), [
    ("levit_128s", "levit_128s has no single classifier"),
    ("xcit_nano_12_p16_224", "xcit_nano_12_p16_224 does more after blocks.8 than call modules in sequence"),
])  # fmt: skip
def test_what_cannot_be_copied_is_refused(name, reason):
    with pytest.raises(UserError) as error:
        check_with_model(load_recipe(["one"]), name)
    assert error.value.wrong == f"branches: {reason}"


@pytest.mark.parametrize(("override", "key"), [("head=linear", "head"), ("exits=3", "exits")])
def test_branches_and_exits_exclude_each_other(override, key):
    with pytest.raises(UserError) as error:
        check_names(load_recipe(["one"], [f"networks.student.{override}"]))
    assert error.value.wrong == f"networks.student has branches and {key}"


# DenseClassifier


def watched(name: str) -> MultiExit:
    torch.manual_seed(0)
    network = build(Blueprint.draft(Network(exits="none"), name, CLASSES))
    network.read_densely()
    return network


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "densenet121"])
def test_places_say_on_average_what_the_network_says(name):
    """True where the classifier is linear and what it reads is the mean over the places."""
    network = watched(name).eval()
    with torch.no_grad():
        final = network(images_for(network))[FINAL]
    rows, columns = network.plan.stages[-1].size
    assert final.dense.shape == (2, 7, rows * columns)
    torch.testing.assert_close(final.dense.mean(dim=2), final.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "swin_tiny_patch4_window7_224"])
def test_a_place_is_worked_out_as_if_it_were_a_map_of_its_own(name):
    network = watched(name).eval()
    backbone = network.backbone
    with torch.no_grad():
        images = images_for(network)
        dense = network(images)[FINAL].dense
        features = backbone.forward_features(images)
        if features.ndim == 3:  # class token and 100 patches: the classifier reads the class token's place
            by_hand = backbone.forward_head(features[:, 1:][:, 5:6])
        elif name.startswith("swin"):
            by_hand = backbone.forward_head(features[:, 0:1, 5:6])
        else:
            by_hand = backbone.forward_head(features[:, :, 1:2, 0:1])
    torch.testing.assert_close(dense[:, :, 5], by_hand, atol=1e-5, rtol=1e-5)


# The second has batch norms behind the pooling.
@pytest.mark.parametrize("name", ["test_resnet", "levit_128s"])
def test_asking_places_changes_nothing_else(name):
    """No gradient and no batch statistics: the training step is the same as without."""
    plain, asked = watched(name), watched(name)
    plain._places = None
    images = images_for(plain)
    for each in (plain, asked):
        torch.manual_seed(0)
        each.train()(images)[FINAL].logits.sum().backward()
    assert all(module.training for module in asked.modules())
    for one, other in zip(plain.parameters(), asked.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    for one, other in zip(plain.buffers(), asked.buffers(), strict=True):
        assert torch.equal(one, other)
    assert asked(images)[FINAL].dense.requires_grad is False


def test_votes_are_refused_where_they_cannot_be_had():
    def message(*overrides: str, model: str = "test_resnet") -> str:
        with pytest.raises(UserError) as error:
            check_with_model(load_recipe(["zipf"], overrides), model)
        return error.value.wrong

    assert message(model="xcit_nano_12_p16_224") == (
        "signals.votes: xcit_nano_12_p16_224 does more after blocks.11 than call modules in sequence"
    )
    exits = ("networks.student.exits=auto", "losses.task.on=all")
    assert message(*exits, "signals.votes.of=exit1") == (
        "signals.votes: kind = 'votes' reads the last map: it works on final, not on exit1"
    )
    assert message(*exits, "signals.votes.of=all") == "signals.votes: kind = 'votes' reads one point"
