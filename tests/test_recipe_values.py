"""The recipes as they are shipped against values of the papers' formulas: what a run of each minimises, in its last phase."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import Case
from torch import Tensor, nn

from sdcli.data.batch import Batch
from sdcli.method.learner import DerivedSignal, build_objectives
from sdcli.method.losses.contrast import Crd
from sdcli.method.losses.labels import cross_entropy, virtual_teacher
from sdcli.method.losses.logits import confidence, dist, dkd, nkd
from sdcli.method.losses.relations import propagate
from sdcli.network.multi_exit import PointSpec
from sdcli.network.signals import Signal
from sdcli.recipe.load import load_recipe

Signals = dict[str, Signal]


def said(logits: Tensor | None = None, embedding: Tensor | None = None, features: Tensor | None = None) -> Signal:
    """What a point says; what nobody is to read is empty."""
    given = next(part for part in (logits, embedding, features) if part is not None)
    nothing = given.new_zeros(len(given), 1)
    return Signal(
        nothing[:, :, None, None] if features is None else features, nothing if embedding is None else embedding, logits
    )


def taught(
    recipe: str, signals: Signals, case: Case, *overrides: str, at: tuple[float, float] = (1.0, 1.0)
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that a run of the recipe works out of these signals, and its parts; `at` is the time of the run."""
    widths = {
        place: PointSpec(signal.features.shape[1], signal.embedding.shape[1], signal.logits is not None)
        for place, signal in signals.items()
        if "@" not in place
    }
    num_classes = next(signal.logits.shape[1] for signal in signals.values() if signal.logits is not None)
    (*_, objective), making = build_objectives(load_recipe([recipe], overrides), widths, num_classes, 10)
    objective.set_time(*at)
    for name, make in making.items():
        made(make, case)
        signals[name] = make(signals, case.batch)
    total, parts = objective(signals, case.batch)
    assert case.equals(total, sum(part.item() for part in parts.values()))
    return total, parts


def made(make: DerivedSignal, case: Case) -> None:
    make.to(case.dtype).eval()
    if gate := getattr(make.make, "gate", None):
        # The vectors give what comes before the ReLU: a linear layer and a batch norm that change nothing.
        nn.init.eye_(gate[0].weight)
        nn.init.zeros_(gate[0].bias)
        gate[1].eps = 0.0


def exits_of(case: Case) -> Signals:
    points = ["exit1", "exit2", "exit3", "final"]
    return {p: said(*both) for p, *both in zip(points, case["exit_logits"], case["exit_feats"], strict=True)}


# BYOT


@pytest.mark.parametrize(("name", "overrides"), [("T1", ["losses.soft.temperature=1.0"]), ("T3_with_T2", [])])
def test_byot_equals_the_papers_equation(case, name, overrides):
    of = case("byot_paper_form")
    paper = ("losses.soft.weight=0.3", "losses.hint.weight=0.03")
    assert of.agrees(taught("byot", exits_of(of), of, *paper, *overrides)[0], name)


def test_byot_journal_equals_the_authors_code(case):
    of = case("byot_journal_code")
    # The vector has the identity for the adaptation layers.
    assert of.agrees(taught("byot-journal", exits_of(of), of, "losses.hint.adapt=none")[0], "total")


def test_byot_scan_equals_the_authors_code(case):
    of = case("scan_code")
    assert of.agrees(taught("byot-scan", exits_of(of), of)[0], "total")


def test_byot_without_a_hint_is_byot_less_its_hint(case):
    of = case("byot_paper_form")
    total, parts = taught("byot", exits_of(of), of)
    assert of.equals(taught("byot-nohint", exits_of(of), of)[0], (total - parts["hint"]).item())


def test_deep_supervision_is_the_sum_of_cross_entropies(case):
    of = case("dsn_total")
    _, parts = taught("deep-supervision", exits_of(of), of)
    assert of.agrees(sum(parts.values()), "total")


# Maps of one network: the last of them has a classifier, which adds its cross entropy


def maps(case: Case, *names: str) -> Signals:
    points = [*(f"exit{number}" for number in range(1, len(names))), "final"]
    signals = {point: said(features=case[name]) for point, name in zip(points, names, strict=True)}
    signals["final"].logits = case[names[-1]].new_zeros(len(case[names[-1]]), 2)
    case.batch.labels = torch.zeros(len(case[names[-1]]), dtype=torch.long)
    return signals


@pytest.mark.parametrize(("target", "name"), [("next", "adjacent (1<-2, 2<-3)"), ("final", "all_from_deepest")])
def test_scd_equals_the_reconstruction(case, target, name):
    of = case("scd_reconstruction")
    parts = taught("scd", maps(of, "L1", "L2", "L3"), of, f"losses.relations.target={target}")[1]
    assert of.equals(parts["relations"], 3000 * of.expected[name], scale=3000)
    assert of.equals(parts["task"], math.log(2))


def test_sp_equals_the_authors_code(case):
    of = case("sp")
    parts = taught("sp", maps(of, "FS3", "FT3"), of)[1]
    assert of.equals(parts["relations"], 3000 * of.expected["loss"], scale=3000)


def test_at_equals_the_authors_code(case):
    of = case("at")
    parts = taught("at", maps(of, "FS", "FT"), of)[1]
    assert of.equals(parts["attention"], 1000 * of.expected["official_mean"], scale=1000)


def test_sad_equals_the_formula_once_it_is_on(case):
    of = case("sad")
    before, then = (taught("sad", maps(of, "shallow", "deep"), of, at=(e, 200.0))[1]["attention"] for e in (99, 100))
    assert before == 0.0
    assert of.equals(then, 0.1 * of.expected["channel_sum_align_corners_true_mse"])


# Branches


def branches(case: Case) -> Signals:
    signals = {p: said(z) for p, z in zip(("exit1", "exit2", "final"), case["branches"], strict=True)}
    signals["exit1"].features = case["gate_pre"][:, :, None, None]
    return signals


@pytest.mark.parametrize("recipe", ["one", "one-exits"])
def test_one_equals_the_authors_code(case, recipe):
    of = case("one_gate")
    total, parts = taught(recipe, branches(of), of, at=(81.0, 300.0))
    labels = sum(of.expected["ce_branches"]) + of.expected["ce_ensemble"]
    assert of.equals(parts["labels"], labels)
    # Their code adds 1e-7 to the target's probabilities; these are the formula's values, without.
    assert of.equals(parts["soft"], sum(of.expected["kl_branches_T2"]))
    assert total.item() == pytest.approx(of.expected["total_ramp1"], abs=1e-5)


def test_one_learns_from_the_mix_along_a_ramp(case):
    of = case("one_gate")
    soft = [taught("one", branches(of), of, at=(epoch, 300.0))[1]["soft"] for epoch in (0, 40.005, 80.01, 300)]
    ramp = [math.exp(-5), math.exp(-5 / 4), 1.0, 1.0]
    whole = sum(of.expected["kl_branches_T2"])
    assert [value.item() for value in soft] == pytest.approx([whole * share for share in ramp], rel=1e-4)


# One classifier


def test_cs_kd_equals_the_authors_code(case):
    of = case("cs_kd")
    total, parts = taught("cs-kd", {"final": said(of["anchor"]), "final@mate": said(of["classmate"])}, of)
    assert of.agrees(parts["soft"], "cls_loss")
    assert of.agrees(total, "total")


def test_ddgsd_equals_the_formula_but_for_a_mean_that_is_logged_twice(case):
    of = case("ddgsd_reconstruction")
    views = {"final": said(of["view_a"], of["feat_a"]), "final@view": said(of["view_b"], of["feat_b"])}
    total, parts = taught("ddgsd", views, of)
    assert of.equals(parts["mean"], 2 * 0.0005 * of.expected["mmd_linear"])
    assert of.agrees(total - parts["mean"] / 2, "total")


def test_bake_equals_the_authors_code_and_its_gradient(case):
    of = case("bake")
    logits, features = of["logits"].requires_grad_(), of["feats"].requires_grad_()
    total, parts = taught("bake", {"final": said(logits, features)}, of)
    assert of.agrees(parts["soft"], "kd_loss_T2")
    assert of.agrees(total, "total")
    (gradient,) = torch.autograd.grad(parts["soft"], logits)
    assert of.agrees(gradient, "grad_logits of kd_loss_T2")
    assert features.grad is None


def test_bake_carries_predictions_to_those_that_are_alike(case):
    of = case("bake")
    # Of unit predictions, almost all of each is carried once at a small omega: what is left is the affinity.
    carried = propagate(1e3 * torch.eye(3, dtype=torch.float64), of["feats"].double(), omega=1e-6, temperature=1.0)
    affinity = (carried - carried.diag().diag()) / 1e-6
    torch.testing.assert_close(affinity, torch.tensor(of.expected["affinity"]).double(), atol=1e-5, rtol=1e-5)


def test_tf_nkd_equals_the_authors_code(case):
    of = case("tf_nkd")
    assert of.agrees(taught("tf-nkd", {"final": said(of["S4"])}, of)[0], "total_with_ce")


def test_zipf_equals_the_authors_code(case):
    of = case("zipf_ls")
    final = said(of["S4"])
    final.dense = 10 * F.one_hot(torch.tensor(of.inputs["dense_argmax"]), 4).mT.to(of.dtype)
    assert of.agrees(taught("zipf", {"final": final}, of)[0], "total_cifar100 (CE + 0.1*zipf)")


def test_label_smoothing_equals_the_formula(case):
    of = case("label_smoothing")
    for over, name in (("all", "uniform_over_all_C"), ("others", "uniform_over_non_target")):
        assert of.agrees(
            taught("label-smoothing", {"final": said(of["S"])}, of, f"losses.task.smooth_over={over}")[0], name
        )


def test_tf_kd_is_a_tenth_of_its_virtual_teacher(case):
    of = case("ce")
    total, _ = taught("tf-kd", {"final": said(of["S"])}, of)
    ours = 0.9 * cross_entropy(of["S"], of.batch) + 0.1 * virtual_teacher(of["S"], of.batch)
    assert of.equals(total, ours.mean().item())


@pytest.mark.parametrize(("epoch", "share"), [(0, 0.0), (30, 0.08), (300, 0.8)])
def test_ps_kd_trusts_its_past_more_and_more(case, epoch, share):
    of = case("ce")
    total, parts = taught("ps-kd", {"final": said(of["S"])}, of, at=(epoch, 300.0))
    # What has not been seen before is remembered as its label; weights that change are kept in float32.
    assert total.item() == pytest.approx(of.expected["ce"], rel=1e-6)
    assert parts["past"].item() == pytest.approx(share * of.expected["ce"], rel=1e-6)


def test_the_average_teaches_as_a_peer_would(case):
    of = case("dml")
    signals = {"final": said(of["S"]), "ema.final": said(of["T"]), "ema.final@view": said(of["T"])}
    assert of.agrees(taught("ema-teacher", signals, of)[0], "loss_student_net")


def test_the_last_student_teaches_a_born_again_one(case):
    of = case("kl")
    parts = taught("born-again", {"final": said(of["S"]), "teacher.final": said(of["T"])}, of)[1]
    teacher = of["T"].softmax(1)
    assert of.equals(parts["soft"], of.expected["T1"] - (teacher * teacher.log()).sum(1).mean().item())
    assert of.equals(parts["task"], cross_entropy(of["S"], of.batch).mean().item())


@pytest.mark.parametrize("recipe", ["baseline", "mixup", "cutmix"])
def test_mixed_labels_are_the_recipes_only_loss(case, recipe):
    of = case("ce")
    assert of.agrees(taught(recipe, {"final": said(of["S"])}, of)[0], "ce")


# A second network


def pair(case: Case, other: str = "teacher.final") -> Signals:
    return {"final": said(case["S"]), other: said(case["T"])}


def test_kd_equals_hintons_formula(case):
    of = case("hinton_kd_total")
    assert of.agrees(taught("kd", pair(of), of)[0], "total")


def test_kl_is_a_sum_over_classes_and_not_a_mean_of_elements(case):
    of = case("kl")
    value = taught("kd", pair(of), of, "losses.soft.weight=1.0", "losses.soft.temperature=4.0")[1]["soft"]
    # What nn.KLDivLoss() makes of it.
    elements = F.kl_div((of["S"] / 4).log_softmax(1), (of["T"] / 4).softmax(1), reduction="none").mean()
    assert of.agrees(16 * elements, "T4_T2_elementwise_mean_PITFALL")
    assert of.agrees(value, "T4_T2")
    assert not of.agrees(value, "T4_T2_elementwise_mean_PITFALL", scale=1e4)


def test_takd_sums_over_classes_where_the_authors_code_takes_their_mean(case):
    of = case("takd_total_as_coded")
    total, parts = taught("takd", {"final": said(of["S"]), "assistant.final": said(of["T"]), **pair(of)}, of)
    assert of.agrees(total, "total_batchmean_form")
    # The pitfall: nn.KLDivLoss() divides by the number of classes too.
    assert of.equals(parts["task"] + parts["soft"] / 3, of.expected["total"])


def test_dml_equals_its_formula_for_either_network(case):
    of = case("dml")
    total, _ = taught("dml", pair(of, "peer.final"), of)
    assert of.equals(total, of.expected["loss_student_net"] + of.expected["loss_peer_net"])


def test_bd_kd_equals_the_reconstruction(case):
    of = case("bdkd_reconstruction")
    total, _ = taught("bd-kd", pair(of, "peer.final"), of)
    assert of.equals(total, of.expected["student_loss"] + of.expected["teacher_loss"])


def test_switokd_teaches_both_as_in_learning_mode(case):
    of = case("switokd")
    total, _ = taught("switokd", pair(of, "peer.final"), of)
    assert of.equals(total, of.expected["student_loss"] + of.expected["teacher_loss_learning_mode"])


def test_sokd_equals_the_authors_code(case):
    of = case("sokd")
    signals = {"teacher.exit1": said(of["A"]), "teacher.final": said(of["T"]), "final": said(of["S"])}
    total, _ = taught("sokd", signals, of)
    assert of.equals(total, of.expected["loss_bridge"] + of.expected["loss_student"])


def test_dkd_dist_and_nkd_have_the_papers_settings_for_cifar(case):
    of = case("dkd")
    task = cross_entropy(of["S4"], of.batch).mean()
    four = {"final": said(of["S4"]), "teacher.final": said(of["T4"])}
    for recipe, parts in (("dkd", "dkd"), ("nkd", "nkd_cifar100"), ("dist", "dist")):
        found = taught(recipe, four, of)[1]
        assert of.equals(found["task"], task.item())
        assert of.equals(found["soft"], soft_part(recipe, case(parts)), scale=10)


def soft_part(recipe: str, of: Case) -> float:
    student, teacher = of["S4"], of["T4"]
    match recipe:
        case "dkd":
            return dkd(student, teacher, of.batch, alpha=1.0, beta=8.0, temperature=4.0).mean().item()
        case "nkd":
            return nkd(student, teacher, of.batch, gamma=3.5, temperature=3.0).mean().item()
        case _:
            return 2 * dist(student, teacher, of.batch, beta=1.0, gamma=1.0, temperature=4.0).mean().item()


# Gradients, from the formulas written with probabilities


def softened(logits: Tensor, temperature: float = 1.0) -> Tensor:
    powers = (logits / temperature).exp()
    return powers / powers.sum(1, keepdim=True)


def divergence(q: Tensor, p: Tensor) -> Tensor:
    return (q * (q / p).log()).sum(1)


def of_label(p: Tensor, labels: Tensor) -> Tensor:
    return p[torch.arange(len(p)), labels]


def of_others(p: Tensor, labels: Tensor) -> Tensor:
    """The probabilities of the wrong classes, made to sum to 1."""
    return torch.stack([torch.cat([row[:y], row[y + 1 :]]) / (1 - row[y]) for row, y in zip(p, labels, strict=True)])


def task(logits: Tensor, labels: Tensor) -> Tensor:
    return -of_label(softened(logits), labels).log().mean()


def naive_dkd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    p, q = softened(s, 4), softened(t, 4)
    pair_p, pair_q = (torch.stack([of_label(x, y), 1 - of_label(x, y)], 1) for x in (p, q))
    apart = divergence(pair_q, pair_p) + 8 * divergence(of_others(q, y), of_others(p, y))
    return task(s, y) + 16 * apart.mean()


def naive_nkd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    label = -of_label(softened(t), y) * of_label(softened(s), y).log()
    others = -(of_others(softened(t, 3), y) * of_others(softened(s, 3), y).log()).sum(1)
    return task(s, y) + (label + 3.5 * 9 * others).mean()


def naive_dist(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    def apart(rows: Tensor, others: Tensor) -> Tensor:
        both = [(u - u.mean(), v - v.mean()) for u, v in zip(rows, others, strict=True)]
        return torch.stack([1 - (u @ v) / (u.norm() * v.norm() + 1e-8) for u, v in both]).mean()

    p, q = softened(s, 4), softened(t, 4)
    return task(s, y) + 2 * 16 * (apart(p, q) + apart(p.T, q.T))


def naive_bd_kd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    p, q, p_fixed, q_fixed = softened(s), softened(t), softened(s.detach()), softened(t.detach())
    surer = (p_fixed * p_fixed.log()).sum(1) > (q_fixed * q_fixed.log()).sum(1)
    forward, reverse = 1 + surer.to(p), 2 - surer.to(p)
    student = forward * divergence(q_fixed, p) + reverse * divergence(p, q_fixed)
    return task(s, y) + student.mean() + task(t, y) + divergence(p_fixed, q).mean()


def naive_sokd(s: Tensor, bridge: Tensor, t: Tensor, y: Tensor) -> Tensor:
    p, a, q = softened(s, 4), softened(bridge, 4), softened(t, 4)
    taught_by = divergence(q, a) + divergence(p.detach(), a) + divergence(a.detach(), p)
    return task(s, y) + task(bridge, y) + 16 * taught_by.mean()


@pytest.mark.parametrize(
    ("recipe", "name", "read", "naive"),
    [
        ("dkd", "dkd", {"final": "S4", "teacher.final": "T4"}, naive_dkd),
        ("nkd", "nkd_cifar100", {"final": "S4", "teacher.final": "T4"}, naive_nkd),
        ("dist", "dist", {"final": "S4", "teacher.final": "T4"}, naive_dist),
        ("bd-kd", "bdkd_reconstruction", {"final": "S", "peer.final": "T"}, naive_bd_kd),
        ("sokd", "sokd", {"final": "S", "teacher.exit1": "A", "teacher.final": "T"}, naive_sokd),
    ],
    ids=["dkd", "nkd", "dist", "bd-kd", "sokd"],
)
def test_a_recipe_has_the_gradient_of_its_formula(case, recipe, name, read, naive):
    of = case(name)
    logits = {point: of[vector].requires_grad_() for point, vector in read.items()}
    total, _ = taught(recipe, {point: said(z) for point, z in logits.items()}, of)
    total.backward()
    learning = [point for point in logits if point != "teacher.final"]
    wanted = naive(*logits.values(), of.batch.labels)
    assert of.equals(total, wanted, scale=100)
    for point, gradient in zip(learning, torch.autograd.grad(wanted, [logits[p] for p in learning]), strict=True):
        assert of.equals(logits[point].grad, gradient, scale=10), point
    assert all(z.grad is None for point, z in logits.items() if point not in learning)


def test_mix_kd_equals_the_authors_code_as_a_whole(case):
    of = case("mix_kd")
    of.batch.labels = torch.tensor(of.expected["mixed_targets"], dtype=of.dtype)
    assert of.agrees(taught("mix-kd", pair(of), of)[0], "total")


def test_ca_mkd_weighs_teachers_as_the_authors_code_and_has_its_gradient(case):
    of = case("ca_mkd")
    teachers = list(of["teachers"])
    assert of.agrees(confidence(teachers, of.batch), "weights")
    student = of["student"].requires_grad_()
    names = ["teacher.final", "second.final", "third.final"]
    signals = {"final": said(student)} | {n: said(t) for n, t in zip(names, teachers, strict=True)}
    _, parts = taught("ca-mkd", signals, of, "losses.maps=false")
    # A cross entropy: without the teachers' own entropies it is the weighted sum of divergences.
    weights, q = confidence(teachers, of.batch), (of["teachers"] / 4).softmax(-1)
    mixed = (weights[:, :, None] * q).sum(0)
    own = -(weights * (q * q.log()).sum(-1)).sum(0).mean()
    assert of.equals(parts["soft"] - 16 * own, of.expected["kd_paper (sum_k, mean_b)"], scale=100)
    (gradient,) = torch.autograd.grad(parts["soft"], student)
    assert of.equals(gradient, 4 * ((student.detach() / 4).softmax(-1) - mixed) / 2, scale=10)


def test_crd_equals_the_authors_code_and_remembers_what_it_has_seen(case):
    of = case("crd_memory_nce")
    loss = Crd(4, 4, torch.arange(6), negatives=3, dim=4).to(of.dtype)
    # The vector's embeddings are those behind the linear layers.
    for layer in (loss.embed_s, loss.embed_t):
        nn.init.eye_(layer.weight), nn.init.zeros_(layer.bias)
    loss.memory_s, loss.memory_t = of["mem_s"], of["mem_t"]
    places = torch.tensor(of.inputs["contrast_idx"])
    loss.others = lambda index: places[:, 1:]
    of.batch.index = places[:, 0]
    student = loss.contrast(of["embed_s"], loss.memory_t, places, 0)
    teacher = loss.contrast(of["embed_t"], loss.memory_s, places, 1)
    # float32 divides exponentials of up to a million.
    assert of.equals(student.mean(), of.expected["loss_s"], scale=100)
    assert of.equals(teacher.mean(), of.expected["loss_t"], scale=100)
    assert loss.z.tolist() == pytest.approx([of.expected["Z_s"], of.expected["Z_t"]], rel=1e-5)
    assert of.equals(loss(of["embed_s"], of["embed_t"], of.batch).mean(), of.expected["total"], scale=100)
    assert of.agrees(loss.memory_s[:2], "updated_mem_s_rows")
    assert torch.equal(loss.memory_s[2:], of["mem_s"][2:]) and torch.equal(loss.memory_t[2:], of["mem_t"][2:])
    # Both are of length 1, so that half of each has the direction of their sum.
    assert of.equals(loss.memory_t[:2], F.normalize(of["mem_t"][:2] + of["embed_t"], dim=1))


def test_crd_draws_negatives_of_other_classes_and_remembers_what_it_has_seen():
    labels = torch.tensor([0, 1, 0, 2, 1, -1, 2, 0])
    torch.manual_seed(0)
    loss = Crd(3, 3, labels, negatives=4, dim=3)
    for _ in range(20):
        drawn = loss.others(torch.tensor([0, 1, 3]))
        assert all(
            labels[row].ne(own).all() and labels[row].ne(-1).all() for row, own in zip(drawn, (0, 1, 2), strict=True)
        )
        assert all(len(row.unique()) == 4 for row in drawn)
    nn.init.eye_(loss.embed_s.weight), nn.init.zeros_(loss.embed_s.bias)
    before, new = loss.memory_s.clone(), F.normalize(torch.randn(2, 3), dim=1)
    loss(new, torch.randn(2, 3), Batch(torch.zeros(2, 3, 1, 1), labels[[3, 0]], torch.tensor([3, 0])))
    wanted = F.normalize(0.5 * before[[3, 0]] + 0.5 * new, dim=1)
    torch.testing.assert_close(loss.memory_s[[3, 0]], wanted)
    assert torch.equal(loss.memory_s[1], before[1])
