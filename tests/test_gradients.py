"""What the trunk hears of its exits: the sum, the mean or nothing; heads alone; weights held at a share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sdcli.data.batch import Batch
from sdcli.errors import UserError
from sdcli.method.learner import Learner, build_objectives, what_trains
from sdcli.network.blueprint import Blueprint
from sdcli.network.gradients import Equilibrium
from sdcli.network.multi_exit import MultiExit, build
from sdcli.recipe.check import check_recipe
from sdcli.recipe.schema import Network

CLASSES = tuple("abcdefg")
# Maps in every layout: NCHW, tokens, tokens that shrink, NHWC; and branches, whose exits share one tensor.
LAYOUTS = ["test_resnet", "test_vit", "test_efficientnet", "pvt_v2_b0", "swin_tiny_patch4_window7_224"]


def network_of(name: str, gradients: str = "sum", **table: object) -> MultiExit:
    torch.manual_seed(0)
    network = build(Blueprint.draft(Network(**table), name, CLASSES)).double().eval()
    network.gradients = gradients  # type: ignore[assignment]
    return network


def own_gradients(network: MultiExit, images: Tensor, points: list[str]) -> dict[str, Tensor]:
    """The gradient of the summed losses of `points`, by parameter."""
    network.zero_grad()
    signals = network(images)
    torch.stack([signals[point].logits.square().sum() for point in points]).sum().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def images_for(network: MultiExit) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, *network.plan.input_size, dtype=torch.float64)


def test_linear_stages_get_the_mean_of_the_gradients_of_the_exits_behind_them() -> None:
    torch.manual_seed(0)
    stages = [nn.Linear(4, 4, bias=False).double() for _ in range(4)]
    heads = [nn.Linear(4, 3, bias=False).double() for _ in range(4)]
    images = torch.randn(5, 4, dtype=torch.float64)
    points = ["exit1", "exit2", "exit3", "final"]

    def logits(trunk: Equilibrium | None) -> list[Tensor]:
        tensor, said = images, []
        for stage, head, point in zip(stages, heads, points, strict=True):
            going = stage(tensor)
            tensor = going if trunk is None else trunk.visit(point, going)
            said.append(head(going if trunk is None else trunk.read.get(point, going)))
        return said

    weights = [stage.weight for stage in stages]
    alone = [
        torch.autograd.grad(said.square().sum(), weights, retain_graph=True, allow_unused=True) for said in logits(None)
    ]
    together = torch.autograd.grad(sum(said.square().sum() for said in logits(Equilibrium(points))), weights)
    for number, found in enumerate(together):
        behind = [own[number] for own in alone if own[number] is not None]
        assert len(behind) == 4 - number
        torch.testing.assert_close(found, sum(behind) / len(behind), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [*LAYOUTS, "branches"])
def test_every_weight_of_the_trunk_gets_the_mean_of_the_exits_that_use_it(name: str) -> None:
    model, table = ("test_resnet", {"branches": 3}) if name == "branches" else (name, {})
    loud, even = network_of(model, **table), network_of(model, "equilibrium", **table)
    images, points = images_for(loud), loud.points
    alone = [own_gradients(loud, images, [point]) for point in points]
    found = own_gradients(even, images, points)
    counts = set()
    for parameter, gradient in found.items():
        own = [gradients[parameter] for gradients in alone if parameter in gradients]
        expected = sum(own)
        if parameter.startswith("backbone."):
            expected = expected / len(own)
            counts.add(len(own))
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max() + 1e-30))
    assert counts >= {1, len(points)}, "deepest and shallowest weights were compared"


@pytest.mark.parametrize("name", [*LAYOUTS, "branches"])
def test_detached_exits_are_not_heard_in_the_trunk(name: str) -> None:
    model, table = ("test_resnet", {"branches": 3}) if name == "branches" else (name, {})
    loud, mute = network_of(model, **table), network_of(model, "detached", **table)
    images = images_for(loud)
    everything = own_gradients(loud, images, loud.points)
    final = own_gradients(loud, images, ["final"])
    found = own_gradients(mute, images, mute.points)
    assert found.keys() == everything.keys()
    for parameter, gradient in found.items():
        expected = final[parameter] if parameter.startswith("backbone.") else everything[parameter]
        assert torch.equal(gradient, expected), parameter


@pytest.mark.parametrize("gradients", ["sum", "equilibrium", "detached"])
def test_gradients_change_no_answer(gradients: str) -> None:
    plain, other = network_of("test_resnet"), network_of("test_resnet", gradients)
    images = images_for(plain)
    for point, signal in plain(images).items():
        assert torch.equal(signal.logits, other(images)[point].logits)


def test_a_plain_network_has_nothing_to_balance() -> None:
    plain, even = (network_of("test_resnet", gradients, exits="none") for gradients in ("sum", "equilibrium"))
    images = images_for(plain)
    one, other = (own_gradients(network, images, ["final"]) for network in (plain, even))
    assert all(torch.equal(one[parameter], other[parameter]) for parameter in one)


def test_only_points_that_teach_share_the_trunk() -> None:
    plain, even = network_of("test_resnet"), network_of("test_resnet", "equilibrium")
    images = images_for(plain)
    found = []
    for network in (plain, even):
        network.zero_grad()
        network(images, {"exit1": False, "final": True})["final"].logits.square().sum().backward()
        found.append({n: p.grad for n, p in network.backbone.named_parameters() if p.grad is not None})
    assert all(torch.equal(found[0][parameter], found[1][parameter]) for parameter in found[0])


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_equilibrium_holds_with_gradient_checkpointing(name: str) -> None:
    network = network_of(name, "equilibrium").train()
    images = images_for(network)
    torch.manual_seed(2)
    before = own_gradients(network, images, network.points)
    network.backbone.set_grad_checkpointing(True)
    torch.manual_seed(2)
    after = own_gradients(network, images, network.points)
    for parameter in before:
        torch.testing.assert_close(before[parameter], after[parameter])


def test_equilibrium_compiles_without_a_graph_break() -> None:
    network = network_of("test_resnet", "equilibrium")
    images = images_for(network)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    expected = own_gradients(network, images, network.points)
    network.zero_grad()
    signals = compiled(images)
    torch.stack([signals[point].logits.square().sum() for point in network.points]).sum().backward()
    for name, parameter in network.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])


def learner_of(tables: dict[str, object], phase: int = 0) -> Learner:
    recipe = check_recipe(tables)
    network = network_of("test_resnet", recipe.student.gradients)
    specs = {f"student.{point}": spec for point, spec in network.specs.items()}
    objectives, made = build_objectives(recipe, specs, len(CLASSES), 2)
    learner = Learner({"student": network}, objectives[phase], (), made)
    learner.teach(objectives[phase], what_trains(recipe, phase))
    return learner.train()


LABELS = {"kind": "cross_entropy", "on": "exits"}
TASK = {"kind": "cross_entropy", "on": "final"}
SOFT = {"kind": "kl", "on": "exits", "target": "final"}


def test_heads_alone_leave_the_backbone_as_it_is() -> None:
    learner = learner_of({"losses": {"labels": LABELS, "soft": SOFT}, "networks": {"student": {"trains": "heads"}}})
    network = learner.student
    assert not any(module.training for module in network.backbone.modules())
    assert all(module.training for module in network.heads.modules())
    before = {name: tensor.clone() for name, tensor in network.backbone.state_dict().items()}
    batch = Batch(images_for(network), torch.tensor([0, 1]), torch.arange(2))
    learner(batch)[0].backward()
    got = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert got == {name for name, _ in network.named_parameters() if name.startswith("heads.")}
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.backbone.state_dict().items())


def test_with_heads_the_classifier_of_final_learns_if_a_loss_is_on_it() -> None:
    learner = learner_of({"losses": {"labels": LABELS, "task": TASK}, "networks": {"student": {"trains": "heads"}}})
    trained = [n for n, p in learner.student.backbone.named_parameters() if p.requires_grad]
    assert trained == [f"{learner.student.plan.classifier}.{part}" for part in ("weight", "bias")]


def test_a_phase_trains_what_it_says() -> None:
    tables = {
        "losses": {"task": TASK, "labels": LABELS},
        "phases": [{"name": "trunk", "losses": ["task"]}, {"name": "exits", "losses": ["labels"], "trains": "heads"}],
    }
    for phase, start in enumerate(("backbone.", "heads.")):
        network = learner_of(tables, phase).student
        trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        assert trained and all(name.startswith(start) for name in trained)
        assert network.backbone.training == (phase == 0)


@pytest.mark.parametrize(
    ("student", "losses", "message"),
    [
        (
            {"trains": "heads"},
            {"labels": LABELS, "maps": {"kind": "attention", "on": "exits", "target": "final"}},
            "losses.maps is on the map of student.exit1, and no gradient passes on to the stages before it",
        ),
        (
            {"gradients": "detached"},
            {"task": TASK, "labels": LABELS, "maps": {"kind": "attention", "on": "exits", "target": "final"}},
            "losses.maps is on the map of student.exit1, and no gradient passes on to the stages before it",
        ),
        (
            {"trains": "heads"},
            {"labels": LABELS, "maps": {"kind": "hint", "on": "final", "target": "exit1"}},
            'losses.maps is on the embedding of student.final, which trains = "heads" leaves as it is',
        ),
        ({}, {"labels": LABELS}, "no loss teaches the classifier of student.final"),
        ({"trains": "heads"}, {"task": TASK}, "no loss teaches the classifier of student.exit1"),
    ],
)
def test_a_loss_that_cannot_teach_is_refused(student: object, losses: object, message: str) -> None:
    with pytest.raises(UserError) as error:
        learner_of({"losses": losses, "networks": {"student": student}})
    assert error.value.wrong.replace("student.", "") == message.replace("student.", "")


def test_the_last_stages_must_be_taught_in_a_phase_that_trains_them() -> None:
    tables = {
        "losses": {"task": TASK, "labels": LABELS},
        "phases": [{"name": "a"}, {"name": "b", "losses": ["labels"]}],
    }
    with pytest.raises(UserError, match=r"phases\.1: no loss teaches the classifier of final"):
        learner_of(tables)
