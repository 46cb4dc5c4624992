"""The page and the model card of a run: whole, self-contained, and with the figures of `sdcli eval`."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import Command, noise, refused
from huggingface_hub import ModelCard
from photos import calibrated, save_network

from sdcli.cli import main
from sdcli.evaluation.answers import Answered, Answers
from sdcli.evaluation.metrics import bins, ece
from sdcli.network.blueprint import Blueprint
from sdcli.network.calibration import Promise
from sdcli.network.checkpoint import Description, TrainedOn, describe_again, read_description, save_checkpoint
from sdcli.network.multi_exit import build
from sdcli.recipe.schema import Network
from sdcli.report import charts
from sdcli.report.findings import examine
from sdcli.report.pictures import SIDE, disagreeing, thumbnail, varied

VOID = {"meta", "img", "br", "hr", "link", "input", "source"}
ADDRESSES = {"src", "href", "xlink:href", "action", "data", "poster", "srcset", "formaction", "background"}


class Page(HTMLParser):
    """A page, parsed: its elements have to be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.events: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ADDRESSES]
        self.events += [name for name, _ in attrs if name.startswith("on")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data.strip()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on digits."""
    folder = tmp_path_factory.mktemp("report") / "first"
    options = "--dataset digits --recipe quick --epochs 2 --workers 0 --device cpu --image-size 16 --limit-train 300"
    options += " --head linear --unset losses.hint"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sdcli", "train", "test_resnet", *options.split(), "--output", str(folder)])
        with pytest.raises(SystemExit) as end:
            main()
    assert not end.value.code
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run in the working folder."""
    shutil.copytree(trained, tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    return Path("first")


def reported(sdcli: Command, *arguments: object) -> Page:
    """The page that a command writes."""
    result = sdcli("report", *arguments, "--device", "cpu")
    assert result.code == 0, result.err
    return Page(Path(result.out.splitlines()[0]).read_text(encoding="utf-8"))


def test_page_and_card_are_written_into_the_run_folder(run: Path, sdcli: Command):
    result = sdcli("report", run, "--device", "cpu")
    assert result.out == "first/report.html\nfirst/README.md\n"
    again = sdcli("report", run, "--device", "cpu")
    assert again.code == 0, "files of an earlier report are replaced"
    assert not list(run.glob(".*.tmp"))


def test_the_page_is_balanced_and_needs_nothing_else(run: Path, sdcli: Command):
    page = reported(sdcli, run)
    assert page.addresses and all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert page.events == []
    text = (run / "report.html").read_text()
    assert "@import" not in text and "url(" not in text
    assert page.tags.count("h1") == 1 and page.tags.count("svg") > 8 and '<html lang="en">' in text
    # On a phone as wide as the phone; in the dark every colour has another value.
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text and "max-width: 600px" in text
    light, dark = re.split(re.escape("@media (prefers-color-scheme: dark)"), text, maxsplit=1)
    colours = [set(re.findall(r"(--[\w-]+): #", part.split("}")[0])) for part in (light[light.index(":root") :], dark)]
    assert colours[0] == colours[1] and len(colours[0]) > 5
    assert len(text) < 300_000


def test_its_figures_are_those_of_eval(run: Path, sdcli: Command):
    scored = json.loads(sdcli("eval", run, "--device", "cpu", "--json").out)
    titles, *rows = reported(sdcli, run).tables[0]
    assert [row[0] for row in rows] == ["exit1", "exit2", "exit3", "final", "ensemble"]
    for row, result in zip(rows, [*scored["exits"], scored["ensemble"]], strict=True):
        cells = dict(zip(titles, row, strict=True))
        assert cells["top-1 %"].startswith(f"{result['top1']:.2f} (")
        assert (cells["top-5 %"], cells["NLL"]) == (f"{result['top5']:.2f}", f"{result['nll']:.3f}")
        assert (cells["ECE"], cells["AUROC"]) == (f"{result['ece']:.3f}", f"{result['auroc']:.3f}")
        assert cells["same as final %"] == f"{result['agreement']:.2f}"
        assert cells["speed-up"] == f"{result['speedup']:.2f}x"


def test_early_exit_is_scored_as_eval_scores_it(run: Path, sdcli: Command):
    promise = Promise("drop", 2.0, 1.25, 0.9, "clopper-pearson", 80)
    calibrated(run / "best.safetensors", promise)
    early = json.loads(sdcli("eval", run, "--dynamic", "--device", "cpu", "--json").out)["early_exit"]
    page = reported(sdcli, run)
    titles, *rows = page.tables[0]
    cells = dict(zip(titles, rows[-1], strict=True))
    assert cells["exit"] == "early exit"
    assert cells["top-1 %"].startswith(f"{early['result']['top1']:.2f} (")
    assert cells["speed-up"] == f"{early['result']['speedup']:.2f}x"
    assert sum(exit["share"] > 0 for exit in early["exits"]) > 1
    shares = ", ".join(f"{exit['point']} ({exit['share']:.1%})" for exit in early["exits"])
    assert f"images leave at {shares}. Promise: at most 2 points of top-1 accuracy lost" in page.text
    assert "As calibrated." in page.text
    assert "(measured there: 1.25)" in (run / "README.md").read_text()


def test_the_curve_of_early_exit_is_measured_on_the_images_of_the_page(run: Path):
    path = run / "best.safetensors"
    calibrated(path)
    found = examine(run, path, device="cpu")
    early, passing = found.early, found.about.blueprint.passing(("exit1",))
    assert early is not None and early.calibration.curve[0].thresholds == {"exit1": 0.0}
    everyone, chosen = early.curve if early.curve[0].macs == passing["exit1"] else early.curve[::-1]
    assert (everyone.macs, everyone.top1) == (passing["exit1"], pytest.approx(found.report.exits[0].top1))
    assert (round(chosen.macs), chosen.top1) == (early.result.macs, pytest.approx(early.result.top1))


def test_a_network_without_exits_has_a_page(tmp_path: Path, sdcli: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    blueprint = Blueprint.draft(Network(exits="none"), "test_resnet", [str(number) for number in range(10)])
    about = Description(blueprint, TrainedOn("digits", "digits", 0.1, 42), recipe={}, epoch=1)
    save_checkpoint(Path("plain.safetensors"), build(blueprint).state_dict(), about)
    page = reported(sdcli, "plain.safetensors", "--limit", "40")
    assert [row[0] for row in page.tables[0]] == ["exit", "final"]
    assert "alibrated" not in page.text.replace("Not calibrated for early exit.", "") and "disagree" not in page.text


def test_without_a_calibration_the_page_says_so(run: Path, sdcli: Command):
    page = reported(sdcli, run)
    assert "Not calibrated for early exit: sdcli calibrate first finds when images may leave." in page.text
    assert "Easy for exit1" in page.text and "Hard for exit1" in page.text


def test_the_card_has_the_fields_of_the_hub(run: Path, sdcli: Command):
    scored = json.loads(sdcli("eval", run, "--device", "cpu", "--json").out)
    assert sdcli("report", run, "--license", "mit", "--device", "cpu").code == 0
    card = ModelCard.load(run / "README.md")
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("timm", "image-classification", "mit")
    assert data.model_name == "test_resnet on digits" and data.metrics == ["accuracy"]
    expected = [(f"Top-1 % of {r['point']}", round(r["top1"], 2)) for r in [*scored["exits"], scored["ensemble"]]]
    assert [(r.metric_name, r.metric_value) for r in data.eval_results] == expected
    assert {(r.dataset_name, r.dataset_split) for r in data.eval_results} == {("digits", "test")}
    assert (
        "sdcli train test_resnet --dataset digits --recipe first/recipe.toml --image-size 16 --limit-train 300"
        in card.text
    )
    assert (
        "sdcli.load('best.safetensors')" in card.text and "- The epoch was chosen on the validation split." in card.text
    )


def test_names_from_data_are_inert(tmp_path: Path, sdcli: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a&b" / "best.safetensors"
    save_network(path)
    about = read_description(path)
    classes = tuple(f"<script>alert({number})</script>\"&'{{{{ 7 * 7 }}}}" for number in range(10))
    recipe = {"title": "<img src=x onerror=alert(1)>`[a](b)`", "note": "```\n</details>"}
    blueprint = replace(about.blueprint, classes=classes)
    describe_again(path, replace(about, blueprint=blueprint, recipe=recipe), path)
    (path.parent / "run.json").write_text(json.dumps({"model": "test_resnet", "dataset": "/secret/place/<b>"}))
    page = reported(sdcli, "a&b/best.safetensors", "--dataset", "digits", "--limit", "40")
    assert "script" not in page.tags and page.events == [] and "b" not in page.tags
    assert classes[0] in page.text and recipe["title"] in page.text
    card = (path.parent / "README.md").read_text()
    assert "/secret" not in card + page.text
    assert "**Recipe:** \\<img src=x onerror=alert(1)\\>\\`\\[a\\](b)\\`" in card
    # The recipe has a fence that is longer than the one in it.
    assert "\n````toml\n" in card and card.count("\n````\n") == 1


def test_several_runs_are_compared_in_the_working_folder(run: Path, sdcli: Command):
    shutil.copytree(run, "second")
    page = reported(sdcli, run, "second")
    assert Path("report.html").is_file() and not Path("second/README.md").exists()
    titles, *rows = page.tables[0]
    assert titles == ["exit", "first", "second"]
    assert all(row[1] == row[2] and "(" in row[1] for row in rows) and len(rows) == 5
    assert "#run-1" in page.addresses and "#run-2" in page.addresses
    assert "cannot be compared" not in page.text


def test_runs_on_different_images_are_not_passed_off_as_comparable(run: Path, sdcli: Command):
    shutil.copytree(run, "second")
    shutil.copytree(run, "other/second")
    page = reported(sdcli, "second", "other/second", "--output", "both.html", "--limit", "50")
    assert page.tables[0][0] == ["exit", "second (1)", "second (2)"]


def test_a_page_needs_no_matplotlib(run: Path, sdcli: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "Validation accuracy" in reported(sdcli, run, "--no-card").text
    assert not (run / "README.md").exists()


def test_a_checkpoint_without_a_run_folder_has_a_page_without_curves(run: Path, sdcli: Command):
    Path("alone").mkdir()
    shutil.copy(run / "best.safetensors", "alone/net.safetensors")
    page = reported(sdcli, "alone/net.safetensors")
    assert "Training losses" not in page.text and "repeats this run" not in page.text
    assert "Accuracy per class" in page.text and "net" in page.text


def test_files_of_others_stay(run: Path, sdcli: Command):
    for name, flag in (("report.html", "--output"), ("README.md", "--card")):
        (run / name).write_text("mine")
        refused(
            sdcli("report", run),
            f"first/{name} exists, and sdcli report has not written it\n"
            "  expected: a new file, or one of an earlier report\n"
            f"  fix:      another {flag}, or --force to replace it",
        )
        assert (run / name).read_text() == "mine"
        (run / name).unlink()
    (run / "README.md").write_text("mine")
    assert sdcli("report", run, "--force", "--device", "cpu").code == 0
    assert (run / "README.md").read_text() != "mine"


def test_what_cannot_be_written_is_refused_before_anything_is_scored(run: Path, sdcli: Command):
    refused(
        sdcli("report", run, "--output", "page.pdf"),
        "--output page.pdf: its name does not end in .html\n  expected: a .html file\n  fix:      --output page.pdf.html",
    )
    refused(
        sdcli("report", run, "--output", "nowhere/page.html"),
        "--output nowhere/page.html: its folder does not exist\n  expected: a folder that exists",
    )
    refused(
        sdcli("report", run, run, "--card", "a.md"),
        "--card with 2 runs\n  expected: one run: a card is about one model\n  fix:      leave out --card",
    )
    refused(
        sdcli("report", run, "--no-card", "--license", "mit"),
        "--license and --no-card exclude each other\n  expected: one of them",
    )
    Path("folder.html").mkdir()
    refused(
        sdcli("report", run, "--output", "folder.html"),
        "--output folder.html is not a regular file\n  expected: a new .html file\n  fix:      another --output",
    )
    assert not (run / "report.html").exists() and not (run / "README.md").exists()


def test_a_run_that_does_not_exist_is_refused(sdcli: Command, tmp_path: Path):
    refused(
        sdcli("report", tmp_path / "none"),
        f"checkpoint '{tmp_path}/none' does not exist\n  expected: a run folder, or a file such as RUN/best.safetensors",
    )
    assert list(tmp_path.iterdir()) == []


# Charts and pictures


def test_an_axis_ends_at_ticks_of_1_2_or_5():
    axis = charts.linear([31.7, 97.5])
    assert (axis.low, axis.high, axis.ticks) == (20, 100, (20, 40, 60, 80, 100))
    assert charts.linear([1, 15], whole=True).ticks == (5, 10, 15)
    assert charts.linear([3.0, 3.0]).low < 3 < charts.linear([3.0, 3.0]).high
    assert charts.logarithmic([0.08, 5.6]).ticks == (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


def test_labels_at_the_ends_of_lines_are_a_line_apart():
    assert charts._apart([50, 51, 120], 0, 200) == pytest.approx([43.5, 57.5, 120])
    assert charts._apart([0, 0, 200], 0, 200) == pytest.approx([0, 14, 200])
    many = charts._apart([10.0] * 40, 0, 100)
    assert (many[0], many[-1]) == (pytest.approx(0), pytest.approx(100))


def test_labels_beside_dots_do_not_overlap():
    dots = [
        charts.Series(name, [(x, y)], charts.look("early"), dots=True, line=False, labels=(name,))
        for name, x, y in (
            ("exit1", 50.0, 70.0),
            ("exit2", 51.0, 70.1),
            ("final", 50.5, 70.2),
            ("ensemble", 52.0, 70.3),
        )
    ]
    svg = charts.dot_chart("", dots, "", format_x=str)
    found = re.findall(r'class="beside" x="([\d.]+)" y="([\d.]+)">(\w+)<', svg)
    boxes = [charts.Box(float(x), float(y) - 11, float(x) + 7 * len(text), float(y) + 3) for x, y, text in found]
    assert len(boxes) == 4
    assert all(one.overlap(other) == 0 for one in boxes for other in boxes if one is not other)


def test_a_line_is_broken_where_a_value_is_missing():
    points = [(1, 1.0), (2, float("nan")), (3, 2.0), (4, 3.0)]
    svg = charts.line_chart("", [charts.Series("a<b", points, charts.look("shade"))], "epoch")
    (line,) = re.findall(r'd="(M[^"V]*)"><title>a&lt;b', svg)
    assert (line.count("M"), line.count("L")) == (2, 1)


def test_the_bins_of_a_reliability_diagram_are_those_of_ece():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=generator)
    correct = torch.rand(500, generator=generator) < confidence**2
    found = bins(confidence, correct)
    gap = sum(bar.images * abs(bar.accuracy - bar.confidence) for bar in found) / 500
    assert gap == pytest.approx(ece(confidence, correct), abs=1e-6)
    assert sum(bar.images for bar in found) == 500


def test_every_class_comes_once_before_any_comes_twice():
    score, labels = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([0, 0, 0, 1, 2])
    everywhere = torch.ones(5, dtype=torch.bool)
    assert varied(score, everywhere, labels, 4) == [0, 3, 4, 1]
    assert varied(score, torch.tensor([False, True, True, False, True]), labels, 9) == [1, 4, 2]


def test_exits_disagree_where_one_differs_from_final():
    def answered(*predicted: int) -> Answered:
        return Answered(torch.tensor(predicted), torch.full((3,), 0.5), torch.zeros(3), torch.ones(3))

    answers = Answers(
        {"exit1": answered(0, 1, 2), "final": answered(0, 1, 1)}, torch.tensor([0, 1, 2]), torch.arange(3)
    )
    assert disagreeing(answers, ["exit1", "final"], 5) == ([2], 1)


def test_thumbnails_are_small():
    uri, width, height = thumbnail(noise(0, 300, 600))
    assert (width, height) == (SIDE, SIDE // 2) and uri.startswith("data:image/jpeg;base64,") and len(uri) < 12_000
    assert thumbnail(noise(0, 8, 8))[1:] == (8, 8) and thumbnail(noise(0, 8, 8))[0].startswith("data:image/png")
