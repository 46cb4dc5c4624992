"""Losses against values from the papers' formulas, and what must hold for every one of them."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import batch_of, tensor

from sdcli.errors import UserError
from sdcli.method.check import remarks
from sdcli.method.learner import build_objectives
from sdcli.method.losses import LOSSES
from sdcli.method.losses.features import Hint
from sdcli.method.losses.labels import cross_entropy, standardized
from sdcli.method.losses.logits import balanced_kl, dkd, kl, soft_cross_entropy, wttm
from sdcli.method.objective import Objective
from sdcli.method.random_weights import random_weights
from sdcli.network.multi_exit import PointSpec
from sdcli.network.signals import Signal
from sdcli.recipe.load import load_recipe
from sdcli.recipe.schema import Loss
from sdcli.registry import Entry


def test_cross_entropy_equals_the_formula(case):
    of = case("ce")
    assert of.agrees(cross_entropy(of["S"], of.batch).mean(), "ce")


def test_label_smoothing_is_uniform_over_all_classes(case):
    of = case("label_smoothing")
    assert of.agrees(cross_entropy(of["S"], of.batch, smoothing=0.1).mean(), "uniform_over_all_C")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("T1", {"temperature": 1.0}),
        ("T3_T2", {"temperature": 3.0}),
        ("T4_T2", {"temperature": 4.0}),
        ("T4_noT2", {"temperature": 4.0, "rescale": False}),
    ],
)
def test_kl_equals_the_formula(case, name, options):
    of = case("kl")
    student = of["S"].requires_grad_()
    value = kl(student, of["T"], of.batch, **options).mean()
    assert of.agrees(value, name)
    if name == "T4_T2":
        value.backward()
        assert of.agrees(student.grad, "grad_S of T4_T2")


@pytest.mark.parametrize(("name", "rescale"), [("no_T2", False), ("with_T2", True)])
def test_soft_cross_entropy_equals_the_authors_code(case, name, rescale):
    of = case("soft_ce_T3")
    assert of.agrees(soft_cross_entropy(of["S"], of["T"], of.batch, temperature=3.0, rescale=rescale).mean(), name)


def test_soft_cross_entropy_has_the_gradient_of_kl():
    torch.manual_seed(0)
    teacher, batch = torch.randn(4, 5, dtype=torch.float64), batch_of([0, 1, 2, 3])
    gradients = []
    for loss in (kl, soft_cross_entropy):
        student = torch.ones(4, 5, dtype=torch.float64, requires_grad=True)
        loss(student, teacher, batch, temperature=3.0).sum().backward()
        gradients.append(student.grad)
    assert torch.allclose(*gradients, atol=1e-12)


def test_standardized_kl_by_hand():
    # Of three classes, with standard deviations 5 and 2: what is left is (-1, 0, 1) and (1, 0, -1). At temperature 1 / ln 2
    # these are 1 : 2 : 4 and 4 : 2 : 1.
    student, teacher = tensor([[-2.0, 3.0, 8.0]]), tensor([[9.0, 7.0, 5.0]])
    value = kl(student, teacher, batch_of([0]), temperature=1 / math.log(2), standardize=True)
    assert value.item() == pytest.approx(3 / 7 * math.log(4) / math.log(2) ** 2, abs=1e-9)


@pytest.mark.parametrize("loss", [kl, soft_cross_entropy, balanced_kl, dkd], ids=lambda loss: loss.__name__)
def test_standardized_losses_see_neither_the_size_nor_the_mean_of_logits(loss):
    torch.manual_seed(0)
    student, teacher, batch = torch.randn(4, 5).double(), torch.randn(4, 5).double(), batch_of([0, 1, 2, 3])
    plain = loss(standardized(student), standardized(teacher), batch)
    moved = loss(3 * student + 7, 0.1 * teacher - 2, batch, standardize=True)
    assert torch.allclose(moved, plain, atol=1e-9)
    assert not torch.allclose(loss(student, teacher, batch), plain, atol=1e-2)


@pytest.mark.parametrize("name", ["kl", "soft_cross_entropy", "balanced_kl", "dkd", "cross_entropy"])
def test_standardize_is_a_key_of_what_compares_softmaxes(name):
    assert LOSSES.find(name).options["standardize"] is False


def test_wttm_by_hand():
    # The square roots of 0.64 and 0.36 are 0.8 and 0.6, which make 1.4; the student is undecided.
    teacher = tensor([[math.log(0.64), math.log(0.36)]])
    value = wttm(tensor([[3.0, 3.0]]), teacher + 5, batch_of([0]), gamma=0.5)
    assert value.item() == pytest.approx(0.8 * math.log(8 / 7) + 0.6 * math.log(6 / 7), abs=1e-12)


def test_wttm_with_gamma_1_is_kl_at_temperature_1():
    torch.manual_seed(0)
    student, teacher, batch = torch.randn(4, 5).double(), torch.randn(4, 5).double(), batch_of([0, 1, 2, 3])
    assert torch.allclose(
        wttm(student, teacher, batch, gamma=1.0), kl(student, teacher, batch, temperature=1.0), atol=1e-12
    )


def test_wttm_equals_the_formula_written_naively():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    power = teacher.softmax(1) ** 0.2
    target = power / power.sum(1, keepdim=True)
    naive = power.sum(1) * (target * (target.log() - student.softmax(1).log())).sum(1)
    assert torch.allclose(wttm(student, teacher, batch_of([0] * 4)), naive, atol=1e-12)


# Random weights


def weights_at(epoch: float, seed: int = 5) -> list[float]:
    objective = Objective(load_recipe(["random-weights"]).losses, WIDTHS, seed=seed)
    objective.set_time(epoch, 10.0)
    return objective.now.tolist()


def test_random_weights_sum_to_1_and_depend_on_seed_and_update_alone():
    assert len(weights_at(0.0)) == 5
    assert sum(weights_at(0.25)) == pytest.approx(1.0) and min(weights_at(0.25)) > 0
    assert weights_at(0.25) == weights_at(0.25)
    assert len({tuple(weights) for weights in (weights_at(0.0), weights_at(0.25), weights_at(0.25, seed=6))}) == 3


def test_random_weights_are_softmaxes_of_normal_numbers():
    # The logarithm of the ratio of two weights is the difference of two normal numbers: mean 0, variance 2.
    weights = torch.tensor([random_weights(1, epoch / 7, 2) for epoch in range(4000)]).double()
    ratios = (weights[:, 0] / weights[:, 1]).log()
    assert ratios.mean().item() == pytest.approx(0.0, abs=0.1) and ratios.var().item() == pytest.approx(2.0, abs=0.2)


def test_random_weights_replace_those_of_the_recipe():
    torch.manual_seed(0)
    signals = {p: Signal(torch.randn(2, 4), torch.randn(2, 32), torch.randn(2, 4)) for p in WIDTHS}
    losses = {
        "task": Loss(kind="cross_entropy", on="all", weight=50.0),
        "off": Loss(kind="kl", on="exits", target="final", weight=0),
    }
    objective, batch = Objective(losses, WIDTHS, seed=5), batch_of([0, 1])
    objective.set_time(0.5, 1.0)
    values = [cross_entropy(signals[point].logits, batch).mean() for point in WIDTHS]
    wanted = sum(weight * value for weight, value in zip(random_weights(5, 0.5, 3), values, strict=True))
    assert objective(signals, batch)[0].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_random_weights_refuse_weights_over_time():
    with pytest.raises(UserError) as error:
        load_recipe(["byot"], ["random_weights=true", "losses.soft.weight={ value = 1.0, warmup = 0.1 }"])
    assert str(error.value) == (
        "--set random_weights=true: random_weights = true replaces losses.soft.weight, which changes over time\n"
        "  expected: weights that are constant, or no random weights\n"
        "  fix:      --set losses.soft.weight=1.0, or --set random_weights=false"
    )


def test_weights_that_random_ones_replace_are_named():
    found = remarks(load_recipe(["byot"], ["random_weights=true"]))
    assert [note.partition(":")[0] for note in found] == [
        f"losses.{name}.weight has no effect" for name in ("exits", "soft", "hint")
    ]
    assert remarks(load_recipe(["random-weights"])) == []


def test_hint_is_a_sum_of_squares_or_its_root():
    student, teacher = tensor([[1.0, 2.0], [0.0, 0.0]]), tensor([[1.0, 0.0], [4.0, 4.0]])
    # differences 0, 2, 4, 4: squares 4 + 16 + 16
    assert Hint(2, 2)(student, teacher, batch_of([0, 0])).mean().item() == 36.0
    assert Hint(2, 2, norm="l2")(student, teacher, batch_of([0, 0])).item() == 6.0


@pytest.mark.parametrize("norm", ["squared", "l2"])
def test_hint_has_a_finite_gradient_where_both_are_equal(norm):
    student = torch.ones(2, 3, requires_grad=True)
    Hint(3, 3, norm=norm)(student, torch.ones(2, 3), batch_of([0, 0])).mean().backward()
    assert torch.equal(student.grad, torch.zeros(2, 3))


def test_the_parts_of_a_batch_add_up_to_the_hint_of_the_whole():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    whole = Hint(3, 3)(student, teacher, batch_of([0] * 4)).mean()
    halves = []
    for half in (slice(0, 2), slice(2, 4)):
        batch = batch_of([0, 0])
        batch.whole = 4
        halves.append(Hint(3, 3)(student[half], teacher[half], batch).mean())
    # What processes and parts of an update do with their losses.
    torch.testing.assert_close(torch.stack(halves).mean(), whole)


def test_no_gradient_reaches_a_target():
    torch.manual_seed(0)
    signals = {p: Signal(*(torch.randn(2, 4, requires_grad=True) for _ in range(3))) for p in ("exit1", "final")}
    losses = load_recipe(["byot"], ["losses.task.weight=1e-30", "losses.hint.weight=1.0"]).losses
    total, _ = Objective(losses, {p: PointSpec(4, 4) for p in signals})(signals, batch_of([0, 1]))
    total.backward()
    assert signals["exit1"].logits.grad.abs().max() > 1e-3
    assert signals["final"].logits.grad.abs().max() < 1e-20
    assert signals["final"].embedding.grad is None


def test_losses_are_worked_out_in_float32():
    signals = {p: Signal(*(torch.randn(2, 4).bfloat16() for _ in range(3))) for p in ("exit1", "final")}
    total, _ = Objective(load_recipe(["byot"]).losses, {p: PointSpec(4, 4) for p in signals})(signals, batch_of([0, 1]))
    assert total.dtype == torch.float32


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda student, batch: 1.0, "losses.mine returned float at final"),
        (lambda student, batch: student.detach().mean(), "losses.mine returned a value without a gradient at final"),
    ],
)
def test_a_loss_from_which_nothing_can_be_learnt_is_named(loss, message, monkeypatch):
    monkeypatch.setitem(LOSSES.entries, "mine", Entry("mine", loss, reads="logits"))
    losses = {"mine": Loss(kind="mine", on="final")}
    signals = {"final": Signal(*(torch.randn(2, 4, requires_grad=True) for _ in range(3)))}
    with pytest.raises(UserError) as error:
        Objective(losses, {"final": PointSpec(4, 4)})(signals, batch_of([0, 1]))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("loss", "shape", "fix"),
    [
        (lambda student, batch: student, [2, 4], "a mean or sum over all dimensions but the first"),
        (lambda student, batch: student[:, :1], [2, 1], "a mean or sum over all dimensions but the first"),
        (lambda student, batch: student.mean(dim=0), [4], "one value for each of the batch's images"),
        (
            lambda student, batch: torch.cat([student, student]).mean(dim=1),
            [4],
            "one value for each of the batch's images",
        ),
    ],
)
def test_a_loss_of_another_shape_is_refused(loss, shape, fix, monkeypatch):
    monkeypatch.setitem(LOSSES.entries, "mine", Entry("mine", loss, reads="logits"))
    signals = {"final": Signal(*(torch.randn(2, 4, requires_grad=True) for _ in range(3)))}
    objective = Objective({"mine": Loss(kind="mine", on="final")}, {"final": PointSpec(4, 4)})
    with pytest.raises(UserError) as error:
        objective(signals, batch_of([0, 1]))
    assert str(error.value) == (
        f"losses.mine returned a tensor of shape {shape} at final\n"
        "  expected: one value [], or one for each image [2]\n"
        f"  fix:      {fix}"
    )


def test_a_loss_that_cannot_be_built_is_named(monkeypatch):
    class Mine(torch.nn.Module):
        def __init__(self, width):
            super().__init__()

    monkeypatch.setitem(LOSSES.entries, "mine", Entry("mine", Mine, reads="features"))
    losses, widths = {"mine": Loss(kind="mine", on="exit1", target="final")}, {"exit1": PointSpec(4, 4)}
    with pytest.raises(UserError) as error:
        Objective(losses, {**widths, "final": PointSpec(8, 8)})
    assert error.value.wrong.startswith("losses.mine at exit1: kind = 'mine' cannot be built: TypeError: ")


@pytest.mark.parametrize("reduced", [lambda values: values, torch.mean])
def test_a_loss_may_return_one_value_or_one_for_each_image(reduced, monkeypatch):
    entry = Entry("mine", lambda student, batch: reduced(student.mean(dim=1)), reads="logits")
    monkeypatch.setitem(LOSSES.entries, "mine", entry)
    signals = {"final": Signal(*(torch.ones(2, 4, requires_grad=True) for _ in range(3)))}
    objective = Objective({"mine": Loss(kind="mine", on="final")}, {"final": PointSpec(4, 4)})
    assert objective(signals, batch_of([0, 1]))[0].item() == 1.0


WIDTHS = {"exit1": PointSpec(8, 16), "exit2": PointSpec(16, 32), "final": PointSpec(32, 32)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["losses.soft.kind=kll"],
            "losses.soft.kind: unknown loss 'kll'\n"
            f"  expected: one of kl, dkd, nkd, balanced_kl, tf_nkd, similarity, …; {len(LOSSES.entries)} in all: sdcli recipes losses\n"
            "  fix:      did you mean 'kl'?",
        ),
        (
            ["losses.soft.temprature=3.0"],
            "losses.soft: unknown key 'temprature'\n"
            "  expected: one of direction, rescale, standardize, temperature\n"
            "  fix:      did you mean 'temperature'?",
        ),
        (
            ["losses.soft.temperature=0.0"],
            "losses.soft.temperature = 0.0\n  expected: greater than 0\n  fix:      the default is 4.0",
        ),
        (
            ["losses.soft.on=exit4"],
            "losses.soft.on = 'exit4': the network has no such point\n"
            "  expected: one of exit1, exit2, final\n"
            "  fix:      did you mean 'exit2'?",
        ),
        (
            ["losses.exits.weight=[0.5]"],
            "losses.exits.weight is a list of length 1\n  expected: one number, or one for each of exit1, exit2",
        ),
        (
            ["losses.soft.target=label"],
            "losses.soft: kind = 'kl' compares with another point, but no target is set\n  expected: target = 'final', 'next' or an exit\n  fix:      add target = \"final\" to [losses.soft]",
        ),
        (
            ["losses.task.target=exit1"],
            "losses.task.target = 'exit1': kind = 'cross_entropy' compares only with the labels\n  expected: no target\n  fix:      remove target from [losses.task], or choose a kind that has one, such as kl",
        ),
        (
            ["losses.soft.on=all"],
            "losses.soft.target: final is compared with itself\n  expected: a target other than the point it teaches",
        ),
        (
            ["losses.soft.on=all", "losses.soft.target=next"],
            'losses.soft.target: \'final\' has no next deeper point\n  expected: on = "exits" with target = "next"',
        ),
        (
            ["losses.hint.on=exit1"],
            "losses.hint at exit1: the embeddings have different widths: 16 and 32\n"
            "  expected: embeddings of the same width\n"
            '  fix:      adapt = "auto", or a head whose embedding has the target\'s width, such as head = "bottleneck"',
        ),
        (
            ["losses.exits.on=exit2", "losses.soft.on=exit2", "losses.hint.on=exit2"],
            "no loss teaches the classifier of exit1\n"
            "  expected: a loss on the logits of every point\n"
            '  fix:      add a loss with on = "all", or set networks.student.exits = "none"',
        ),
    ],
)
def test_a_mistake_in_a_loss_is_explained(overrides, message):
    with pytest.raises(UserError) as error:
        build_objectives(load_recipe(["byot"], overrides), WIDTHS, 2, 1)
    assert str(error.value) == message


def test_next_is_the_next_deeper_point():
    losses = load_recipe(["byot"], ["losses.soft.target=next", "losses.hint.weight=0.0"]).losses
    objective = Objective(losses, WIDTHS)
    assert [(t.on, t.target) for t in objective.terms if t.name == "soft"] == [("exit1", "exit2"), ("exit2", "final")]


def test_weights_are_given_per_exit():
    objective = Objective(
        load_recipe(["byot"], ["losses.exits.weight=[0.25, 0.5]", "losses.hint.weight=0.0"]).losses, WIDTHS
    )
    assert [t.weight.value for t in objective.terms if t.name == "exits"] == [0.25, 0.5]
