"""The other published losses against values from their formulas, what they are made of, and weights over time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import batch_of, tensor
from torch import Tensor

from sdcli.data.loaders import classmates
from sdcli.errors import UserError
from sdcli.method.learner import build_signals
from sdcli.method.losses import LOSSES
from sdcli.method.losses.features import FitNet, Hint, attention, attention_map, mmd, sad
from sdcli.method.losses.labels import cross_entropy, tf_nkd, virtual_teacher, votes, zipf, zipf_label
from sdcli.method.losses.logits import balanced_kl, dist, dkd, gated, kl, nkd, soft_cross_entropy
from sdcli.method.losses.relations import propagate, similarity
from sdcli.method.objective import Objective
from sdcli.method.signals import SIGNALS
from sdcli.network.multi_exit import PointSpec
from sdcli.network.signals import Signal
from sdcli.recipe import ramps
from sdcli.recipe.check import check_recipe
from sdcli.recipe.schema import Derived, Loss

# Labels


def test_label_smoothing_over_the_others_equals_the_formula(case):
    of = case("label_smoothing")
    value = cross_entropy(of["S"], of.batch, smoothing=0.1, smooth_over="others").mean()
    assert of.agrees(value, "uniform_over_non_target")


@pytest.mark.parametrize("over", ["all", "others"])
def test_label_smoothing_is_the_cross_entropy_with_a_smoothed_label(over):
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    hard = F.one_hot(labels, 4).double()
    smooth = torch.full_like(hard, 0.25) if over == "all" else (1 - hard) / 3
    naive = -((0.8 * hard + 0.2 * smooth) * logits.softmax(1).log()).sum(1)
    assert torch.allclose(cross_entropy(logits, batch_of(labels), smoothing=0.2, smooth_over=over), naive, atol=1e-12)


def test_smoothing_mixed_labels_smooths_each_of_them():
    torch.manual_seed(0)
    logits, both = torch.randn(1, 4, dtype=torch.float64), tensor([[0.3, 0.0, 0.7, 0.0]])
    one, other = (cross_entropy(logits, batch_of([y]), smoothing=0.1, smooth_over="others") for y in (0, 2))
    mixed = cross_entropy(logits, batch_of(both), smoothing=0.1, smooth_over="others")
    assert torch.allclose(mixed, 0.3 * one + 0.7 * other, atol=1e-12)


def test_mix_kd_equals_the_authors_code(case):
    of = case("mix_kd")
    labels = of["lam"][:, None] * F.one_hot(torch.tensor(of.inputs["y"])[torch.tensor(of.inputs["perm1"])], 3)
    labels = labels + (1 - of["lam"])[:, None] * F.one_hot(
        torch.tensor(of.inputs["y"])[torch.tensor(of.inputs["perm2"])], 3
    )
    assert of.agrees(labels, "mixed_targets")
    task = cross_entropy(of["S"], batch_of(labels.to(of.dtype)), standardize=True).mean()
    soft = kl(of["S"], of["T"], of.batch, temperature=1.0, standardize=True).mean()
    assert of.agrees(task, "cls")
    assert of.agrees(soft, "kd")
    assert of.agrees(0.1 * task + 0.9 * soft, "total")


def test_equal_logits_are_standardized_to_zero_with_a_finite_gradient():
    student = torch.full((2, 3), 5.0, requires_grad=True)
    kl(student, torch.ones(2, 3), batch_of([0, 0]), standardize=True).sum().backward()
    assert student.grad.isfinite().all()


def test_virtual_teacher_equals_the_divergence_from_a_written_out_label():
    logits = tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    # Of three classes the label has 0.9 and the others 0.05 each, which are then softened as if they were logits.
    teacher = (tensor([[0.05, 0.05, 0.9], [0.9, 0.05, 0.05]]) / 2).softmax(1)
    naive = (teacher * (teacher.log() - logits.softmax(1).log())).sum(1)
    value = virtual_teacher(logits, batch_of([2, 0]), confidence=0.9, temperature=2.0)
    assert torch.allclose(value, naive, atol=1e-12)


def test_virtual_teacher_of_two_classes_by_hand():
    # Logits 0 and 0 give 1/2 and 1/2; 0.75 and 0.25 at temperature 0.5 / ln 3 are 3/4 and 1/4 again.
    value = virtual_teacher(tensor([[0.0, 0.0]]), batch_of([0]), confidence=0.75, temperature=0.5 / math.log(3))
    assert value.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-12)


def test_tf_nkd_equals_the_authors_code_and_its_weights_have_no_gradient(case):
    of = case("tf_nkd")
    student = of["S4"].requires_grad_()
    soft = tf_nkd(student, of.batch).mean()
    soft.backward()
    assert of.agrees(soft, "soft_term")
    assert of.agrees(student.grad, "grad_S4 of soft_term")
    assert of.agrees(soft + cross_entropy(student, of.batch).mean(), "total_with_ce")


def test_tf_nkd_is_the_cross_entropy_for_a_single_image():
    logits = tensor([[1.0, 2.0, 3.0]])
    assert tf_nkd(logits, batch_of([0])).item() == pytest.approx(cross_entropy(logits, batch_of([0])).item(), abs=1e-12)


def dense_logits(winners: list[list[int]], num_classes: int) -> Tensor:
    """A map of logits [B, K, 2, 3] in which the given classes win."""
    torch.manual_seed(0)
    places = F.one_hot(torch.tensor(winners), num_classes).mT.double()
    return places * 10 + torch.rand_like(places)


def test_zipf_equals_the_authors_code_for_logits_and_for_votes(case):
    of = case("zipf_ls")
    dense = dense_logits(of.inputs["dense_argmax"], 4).to(of.dtype)
    assert of.agrees(zipf_label(of["S4"], of.batch.labels), "label_from_logits")
    assert of.agrees(votes(dense), "votes")
    assert of.agrees(zipf_label(votes(dense), of.batch.labels), "label_from_votes")
    assert of.agrees(zipf(of["S4"], of["S4"], of.batch).mean(), "loss_from_logits")
    by_votes = zipf(of["S4"], votes(dense), of.batch).mean()
    assert of.agrees(by_votes, "loss_from_votes")
    assert of.agrees(zipf(of["S4"], votes(dense), of.batch, mask=True).mean(), "loss_from_votes_only_correct")
    assert of.agrees(cross_entropy(of["S4"], of.batch).mean() + 0.1 * by_votes, "total_cifar100 (CE + 0.1*zipf)")


def test_zipf_is_zero_where_the_wrong_classes_follow_zipfs_law():
    # Ranks 1, 2, 3, 4 with the label first: the others' shares are as 1/2 : 1/3 : 1/4, whatever the label's logit.
    student = tensor([[9.0, math.log(1 / 2), math.log(1 / 3), math.log(1 / 4)]])
    assert zipf(student, student, batch_of([0])).item() == pytest.approx(0.0, abs=1e-12)


def test_no_gradient_passes_the_ranks_of_zipf():
    torch.manual_seed(0)
    student, dense = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, 9, requires_grad=True)
    zipf(student, votes(dense), batch_of([0, 1])).sum().backward()
    assert dense.grad is None
    assert student.grad[[0, 1], [0, 1]].abs().max() == 0.0


def test_ps_kds_mixed_target_equals_two_weighted_losses():
    torch.manual_seed(0)
    student, past = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    batch, alpha = batch_of([0, 1, 2, 3]), ramps.between(30, 300, 0.0, 0.8)
    assert alpha == pytest.approx(0.08)
    target = (1 - alpha) * F.one_hot(batch.labels, 5) + alpha * past.softmax(1)
    assert torch.allclose(target.sum(1), torch.ones(4, dtype=torch.float64))
    two = (1 - alpha) * cross_entropy(student, batch) + alpha * soft_cross_entropy(
        student, past, batch, temperature=1.0
    )
    assert torch.allclose(F.cross_entropy(student, target, reduction="none"), two, atol=1e-12)


@pytest.mark.parametrize("name", ["virtual_teacher", "tf_nkd", "zipf", "dkd", "nkd"])
def test_a_loss_that_needs_one_class_per_image_is_refused_where_they_are_mixed(name):
    loss = {"kind": name, "on": "exit1"} | ({"target": "final"} if "teacher" in LOSSES.find(name).takes else {})
    losses = check_recipe({"losses": {"new": loss, "task": {"kind": "cross_entropy", "on": "all"}}}).losses
    widths = {"exit1": PointSpec(2, 4), "final": PointSpec(2, 4)}
    Objective(losses, widths)
    with pytest.raises(UserError) as caught:
        Objective(losses, widths, mixes=True)
    assert str(caught.value) == (
        f"losses.new: kind = '{name}' needs one class per image, but batch.mixup or batch.cutmix mixes classes\n"
        "  expected: no mixup or cutmix, or another loss\n"
        "  fix:      --set batch.mixup=0 --set batch.cutmix=0"
    )


# Two predictions


@pytest.mark.parametrize(
    ("name", "temperature"), [("reverse_T1 KL(S||T)", 1.0), ("reverse_T4_T2", 4.0)], ids=["T1", "T4"]
)
def test_reverse_kl_equals_the_formula(case, name, temperature):
    of = case("kl")
    value = kl(of["S"], of["T"], of.batch, temperature=temperature, direction="reverse").mean()
    assert of.agrees(value, name)


@pytest.mark.parametrize("name", ["loss_student_net", "loss_peer_net"])
def test_deep_mutual_learning_is_cross_entropy_plus_kl(case, name):
    of = case("dml")
    student, peer = (of["S"], of["T"]) if name == "loss_student_net" else (of["T"], of["S"])
    value = cross_entropy(student, of.batch) + kl(student, peer, of.batch, temperature=1.0)
    assert of.agrees(value.mean(), name)


def test_balanced_kl_equals_the_reconstruction(case):
    of = case("bdkd_reconstruction")
    value = cross_entropy(of["S"], of.batch) + balanced_kl(of["S"], of["T"], of.batch, nu=2.0)
    assert of.agrees(value.mean(), "student_loss")


def test_balanced_kl_with_nu_1_is_the_sum_of_both_directions():
    torch.manual_seed(0)
    one, other, batch = (
        torch.randn(4, 5, dtype=torch.float64),
        torch.randn(4, 5, dtype=torch.float64),
        batch_of([0] * 4),
    )
    both = sum(kl(one, other, batch, temperature=2.0, direction=d) for d in ("forward", "reverse"))
    assert torch.allclose(balanced_kl(one, other, batch, nu=1.0, temperature=2.0), both, atol=1e-12)


def test_dkd_equals_the_authors_code(case):
    of = case("dkd")
    assert of.agrees(dkd(of["S4"], of["T4"], of.batch, beta=0.0).mean(), "tckd_T2")
    assert of.agrees(dkd(of["S4"], of["T4"], of.batch, alpha=0.0, beta=1.0).mean(), "nckd_T2")
    assert of.agrees(dkd(of["S4"], of["T4"], of.batch).mean(), "total", scale=8 * 4**2)
    imagenet = case("dkd_imagenet")
    value = dkd(of["S4"], of["T4"], of.batch, beta=0.5, temperature=1.0).mean()
    assert imagenet.agrees(value, "total")


def test_kl_is_dkds_parts_put_together():
    torch.manual_seed(0)
    student, teacher, batch = torch.randn(4, 5).double(), torch.randn(4, 5).double(), batch_of([0, 1, 2, 3])
    target, others = dkd(student, teacher, batch, beta=0.0), dkd(student, teacher, batch, alpha=0.0, beta=1.0)
    p = (teacher / 4).softmax(1).gather(1, batch.labels[:, None]).squeeze(1)
    assert torch.allclose(kl(student, teacher, batch), target + (1 - p) * others, atol=1e-12)


@pytest.mark.parametrize(("name", "gamma", "temperature"), [("nkd_imagenet", 1.5, 1.0), ("nkd_cifar100", 3.5, 3.0)])
def test_nkd_equals_the_authors_code(case, name, gamma, temperature):
    of = case(name)
    value = nkd(of["S4"], of["T4"], of.batch, gamma=gamma, temperature=temperature).mean()
    assert of.agrees(nkd(of["S4"], of["T4"], of.batch, gamma=0.0, temperature=temperature).mean(), "target")
    assert of.agrees(value, "distill")
    assert of.agrees(value + cross_entropy(of["S4"], of.batch).mean(), "total_with_ce")


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_equals_the_authors_code(case, temperature):
    of, suffix = case("dist"), f"_T{temperature:.0f}"
    for name, options in {"inter": {"gamma": 0.0}, "intra": {"beta": 0.0}, "total": {}}.items():
        assert of.agrees(dist(of["S4"], of["T4"], of.batch, temperature=temperature, **options), name + suffix)


def test_dist_does_not_see_the_scale_of_a_prediction():
    torch.manual_seed(0)
    p = torch.rand(4, 6).double().softmax(1)
    # Half of p and half of a uniform prediction correlates fully with p.
    value = dist((p / 2 + 1 / 12).log(), p.log(), batch_of([0] * 4), temperature=1.0)
    assert value.item() == pytest.approx(0.0, abs=1e-4)


def test_ones_gate_mixes_the_branches_as_the_authors_code(case):
    of = case("one_gate")
    branches, gate = list(of["branches"]), of["gate_pre"].relu().softmax(1)
    mixed = gated(branches, gate)
    assert of.agrees(gate, "gate")
    assert of.agrees(mixed, "ensemble_logits")
    assert of.agrees(torch.stack([cross_entropy(z, of.batch).mean() for z in branches]), "ce_branches")
    assert of.agrees(cross_entropy(mixed, of.batch).mean(), "ce_ensemble")
    assert of.agrees(torch.stack([kl(z, mixed, of.batch, temperature=3.0).mean() for z in branches]), "kl_branches_T2")


# Features


def test_hint_with_norm_mean_is_fitnets_mean_squared_error(case):
    of = case("fitnet_hint")
    assert of.agrees(Hint(2, 2, norm="mean")(of["a"], of["b"], batch_of([0, 0])).mean(), "mse")


def test_fitnet_is_the_mean_squared_difference_of_maps_pooled_alike():
    student, teacher = torch.zeros(2, 1, 2, 2), torch.arange(16.0).reshape(1, 1, 4, 4).repeat(2, 1, 1, 1)
    # The teacher's four blocks have the means 2.5, 4.5, 10.5 and 12.5.
    value = FitNet(1, 1, adapt="none")(student, teacher, batch_of([0, 0]))
    assert value.tolist() == [(2.5**2 + 4.5**2 + 10.5**2 + 12.5**2) / 4] * 2


def test_fitnets_convolution_gives_the_targets_channels():
    loss = FitNet(3, 5)
    assert loss(torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4), batch_of([0, 0])).shape == (2,)
    assert [tuple(p.shape) for p in loss.parameters()] == [(5, 3, 1, 1), (5,)]


def test_fitnet_without_convolution_needs_equal_channel_counts():
    with pytest.raises(UserError) as error:
        FitNet(3, 5, adapt="none")
    assert str(error.value) == (
        "the feature maps have different channel counts: 3 and 5\n"
        "  expected: feature maps with equal channel counts\n"
        '  fix:      adapt = "conv" (the default)'
    )


def test_attention_equals_the_authors_code_and_the_paper(case):
    of = case("at")
    batch = batch_of([0, 0])
    assert of.agrees(attention_map(of["FS"], 2.0), "Q_S")
    assert of.agrees(attention(of["FS"], of["FT"], batch).mean(), "official_mean")
    squared, l2 = (attention(of["FS"], of["FT"], batch, norm=norm).mean() for norm in ("squared", "l2"))
    assert of.agrees(squared, "sum_over_positions_mean_over_batch")
    assert of.agrees(l2, "paper_l2norm_mean_over_batch")


def test_attention_pools_the_larger_map_before_it_takes_powers(case):
    of = case("at")
    value = attention(of["FS"], of["FT4"], batch_of([0, 0])).mean()
    assert of.agrees(value, "teacher_4x4_pooled_to_2x2_mean")
    swapped = attention(of["FT4"], of["FS"], batch_of([0, 0])).mean()
    assert swapped.item() == pytest.approx(value.item(), abs=1e-9)


def test_sad_equals_the_formula_with_and_without_aligned_corners(case):
    of = case("sad")
    batch = batch_of([0, 0])
    assert of.agrees(sad(of["shallow"], of["deep"], batch).mean(), "channel_sum_align_corners_true_mse")
    value = sad(of["shallow"], of["deep"], batch, align_corners=False).mean()
    assert of.agrees(value, "channel_sum_align_corners_false_mse")


def test_sad_and_attention_do_not_see_the_number_of_channels():
    torch.manual_seed(0)
    maps, batch = torch.rand(2, 3, 4, 4).double(), batch_of([0, 0])
    twice = maps.repeat(1, 2, 1, 1)
    assert attention(maps, twice, batch).abs().max() < 1e-20
    assert sad(maps, twice / 2**0.5, batch).abs().max() < 1e-20


def test_ddgsd_is_both_views_teaching_each_other(case):
    of = case("ddgsd_reconstruction")
    a, b, batch = of["view_a"], of["view_b"], of.batch
    assert of.agrees(mmd(of["feat_a"], of["feat_b"], batch), "mmd_linear")
    total = sum(cross_entropy(z, batch).mean() for z in (a, b)) + 0.0005 * mmd(of["feat_a"], of["feat_b"], batch)
    total = total + kl(a, b, batch, temperature=3.0).mean() + kl(b, a, batch, temperature=3.0).mean()
    assert of.agrees(total, "total")


def test_mmd_stated_in_both_directions_has_the_gradient_of_one_without_a_stop():
    torch.manual_seed(0)
    a, b = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    both = torch.autograd.grad(mmd(a, b.detach(), batch_of([0] * 4)) + mmd(b, a.detach(), batch_of([0] * 4)), (a, b))
    free = torch.autograd.grad((a.mean(0) - b.mean(0)).square().sum(), (a, b))
    assert all(torch.allclose(x, y, atol=1e-12) for x, y in zip(both, free, strict=True))


def test_mmd_says_which_widths_it_met():
    with pytest.raises(UserError) as error:
        mmd(torch.zeros(2, 3), torch.zeros(2, 4), batch_of([0, 0]))
    assert (
        str(error.value)
        == "mmd: the embeddings have different widths: 3 and 4\n  expected: embeddings of the same width"
    )


# Relations between images


def test_similarity_equals_the_authors_code(case):
    of = case("sp")
    assert of.agrees(similarity(of["FS3"], of["FT3"], batch_of([0, 0, 0])), "loss")


def test_similarity_of_attention_equals_the_reconstruction_of_scd(case):
    of, batch = case("scd_reconstruction"), batch_of([0, 0, 0])

    def value(student: str, teacher: str) -> Tensor:
        return similarity(of[student], of[teacher], batch, of="attention")

    assert of.agrees(value("L1", "L2") + value("L2", "L3"), "adjacent (1<-2, 2<-3)")
    assert of.agrees(value("L1", "L3") + value("L2", "L3"), "all_from_deepest")


def test_bakes_targets_loss_and_gradient_equal_the_authors_code(case):
    of = case("bake")
    logits, feats = of["logits"].requires_grad_(), of["feats"].requires_grad_()
    targets = propagate(logits, feats, omega=0.5, temperature=4.0)
    assert of.agrees(targets, "soft_targets")
    assert of.agrees(propagate(logits, feats, omega=0.9, temperature=4.0), "soft_targets_omega0.9")
    # As logits for a loss with the same temperature: T log q is softened to q again.
    loss = kl(logits, 4.0 * targets.log(), of.batch, temperature=4.0).mean()
    loss.backward()
    assert of.agrees(loss, "kd_loss_T2")
    assert of.agrees(logits.grad, "grad_logits of kd_loss_T2")
    assert feats.grad is None
    assert of.agrees(loss + cross_entropy(logits, of.batch).mean(), "total")


def test_propagation_keeps_ones_own_prediction_at_omega_0_and_sums_to_1():
    torch.manual_seed(0)
    logits, feats = torch.randn(5, 4), torch.randn(5, 3)
    assert torch.allclose(propagate(logits, feats, omega=0.0, temperature=2.0), (logits / 2).softmax(1), atol=1e-6)
    far = propagate(logits.bfloat16(), feats.bfloat16(), omega=0.95, temperature=2.0)
    assert far.dtype == torch.float32
    assert torch.allclose(far.sum(1), torch.ones(5), atol=1e-5)


def test_cs_kd_is_kl_from_a_classmate(case):
    of = case("cs_kd")
    soft = kl(of["anchor"], of["classmate"], of.batch).mean()
    assert of.agrees(soft, "cls_loss")
    assert of.agrees(soft + cross_entropy(of["anchor"], of.batch).mean(), "total")


LABELS = torch.tensor([2, 0, 1, 0, 2, 0, 2, 2, 3])


@pytest.mark.parametrize("itself", [True, False])
def test_classmates_are_drawn_evenly_from_the_class(itself):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat(
        [classmates(LABELS, torch.tensor([0]), itself=itself, generator=generator) for _ in range(2000)]
    ).flatten()
    expected = [0, 4, 6, 7] if itself else [4, 6, 7]
    assert drawn.unique().tolist() == expected
    assert (drawn.bincount()[expected] / 2000 - 1 / len(expected)).abs().max() < 0.04


def test_the_mates_of_one_anchor_differ_as_long_as_there_are_enough():
    anchors, generator = torch.arange(9), torch.Generator().manual_seed(0)
    mates = classmates(LABELS, anchors, 3, generator=generator)
    assert torch.equal(LABELS[mates], LABELS[anchors][:, None].expand(-1, 3))
    for anchor, row in enumerate(mates.tolist()):
        others = [i for i in range(9) if LABELS[i] == LABELS[anchor] and i != anchor]
        assert len(set(row)) == min(3, max(len(others), 1))
        assert set(row) <= set(others or [anchor])


def test_classmates_depend_on_the_generator_alone():
    draws = [classmates(LABELS, torch.arange(9), 2, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*draws)


# Every loss


# Those that read whole signals have tests of their own.
ENTRIES = [entry for entry in LOSSES if entry.reads != "signal"]
COMPARED = [entry for entry in ENTRIES if isinstance(entry.call, type) or "teacher" in entry.takes]
NO_DISTANCE = {"soft_cross_entropy", "nkd", "zipf", "wttm", "crd"}
"""Not zero where student equals target: cross entropies, and targets that only rank or are flattened."""

every_loss = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)


def random_signal(dtype: torch.dtype = torch.float32) -> Signal:
    shapes = [(6, 6, 3, 3), (6, 6), (6, 6)]
    return Signal(*(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes))


def taught(entry, student: Signal, target: Signal) -> Tensor:
    """What the objective makes of one loss, next to nothing else."""
    signals, target_name = {"exit1": student, "final": target}, "final" if entry in COMPARED else "label"
    losses = {"it": Loss(kind=entry.name, on="exit1", target=target_name), "task": Loss(kind="cross_entropy", on="all")}
    objective = Objective(losses, {point: PointSpec(6, 6) for point in signals}, labels=torch.arange(6))
    objective.terms = [term for term in objective.terms if term.name == "it"]
    total, _ = objective(signals, batch_of(list(range(6))))
    return total


def compared(entry, student: Tensor, target: Tensor) -> Tensor:
    """What one loss returns for two bare tensors."""
    loss = entry.call
    if isinstance(entry.call, type):
        loss = entry.call(6, 6, torch.arange(6)) if "labels" in entry.takes else entry.call(6, 6, adapt="none")
    batch = batch_of(list(range(6)))
    return loss(student, target, batch) if entry in COMPARED else loss(student, batch)


@every_loss
def test_a_gradient_reaches_the_student_and_none_the_target(entry):
    torch.manual_seed(0)
    student, target = random_signal(), random_signal()
    taught(entry, student, target).backward()
    assert getattr(student, entry.reads).grad.abs().max() > 0
    assert target.features.grad is None
    assert target.embedding.grad is None
    assert target.logits.grad is None


@every_loss
def test_losses_give_a_scalar_or_one_value_per_image(entry):
    torch.manual_seed(0)
    student, target = (getattr(random_signal(), entry.reads) for _ in range(2))
    assert compared(entry, student, target).shape in ((), (6,))


@every_loss
def test_half_precision_is_widened_before_a_loss_is_worked_out(entry):
    torch.manual_seed(0)
    total = taught(entry, random_signal(torch.bfloat16), random_signal(torch.bfloat16))
    assert total.dtype == torch.float32
    assert total.isfinite()


def extreme(even: bool, dtype: torch.dtype = torch.float32) -> Signal:
    """A signal that says 1e4 or -1e4 everywhere, or is of that order with zeros between."""
    signal = random_signal()
    for name in ("features", "embedding", "logits"):
        drawn = getattr(signal, name).detach()
        values = torch.where(drawn > 0, 1e4, -1e4) if even else torch.where(drawn.abs() > 0.5, drawn * 1e4, 0.0)
        setattr(signal, name, values.to(dtype).requires_grad_())
    return signal


@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
@every_loss
def test_losses_and_gradients_are_finite_at_ten_thousand(entry, even):
    torch.manual_seed(0)
    student, target = extreme(even), extreme(even)
    total = taught(entry, student, target)
    total.backward()
    assert total.isfinite()
    assert getattr(student, entry.reads).grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
@pytest.mark.parametrize("entry", list(SIGNALS), ids=lambda entry: entry.name)
def test_what_is_made_of_signals_is_finite_at_ten_thousand_and_float32_at_least(entry, even, dtype):
    torch.manual_seed(0)
    signals = {place: extreme(even, dtype) for place in ("exit1", "final")}
    signals["final"].dense = torch.randn(6, 6, 9).to(dtype) * 1e4
    of = "final" if entry.reads_one else "all"
    widths = {place: PointSpec(6, 6) for place in signals}
    (make,) = build_signals({"made": Derived(kind=entry.name, of=of)}, widths, 6, 6)[0].values()
    for _ in range(2):
        logits = make(signals, batch_of(list(range(6)))).logits
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()
    if not entry.constant:
        kl(logits, torch.randn(6, 6), batch_of([0] * 6)).sum().backward()
        assert signals["final"].logits.grad.isfinite().all()
        assert signals["final"].logits.grad.abs().max() > 0


@every_loss
def test_losses_and_gradients_are_finite_where_everything_is_zero(entry):
    student, target = (Signal(torch.zeros(6, 6, 3, 3), torch.zeros(6, 6), torch.zeros(6, 6)) for _ in range(2))
    getattr(student, entry.reads).requires_grad_()
    total = taught(entry, student, target)
    total.backward()
    assert total.isfinite()
    assert getattr(student, entry.reads).grad.isfinite().all()


@pytest.mark.parametrize("entry", [e for e in COMPARED if e.name not in NO_DISTANCE], ids=lambda entry: entry.name)
def test_losses_are_zero_where_student_equals_target_and_above_elsewhere(entry):
    torch.manual_seed(0)
    target = getattr(random_signal(torch.float64), entry.reads).detach()
    # DIST's guard against a division by zero keeps it from the zero.
    assert compared(entry, target, target).mean().item() == pytest.approx(0.0, abs=1e-4), "or it belongs to NO_DISTANCE"
    for _ in range(5):
        assert compared(entry, target + torch.randn_like(target), target).mean() > 1e-3


# Weights over time


def test_the_sigmoid_ramp_equals_ones_code(vectors):
    expected = vectors["sigmoid_rampup"]["expected"]
    assert len(expected) == 6
    for epoch, value in expected.items():
        assert ramps.sigmoid_ramp(float(epoch), 300, 80) == pytest.approx(value, abs=1e-9)


def test_the_linear_warmup_equals_dkds_code(vectors):
    values = [ramps.linear_warmup(epoch, 240, 20) for epoch in (0, 1, 10, 20)]
    assert values == vectors["schedules"]["expected"]["dkd_warmup min(epoch/20,1) epochs 0,1,10,20"]
    assert ramps.linear_warmup(100, 240, 20) == 1.0


@pytest.mark.parametrize(
    ("ramp", "arguments", "values"),
    [
        (ramps.on_from, (50,), [0, 0, 1, 1, 1]),
        (ramps.off_from, (50,), [1, 1, 0, 0, 0]),
        (ramps.linear_decay, (50,), [1, 1, 1, 0.5, 0]),
        (ramps.linear_warmup, (0.5,), [0, 0.5, 1, 1, 1]),
        (ramps.between, (0.0, 0.8), [0, 0.2, 0.4, 0.6, 0.8]),
        (ramps.between, (1.0, 0.2), [1, 0.8, 0.6, 0.4, 0.2]),
    ],
)
def test_weights_at_the_quarters_of_a_run(ramp, arguments, values):
    assert [ramp(epoch, 100, *arguments) for epoch in (0, 25, 50, 75, 100)] == pytest.approx(values)


@pytest.mark.parametrize("ramp", [ramps.linear_warmup, ramps.sigmoid_ramp, ramps.on_from])
def test_a_ramp_without_length_is_on_from_the_start(ramp):
    assert ramp(0.0, 100, 0) == 1.0


def test_a_time_below_1_is_a_share_of_the_run():
    assert [ramps.in_epochs(time, 300) for time in (0.5, 1, 80)] == [150, 1, 80]


@pytest.mark.parametrize("reads_one", [True, False])
def test_a_signal_of_ones_own_gets_what_it_is_registered_for_whatever_its_arguments_are_called(reads_one, monkeypatch):
    monkeypatch.setattr(SIGNALS, "entries", dict(SIGNALS.entries))

    @SIGNALS.register("mine", reads_one=reads_one)
    def mine(signal, batch):
        return (signal if reads_one else signal[0]).logits

    @SIGNALS.register("other", reads_one=reads_one)
    def other(signals, batch):
        return (signals if reads_one else signals[0]).logits

    signals = {"final": random_signal()}
    for kind in ("mine", "other"):
        tables = {"made": Derived(kind=kind, of="final")}
        (make,) = build_signals(tables, {"final": PointSpec(6, 6)}, 6, 6)[0].values()
        assert torch.equal(make(signals, batch_of(list(range(6)))).logits, signals["final"].logits)
