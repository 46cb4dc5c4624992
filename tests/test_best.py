"""The best epoch: chosen by what the recipe says, on the validation split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Command

from sdcli.errors import UserError
from sdcli.evaluation.evaluate import ExitResult, Report
from sdcli.method.check import check_with_model
from sdcli.recipe.load import load_recipe
from sdcli.run.best import Best, quality


def result(point: str, top1: float, nll: float = 1.0) -> ExitResult:
    return ExitResult(point, top1, 100.0, nll, 0.1, 10, 10, 1.0)


def report(exit1: float, final: float, ensemble: float | None, nll: float = 1.0) -> Report:
    exits = (result("exit1", exit1, nll), result("final", final, nll))
    return Report("m", "d", "validation", 72, exits, None if ensemble is None else result("ensemble", ensemble))


@pytest.mark.parametrize(("by", "best"), [("mean", 2), ("ensemble", 1), ("final", 3), ("exit1", 2)])
def test_the_best_epoch_is_chosen_by_what_the_recipe_says(by: str, best: int) -> None:
    epochs = [report(25, 80, 84), report(50, 82, 83), report(40, 85, 82)]
    chosen = Best(by)
    better = [chosen.see(number, epoch) for number, epoch in enumerate(epochs, start=1)]
    assert (chosen.epoch, chosen.report) == (best, epochs[best - 1]) and better[best - 1]
    assert chosen.epochs == {"exit1": 2, "final": 3, "ensemble": 1}


def test_equal_accuracy_is_decided_by_the_lower_nll() -> None:
    chosen = Best("mean")
    assert chosen.see(1, report(40, 80, 80, nll=2.0)) and chosen.see(2, report(40, 80, 80, nll=1.0))
    assert not chosen.see(3, report(40, 80, 80, nll=1.0)), "of two that are equal, the first"


def test_a_plain_network_is_chosen_by_its_only_classifier() -> None:
    alone = replace(report(0, 80, None), exits=(result("final", 80.0),))
    assert quality(alone, "mean") == quality(alone, "ensemble") == quality(alone, "final") == (80.0, -1.0)


def test_an_exit_that_the_network_does_not_have_is_refused() -> None:
    with pytest.raises(UserError) as error:
        check_with_model(load_recipe(["byot"], ["best=exit9"]), "test_resnet")
    assert str(error.value) == (
        "best = 'exit9': the network has no such classifier\n"
        "  expected: one of mean, ensemble, exit1, exit2, exit3, final\n"
        "  fix:      did you mean 'exit3'?"
    )
    with pytest.raises(UserError, match="best = 'worst'"):
        load_recipe(["byot"], ["best=worst"])


def test_losses_without_a_point_are_reported() -> None:
    notes = check_with_model(load_recipe(["byot"], ["networks.student.exits=none"]), "test_resnet").notes
    assert notes == [
        f"losses.{name} has no effect: the network has none of the points that it is on"
        for name in ("exits", "soft", "hint")
    ]


def test_a_run_reports_the_best_epoch_of_each_point(sdcli: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--dataset", "digits", "--recipe", "quick", "--epochs", 3, "--limit-train", 64, "--limit-val", 40]
    ended = sdcli("train", "test_resnet", *options, "--set", "best=exit1", "--device", "cpu", "--output", run)
    assert ended.code == 0, ended.err
    table = json.loads((run / "report.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    first = [(line["validation"]["exits"][0]["top1"], -line["validation"]["exits"][0]["nll"]) for line in log]
    assert table["epoch"] == table["best_epochs"]["exit1"] == 1 + first.index(max(first))
    assert "caution: one of 40 validation images is 2.5 points" in ended.err
