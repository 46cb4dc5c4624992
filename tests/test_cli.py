"""The commands as a user types them: whole runs, the words on the screen, exit codes."""

from __future__ import annotations

import csv
import io
import json
import re
import signal
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import Command, Terminal, refused
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdcli import devices
from sdcli.cli import main
from sdcli.cli.plots import _losses
from sdcli.cli.progress import _epoch_table, _skipped
from sdcli.evaluation.evaluate import Report
from sdcli.method.losses import LOSSES
from sdcli.recipe.load import recipe_names
from sdcli.run.best import quality
from sdcli.run.events import Epoch

QUICK = ("--dataset", "digits", "--recipe", "quick", "--epochs", "2", "--limit-train", "120", "--limit-val", "40",
         "--workers", "0", "--device", "cpu", "--image-size", "32")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that several tests look at."""
    folder = tmp_path_factory.mktemp("run") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sdcli", "train", "test_resnet", *QUICK, "--output", str(folder)])
        main_without_exit()
    return folder


def main_without_exit() -> None:
    try:
        main()
    except SystemExit as end:
        assert not end.code


def test_training_fills_the_run_folder(trained):
    assert sorted(file.name for file in trained.iterdir()) == [
        "best.safetensors", "curves.png", "last.safetensors", "log.jsonl", "recipe.toml", "report.json", "run.json",
        "state", "summary.csv",
    ]  # fmt: skip
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2]
    assert set(log[0]["losses"]) == {"task", "exits", "soft", "hint"}
    assert log[0]["loss"] == pytest.approx(sum(log[0]["losses"].values()))
    assert log[0]["num_images"] > 100
    rows = list(csv.DictReader(io.StringIO((trained / "summary.csv").read_text())))
    assert {
        "epoch",
        "train_loss",
        "train_loss_soft",
        "eval_top1",
        "eval_top1_exit1",
        "eval_top1_ensemble",
        "lr",
    } <= set(rows[0])
    report = json.loads((trained / "report.json").read_text())
    best = max(log, key=lambda line: quality(Report.from_dict(line["validation"]), "mean"))
    assert report["checkpoint"] == "best.safetensors"
    assert report["exits"] == best["validation"]["exits"]


def test_the_same_seed_gives_the_same_log_and_weights(trained, tmp_path, sdcli):
    again = sdcli("train", "test_resnet", *QUICK, "--output", tmp_path / "again")
    assert again.code == 0
    assert log_without_times(tmp_path / "again") == log_without_times(trained)
    first, second = (load_file(folder / "last.safetensors") for folder in (trained, tmp_path / "again"))
    assert all((first[name] == second[name]).all() for name in first)


def test_another_seed_gives_another_log(trained, tmp_path, sdcli):
    sdcli("train", "test_resnet", *QUICK, "--epochs", 1, "--seed", 1, "--output", tmp_path / "other")
    assert log_without_times(tmp_path / "other")[0] != log_without_times(trained)[0]


def log_without_times(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "cpu_seconds", "images_per_s")}
        for line in lines
    ]


def test_the_resolved_recipe_trains_the_same_again(trained, tmp_path, sdcli):
    options = [option for option in QUICK if option not in ("--recipe", "quick", "--epochs", "2")]
    sdcli("train", "test_resnet", *options, "--recipe", trained / "recipe.toml", "--output", tmp_path / "again")
    assert log_without_times(tmp_path / "again") == log_without_times(trained)


def test_eval_prints_a_table_of_all_exits_and_the_ensemble(trained, sdcli):
    result = sdcli("eval", trained / "best.safetensors", "--exits", "all", "-j", 0)
    assert result.code == 0
    words = [line.split()[0] for line in result.out.splitlines() if line.strip()]
    assert [word for word in words if word.startswith(("exit", "final", "ensemble"))] == [
        "exit", "exit1", "exit2", "exit3", "final", "ensemble",
    ]  # fmt: skip
    assert "digits (test, 359 images)" in result.out
    for title in ("top-1", "interval", "top-5", "NLL", "ECE", "AUROC", "final %", "params", "MACs", "speed-up"):
        assert title in result.out
    assert max(map(len, result.out.splitlines())) <= 100


def test_eval_needs_the_checkpoint_alone(trained, tmp_path, sdcli, monkeypatch):
    moved = tmp_path / "model.safetensors"
    moved.write_bytes((trained / "best.safetensors").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert sdcli("eval", "model.safetensors", "-j", 0).code == 0


def test_eval_of_a_run_takes_its_best_checkpoint_else_the_last_one(trained, tmp_path, sdcli):
    best = sdcli("eval", trained, "--json", "--limit", 40, "-j", 0)
    assert best.out == sdcli("eval", trained / "best.safetensors", "--json", "--limit", 40, "-j", 0).out
    epoch = (
        json.loads((trained / "report.json").read_text())["exits"]
        == log_without_times(trained)[1]["validation"]["exits"]
    )
    assert best.err.endswith(f"note: checkpoint: {trained / 'best.safetensors'}, epoch {1 + epoch}\n")
    (tmp_path / "last.safetensors").write_bytes((trained / "last.safetensors").read_bytes())
    last = sdcli("eval", tmp_path, "--limit", 40, "-j", 0)
    assert last.code == 0 and last.err.endswith(f"note: checkpoint: {tmp_path / 'last.safetensors'}, epoch 2\n")


def test_a_run_without_a_checkpoint_cannot_be_scored(trained, tmp_path, sdcli):
    expected = "\n  expected: a run folder with best.safetensors or last.safetensors, or a checkpoint file"
    refused(sdcli("eval", tmp_path), f"'{tmp_path}' has no checkpoint{expected}")
    several = tmp_path / "runs"
    for name in ("second", "first"):
        (several / name).mkdir(parents=True)
        (several / name / "last.safetensors").write_bytes(b"")
    for command in ("eval", "report"):
        refused(
            sdcli(command, several),
            f"'{several}' is no run folder: it holds 2 runs\n"
            "  expected: one of them: first, second\n"
            f"  fix:      name one, such as {several}/first",
        )
    (tmp_path / "run.json").write_bytes((trained / "run.json").read_bytes())
    refused(
        sdcli("eval", tmp_path),
        f"'{tmp_path}' has no checkpoint yet: no epoch has finished{expected}\n  fix:      sdcli train --resume {tmp_path}",
    )


@pytest.mark.parametrize(
    ("name", "split", "note"),
    [
        (
            "val",
            "validation",
            "the epoch was chosen by its validation score: expect a slightly lower score on new images",
        ),
        (
            "VALID",
            "validation",
            "the epoch was chosen by its validation score: expect a slightly lower score on new images",
        ),
        ("testing", "test", None),
        ("training", "train", "this checkpoint was trained on these images"),
    ],
)
def test_a_split_goes_by_its_usual_names(name, split, note, trained, sdcli):
    result = sdcli("eval", trained / "best.safetensors", "--split", name, "--limit", 20, "--json", "-j", 0)
    assert json.loads(result.out)["split"] == split
    assert ([line for line in result.err.splitlines() if line.startswith("note: ")] or [None])[-1] == (
        f"note: {note}" if note else None
    )
    last = sdcli("eval", trained / "last.safetensors", "--split", name, "--limit", 20, "-j", 0)
    assert "was chosen" not in last.err


def test_eval_json_has_all_fields(trained, sdcli):
    report = json.loads(sdcli("eval", trained / "best.safetensors", "--json", "-j", 0).out)
    assert (report["model"], report["dataset"], report["split"], report["num_images"]) == (
        "test_resnet",
        "digits",
        "test",
        359,
    )
    assert [result["point"] for result in report["exits"]] == ["exit1", "exit2", "exit3", "final"]
    assert set(report["ensemble"]) == {
        *("point", "top1", "top1_low", "top1_high", "top5", "nll", "ece", "auroc", "agreement"),
        *("params", "macs", "speedup", "latency_ms"),
    }
    assert all(0 <= result["top1"] <= result["top5"] <= 100 for result in report["exits"])
    assert report["exits"][-1]["speedup"] == 1.0


def test_eval_of_the_validation_split_repeats_what_training_saw(trained, sdcli):
    scored = json.loads(
        sdcli("eval", trained / "best.safetensors", "--split", "validation", "--limit", 40, "--json", "-j", 0).out
    )
    noted = json.loads((trained / "report.json").read_text())
    assert scored["num_images"] == noted["num_images"] == 40
    assert [r["top1"] for r in scored["exits"]] == [r["top1"] for r in noted["exits"]]


def test_eval_of_some_exits_scores_the_ensemble_of_just_these(trained, sdcli):
    every = json.loads(sdcli("eval", trained / "best.safetensors", "--json", "-j", 0).out)
    some = json.loads(sdcli("eval", trained / "best.safetensors", "--exits", "exit3,exit1", "--json", "-j", 0).out)
    without = {"agreement": None}
    assert some["exits"] == [every["exits"][0] | without, every["exits"][2] | without], "with what, if final is not run"
    assert some["ensemble"]["macs"] < every["ensemble"]["macs"]
    assert some["ensemble"]["macs"] > every["exits"][2]["macs"]


def test_eval_of_the_final_exit_alone_has_no_ensemble(trained, sdcli):
    assert (
        json.loads(sdcli("eval", trained / "best.safetensors", "--exits", "final", "--json", "-j", 0).out)["ensemble"]
        is None
    )


def test_eval_csv_and_markdown_have_a_row_per_exit(trained, sdcli):
    rows = list(csv.DictReader(io.StringIO(sdcli("eval", trained / "best.safetensors", "--csv", "-j", 0).out)))
    assert [row["point"] for row in rows] == ["exit1", "exit2", "exit3", "final", "ensemble"]
    lines = sdcli("eval", trained / "best.safetensors", "--markdown", "-j", 0).out.splitlines()
    assert lines[2].startswith("| exit | top-1 % | 95 % interval |") and len(lines) == 9
    assert "**" in "".join(lines)


def test_without_validation_nothing_is_chosen_and_the_last_epoch_is_scored_on_test(tmp_path, sdcli):
    result = sdcli("train", "test_resnet", *QUICK, "--epochs", 1, "--val-fraction", 0, "--output", tmp_path / "all")
    assert result.code == 0 and "no validation split: the last epoch is kept" in result.err
    assert not (tmp_path / "all" / "best.safetensors").exists()
    report = json.loads((tmp_path / "all" / "report.json").read_text())
    assert (report["split"], report["num_images"], report["checkpoint"]) == ("test", 359, "last.safetensors")


def test_a_transformer_trains(tmp_path, sdcli):
    options = ["--recipe", "schedules/transformer", "--epochs", 1]
    assert sdcli("train", "test_vit", *QUICK, *options, "--output", tmp_path / "run").code == 0
    assert sdcli("eval", tmp_path / "run" / "best.safetensors", "-j", 0, "--limit", 20).code == 0


def test_weights_start_a_run(trained, tmp_path, sdcli):
    # Of a run folder, its best checkpoint.
    options = ["--weights", trained, "--epochs", 1, "--lr", 1e-9]
    result = sdcli("train", "test_resnet", *QUICK, *options, "--output", tmp_path / "run")
    assert result.code == 0 and f"weights from {trained / 'best.safetensors'}" in result.err.replace("\n", "")


def test_head_is_short_for_the_students_head(tmp_path, sdcli):
    options = [
        "--recipe",
        "deep-supervision",
        "--head",
        "linear",
        "--epochs",
        1,
        "--batch-size",
        24,
        "--limit-train",
        48,
    ]
    result = sdcli("train", "test_resnet", *QUICK[:2], *options, "--device", "cpu", "--output", tmp_path / "run")
    assert result.code == 0, result.err
    assert 'head = "linear"' in (tmp_path / "run" / "recipe.toml").read_text()


def test_on_a_terminal_epochs_bar_and_time_are_of_the_whole_run(tmp_path, sdcli, monkeypatch):
    shown = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", shown)
    assert sdcli("train", "test_resnet", *QUICK, "--output", tmp_path / "run").code == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    assert re.search(r"epoch 1/2 [━╸╺]+ +0 % +update 0/2 +0 images/s +-:--:-- left", text)
    last = re.findall(r"epoch .*in all", text)[-1]
    assert re.fullmatch(r"epoch 2/2 ━+ +100 % +update 2/2 +[\d,]+ images/s +0:00:\d\d in all", last)
    assert re.search(r"epoch +loss +loss .*top-1 % +top-1 %", text) and "[progress" not in text


def test_inspect_prints_a_table(sdcli):
    result = sdcli("inspect", "resnet18")
    assert result.code == 0
    for word in ("resnet18", "layer1", "layer4", "64x56x56", "11.7 M parameters", "1.81 G MACs", "exit3", "final"):
        assert word in result.out


def test_inspect_json_has_the_fields_of_the_plan(sdcli):
    plan = json.loads(sdcli("inspect", "resnet18", "--json", "--num-classes", 10).out)
    assert set(plan) == {"model", "family", "input_size", "found_by", "notes", "params", "macs", "stages"}
    assert {"module", "num_chs", "reduction", "output_fmt", "num_prefix_tokens", "params", "macs", "macs_fraction",
            "head_params", "head_macs", "exit_params", "exit_macs", "exit_macs_fraction", "dominated_by"
            } <= set(plan["stages"][0])  # fmt: skip
    assert [stage["module"] for stage in plan["stages"]] == ["layer1", "layer2", "layer3", "layer4"]
    assert plan["stages"][-1]["head_params"] == 512 * 10 + 10


def test_inspect_counts_an_exits_head_and_marks_exits_that_are_no_cheaper_than_a_deeper_one(sdcli):
    plan = json.loads(sdcli("inspect", "tf_efficientnet_lite0", "--head", "bottleneck", "--json").out)
    assert [(stage["point"], stage["dominated_by"]) for stage in plan["stages"]] == [
        ("exit1", "exit2"), ("exit2", None), ("exit3", None), ("final", None)
    ]  # fmt: skip
    for stage in plan["stages"]:
        assert stage["exit_macs"] == stage["macs"] + stage["head_macs"]
        assert stage["exit_params"] == stage["params"] + stage["head_params"]
        assert stage["exit_macs_fraction"] == stage["exit_macs"] / plan["macs"]
    assert plan["stages"][-1]["exit_macs_fraction"] == 1
    note = "exit1* costs at least as many MACs as the deeper exit2; --head linear is cheaper"
    assert plan["notes"] == [note]
    result = sdcli("inspect", "tf_efficientnet_lite0", "--head", "bottleneck")
    rows = {line.split()[0]: line.split() for line in result.out.splitlines() if line.strip()}
    assert "37.9%" in rows["exit1*"] and "36.3%" in rows["exit2"] and "100.0%" in rows["final"]
    assert f"note: {note}" in " ".join(result.err.split())


def test_inspect_warns_of_an_exit_that_costs_more_than_the_network(sdcli):
    result = sdcli("inspect", "test_resnet", "--head", "bottleneck")
    assert "106.9%" in result.out
    assert "note: exit1* costs 1.07 times as many MACs as the whole network; --head linear is cheaper" in " ".join(
        result.err.split()
    )
    assert "costs" not in sdcli("inspect", "test_resnet", "--head", "linear").err


def test_inspect_of_a_pattern_has_a_row_for_each_model_in_the_order_asked_for(sdcli):
    result = sdcli("inspect", "test_vit?", "--sort", "macs", "--json")
    plans = json.loads(result.out)
    assert result.code == 0
    assert {plan["model"] for plan in plans} == {"test_vit2", "test_vit3", "test_vit4"}
    assert {plan["family"] for plan in plans} == {"vision_transformer"}
    assert [plan["macs"] for plan in plans] == sorted(plan["macs"] for plan in plans)
    assert plans[0]["stages"][-1]["macs_fraction"] == pytest.approx(1.0, abs=0.01)
    table = sdcli("inspect", "test_vit?").out
    rows = [line.split() for line in table.splitlines() if line.split()[:1] and line.split()[0].startswith("test_vit")]
    assert [row[0] for row in rows] == ["test_vit2", "test_vit3", "test_vit4"]
    assert rows[0][1:3] == ["vision_transformer", "160x160"]
    assert rows[0][-8:] == ["/16", "/16", "/16", "/16", "64", "64", "64", "64"]


def test_a_model_of_a_pattern_that_refuses_is_left_out_and_said_so(sdcli):
    result = sdcli("inspect", "test_v[i]t*", "--exits", 8, "--json")
    assert result.code == 0
    assert [plan["model"] for plan in json.loads(result.out)] == [
        "test_vit2",
        "test_vit3",
        "test_vit4",
        "test_vit_relpos",
    ]
    assert "test_vit is left out: test_vit cannot be cut into 8 stages (--exits 7)" in result.err
    everything = sdcli("inspect", "test_resne*", "--exits", 99)
    assert everything.code == 2 and everything.err.startswith("error: test_resnet cannot be cut into 99 stages")


def test_a_pattern_that_matches_nothing_gets_the_nearest_name(sdcli):
    refused(
        sdcli("inspect", "convnxt*"),
        "no model matches 'convnxt*'\n"
        "  expected: a pattern of timm's names, such as 'resnet*'\n"
        "  fix:      did you mean 'convnext'?",
    )


def test_an_order_for_one_model_is_refused(sdcli):
    refused(
        sdcli("inspect", "resnet18", "--sort", "macs"),
        "--sort macs without effect: 'resnet18' is one model\n"
        "  expected: a pattern\n"
        "  fix:      sdcli inspect 'resnet18*'",
    )


@pytest.mark.parametrize("command", [[], ["inspect"], ["train"], ["eval"], ["recipes", "show"], ["recipes", "list"],
                                     ["recipes", "copy"], ["recipes", "check"], ["recipes", "diff"], ["recipes", "losses"],
                                     ["recipes", "heads"], ["recipes", "policies"]])  # fmt: skip
def test_help_ends_with_an_example_that_parses(command, sdcli):
    result = sdcli(*command, "--help")
    assert result.code == 0
    text = " ".join(result.out.split())
    assert ("Example: sdcli " + " ".join(command) if command else "Start with:") in text


def test_recipes_are_listed_and_shown(sdcli):
    listed = sdcli("recipes", "list").out
    assert "byot-journal" in listed and "1905.08094" in listed
    shown = sdcli("recipes", "show", "byot").out
    assert "[losses.hint]" in shown and "weight_decay = 0.0005" in shown


def test_version_is_printed(sdcli):
    assert sdcli("--version").out.startswith("sdcli ")


def test_an_output_folder_that_holds_a_run_is_never_touched(trained, sdcli):
    before = {file.name: file.read_bytes() for file in trained.rglob("*") if file.is_file()}
    result = sdcli("train", "test_resnet", *QUICK, "--output", trained)
    refused(
        result,
        f"output '{trained}' already holds a run\n  expected: a new or empty folder\n"
        f"  fix:      --output {trained}-2, or resume the run: sdcli train --resume {trained}",
    )
    assert {file.name: file.read_bytes() for file in trained.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "byott"], "unknown recipe 'byott'\n  expected: one of byot, byot-auto, byot-nohint, byot-dkd, "
          f"byot-scan, byot-modern, …; {len(recipe_names())} in all: sdcli recipes list\n  fix:      did you mean 'byot'?"),
        (["--set", "losses.soft.temprature=3"], "--set losses.soft.temprature=3: losses.soft: unknown key 'temprature'\n  expected: one of direction, rescale, standardize, temperature\n"
         "  fix:      did you mean 'temperature'?"),
        (["--set", "losses.soft.kind=kll"], "--set losses.soft.kind=kll: losses.soft.kind: unknown loss 'kll'\n  expected: one of kl, dkd, nkd, balanced_kl, "
          f"tf_nkd, similarity, …; {len(LOSSES.entries)} in all: sdcli recipes losses\n  fix:      did you mean 'kl'?"),
        (["--set", "losses.soft.on=exit9"], "--set losses.soft.on=exit9: losses.soft.on = 'exit9': the network has no such point\n"
         "  expected: one of exit1, exit2, exit3, final\n  fix:      did you mean 'exit3'?"),
        (["--set", "schedule.warmup_epochs=5"], "--set schedule.warmup_epochs=5: schedule.warmup_epochs = 5 lasts as long as the run (epochs = 2)\n  expected: fewer epochs than the "
         "run, or a fraction of the run (below 1)\n  fix:      --set schedule.warmup_epochs=0.05"),
        (["--lr", -1], "--lr -1.0: optimizer.lr = -1.0\n  expected: greater than 0\n  fix:      the default is 0.1"),
        (["--stem", "cifr"], "--stem cifr: networks.student.stem = 'cifr'\n  expected: 'auto', 'imagenet' or 'cifar'\n"
         "  fix:      did you mean 'cifar'?"),
        (["--unset", "losses.hnt"], "--unset losses.hnt: the recipe does not set losses.hnt\n  expected: one of losses.task, "
         "losses.exits, losses.soft, losses.hint\n  fix:      did you mean 'losses.hint'?"),
        (["--pretrained", "--weights", "x.safetensors"], "--pretrained and --weights exclude each other\n  expected: one of them"),
        (["--weights", "no.safetensors"], "--weights no.safetensors: networks.student.weights: checkpoint 'no.safetensors' does not "
         "exist\n  expected: a run folder, or a file such as RUN/best.safetensors"),
        (["--exits", "5000"], "test_resnet cannot be cut into 5000 stages\n  expected: between 1 and 5\n  fix:      --exits 5"),
        (["--exits", "layer1,layer2,layer1"], "exits: 'layer1' is named 2 times\n"
         "  expected: each module once"),
        (["--set", "networks.student.model_args.in_chans=1"], "--set networks.student.model_args.in_chans=1: networks.student.model_args."
         "in_chans = 1\n  expected: 3: images are read as RGB, grey ones too\n  fix:      leave in_chans out"),
        (["--set", "networks.student.branches=100000000"], "--set networks.student.branches=100000000: networks.student.branches = "
         "100000000\n  expected: less than or equal to 64"),
    ],
)  # fmt: skip
def test_a_mistake_ends_before_anything_is_written(options, message, tmp_path, sdcli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = message.replace("FOLDER", str(tmp_path))
    refused(sdcli("train", "test_resnet", *QUICK, *options, "--output", tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()


def test_an_unknown_optimizer_is_explained(tmp_path, sdcli):
    result = sdcli("train", "test_resnet", *QUICK, "--set", "optimizer.opt=sdg", "--output", tmp_path / "run")
    assert result.code == 2 and "optimizer.opt: unknown optimizer 'sdg'" in result.err
    assert "did you mean 'sgd'?" in result.err


def test_a_loss_that_is_not_finite_is_named(tmp_path, sdcli):
    result = sdcli(
        "train", "test_resnet", *QUICK, "--lr", 1e30, "--set", "optimizer.clip_grad=1e30", "--output", tmp_path / "run"
    )
    assert result.code == 2
    assert re.search(r"error: losses\.\w+ was not finite in epoch 1, update 2, at learning rate", result.err)
    assert "at learning rate" in result.err and "Traceback" not in result.err


@pytest.mark.parametrize(
    ("device", "present", "message"),
    [
        ("gpu", ["cpu"], "--device gpu is not available: torch's name for it is cuda, and torch finds no cuda device\n"
         "  expected: cpu\n  fix:      leave out --device to run on cpu"),
        ("cuda:7", ["cpu"], "--device cuda:7 is not available: torch finds no cuda device\n"
         "  expected: cpu\n  fix:      leave out --device to run on cpu"),
        ("gpu", ["cpu", "cuda:0"], "--device gpu is not available: torch's name for it is cuda\n"
         "  expected: cpu or cuda:0\n  fix:      --device cuda"),
        ("cuda:7", ["cpu", "cuda:0"], "--device cuda:7 is not available\n"
         "  expected: cpu or cuda:0\n  fix:      --device cuda:0"),
        ("tpu", ["cpu"], "--device tpu is not available\n  expected: cpu\n  fix:      leave out --device to run on cpu"),
    ],
)  # fmt: skip
def test_a_device_that_is_not_there_is_explained(device, present, message, tmp_path, sdcli, monkeypatch):
    monkeypatch.setattr(devices, "_present", lambda: present)
    refused(sdcli("train", "test_resnet", *QUICK, "--device", device, "--output", tmp_path / "run"), message)


@pytest.mark.parametrize(
    ("model", "wrong", "fix"),
    [
        (
            "test_resnet",
            "pretrained weights of 'test_resnet' are not in the cache, and HF_HUB_OFFLINE is set\n",
            "hf download timm/test_resnet.r160_in1k, then copy its cache; or --weights FILE.safetensors; or leave out --pretrained\n",
        ),
        (
            "darknet17",
            "pretrained weights of 'darknet17' cannot be loaded: ",
            "  fix:      --weights FILE.safetensors, or leave out --pretrained to start from random weights\n",
        ),
    ],
)
def test_pretrained_weights_that_cannot_be_loaded_are_explained_for_the_command_line(
    tmp_path, sdcli, model, wrong, fix
):
    result = sdcli("train", model, *QUICK, "--pretrained", "--output", tmp_path / "run")
    assert result.code == 2 and wrong in result.err and result.err.endswith(fix)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--exits", "exit9"], "unknown exit 'exit9'\n  expected: one of exit1, exit2, exit3, final\n  fix:      did you mean 'exit3'?"),
        (["--exits", ","], "--exits names no exit\n  expected: all, final, or some of them: exit1,exit3"),
        (["--json", "--csv"], "--json, --csv, --markdown and --latex exclude each other\n  expected: one of them"),
        (["--split", "tset"], "digits has no split 'tset'\n  expected: one of train, test, validation\n"
         "  fix:      did you mean 'test'?"),
    ],
)  # fmt: skip
def test_a_mistake_in_eval_is_explained(options, message, trained, sdcli):
    refused(sdcli("eval", trained / "best.safetensors", "-j", 0, *options), message)


def test_scores_that_are_not_finite_are_refused(trained: Path, tmp_path: Path, sdcli: Command) -> None:
    with safe_open(trained / "last.safetensors", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["backbone.conv1.weight"].fill_(float("nan"))
    save_file(tensors, tmp_path / "last.safetensors", metadata)
    refused(
        sdcli("eval", tmp_path, "--json"),
        f"'{tmp_path}/last.safetensors': exit1 has an NLL of nan on 359 images\n"
        "  expected: a network whose outputs are finite\n"
        "  fix:      train it again with a lower learning rate",
    )


TOO_LONG = "x" * 300


@pytest.mark.parametrize(
    "command",
    [
        ("train", "test_vit", "--dataset", TOO_LONG),
        ("train", "test_vit", "--dataset", "digits", "--output", TOO_LONG),
        ("train", "test_vit", "--dataset", "digits", "--weights", f"{TOO_LONG}.safetensors"),
        ("train", "test_vit", "--dataset", "digits", "--import", f"{TOO_LONG}.py"),
        ("train", "test_vit", "--dataset", "digits", "--resume", "auto", "--output", TOO_LONG),
        ("train", "--resume", TOO_LONG),
        ("eval", TOO_LONG),
        ("plot", TOO_LONG),
        ("train", "test_vit", "--dataset", "~nobody-at-all/set"),
        ("train", "test_vit", "--dataset", "digits", "--weights", "~nobody-at-all/w.safetensors"),
        ("train", "test_vit", "--dataset", "digits", "--import", "~nobody-at-all/own.py"),
    ],
)
def test_a_path_that_cannot_be_is_one_message(
    command: tuple[str, ...], tmp_path: Path, sdcli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = sdcli(*command)
    assert (result.code, result.out) == (2, "") and "Traceback" not in result.err
    assert result.err.count("error: ") == 1 and "\n  expected: " in result.err
    assert not list(tmp_path.iterdir())


def test_a_value_of_any_length_is_one_short_message(sdcli: Command) -> None:
    result = sdcli("recipes", "check", "quick", "--set", f"epochs={'1' * 5000}")
    assert result.code == 2 and len(result.err) < 1500 and "an integer is too large\n" in result.err


def test_the_whole_disk_is_refused_as_a_data_set(sdcli: Command) -> None:
    result = sdcli("train", "test_vit", "--dataset", "/", "--device", "cpu")
    assert result.code == 2 and "error: '/' is not the folder of a data set\n" in result.err


def test_classes_that_do_not_match_are_explained(trained, tmp_path, sdcli):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "test" / name / "1.png")
    path = trained / "best.safetensors"
    refused(
        sdcli("eval", path, "--dataset", tmp_path, "-j", 0),
        f"'{path}' has 10 classes, but the data set has 2\n"
        "  expected: a data set with the classes that the checkpoint was trained on\n"
        "  fix:      choose another --dataset, or another column with --label-key",
    )


def test_an_unknown_model_gets_the_nearest_name(sdcli):
    result = sdcli("inspect", "resnet81")
    assert result.code == 2 and "unknown model 'resnet81'" in result.err and "did you mean 'resnet18'?" in result.err


def test_weights_that_a_name_means_are_not_loaded_silently_nor_left_out_silently(tmp_path, sdcli):
    result = sdcli("train", "test_resnet.r160_in1k", *QUICK, "--epochs", 1, "--output", tmp_path / "run")
    assert (
        "note: test_resnet.r160_in1k starts from random weights; --pretrained loads the weights that it names"
        in " ".join(result.err.split())
    )


def test_an_exit_in_the_stem_gets_a_note(sdcli):
    result = sdcli("inspect", "resnet18", "--exits", "conv1,layer2")
    assert result.code == 0
    assert "note: conv1 ends after 6.5% of the MACs: expect low accuracy at its exit." in result.err
    assert "layer2" not in result.err


def test_a_classifier_that_does_most_of_the_work_is_refused(sdcli):
    refused(
        sdcli("inspect", "mobilenetv3_small_050", "--num-classes", 100_000),
        "82% of the MACs of mobilenetv3_small_050 at 224 pixels come after its last map, in the classifier\n"
        "  expected: a network with most of its MACs in its stages\n"
        "  fix:      fewer classes, a larger image, or name the modules to attach exits to: --exits MODULE,MODULE",
    )


def test_ctrl_c_leaves_with_130(sdcli, monkeypatch):
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sdcli.network.blueprint.resolve", stop)
    assert sdcli("inspect", "test_resnet").code == 130


# Runs that go on


def stopping(monkeypatch: pytest.MonkeyPatch, updates: int, number: int) -> None:
    """A signal arrives after so many updates."""

    @contextmanager
    def signals():
        asked = iter(range(1, updates + 1))
        yield lambda: None if next(asked, updates) < updates else number

    monkeypatch.setattr("sdcli.cli.train.stopping", signals)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_saves_leaves_and_goes_on(trained, tmp_path, sdcli, monkeypatch, number, code):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopping(patch, 3, number)
        stopped = sdcli("train", "test_resnet", *QUICK, "--output", folder)
    assert stopped.code == code
    assert f"the state is saved. Resume with: sdcli train --resume {folder}" in stopped.err
    resumed = sdcli("train", "--resume", folder)
    assert resumed.code == 0 and "resumed in epoch 1 after update 2" in resumed.err
    assert log_without_times(folder) == log_without_times(trained)


def test_the_first_signal_is_noted_and_those_that_a_launcher_repeats_are_not_obeyed(request):
    from sdcli.cli.stopping import stopping as noted

    # Jobs in the background of a shell begin with Ctrl-C ignored, and those of nohup with SIGHUP, tests among them.
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    for number, handler in handlers.items():
        former = signal.signal(number, handler)
        request.addfinalizer(partial(signal.signal, number, former))
    for first in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with noted() as told:
            assert told() is None
            signal.raise_signal(first)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.raise_signal(number)
            assert told() == first
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_keeps_freed_memory_for_the_next_step(tmp_path, sdcli, monkeypatch):
    asked = []
    monkeypatch.setattr(devices, "keep_freed_memory", asked.append)
    assert sdcli("train", "test_resnet", *QUICK, "--epochs", 1, "--output", tmp_path / "run").code == 0
    assert asked == [torch.device("cpu")]


def test_commands_that_score_keep_freed_memory_for_the_next_batch(trained, sdcli, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(devices, "keep_freed_memory", asked.append)
    for command in (
        ["eval"],
        ["compare"],
        ["report", "--output", tmp_path / "page.html", "--no-card"],
        ["bench", "-b", 1],
    ):
        asked.clear()
        assert sdcli(command[0], trained, *command[1:]).code == 0
        assert asked == [torch.device("cpu")]


def test_curves_and_the_table_have_the_losses_of_all_phases():
    def epoch(number, losses):
        return Epoch(number, f"phase{number}", 0.1, losses, 10, 1.0, 10.0, {}, skipped=number - 1)

    epochs = [epoch(1, {"task": 1.0, "soft": 2.0}), epoch(2, {"task": 0.5})]
    table = _epoch_table(epochs, "mean")
    assert [str(column.header) for column in table.columns] == ["epoch", "task\nloss", "soft\nloss"]
    assert list(table.columns[2].cells) == ["2.0000", ""]
    figure = Figure()
    _losses(figure.subplots(), [line.to_log() for line in epochs])
    assert [line.get_label() for line in figure.axes[0].lines] == ["soft", "task"]
    assert (_skipped(epochs[0]), _skipped(epochs[1])) == ("", "  |  1 update skipped: loss not finite")


@pytest.mark.parametrize(("option", "key"), [("--epochs", "epochs"), ("--lr", "optimizer.lr")])
def test_a_key_that_is_set_twice_is_refused(option, key, sdcli, tmp_path):
    result = sdcli("train", "test_resnet", *QUICK, option, 1, "--set", f"{key}=2", "--output", tmp_path / "run")
    refused(result, f"--set {key}=2 and {option} are about the same key, {key}\n  expected: one of them")


@pytest.mark.parametrize("exits", ["0", ","])
def test_exits_that_are_none_are_refused(exits, sdcli, tmp_path):
    message = f"--exits '{exits}'\n  expected: auto, none, a number of 1 or more, or modules to tap: blocks.3,blocks.7"
    refused(sdcli("inspect", "test_resnet", "--exits", exits), message)
    refused(sdcli("train", "test_resnet", *QUICK, "--exits", exits, "--output", tmp_path / "run"), message)


def test_resume_auto_starts_and_goes_on_with_the_same_command(trained, tmp_path, sdcli, monkeypatch):
    command = ["train", "test_resnet", *QUICK, "--output", tmp_path / "run", "--resume", "auto"]
    with monkeypatch.context() as patch:
        stopping(patch, 1, signal.SIGTERM)
        assert sdcli(*command).code == 143
    assert sdcli(*command).code == 0
    assert log_without_times(tmp_path / "run") == log_without_times(trained)
    finished = sdcli(*command)
    assert finished.code == 0 and "all 2 epochs are done; --epochs N extends the run" in finished.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume", "auto"], "--resume auto needs the folder of the run\n  expected: --output RUN\n"
         "  fix:      --resume auto --output runs/mine"),
        (["--resume", "RUN", "--output", "other"], "--resume RUN and --output exclude each other\n"
         "  expected: one of them: a run stays in its folder"),
        (["--resume", "RUN", "--seed", 5], "the run in 'RUN' was started with seed = 42, not 5\n"
         "  expected: the same value; only these may change: --epochs, --device, --workers, --compile, --grad-accum-steps, "
         "--save-every, --keep-every, --track, --import\n"
         "  fix:      leave --seed out, or start a new run"),
        (["--resume", "RUN", "--lr", 5], "the recipe of the run in 'RUN' has optimizer.lr = 0.05, not 5.0\n"
         "  expected: the recipe that it was started with; only epochs may change\n"
         "  fix:      leave it out, or start a new run"),
        ([], "MODEL is missing\n  expected: a model and a data set\n  fix:      sdcli train resnet18 --dataset cifar100"),
        (["test_resnet"], "--dataset is missing\n  expected: a model and a data set\n"
         "  fix:      sdcli train resnet18 --dataset cifar100"),
        (["test_resnet", "--dataset", "digits", "--device", "cpu", "--precision", "fp16"],
         "--precision fp16 is not available on a CPU\n  expected: fp32 or bf16\n  fix:      --precision bf16"),
        (["test_mambaout", *QUICK, "--grad-checkpointing", "--batch-size", 30, "--grad-accum-steps", 7],
         "a batch of 30 images cannot be divided evenly among 1 process with 7 micro-batches\n"
         "  expected: a multiple of 7\n  fix:      --batch-size 28"),
    ],
)  # fmt: skip
def test_a_mistake_in_going_on_is_explained(options, message, trained, sdcli):
    options = [str(trained) if option == "RUN" else option for option in options]
    refused(sdcli("train", *options), message.replace("'RUN'", f"'{trained}'"))


def test_only_a_near_name_is_offered_for_a_run_that_is_not_there(tmp_path, sdcli):
    for name in ("flowers", "digits-resnet18"):
        (tmp_path / name / "state").mkdir(parents=True)
        (tmp_path / name / "state" / "last.pt").touch()
    message = "'{0}' holds no run to resume\n  expected: a run folder of sdcli train, with state/last.pt\n  fix:      "
    nope, near = tmp_path / "nope", tmp_path / "digit-resnet18"
    refused(
        sdcli("train", "--resume", nope),
        message.format(nope) + f"start one: sdcli train MODEL --dataset DATA --output {nope}",
    )
    refused(sdcli("train", "--resume", near), message.format(near) + f"did you mean '{tmp_path / 'digits-resnet18'}'?")


def test_curves_are_drawn_at_the_end_and_on_demand(trained, tmp_path, sdcli):
    pytest.importorskip("matplotlib")
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    result = sdcli("plot", trained, "--output", tmp_path / "c.svg")
    assert result.code == 0 and result.out.strip() == str(tmp_path / "c.svg")
    drawn = (tmp_path / "c.svg").read_text()
    assert drawn.lstrip().startswith("<?xml")
    refused(
        sdcli("plot", tmp_path),
        f"'{tmp_path}' has no epochs to draw\n  expected: a run folder whose log.jsonl has a line",
    )


def test_a_tracker_gets_losses_shares_and_scores(tmp_path, sdcli):
    pytest.importorskip("tensorboard")
    AcceleratorState._reset_state(reset_partial_state=True)
    result = sdcli(
        "train", "test_resnet", *QUICK, "--epochs", 1, "--track", "tensorboard", "--output", tmp_path / "run"
    )
    assert result.code == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "run" / "sdcli").glob("events*")).parent)).Reload()
    assert {"train/hint", "gradient_share/hint", "validation/top1_ensemble", "step/lr"} <= set(events.Tags()["scalars"])
