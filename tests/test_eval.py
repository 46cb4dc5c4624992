"""`sdcli eval`: metrics against values worked out by hand and other libraries, what it writes, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from conftest import Command, Terminal, batch_of, noise, refused
from photos import calibrated, save_network
from PIL import Image
from processes import SERVER
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torchmetrics.functional import kl_divergence
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_confusion_matrix,
    multiclass_recall,
)

from sdcli.cli import main, talk
from sdcli.cli.grids import Cell, Grid, fitted, latex
from sdcli.data.batch import Batch
from sdcli.data.loaders import EpochBatches
from sdcli.data.open import open_dataset
from sdcli.data.resident import suitable_loader
from sdcli.data.splits import limited
from sdcli.devices import accelerator_for, interleaved
from sdcli.evaluation.answers import Answers, answer
from sdcli.evaluation.ensembles import Mixed, fit_weights, mean_of_probabilities, weighted
from sdcli.evaluation.fidelity import divergence
from sdcli.evaluation.metrics import (
    auroc,
    balanced_accuracy,
    bins,
    class_accuracies,
    confusion_matrix,
    ece,
    wilson,
)
from sdcli.evaluation.outputs import Outputs
from sdcli.evaluation.sharpness import HessianProduct, hutchinson, largest_eigenvalue, measure_sharpness
from sdcli.network.blueprint import Blueprint
from sdcli.network.multi_exit import build
from sdcli.network.policies import decide
from sdcli.network.weights import load, rebuild
from sdcli.recipe.schema import Network

QUICK = ("--dataset", "digits", "--recipe", "quick", "--epochs", "3", "--limit-train", "600", "--limit-val", "60",
         "--workers", "0", "--device", "cpu")  # fmt: skip
ON = ("--device", "cpu", "-j", 0)


def train(folder: Path, *options: str) -> Path:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["sdcli", "train", "test_resnet", *QUICK, *options, "--output", str(folder)])
        main()
    assert not end.value.code
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that differ by seed, `one` and `two`; `one` is calibrated."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("one", "1"), ("two", "2")):
        train(folder / name, "--seed", seed)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        arguments = ["calibrate", str(folder / "one"), "--max-drop", "50", "--no-guarantee", "--device", "cpu"]
        patch.setattr(sys, "argv", ["sdcli", *arguments])
        main()
    assert not end.value.code
    return folder


# --- metrics --------------------------------------------------------------------------------------------------------


def test_wilsons_interval_is_that_of_the_formula():
    # (p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with p = 0.9, n = 10, z = 1.959964.
    z, n, p = 1.959964, 10, 0.9
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = ((p + z**2 / (2 * n) - half) / (1 + z**2 / n), (p + z**2 / (2 * n) + half) / (1 + z**2 / n))
    assert wilson(9, 10) == pytest.approx(expected, abs=1e-6)
    assert wilson(10, 10)[1] == pytest.approx(1.0) and wilson(10, 10)[0] == pytest.approx(1 / (1 + z**2 / 10), abs=1e-6)


def test_auroc_counts_pairs_and_ties_are_half():
    confidence = torch.tensor([0.9, 0.6, 0.6, 0.3])
    correct = torch.tensor([True, False, True, False])
    # Right 0.9 beats both wrong ones, right 0.6 ties with 0.6 and beats 0.3: (2 + 0.5 + 1) / 4.
    assert auroc(confidence, correct) == pytest.approx(3.5 / 4)
    assert auroc(confidence, torch.ones(4, dtype=torch.bool)) is None
    generator = torch.Generator().manual_seed(0)
    confidence, correct = torch.rand(200, generator=generator), torch.rand(200, generator=generator) < 0.7
    assert auroc(confidence, correct) == pytest.approx(float(binary_auroc(confidence, correct.long())), abs=1e-6)
    assert auroc(confidence, correct) == pytest.approx(sklearn.metrics.roc_auc_score(correct, confidence), abs=1e-6)


def test_confusion_has_true_classes_in_rows():
    labels, predicted = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 0, 2])
    matrix = confusion_matrix(predicted, labels, 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 1]]
    assert matrix.equal(multiclass_confusion_matrix(predicted, labels, 3))
    assert class_accuracies(matrix).tolist() == pytest.approx([1 / 2, 1, 1 / 3])
    assert balanced_accuracy(matrix) == pytest.approx((1 / 2 + 1 + 1 / 3) / 3)
    recall = multiclass_recall(predicted, labels, num_classes=3, average="macro")
    assert balanced_accuracy(matrix) == pytest.approx(float(recall))
    assert matrix.tolist() == sklearn.metrics.confusion_matrix(labels, predicted).tolist()
    assert balanced_accuracy(matrix) == pytest.approx(sklearn.metrics.balanced_accuracy_score(labels, predicted))


def test_a_class_without_images_does_not_count_in_balanced_accuracy():
    # Class 1 has no image, but one of class 0 is taken for it.
    matrix = confusion_matrix(torch.tensor([0, 1, 2]), torch.tensor([0, 0, 2]), 3)
    assert balanced_accuracy(matrix) == pytest.approx((0.5 + 1.0) / 2)


def test_the_bins_of_the_reliability_diagram_are_those_of_ece():
    generator = torch.Generator().manual_seed(1)
    confidence, correct = torch.rand(500, generator=generator), torch.rand(500, generator=generator) < 0.6
    found = bins(confidence, correct)
    assert sum(one.images for one in found) == 500
    gap = sum(one.images * abs(one.accuracy - one.confidence) for one in found) / 500
    assert gap == pytest.approx(ece(confidence, correct), abs=1e-6)


def test_the_divergence_is_from_the_other_network_to_this_one():
    theirs, ours = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    found = divergence(theirs.log(), ours.log())
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found.tolist() == pytest.approx([by_hand, 0.0], abs=1e-6)
    assert float(found.mean()) == pytest.approx(float(kl_divergence(theirs, ours)), abs=1e-6)


# --- ensembles ------------------------------------------------------------------------------------------------------


def test_the_mean_of_probabilities_is_no_mean_of_logits():
    logits = [torch.tensor([[math.log(0.9), math.log(0.1)]]), torch.tensor([[math.log(0.2), math.log(0.8)]])]
    assert mean_of_probabilities(logits).exp().tolist()[0] == pytest.approx([0.55, 0.45])
    assert torch.softmax(sum(logits) / 2, dim=1)[0, 0] == pytest.approx(0.6)


def outputs_of(num: int, seed: int) -> Outputs:
    """Three exits, of which the second is best and the third guesses."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (num,), generator=generator)
    right = F.one_hot(labels, 5).float()
    noises = [torch.randn(num, 5, generator=generator) for _ in range(3)]
    strengths = (1.0, 2.0, 0.0)
    # Surer than they should be, so that sharing the weight pays.
    logits = {f"exit{k + 1}": 4 * (s * right + own) for k, (s, own) in enumerate(zip(strengths, noises, strict=True))}
    return Outputs(logits, labels)


def test_fitted_weights_are_a_minimum_of_the_nll_among_shares():
    outputs = outputs_of(400, 0)
    weights = fit_weights(outputs)
    assert sum(weights.values()) == pytest.approx(1) and min(weights.values()) >= 0
    assert weights["exit2"] > weights["exit1"] > weights["exit3"]

    def nll(of: dict[str, float]) -> float:
        return float(F.cross_entropy(weighted(outputs.logits, of), outputs.labels))

    best = nll(weights)
    grid = [(a / 40, b / 40, 1 - a / 40 - b / 40) for a in range(41) for b in range(41 - a)]
    assert best <= min(nll(dict(zip(weights, shares, strict=True))) for shares in grid) + 1e-6


def test_both_ensembles_answer_every_batch():
    outputs = outputs_of(64, 1)
    weights = {"exit1": 0.25, "exit2": 0.75, "exit3": 0.0}
    mixed = Mixed(weights, 10)
    for start in (0, 40):
        part = slice(start, start + 40)
        mixed(batch_of(outputs.labels[part]), {point: own[part] for point, own in outputs.logits.items()})
    found = mixed.answered()
    by_hand = 0.25 * outputs.logits["exit1"] + 0.75 * outputs.logits["exit2"]
    assert found["weighted"].predicted.equal(by_hand.argmax(dim=1))
    shares = torch.stack([own.softmax(dim=1) for own in outputs.logits.values()]).mean(dim=0)
    assert torch.allclose(found["mean of probs"].confidence, shares.amax(dim=1), atol=1e-6)


# --- sharpness ------------------------------------------------------------------------------------------------------


def tiny() -> tuple[nn.Sequential, list[Batch]]:
    """A network of 39 parameters with a batch norm whose statistics are fixed, and two batches of unequal size."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(2, 3)).double()
    network[1].running_mean.normal_(), network[1].running_var.uniform_(0.5, 2.0)
    images, labels = torch.randn(7, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 2])
    parts = (slice(0, 4), slice(4, 7))
    return network.eval(), [Batch(images[part], labels[part], torch.arange(7)[part]) for part in parts]


def exact(network: nn.Sequential, batches: list[Batch]) -> torch.Tensor:
    """The Hessian, entry by entry."""
    names = [name for name, _ in network.named_parameters()]
    sizes = [parameter.numel() for parameter in network.parameters()]
    images, labels = torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])

    def loss(vector: torch.Tensor) -> torch.Tensor:
        parts = zip(names, vector.split(sizes), network.parameters(), strict=True)
        table = {name: part.view_as(parameter) for name, part, parameter in parts}
        return F.cross_entropy(functional_call(network, table, images), labels)

    return hessian(loss, torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))


@pytest.fixture(scope="module")
def curvature() -> tuple[HessianProduct, torch.Tensor]:
    network, batches = tiny()
    product = HessianProduct(network, list(network.parameters()), batches, torch.device("cpu"))
    return product, exact(network, batches)


def test_hessian_products_are_the_columns_of_the_exact_hessian(curvature):
    product, matrix = curvature
    assert matrix.shape == (product.size, product.size) == (39, 39)
    columns = torch.stack([product(column) for column in torch.eye(39, dtype=torch.float64)], dim=1)
    assert torch.allclose(columns, matrix, atol=1e-12)
    assert matrix.abs().max() > 0.1


def test_hutchinsons_trace_and_its_error_are_those_of_the_exact_hessian(curvature):
    product, matrix = curvature
    trace, error = hutchinson(product, 400, seed=0)
    # With vectors of signs v'Hv has the variance 2 (sum of squares off the diagonal).
    off = matrix - matrix.diag().diag()
    assert error == pytest.approx(math.sqrt(2 * float(off.square().sum()) / 400), rel=0.2)
    assert abs(trace - float(matrix.trace())) < 3 * error


def test_the_largest_eigenvalue_is_that_of_the_exact_hessian(curvature):
    product, matrix = curvature
    assert largest_eigenvalue(product, seed=0) == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-3)


def test_sharpness_is_of_the_plain_network_in_eval_mode_and_leaves_it_as_it_was():
    blueprint = Blueprint.draft(Network(), "test_vit", ["a", "b", "c"], image_size=32)
    network = build(blueprint)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    batch = Batch(torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 0]), torch.arange(4))
    found = measure_sharpness(network, [batch], torch.device("cpu"), draws=2)
    assert found.num_parameters == sum(p.numel() for p in network.backbone.parameters() if p.requires_grad)
    assert (found.num_images, found.num_vectors) == (4, 2)
    with torch.no_grad():
        assert found.loss == pytest.approx(float(F.cross_entropy(network.plain(batch.images), batch.labels)), rel=1e-4)
    assert found.largest_eigenvalue is not None and found.largest_eigenvalue > 0
    assert all(tensor.equal(before[name]) for name, tensor in network.state_dict().items())


# --- several processes ----------------------------------------------------------------------------------------------


def answers_of(path: Path, rank: int, world: int) -> Answers:
    accelerator = accelerator_for("cpu")
    network, about = rebuild(path)
    split = limited(open_dataset("digits").splits["test"], 50, 0)
    batches = EpochBatches(split, 8, rank=rank, world=world)
    loader, _ = suitable_loader(
        split, about.blueprint.preprocess, None, batches, seed=0, workers=0, device=accelerator.device
    )
    return answer(
        network, loader, points=network.classifiers, device=accelerator.device,
        collect=lambda own: interleaved(accelerator, [tensor.cpu() for tensor in own]),
    )  # fmt: skip


def one_of_two(path: Path, rank: int, port: int, out: Path) -> None:
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()})
    torch.set_num_threads(1)
    torch.save(answers_of(path, rank, 2), out)
    torch.distributed.destroy_process_group()


def test_answers_collected_over_two_processes_equal_those_of_one(tmp_path):
    path = tmp_path / "network.safetensors"
    save_network(path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    files = [tmp_path / f"{rank}.pt" for rank in range(2)]
    both = [SERVER.Process(target=one_of_two, args=(path, rank, port, file)) for rank, file in enumerate(files)]
    for process in both:
        process.start()
    alone = answers_of(path, 0, 1)
    for process in both:
        process.join(300)
        assert process.exitcode == 0
    # 50 images in batches of 8: the processes have four and three, the last of two images.
    for file in files:
        found = torch.load(file, weights_only=False)
        assert found.labels.equal(alone.labels) and found.index.equal(alone.index)
        assert list(found.points) == ["exit1", "exit2", "exit3", "final", "ensemble"]
        for point, own in alone.points.items():
            for name, tensor in vars(own).items():
                assert getattr(found.points[point], name).equal(tensor), (point, name)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_table_of_a_terminal_has_at_most_100_columns(runs, sdcli, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(talk, "output", lambda: talk._Console(file=terminal, width=200, force_terminal=True))
    result = sdcli("eval", runs / "one", *ON, "--limit", 50, "--dynamic", "--latency", "--ensembles")
    assert result.code == 0, result.err
    plain = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    tables = [line for line in plain.splitlines() if line.startswith(" ")]
    assert "mean of probs" in plain and " ms " in plain and max(map(len, tables)) <= 100


def test_a_narrow_terminal_does_without_columns_and_a_note_names_them():
    grid = Grid("scores", ("exit", "top-1\n%", "AUROC", "MACs"), (tuple(map(Cell, ("exit1", "97.77", "0.9", "1 M"))),))
    wide, none = fitted(grid, talk._Console(width=80, file=Terminal(), force_terminal=True), ("AUROC",))
    narrow, dropped = fitted(grid, talk._Console(width=25, file=Terminal(), force_terminal=True), ("AUROC",))
    assert (len(wide.columns), none) == (4, [])
    assert (len(narrow.columns), dropped) == (3, ["AUROC"])


def test_all_formats_have_the_same_scores(runs, sdcli):
    asked = ("eval", runs / "one", *ON, "--limit", 60, "--dynamic", "--ensembles", "--against", runs / "two")
    table = json.loads(sdcli(*asked, "--json").out)
    rows = list(csv.DictReader(io.StringIO(sdcli(*asked, "--csv").out)))
    names = ["exit1", "exit2", "exit3", "final", "ensemble", "mean of probs", "weighted", "early exit"]
    assert [row["point"] for row in rows] == names
    results = [*table["exits"], table["ensemble"], *table["ensembles"]["results"], table["early_exit"]["result"]]
    for row, result in zip(rows, results, strict=True):
        for field in ("top1", "top1_low", "top1_high", "top5", "nll", "ece", "auroc", "agreement", "params", "macs"):
            assert row[field] == ("" if result[field] is None else str(result[field])), field
    fidelity = {row["point"]: row for row in table["against"]["points"]}
    assert [row["against_kl"] for row in rows[:5]] == [str(fidelity[name]["kl"]) for name in names[:5]]
    assert [row["against_kl"] for row in rows[5:]] == ["", "", ""]
    markdown, tex = sdcli(*asked, "--markdown").out, sdcli(*asked, "--latex").out
    for result in results:
        low, high = result["top1_low"], result["top1_high"]
        assert f"{result['top1']:.2f}" in markdown and f"{low:.1f}-{high:.1f}" in markdown
        assert f"{result['nll']:.3f}" in tex
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == markdown.count("| --- |") == 4
    assert r"top-1 \%" in tex and "& speed-up" in tex


def test_latex_escapes_names():
    grid = Grid("t", ("a_b", "5 %"), ((Cell("x&y"), Cell("1 ± 2", best=True)),))
    assert r"x\&y & \textbf{1 $\pm$ 2} \\" in latex(grid) and r"a\_b & 5 \%" in latex(grid)


def test_weights_of_an_ensemble_are_fitted_on_validation_images_alone(runs, sdcli):
    table = json.loads(sdcli("eval", runs / "one", *ON, "--ensembles", "--json").out)
    found = table["ensembles"]
    # 144 of the 1,438 training images are held out, whatever --limit-val took of them.
    assert found["num_images"] == 144 and sum(found["weights"].values()) == pytest.approx(1)
    some = json.loads(sdcli("eval", runs / "one", *ON, "--ensembles", "--limit", 30, "--json").out)
    assert some["ensembles"]["weights"] == found["weights"], "whatever is scored"


def test_ensembles_need_several_exits_and_other_images_than_those_scored(runs, sdcli, tmp_path):
    refused(
        sdcli("eval", runs / "one", "--ensembles", "--split", "val"),
        "--ensembles: the weights are fitted on the validation split, which is scored here\n"
        "  expected: other images to score\n  fix:      --split test",
    )
    refused(
        sdcli("eval", runs / "one", "--ensembles", "--exits", "final"),
        "--ensembles: only one exit is scored\n  expected: two exits or more\n  fix:      --exits all",
    )
    whole = train(tmp_path / "whole", "--val-fraction", "0", "--epochs", "1", "--limit-train", "40")
    result = sdcli("eval", whole, *ON, "--ensembles")
    assert result.code == 2 and "was trained on all images of digits: none is left" in result.err


def test_fidelity_to_itself_is_perfect_and_to_another_run_is_what_both_answer(runs, sdcli):
    own = json.loads(sdcli("eval", runs / "two", *ON, "--limit", 80, "--against", runs / "two", "--json").out)
    final = own["against"]["points"][3]
    assert (final["point"], final["agreement"]) == ("final", 100.0) and final["kl"] == pytest.approx(0, abs=1e-6)
    assert [p["agreement"] for p in own["against"]["points"]] == [
        row["agreement"] for row in [*own["exits"], own["ensemble"]]
    ]
    other = json.loads(sdcli("eval", runs / "one", *ON, "--limit", 80, "--against", runs / "two", "--json").out)
    split = limited(open_dataset("digits").splits["test"], 80, 42)
    one, two = load(runs / "one"), load(runs / "two")
    with torch.no_grad():
        mine = one(torch.stack([one.transform(split.image(i)) for i in range(80)]))
        theirs = two.plain(torch.stack([two.transform(split.image(i)) for i in range(80)]))
    for row in other["against"]["points"][:4]:
        logits = mine[row["point"]].logits
        same = logits.argmax(dim=1) == theirs.argmax(dim=1)
        assert row["agreement"] == pytest.approx(100 * float(same.double().mean()))
        expected = F.kl_div(logits.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="batchmean")
        assert row["kl"] == pytest.approx(float(expected), rel=1e-3)
    assert other["against"]["top1"] == pytest.approx(own["exits"][3]["top1"])


def test_another_network_sees_the_images_with_its_own_preprocessing(runs, sdcli, tmp_path):
    small = train(tmp_path / "small", "--image-size", "16", "--epochs", "1", "--limit-train", "200")
    own = json.loads(sdcli("eval", small, *ON, "--limit", 60, "--json").out)
    seen = json.loads(sdcli("eval", runs / "one", *ON, "--limit", 60, "--against", small, "--json").out)
    assert seen["against"]["top1"] == pytest.approx(own["exits"][-1]["top1"])


def test_another_network_with_other_classes_is_refused(runs, sdcli, tmp_path):
    path = tmp_path / "other.safetensors"
    save_network(path)
    refused(
        sdcli("eval", runs / "one", *ON, "--against", path),
        f"--against: '{path}' has other classes than '{runs / 'one' / 'best.safetensors'}': class 0 is 'class 0' there "
        "and '0' here\n  expected: a checkpoint with the same classes in the same order\n"
        "  fix:      train both on the same data set",
    )


def test_per_class_is_worst_first_and_adds_up_to_top_1(runs, sdcli):
    table = json.loads(sdcli("eval", runs / "one", *ON, "--per-class", "--json").out)
    rows = table["per_class"]
    assert len(rows) == 10 and [row["final"] for row in rows] == sorted(row["final"] for row in rows)
    for point, result in (("final", table["exits"][-1]), ("ensemble", table["ensemble"])):
        right = sum(row["images"] * row[point] for row in rows)
        assert right / 359 == pytest.approx(result["top1"] / 100)
        assert table["balanced_accuracy"][point] == pytest.approx(100 * np.mean([row[point] for row in rows]))
    shown = sdcli("eval", runs / "one", *ON, "--per-class").out
    assert f"balanced accuracy: exit1 {table['balanced_accuracy']['exit1']:.2f} %" in shown
    refused(
        sdcli("eval", runs / "one", "--per-class", "--csv"),
        "--per-class and --csv exclude each other: CSV is one table, of exits\n  expected: --json or --markdown",
    )


def test_the_confusion_matrix_is_that_of_the_predictions(runs, sdcli, tmp_path):
    matrix_file, rows_file = tmp_path / "matrix.csv", tmp_path / "rows.parquet"
    result = sdcli("eval", runs / "one", *ON, "--confusion", matrix_file, "--predictions", rows_file)
    assert result.code == 0, result.err
    with matrix_file.open() as opened:
        header, *lines = csv.reader(opened)
    assert header == ["class", *map(str, range(10))] and [line[0] for line in lines] == header[1:]
    matrix = np.array([[int(cell) for cell in line[1:]] for line in lines])
    rows = pyarrow.parquet.read_table(rows_file).to_pydict()
    counted = np.zeros((10, 10), dtype=int)
    np.add.at(counted, (np.array(rows["label"], dtype=int), np.array(rows["final"], dtype=int)), 1)
    assert matrix.sum() == 359 and np.array_equal(matrix, counted)
    mistakes = matrix - np.diag(matrix.diagonal())
    row, column = np.unravel_index(mistakes.argmax(), mistakes.shape)
    said = f"{mistakes[row, column]} of {matrix[row].sum()} images of '{row}' classified as '{column}'."
    assert f"most confused classes of final: {said}" in result.out


def test_predictions_have_a_row_per_image_in_the_order_of_the_data(runs, sdcli, tmp_path):
    file = tmp_path / "rows.parquet"
    result = sdcli("eval", runs / "one", *ON, "--limit", 40, "--predictions", file, "--json")
    table = pyarrow.parquet.read_table(file)
    points = ("exit1", "exit2", "exit3", "final", "ensemble")
    assert table.column_names == ["image", "label", *(n for p in points for n in (p, f"{p}_confidence"))]
    split = open_dataset("digits").splits["test"]
    rows = table.to_pydict()
    assert rows["image"] == limited(split, 40, 42).index.tolist() == sorted(rows["image"])
    assert rows["label"] == [str(split.labels[index]) for index in rows["image"]]
    right = np.mean([a == b for a, b in zip(rows["exit2"], rows["label"], strict=True)])
    assert 100 * right == pytest.approx(json.loads(result.out)["exits"][1]["top1"])
    assert all(0.1 <= share <= 1 for share in rows["final_confidence"])


def test_images_in_files_are_named_by_their_files(sdcli, tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for label in ("left", "right"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for number in range(count):
                noise(number).save(tmp_path / "data" / split / label / f"{number}.png")
    save_network(tmp_path / "network.safetensors")
    network, _ = rebuild(tmp_path / "network.safetensors")
    blueprint = Blueprint.draft(Network(exits="none"), "test_resnet", ["left", "right"])
    plain = build(blueprint).eject()
    weights = tmp_path / "plain.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in plain.state_dict().items()}, weights)
    asked = ("eval", "test_resnet", "--weights", weights, "--dataset", tmp_path / "data", *ON)
    result = sdcli(*asked, "--predictions", tmp_path / "rows.parquet")
    assert result.code == 0, result.err
    rows = pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pydict()
    assert rows["image"] == [f"test/{label}/{number}.png" for label in ("left", "right") for number in range(2)]
    assert "classes" in result.err and network.classes[0] not in result.out


def grow(folder: Path, names: tuple[str, str], count: int, first: int = 0) -> None:
    """Images of two classes that a mean tells apart."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for image in range(first, first + count):
            pixels = np.random.RandomState(image).randint(0, 100, (16, 16, 3), dtype=np.uint8) + 100 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{image}.png")


def test_images_held_out_of_training_are_known_only_while_the_data_stay_as_they_were(sdcli, tmp_path):
    data, run = tmp_path / "photos", tmp_path / "run"
    grow(data, ("cat", "dog"), 20)
    options = ("--recipe", "quick", "--epochs", 1, "--val-fraction", 0.3, *ON, "-o", run)
    assert sdcli("train", "test_resnet", "--dataset", data, *options).code == 0
    same = sdcli("eval", run, *ON, "--json")
    assert (json.loads(same.out)["split"], json.loads(same.out)["num_images"]) == ("validation", 12)
    grow(data, ("cat", "dog"), 2, first=20)
    wrong = "the training images of photos have changed since training, so that it is not known which were held out"
    for command in (("eval", run), ("calibrate", run, "--budget", 0.9), ("report", run)):
        result = sdcli(*command, *ON)
        assert result.code == 2 and f"{wrong}\n  expected: the images as they were, or others" in result.err, command
    # A test split was never part of them.
    (tmp_path / "sorted").mkdir()
    data.rename(tmp_path / "sorted" / "train")
    (tmp_path / "sorted").rename(data)
    grow(data / "test", ("cat", "dog"), 4, first=50)
    scored = sdcli("eval", run, *ON, "--json")
    assert json.loads(scored.out)["split"] == "test" and f"note: {wrong}: they are left out" in scored.err
    refused(
        sdcli("calibrate", run, "--budget", 0.9, *ON),
        f"'{run}/best.safetensors': {wrong}\n  expected: the images as they were, or others that it has not seen\n"
        "  fix:      restore them, train again, or name other data with --dataset",
    )
    # Other data of the same name have no images that were held out of this training.
    grow(tmp_path / "other" / "photos", ("cat", "dog"), 30, first=100)
    other = sdcli("calibrate", run, "--budget", 0.9, "--dataset", tmp_path / "other" / "photos", *ON)
    assert other.code == 2 and "photos has no validation split" in other.err
    # A copy of the data in another place is the same.
    shutil.rmtree(data)
    grow(tmp_path / "copy" / "photos", ("cat", "dog"), 20)
    copy = sdcli("eval", run, "--dataset", tmp_path / "copy" / "photos", *ON, "--json")
    assert json.loads(copy.out)["split"] == "validation"
    assert json.loads(copy.out)["exits"] == json.loads(same.out)["exits"]


def test_a_timm_model_with_weights_is_one_row_as_the_checkpoint_scores_it(runs, sdcli, tmp_path):
    weights = tmp_path / "plain.safetensors"
    blueprint = Blueprint.draft(Network(exits="none"), "test_resnet", [str(n) for n in range(10)])
    network = build(blueprint).eval()
    save_file({name: tensor.contiguous() for name, tensor in network.eject().state_dict().items()}, weights)
    asked = ("eval", "test_resnet", "--weights", weights, "--dataset", "digits", *ON, "--limit", 20)
    result = sdcli(*asked, "--json", "--per-class", "--latency")
    assert result.code == 0, result.err
    table = json.loads(result.out)
    assert [row["point"] for row in table["exits"]] == ["final"] and table["ensemble"] is None
    assert table["exits"][0]["latency_ms"] > 0
    split = limited(open_dataset("digits").splits["test"], 20, 42)
    fresh = build(blueprint).eval()
    fresh.backbone.load_state_dict(load_file(weights))
    with torch.no_grad():
        logits = fresh.plain(torch.stack([fresh.transform(split.image(i)) for i in range(20)]))
    nll = F.cross_entropy(logits, torch.from_numpy(split.labels))
    assert table["exits"][0]["nll"] == pytest.approx(float(nll), rel=1e-4)
    assert "same as" not in sdcli(*asked).out


def test_a_timm_model_needs_weights_data_and_its_own_classes(sdcli, tmp_path):
    refused(
        sdcli("eval", "resnet18"),
        "'resnet18' is no run folder or checkpoint, and as a timm model it has random weights, which score nothing\n"
        "  expected: a run folder, a .safetensors file, or a timm model with trained weights\n"
        "  fix:      --weights FILE.safetensors, or --pretrained for timm's own",
    )
    weights = tmp_path / "plain.safetensors"
    plain = build(Blueprint.draft(Network(exits="none"), "test_resnet", ["a", "b", "c"])).eject()
    save_file({name: tensor.contiguous() for name, tensor in plain.state_dict().items()}, weights)
    refused(
        sdcli("eval", "test_resnet", "--weights", weights),
        "--dataset is missing: 'test_resnet' does not name one\n  expected: the data set to score on\n"
        "  fix:      --dataset DATA",
    )
    refused(
        sdcli("eval", "test_resnet", "--weights", weights, "--dataset", "digits", *ON),
        f"'{weights}' has 3 classes, but the data set has 10\n"
        "  expected: weights that were trained on the data set's classes\n"
        "  fix:      choose another --dataset or --weights; sdcli train fits a new classifier",
    )
    refused(
        sdcli("eval", "test_resnet", "--weights", weights, "--dataset", "digits", "--dynamic"),
        "--dynamic and --ensembles need exits: 'test_resnet' has none\n"
        "  expected: a run or a checkpoint of sdcli train",
    )
    checkpoint = tmp_path / "network.safetensors"
    save_network(checkpoint)
    assert (
        "is a checkpoint of sdcli" in sdcli("eval", "test_resnet", "--weights", checkpoint, "--dataset", "digits").err
    )
    refused(
        sdcli("eval", checkpoint, "--pretrained"),
        f"--pretrained is for a timm model: '{checkpoint}' has weights of its own\n"
        "  expected: one of them\n  fix:      leave --pretrained out",
    )


def test_latency_is_measured_for_every_exit(runs, sdcli):
    result = sdcli("eval", runs / "one", *ON, "--limit", 20, "--latency", "--json")
    table = json.loads(result.out)
    times = [row["latency_ms"] for row in table["exits"]]
    assert all(time > 0 for time in times) and times[0] < times[-1] and table["ensemble"]["latency_ms"] is None
    assert table["latency_on"].startswith("cpu") and "note: ms: the median time of one image on cpu" in result.err


def test_sharpness_is_reported_with_its_error(runs, sdcli, monkeypatch):
    monkeypatch.setattr("sdcli.evaluation.sharpness.KEPT", 4)
    monkeypatch.setattr("sdcli.evaluation.sharpness.RESTARTS", 1)
    result = sdcli("eval", runs / "one", *ON, "--limit", 8, "--sharpness", "--json")
    found = json.loads(result.out)["sharpness"]
    assert found["num_images"] == 8 and found["trace_error"] > 0 and found["num_vectors"] == 30


def test_early_exit_is_scored_like_an_exit_and_drawn_along_its_curve(runs, sdcli, tmp_path):
    picture = tmp_path / "scores.png"
    result = sdcli("eval", runs / "one", *ON, "--dynamic", "--plot", picture, "--json")
    early = json.loads(result.out)["early_exit"]["result"]
    assert 0 <= early["auroc"] <= 1 and early["top1_low"] < early["top1"] < early["top1_high"]
    split, network = open_dataset("digits").splits["test"], load(runs / "one")
    with torch.no_grad():
        signals = network(torch.stack([network.transform(split.image(i)) for i in range(len(split))]))
    decided = decide(network.calibration.policy, {point: signals[point].logits for point in network.exits})
    same = decided.answers.argmax(dim=1) == signals["final"].logits.argmax(dim=1)
    assert early["agreement"] == pytest.approx(100 * float(same.double().mean()))
    right = decided.answers.argmax(dim=1) == torch.from_numpy(split.labels)
    assert early["auroc"] == pytest.approx(auroc(decided.answers.amax(dim=1).exp(), right), abs=1e-4)
    with Image.open(picture) as opened:
        assert opened.size[0] > 1000
    assert f"note: wrote {picture}" in result.err


def test_the_picture_of_scores_shows_what_the_table_says(runs, sdcli, tmp_path, figures):
    result = sdcli("eval", runs / "one", *ON, "--plot", tmp_path / "scores.svg", "--json")
    table, (figure,) = json.loads(result.out), figures
    rows = [*table["exits"], table["ensemble"]]
    cost, *panels = figure.axes
    for row, drawn in zip(rows, cost.containers, strict=True):
        line, _, (bar,) = drawn.lines
        ((_, low), (_, high)) = bar.get_segments()[0]
        assert drawn.get_label() == row["point"]
        assert (line.get_xdata()[0], line.get_ydata()[0]) == pytest.approx((row["macs"], row["top1"]))
        assert (low, high) == pytest.approx((row["top1_low"], row["top1_high"]))
    shown = [panel for panel in panels if panel.get_visible()]
    for row, panel in zip(rows, shown, strict=True):
        assert panel.get_title(loc="left") == f"{row['point']}, ECE {row['ece']:.3f}"
        assert panel.patches and all(0 <= bar.get_height() <= 1 for bar in panel.patches)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_confusion_matrix_is_drawn_in_every_format(ending, sdcli, tmp_path):
    save_network(tmp_path / "network.safetensors")
    calibrated(tmp_path / "network.safetensors")
    file = tmp_path / f"matrix.{ending}"
    assert sdcli("eval", tmp_path / "network.safetensors", *ON, "--limit", 20, "--confusion", file).code == 0
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert file.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--exits", "all,exit9"),
            "--exits all,exit9: 'all' is every exit already\n  expected: all, or some of them: exit1,exit3\n"
            "  fix:      --exits all",
        ),
        (
            ("--json", "--latex"),
            "--json, --csv, --markdown and --latex exclude each other\n  expected: one of them",
        ),
        (
            ("--weights", "a.safetensors", "--pretrained"),
            "--weights and --pretrained exclude each other\n  expected: one of them",
        ),
        (
            ("--plot", "scores.txt"),
            "--plot scores.txt has another ending\n  expected: a file whose name ends in .png, .svg, .pdf, .jpg, .webp\n"
            "  fix:      --plot scores.png",
        ),
        (
            ("--confusion", "there/matrix.csv"),
            "--confusion there/matrix.csv cannot be written: No such file or directory\n"
            "  expected: a file in a folder that exists",
        ),
        (
            ("--predictions", "rows.csv"),
            "--predictions rows.csv has another ending\n  expected: a file whose name ends in .parquet\n"
            "  fix:      --predictions rows.parquet",
        ),
        (
            ("--plot", "a.png", "--confusion", "./a.png"),
            "--plot and --confusion name the same file, a.png\n  expected: a file each",
        ),
        (("--budget", "0.5"), "--budget needs --dynamic\n  expected: both, or neither\n  fix:      --dynamic"),
        (
            ("--against", "nowhere.safetensors"),
            "checkpoint 'nowhere.safetensors' does not exist\n"
            "  expected: a run folder, or a file such as RUN/best.safetensors",
        ),
    ],
)
def test_mistakes_are_refused_before_any_data_is_read(options, message, runs, sdcli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sdcli.evaluation.opened.open_dataset", lambda *_, **__: pytest.fail("data were opened"))
    refused(sdcli("eval", runs / "one", *options), message)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_file_is_whole_or_not_there(runs, sdcli: Command, tmp_path, monkeypatch):
    before = tmp_path / "rows.parquet"
    before.write_bytes(b"older")

    def broken(table: object, file: Path) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", broken)
    result = sdcli("eval", runs / "one", *ON, "--limit", 20, "--predictions", before)
    refused(
        result,
        f"--predictions {before} cannot be written: No space left on device\n  expected: a file in a folder that exists",
    )
    assert [file.name for file in tmp_path.iterdir()] == ["rows.parquet"] and before.read_bytes() == b"older"
