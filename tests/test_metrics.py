"""Metrics against values worked out by hand or from the papers."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import log_loss, top_k_accuracy_score
from torchmetrics.functional.classification import multiclass_calibration_error

from sdcli.evaluation.metrics import confidence_and_correct, ece, nll, topk_correct
from sdcli.method.signals import ensemble


def test_top_k_counts_labels_among_the_k_largest_logits():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    labels = torch.tensor([0, 1, 2])
    assert topk_correct(logits, labels, 1).tolist() == [True, False, False]
    assert topk_correct(logits, labels, 2).tolist() == [True, True, False]
    assert topk_correct(logits, labels, 5).tolist() == [True, True, True]


def test_nll_equals_the_formula(vectors):
    entry = vectors["fidelity_metrics"]
    logits, labels = torch.tensor(entry["inputs"]["S4"]), torch.tensor(entry["inputs"]["y4"])
    assert nll(logits, labels).mean().item() == pytest.approx(entry["expected"]["nll"], abs=1e-6)
    assert topk_correct(logits, labels, 1).double().mean().item() == pytest.approx(entry["expected"]["acc"], abs=1e-9)


@pytest.mark.parametrize("bins", [10, 15])
def test_ece_equals_the_formula(vectors, bins):
    entry = vectors["ece"]
    logits, labels = torch.tensor(entry["inputs"]["S4"]), torch.tensor(entry["inputs"]["y4"])
    confidence, correct = confidence_and_correct(logits, labels)
    assert confidence.tolist() == pytest.approx(entry["expected"]["confidence"], abs=1e-6)
    assert ece(confidence, correct, bins) == pytest.approx(entry["expected"][f"ece{bins}"], abs=1e-6)


def test_a_confidence_of_one_is_in_the_last_bin():
    confidence = torch.cat([torch.ones(10), torch.full((10,), 0.95)])
    correct = torch.tensor([True, False] * 5 + [True] * 10)
    assert ece(confidence, correct) == pytest.approx(0.975 - 0.75, abs=1e-7)


def test_ece_is_zero_where_confidence_is_accuracy():
    confidence = torch.full((4,), 0.75)
    assert ece(confidence, torch.tensor([True, True, True, False])) == pytest.approx(0.0, abs=1e-7)


def test_the_ensemble_is_the_mean_of_the_logits(vectors):
    entry = vectors["exit_ensemble"]
    mean = ensemble(torch.tensor(entry["inputs"]["exit_logits"], dtype=torch.float64))
    assert torch.allclose(mean, torch.tensor(entry["expected"]["mean_logits"], dtype=torch.float64), atol=1e-9)


def test_metrics_equal_those_of_other_libraries():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(300, 7, generator=generator)
    labels = torch.randint(7, (300,), generator=generator)
    probabilities = logits.double().softmax(1)
    assert nll(logits, labels).mean().item() == pytest.approx(log_loss(labels, probabilities), abs=1e-6)
    for k in (1, 5):
        theirs = top_k_accuracy_score(labels, probabilities, k=k)
        assert topk_correct(logits, labels, k).double().mean().item() == pytest.approx(theirs)
    theirs = float(multiclass_calibration_error(logits.softmax(1), labels, num_classes=7, n_bins=15))
    assert ece(*confidence_and_correct(logits, labels), 15) == pytest.approx(theirs, abs=1e-6)
