"""What the trunk hears of its exits: the sum, the mean or nothing; heads alone; weights held at a share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sdcli.data.batch import Batch
from sdcli.errors import UserError
from sdcli.method.learner import Learner, build_objectives, what_trains
from sdcli.method.shares import Shares, is_measured_at
from sdcli.network.blueprint import Blueprint
from sdcli.network.gradients import Equilibrium
from sdcli.network.multi_exit import MultiExit, build
from sdcli.recipe.check import check_recipe
from sdcli.recipe.schema import Network, WeightSchedule
from sdcli.run.still import Stillness

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


def shares_of(**shares: float) -> Shares:
    weights = {name: WeightSchedule(share=share, of="task") for name, share in shares.items()}
    return Shares(weights).double()


def test_a_share_holds_at_the_first_measurement_and_follows_averages_after_it() -> None:
    shares = shares_of(soft=0.5, hint=0.1)
    assert shares.found == {"soft": 0.0, "hint": 0.0}
    shares.see({"task": 3.0, "soft": 7.0, "hint": 2e5, "other": 1.0})
    assert shares.found["soft"] * 7.0 == pytest.approx(0.5 * 3.0, rel=1e-12)
    assert shares.found["hint"] * 2e5 == pytest.approx(0.1 * 3.0, rel=1e-12)
    shares.see({"task": 6.0, "soft": 7.0, "hint": 1e5})
    task, hint = (math.exp(0.9 * math.log(old) + 0.1 * math.log(new)) for old, new in ((3.0, 6.0), (2e5, 1e5)))
    assert shares.found["soft"] * 7.0 == pytest.approx(0.5 * task, rel=1e-12)
    assert shares.found["hint"] * hint == pytest.approx(0.1 * task, rel=1e-12)


def test_a_share_moves_by_a_factor_of_two_at_most_and_ignores_what_cannot_be_measured() -> None:
    shares = shares_of(soft=1.0)
    for norms in ({"task": 1.0}, {"task": 0.0, "soft": 1.0}, {"task": math.nan, "soft": 1.0}):
        shares.see(norms)
    # The task was measured in the first one, the loss in the others.
    assert shares.found["soft"] == pytest.approx(1.0, rel=1e-12)
    shares.see({"task": 1e30, "soft": 1.0})
    assert shares.found["soft"] == pytest.approx(2.0, rel=1e-12)
    shares.see({"task": 1.0, "soft": 1e200})
    assert shares.found["soft"] == pytest.approx(1.0, rel=1e-12)
    tiny = shares_of(soft=1.0)
    tiny.see({"task": 1e-200, "soft": 1e200})
    assert tiny.found["soft"] == 1e-8


def test_shares_are_measured_early_and_in_the_first_half() -> None:
    assert [n for n in range(1, 1001) if is_measured_at(n, 1000)] == [1, 10, 25, 50, 250, 450]


def test_the_state_of_shares_is_their_buffers() -> None:
    first, second = shares_of(soft=0.5), shares_of(soft=0.5)
    first.see({"task": 3.0, "soft": 7.0})
    second.load_state_dict(first.state_dict())
    assert second.found == first.found
    for shares in (first, second):
        shares.see({"task": 4.0, "soft": 1.0})
    assert second.found == first.found


def test_a_loss_is_held_at_its_share_of_the_gradient_on_the_backbone() -> None:
    """Measured as a run does, on a network in float64; the heads' gradients do not count."""
    soft = {**SOFT, "weight": {"share": 0.3, "of": "task"}}
    learner = learner_of({"losses": {"task": {**TASK, "weight": 2.0}, "labels": LABELS, "soft": soft}})
    learner.double()
    objective, network = learner.objective, learner.student
    batch = Batch(images_for(network), torch.tensor([0, 1]), torch.arange(2))
    backbone = [p for p in network.backbone.parameters() if p.requires_grad]

    def norms() -> dict[str, float]:
        _, parts = learner(batch)
        found = {}
        for name, part in parts.items():
            own = torch.autograd.grad(part, backbone, retain_graph=True, allow_unused=True)
            found[name] = float(nn.utils.get_total_norm([g for g in own if g is not None]))
        return found

    assert norms()["soft"] == 0
    with objective.unweighted():
        measured = norms()
    objective.shares.see(measured)
    objective.set_time(0.0, 1.0)
    held = norms()
    assert held["task"] == pytest.approx(measured["task"], rel=1e-12)
    assert held["soft"] == pytest.approx(0.3 * held["task"], rel=1e-10)


def share(**table: object) -> dict[str, object]:
    return {"losses": {"task": TASK, "labels": LABELS, "soft": {**SOFT, "weight": table}}}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (share(share=0.1), "losses.soft.weight has share without of"),
        (share(of="task"), "losses.soft.weight has of without share"),
        (share(share=0.1, of="task", value=1.0), "losses.soft.weight has share and value"),
        (share(share=0.1, of="task", to=1.0), "losses.soft.weight has share and to"),
        (share(share=0.1, of="tusk"), "losses.soft.weight.of: unknown loss 'tusk'"),
        (share(share=0.1, of="soft"), "losses.soft.weight.of = 'soft', whose weight finds itself too"),
        (
            share(share=0.1, of="task") | {"networks": {"student": {"gradients": "detached"}}},
            'losses.soft has a share of losses.task, but with gradients = "detached" no gradient of losses.soft '
            "reaches the backbone, where it is measured",
        ),
        (
            share(share=0.1, of="task") | {"phases": [{"name": "a", "losses": ["labels", "soft"]}]},
            "phases.0: losses.soft has a share of losses.task, which is not in this phase",
        ),
    ],
)
def test_a_share_that_cannot_be_measured_is_refused(tables: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_recipe(tables)
    assert error.value.wrong == message


def test_losses_that_teach_nothing_are_named_once() -> None:
    still = Stillness(["task", "still", "zero", "resting"], 40)
    assert still.last == 40 and Stillness([], 1000).last == 100
    for value in (3.0, 2.0, 1.0):
        still.see(torch.tensor([value, 5.0, value, 0.0]))
    norms = {"task": 1.0, "still": 1.0, "zero": 0.0, "resting": 0.0}
    assert still.remarks(norms, ["resting"]) == [
        "losses.still teaches nothing: its value has not changed by update 40",
        "losses.zero teaches nothing: its gradient is 0 at update 40",
    ]
