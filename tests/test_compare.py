"""Runs compared: statistics against cases worked out by hand, groups, records, and the command."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, refused
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from scipy import stats

from sdcli.cli.comparisons import DROPPABLE, WIDEST, grids, remarks
from sdcli.cli.grids import Cell, Grid, fitted, latex, markdown
from sdcli.compare.compare import Comparison, compare
from sdcli.compare.record import (
    BUDGETS,
    Costs,
    EarlyExit,
    Record,
    check_names,
    find_runs,
    read_record,
    record_of,
    save_record,
)
from sdcli.compare.statistics import (
    detectable,
    holm,
    iqm,
    mcnemar,
    over_tasks,
    paired_difference,
    sign_flip_p,
)
from sdcli.errors import UserError
from sdcli.evaluation.evaluate import ExitResult, Report

TRAIN = ("--dataset", "digits", "--epochs", "1", "--limit-train", "60", "--limit-val", "20", "--workers", "0",
         "--device", "cpu")  # fmt: skip

BASE = "baseline + schedules/cosine"


def test_a_paired_difference_has_its_t_interval_worked_out_by_hand():
    # 1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.3027, half width 4.3027 / sqrt(3).
    found = paired_difference([1.0, 2.0, 3.0])
    assert (found.num_seeds, found.mean, found.sd) == (3, 2.0, 1.0)
    assert (found.low, found.high) == (pytest.approx(2 - 2.48414, abs=1e-4), pytest.approx(2 + 2.48414, abs=1e-4))
    interval = stats.ttest_1samp([1.0, 2.0, 3.0], 0).confidence_interval()
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_one_pair_has_no_interval():
    found = paired_difference([1.5])
    assert (found.mean, found.sd, found.low, found.high, found.p) == (1.5, None, None, None, None)


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [0.4, -0.1, 0.9, 0.3], [-2.0, -1.0, -1.5, -0.1, -3.0, -0.7]])
def test_the_sign_flip_p_counts_all_patterns(values):
    seen = abs(sum(values)) - 1e-12
    flips = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in product((1, -1), repeat=len(values))
    ]
    assert sign_flip_p(values) == pytest.approx(np.mean([flip >= seen for flip in flips]))


def test_the_smallest_sign_flip_p_is_that_of_the_number_of_seeds():
    assert [sign_flip_p([1.0] * seeds) for seeds in (3, 6)] == [0.25, 0.03125]


def test_holm_multiplies_by_how_many_are_left_and_never_falls():
    # Sorted: 0.01 x 3 = 0.03, 0.02 x 2 = 0.04, 0.03 x 1 = 0.03, which may not be below the one before.
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("seeds", "effect"), [(3, 3.26), (5, 1.68), (6, 1.43), (8, 1.16), (10, 1.00)])
def test_what_can_be_detected_equals_tables_of_the_paired_t_test(seeds, effect):
    assert detectable(1.0, seeds) == pytest.approx(effect, abs=0.006)
    assert detectable(0.4, seeds) == pytest.approx(0.4 * detectable(1.0, seeds))


def test_what_can_be_detected_is_found_four_times_out_of_five():
    generator = np.random.default_rng(0)
    draws = generator.normal(detectable(1.0, 4), 1.0, (20_000, 4))
    assert np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.01)
    assert detectable(1.0, 1) == float("inf")


def test_mcnemar_is_the_binomial_test_of_the_images_that_only_one_gets_right():
    first = np.array([True] * 8 + [False] * 2 + [True] * 5)
    second = np.array([False] * 8 + [True] * 2 + [True] * 5)
    found = mcnemar(first, second)
    # Two-sided, 2 of 10 at one half: 2 x (1 + 10 + 45) / 1024.
    assert (found.only_first, found.only_second, found.p) == (8, 2, pytest.approx(112 / 1024))
    assert mcnemar(first, first).p == 1.0


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end():
    assert iqm([np.array([1.0, 100.0]), np.array([2.0, 3.0])]) == 2.5


def test_over_tasks_compares_within_each_task():
    own = {"a": [2.0, 3.0], "b": [52.0, 53.0], "c": [12.0, 13.0]}
    base = {"a": [1.0, 1.5], "b": [52.0, 54.0], "c": [12.5, 11.0]}
    found = over_tasks(own, base)
    # a: always better; b: 52 ties with 52 and beats nothing else, 53 beats 52: 1.5 of 4; c: 12 > 11, 13 > both: 3 of 4.
    assert found.improves == pytest.approx((1 + 1.5 / 4 + 3 / 4) / 3)
    assert found.low <= found.iqm <= found.high
    assert over_tasks(base, base).improves == pytest.approx(0.5)


# --- groups ---------------------------------------------------------------------------------------------------------


def row(point: str, top1: float, macs: int) -> ExitResult:
    return ExitResult(point, top1, 99.0, 1.0, 0.1, 10 * macs, macs, 1.0)


def record(label: str, seed: int, final: float, exit1: float | None = None, **changes: object) -> Record:
    exits = (*([row("exit1", exit1, 40)] if exit1 is not None else []), row("final", final, 100))
    ensemble = row("ensemble", final + 1, 110) if exit1 is not None else None
    report = Report("resnet18", "cifar100", "test", 16, exits, ensemble)
    base = Record(
        label=label,
        model="resnet18",
        model_args={},
        image_size=32,
        dataset="cifar100",
        val_fraction=0.1,
        split_seed=42,
        recipe={"losses": {"task": {"kind": "cross_entropy", "on": "final"}}},
        checkpoint="last",
        epoch=10,
        test=report,
        seed=seed,
        training=Costs(10, 1000, 50.0, 300 if exit1 is None else 330, 40.0 if exit1 is None else 50.0),
        correct={"final": "//8=" if exit1 is None else "/w8="},
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def three(label: str, finals: list[float], exit1: float | None = None, **changes: object) -> list[Record]:
    return [record(label, seed, final, exit1, **changes) for seed, final in enumerate(finals)]


def test_early_exit_of_calibrated_runs_has_a_table_of_its_own():
    at = [
        (EarlyExit(None, 0.48, 40.0 + seed, 0.5), EarlyExit(0.5, 0.48, 40.0 + seed), EarlyExit(0.8, 0.79, 50.0))
        for seed in range(2)
    ]
    runs = [record("byot", seed, 52.0, 45.0, early=at[seed]) for seed in range(2)]
    runs += [record("default", seed, 52.0, 45.0, early=at[seed][:2] if seed else at[seed]) for seed in range(2)]
    runs += three("baseline", [50.0, 51.0])
    (task,) = compare(runs).tasks
    _, byot, default = task.groups
    assert byot.early["0.5"].top1.values == (40.0, 41.0) and byot.early["0.5"].macs == 0.48
    assert (byot.early["calibrated"].time, byot.early["0.5"].time) == (0.5, None)
    assert list(default.early) == ["calibrated", "0.5"], "what all of its runs have"
    early = list(grids(compare(runs), "final"))[3]
    assert early.title.endswith("top-1 % of early exit, by its share of the plain network's MACs")
    assert [[cell.text for cell in line] for line in early.rows] == [
        ["byot", "40.50 ± 0.71", "50.00 ± 0.00", "40.50 ± 0.71", "0.48", "0.50"],
        ["default", "40.50 ± 0.71", "-", "40.50 ± 0.71", "0.48", "0.50"],
    ]
    assert len(list(grids(compare(three("baseline", [50.0])), "final"))) == 1


def test_an_exit_that_is_better_than_early_exit_is_named():
    early = tuple(EarlyExit(budget, 0.35, 44.0) for budget in (None, 0.3, 0.5, 0.9))
    runs = [*three("baseline", [50.0]), record("byot", 0, 52.0, 45.0, early=early)]
    named = [line for line in remarks(compare(runs)) if "alone" in line]
    wanted = "exit1 of byot alone has 45.00 % for 0.40 of the MACs, more than its early exit has for at most 0.5, 0.9"
    assert named == [wanted]
    better = tuple(replace(own, top1=46.0) for own in early)
    runs = [*three("baseline", [50.0]), record("byot", 0, 52.0, 45.0, early=better)]
    assert not [line for line in remarks(compare(runs)) if "alone" in line]


def test_how_well_confidence_fits_has_a_table_of_its_own():
    def surer(run: Record) -> Record:
        rows = tuple(replace(row, nll=0.5, ece=0.2 + 0.1 * (run.seed or 0)) for row in run.test.exits)
        return replace(run, test=replace(run.test, exits=rows))

    runs = [*map(surer, three("byot", [52.0, 54.0], 45.0)), *three("baseline", [50.0, 51.0])]
    table = list(grids(compare(runs), "final"))[2]
    assert table.header == ("recipe", "final\nNLL", "final\nECE", "ensemble\nNLL", "ensemble\nECE")
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["baseline", "1.000 ± 0.000", "0.100 ± 0.000", "", ""],
        ["byot", "0.500 ± 0.000", "0.250 ± 0.071", "1.000 ± 0.000", "0.100 ± 0.000"],
    ]
    assert [[cell.best for cell in row[1:3]] for row in table.rows] == [[False, True], [True, False]]


def test_recipes_are_compared_seed_by_seed_with_the_baseline():
    runs = [*three("byot", [52.0, 54.0, 53.0], 45.0), *three("baseline", [50.0, 51.0, 52.0])]
    (task,) = compare(list(reversed(runs))).tasks
    base, byot = task.groups
    assert (task.baseline, base.label, byot.label, byot.seeds) == ("baseline", "baseline", "byot", (0, 1, 2))
    assert (base.versus, byot.points["final"].mean, byot.points["final"].sd) == ({}, 53.0, 1.0)
    assert byot.versus["final"].mean == pytest.approx(2.0), "2, 3 and 1"
    assert byot.versus["exit1"].mean == pytest.approx(45.0 - 51.0), "the plain network has no exit1: its final"
    assert (byot.relative_macs, byot.relative_seconds) == (pytest.approx(1.1), pytest.approx(1.25))
    assert (byot.macs["exit1"], byot.params["exit1"]) == (40, 400)
    noise = task.noise["final"]
    assert noise.sd == pytest.approx(1.0)
    assert noise.detectable == {3: pytest.approx(detectable(1.0, 3))}
    assert list(task.noise) == ["exit1", "final", "ensemble"]


def test_the_baseline_s_costs_are_what_the_others_are_multiples_of():
    found = compare([*three("byot", [52.0, 54.0], 45.0), *three("baseline", [50.0, 51.0])])
    costs = [[cell.text for cell in line[-4:]] for line in list(grids(found, "exit1"))[1].rows]
    assert costs == [["300", "40 s", "-", "-"], ["1.10x", "1.25x", "400", "40"]]
    hours = [replace(run, training=Costs(10, 1000, 9000.0)) for run in three("baseline", [50.0])]
    table = list(grids(compare([*hours, *three("byot", [52.0], 45.0)]), "final"))[1]
    assert [cell.text for cell in table.rows[0][-4:]] == ["-", "2.5 h", "1.00 K", "100"]


def test_noise_is_that_of_the_point_that_is_shown():
    runs = [*three("baseline", [50.0, 51.0, 52.0])]
    runs += [record("byot", seed, 52.0, exit1) for seed, exit1 in enumerate([40.0, 45.0, 44.0])]
    (line,) = [line for line in remarks(compare(runs), "exit1") if "seeds" in line]
    sd = float(np.std([-10.0, -6.0, -8.0], ddof=1))
    assert f"differences of exit1 below about {detectable(sd, 3):.1f} points cannot be told" in line
    assert f"standard deviation of {sd:.2f})" in line
    assert line.endswith("no p can be below 0.25")


def test_a_recipe_of_one_seed_does_not_hide_what_the_others_can_tell():
    runs = [*three("baseline", [50.0, 51.0, 52.0]), *three("byot", [52.0, 54.0, 53.0], 45.0)]
    runs.append(record("begun", 0, 51.0, 40.0))
    found = compare(runs)
    assert found.tasks[0].noise["final"].detectable == {3: pytest.approx(detectable(1.0, 3))}
    lines = [line for line in remarks(found) if "seed" in line]
    assert lines[0].startswith("3 paired seeds: differences of final below about 3.3 points cannot be told from noise")
    assert lines[1:] == ["one seed only, which cannot be told from the noise of training: begun"]


def test_differences_that_are_all_alike_show_no_noise():
    runs = [*three("baseline", [50.0, 51.0, 52.0]), *three("frozen", [50.0, 51.0, 52.0], 45.0)]
    assert "final" not in compare(runs).tasks[0].noise
    assert not [line for line in remarks(compare(runs)) if "cannot be told" in line]
    runs += three("byot", [52.0, 54.0, 53.0], 45.0)
    assert compare(runs).tasks[0].noise["final"].sd == pytest.approx(1.0), "that of byot alone"


def test_what_can_be_told_is_said_for_every_number_of_seeds():
    runs = [*three("baseline", [50.0, 51.0, 52.0, 50.0]), *three("a", [52.0, 54.0, 53.0, 53.0], 45.0)]
    runs += three("b", [51.0, 51.0], 45.0)
    found = compare(runs)
    sd = found.tasks[0].noise["final"].sd
    assert sd == pytest.approx(np.sqrt((3 * np.var([2, 3, 1, 3], ddof=1) + np.var([1, 0], ddof=1)) / 4))
    (line,) = [line for line in remarks(found) if "seeds" in line]
    assert line.startswith(f"2 paired seeds: differences of final below about {detectable(sd, 2):.1f} points cannot")
    assert line.endswith(f"no p can be below 0.5; with 4: {detectable(sd, 4):.1f} points, 0.12")


def test_another_stem_is_named():
    small = [replace(run, recipe={**run.recipe, "networks": {"student": {"stem": "cifar"}}}) for run in
             three("byot", [52.0, 54.0], 45.0)]  # fmt: skip
    (task,) = compare([*three("baseline", [50.0, 51.0]), *small]).tasks
    assert task.groups[1].differs == ("stem = cifar (baseline: auto)",)


def test_a_narrow_terminal_has_names_and_fewer_columns():
    runs = [*three("baseline", [50.0, 51.0]), *three("deep-supervision-equilibrium", [52.0, 54.0], 45.0)]
    console = Console(width=80, force_terminal=True, color_system=None, file=io.StringIO())
    dropped = []
    for grid in grids(compare(runs), "final"):
        table, without = fitted(grid, console, DROPPABLE, WIDEST)
        with console.capture() as caught:
            console.print(table)
        lines = caught.get().splitlines()
        assert any("deep-supervision-equilibrium" in line for line in lines) and "…" not in caught.get()
        assert max(map(len, lines)) <= 80
        dropped.append(without[:3])
    assert dropped == [[], ["p", "params", "training time"], ["ensemble NLL"]]


def test_seeds_that_were_not_trained_alike_are_named():
    first, second = three("byot", [52.0, 54.0], 45.0)
    slower = {**second.recipe, "optimizer": {**second.recipe.get("optimizer", {}), "lr": 0.7}}
    found = compare([*three("baseline", [50.0, 51.0]), first, replace(second, recipe=slower)])
    (note,) = [line for line in remarks(found) if "alike" in line]
    assert note.startswith("the runs of byot were not trained alike: optimizer.lr = 0.7 (seed 0: ")


def test_recipes_that_start_from_other_weights_differ_in_more_than_their_method():
    runs = three("byot", [52.0, 54.0], 45.0)
    given = [replace(run, recipe={**run.recipe, "networks": {"student": {"weights": "pretrained"}}}) for run in runs]
    (task,) = compare([*three("baseline", [50.0, 51.0]), *given]).tasks
    assert task.groups[1].differs == ("weights at the start = trained (baseline: random)",)


def test_recipes_without_a_common_seed_say_so():
    runs = [*three("baseline", [50.0, 51.0]), record("byot", 7, 53.0, 40.0), record("byot", 8, 53.0, 40.0)]
    lines = [line for line in remarks(compare(runs)) if "seed" in line]
    assert lines == ["byot and baseline have no seed in common (7, 8; 0, 1), so their difference has no pairs"]


def test_records_of_one_name_are_not_written_over_each_other(tmp_path):
    twice = [*three("byot", [52.0]), replace(three("byot", [52.0])[0], image_size=16)]
    with pytest.raises(UserError, match=r"--save: 1 file would hold two runs each: byot-seed0"):
        check_names(twice, tmp_path)
    check_names(twice[:1], tmp_path)
    save_record(twice[0], tmp_path)
    check_names([replace(twice[0], epoch=7, label_set="0123")], tmp_path)
    file = tmp_path / "byot-seed0.json"
    for other in (twice[1], replace(twice[0], dataset="photos")):
        with pytest.raises(UserError, match=re.escape(f"--save: '{file}' is the record of another run: byot, seed 0,")):
            check_names([other], tmp_path)
    file.write_text("{}")
    with pytest.raises(UserError, match="is not a record"):
        check_names(twice[:1], tmp_path)


def test_data_sets_of_one_name_are_told_apart_by_their_labels():
    runs = [*three("baseline", [50.0, 51.0]), *three("byot", [52.0, 54.0])]
    photos = [replace(run, label_set="aaa") for run in runs[:3]] + [replace(runs[3], label_set="bbb")]
    found = compare(photos)
    assert [[group.label for group in task.groups] for task in found.tasks] == [["baseline", "byot"], ["byot"]]
    assert "not compared with each other, because of another set of labels: aaa, bbb" in found.notes
    assert "set of labels aaa" in found.tasks[0].name
    # A record of an earlier version does not say what its labels are.
    assert len(compare([replace(runs[0], label_set=""), *photos[1:3]]).tasks) == 1
    assert len(compare(runs).tasks) == 1


@pytest.mark.parametrize("change", [{"head": "linear"}, {"gradients": "equilibrium"}, {"exits": "none"}])
def test_seeds_of_other_networks_are_named(change):
    first, second = three("byot", [52.0, 54.0], 45.0)
    other = {**second.recipe, "networks": {"student": change}}
    found = compare([*three("baseline", [50.0, 51.0]), first, replace(second, recipe=other)])
    (note,) = [line for line in remarks(found) if "alike" in line]
    ((name, value),) = change.items()
    assert note.startswith(f"the runs of byot were not trained alike: networks.student.{name} = {value} (seed 0: ")


def test_one_run_under_two_names_is_one_run(tmp_path, monkeypatch):
    file = save_record(record("byot", 1, 52.0, 40.0), tmp_path / "kept")
    (tmp_path / "link").symlink_to("kept")
    monkeypatch.chdir(tmp_path)
    assert find_runs([Path("kept"), file, Path("link")]) == [Path("kept") / file.name]


def test_names_of_any_characters_stay_in_their_rows():
    rows = tuple((Cell(name), Cell("1")) for name in ("[a]", "*b", "c\nd\te", "$f$"))
    grid = Grid("a\nb", ("name", "value"), rows)
    lines = latex(grid).splitlines()
    assert lines[0] == "% a b" and len(lines) == len(rows) + 7
    assert [line.split(" &")[0] for line in lines[5:9]] == ["{}[a]", "{}*b", "c d e", r"\$f\$"]
    assert [line.split(" | ")[0] for line in markdown(grid).splitlines()[4:]] == ["| [a]", r"| \*b", "| c d e", "| $f$"]


def test_only_seeds_that_both_have_are_paired():
    runs = [*three("baseline", [50.0, 51.0]), record("byot", 1, 53.0, 40.0), record("byot", 7, 90.0, 40.0)]
    (task,) = compare(runs).tasks
    found = task.groups[1].versus["final"]
    assert (found.num_seeds, found.mean) == (1, 2.0)


def test_p_values_are_corrected_over_the_recipes_of_a_task():
    runs = [*three("baseline", [50.0] * 6), *three("a", [51.0 + 0.1 * n for n in range(6)])]
    runs += three("b", [50.5, 49.0, 51.0, 50.2, 49.9, 50.3])
    (task,) = compare(runs).tasks
    a, b = task.groups[1:]
    assert a.versus["final"].p == 0.03125
    assert (a.p_holm["final"], b.p_holm["final"]) == (0.0625, b.versus["final"].p)


def test_two_single_runs_are_compared_image_by_image():
    (task,) = compare([record("baseline", 1, 50.0), record("byot", 1, 52.0, 40.0)]).tasks
    found = task.groups[1].mcnemar
    assert found is not None
    # Bits: baseline right on all 16 images, byot on the first 8 and on the last 4.
    assert (found.only_first, found.only_second) == (0, 4)
    assert task.noise == {}
    (many,) = compare([*three("baseline", [50.0, 51.0]), *three("byot", [52.0, 53.0], 40.0)]).tasks
    assert many.groups[1].mcnemar is None


@pytest.mark.parametrize(
    "change",
    [{"split_seed": 7}, {"val_fraction": 0.2}, {"limit_train": 500}, {"image_size": 16}, {"model": "resnet34"},
     {"checkpoint": "best"}, {"precision": "bf16"}, {"dataset": "cifar10"}, {"model_args": {"channels": [8, 8, 8, 8]}}],
)  # fmt: skip
def test_runs_of_other_images_or_networks_are_never_compared(change):
    found = compare([*three("baseline", [50.0, 51.0]), *three("byot", [52.0, 53.0], 40.0, **change)])
    assert [task.baseline for task in found.tasks] == ["baseline", None]
    assert all(not group.versus for task in found.tasks for group in task.groups)
    assert any("no runs of baseline: nothing to compare with" in note for note in found.notes)
    assert len({task.name for task in found.tasks}) == 2 or set(change) & {"checkpoint", "precision"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"split_seed": 7}, "split_seed: 42, 7"),
        ({"limit_train": 500}, "training images: all, 500"),
        ({"model_args": {"channels": [8]}}, "model_args: as in timm, channels=[8]"),
    ],
)
def test_what_keeps_runs_of_one_network_apart_is_said_loudly(change, words):
    found = compare([*three("baseline", [50.0]), *three("byot", [52.0], 40.0, **change)])
    assert f"not compared with each other, because of another {words}" in found.notes


def test_one_run_is_told_that_it_is_alone():
    assert compare(three("byot", [50.0])).notes == ("one run: there is nothing to compare it with",)


def test_another_schedule_is_named():
    other = {"losses": {"task": {"kind": "cross_entropy", "on": "final"}}, "optimizer": {"lr": 0.2}}
    costs = Costs(12, 1200, 50.0, 330, 40.0)
    runs = [*three("baseline", [50.0]), *three("byot", [52.0], 40.0, recipe=other, training=costs)]
    (task,) = compare(runs).tasks
    assert task.groups[1].differs == ("optimizer.lr = 0.2 (baseline: 0.1)", "epochs = 12 (baseline: 10)")


def test_an_average_over_tasks_needs_three():
    def tasks(count: int) -> Comparison:
        runs: list[Record] = []
        for number in range(count):
            data = f"data{number}"
            runs += three("baseline", [50.0, 51.0], dataset=data) + three("byot", [52.0, 53.0], 40.0, dataset=data)
        return compare(runs)

    assert not tasks(2).overall
    assert tasks(3).overall["byot"].iqm == pytest.approx(52.5)
    assert (tasks(3).overall["byot"].improves, tasks(3).overall["baseline"].improves) == (1.0, 0.5)


def test_mistakes_in_what_is_compared_are_explained():
    with pytest.raises(UserError) as twice:
        compare([record("byot", 1, 50.0), record("byot", 1, 51.0)])
    assert str(twice.value) == (
        "byot: 2 runs with seed 1 more than once\n"
        "  expected: one run of each recipe and seed on a task\n"
        "  fix:      leave one of them out, or tell them apart: sdcli train --set title=NAME"
    )
    with pytest.raises(UserError) as missing:
        compare([record("byot", 1, 50.0)], "baselin")
    assert str(missing.value) == "unknown recipe 'baselin'\n  expected: one of byot"
    with pytest.raises(UserError, match="byot: its runs have different exits"):
        compare([record("byot", 1, 50.0), record("byot", 2, 51.0, 40.0)])


# --- records --------------------------------------------------------------------------------------------------------


def test_a_record_survives_its_file(tmp_path):
    own = record("byot + cosine, head=patch/8", 3, 52.0, 40.0)
    path = save_record(own, tmp_path / "new" / "folder")
    assert path.name == "byot+cosine-head-patch-8-seed3.json"
    assert read_record(path) == own
    assert find_runs([tmp_path]) == [path]


def test_a_resumed_epoch_counts_with_all_its_images():
    whole = {"num_images": 100, "macs": 500, "seconds": 10.0, "cpu_seconds": 8.0, "images_per_s": 10.0}
    half = {"num_images": 100, "macs": 500, "seconds": 5.0, "cpu_seconds": 4.0, "images_per_s": 10.0}
    assert Costs.of([whole, half]) == Costs(2, 200, 20.0, 1000, 16.0)
    assert Costs.of([]) is None
    old = {"num_images": 100, "seconds": 10.0, "images_per_s": 10.0}
    assert Costs.of([old]) == Costs(1, 100, 10.0, None, None), "a log without MACs and CPU seconds"
    assert Costs.of([whole | {"cpu_seconds": None}]) == Costs(1, 100, 10.0, 500, None), "images loaded by others"


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "Invalid JSON: EOF while parsing an object at line 1 column 1"), ("{}", "label: Field required")],
)
def test_what_is_no_record_is_refused(tmp_path, sdcli: Command, text, reason):
    file = tmp_path / "run.json.json"
    file.write_text(text)
    result = sdcli("compare", file)
    refused(result, f"'{file}' is not a record of a run: {reason}\n  expected: a file of sdcli compare --save")


@pytest.mark.parametrize(("change", "reason"), [
    ({"format": 99}, "is a record of format 99, which this version does not read"),
    ({"recipe": {"losses": {}, "tomorrow": 1}}, "is not a record of a run: tomorrow: Extra inputs are not permitted"),
    ({"correct": {"final": "//8"}}, "is damaged: correct.final is not one bit per image"),
    ({"correct": {"final": "////"}}, "is damaged: correct.final is not one bit per image"),
    ({"test": Report("resnet18", "cifar100", "test", 16, (), None)}, "it has no scores of 'final'"),
    ({"test": Report("resnet18", "cifar100", "test", 16, (replace(row("final", 52.0, 100), nll=float("nan")),), None)}, "final has an NLL of nan on 16 images"),
])  # fmt: skip
def test_a_record_that_cannot_be_used_is_refused(tmp_path, change, reason):
    file = save_record(replace(record("byot", 1, 52.0, 40.0), **change), tmp_path)
    with pytest.raises(UserError, match=re.escape(reason)):
        read_record(file)


# --- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recipes with two seeds each."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDCLI_CACHE", str(folder / "cache"))
        from sdcli.cli import main

        for name, *options in (
            ("baseline", "--recipe", "baseline", "--recipe", "schedules/cosine"),
            ("exits", "--recipe", "default", "--set", "title=exits"),
        ):
            arguments = ["train", "test_resnet", *TRAIN, *options, "--seeds", "2", "-o", str(folder / "runs" / name)]
            patch.setattr("sys.argv", ["sdcli", *arguments])
            with suppress(SystemExit):
                main()
    return folder / "runs"


def test_a_calibrated_checkpoint_is_scored_with_early_exit(sdcli, runs, tmp_path):
    run = tmp_path / "exits"
    shutil.copytree(runs / "exits" / "seed42", run)
    assert record_of(run / "last.safetensors").early == ()
    assert sdcli("calibrate", run / "last.safetensors", "--budget", "0.9", "--policy", "confidence").code == 0
    found = record_of(run / "last.safetensors")
    calibrated, *budgets = found.early
    assert calibrated.budget is None and calibrated.time is not None and calibrated.time > 0
    assert [one.budget for one in budgets] == [b for b in BUDGETS if b >= budgets[0].budget]
    assert budgets[-1].macs == pytest.approx(calibrated.macs) and budgets[-1].top1 == pytest.approx(calibrated.top1)
    assert [one.macs for one in budgets] == sorted(one.macs for one in budgets)
    assert read_record(save_record(found, tmp_path / "kept")) == found


def test_seeds_are_trained_in_turn_on_the_same_split(runs):
    folders = sorted(path.name for path in (runs / "exits").iterdir())
    assert folders == ["seed42", "seed43"]
    settings = [json.loads((runs / "exits" / name / "run.json").read_text()) for name in folders]
    assert [(table["seed"], table["split_seed"], table["label"]) for table in settings] == [
        (42, 42, "exits"),
        (43, 42, "exits"),
    ]
    logs = [(runs / "exits" / name / "log.jsonl").read_text().splitlines()[-1] for name in folders]
    losses = [json.loads(line)["losses"] for line in logs]
    assert losses[0] != losses[1]


def test_a_run_of_several_equals_one_that_was_trained_alone(runs, tmp_path, sdcli: Command):
    alone = tmp_path / "alone"
    options = ("--recipe", "default", "--set", "title=exits", "--seed", 43, "-o", alone)
    assert sdcli("train", "test_resnet", *TRAIN, *options).code == 0
    other = runs / "exits" / "seed43"
    assert (alone / "last.safetensors").read_bytes() == (other / "last.safetensors").read_bytes()


def test_finished_seeds_are_kept_and_missing_ones_trained(runs, sdcli: Command):
    before = (runs / "exits" / "seed42" / "log.jsonl").stat().st_mtime_ns
    options = ("--recipe", "default", "--set", "title=exits", "--seeds", 2, "-o", runs / "exits")
    refused(
        sdcli("train", "test_resnet", *TRAIN, *options),
        f"output '{runs / 'exits'}' is not an empty folder\n"
        "  expected: a new or empty folder\n"
        "  fix:      --resume auto, if it holds these runs: finished ones are kept, others are resumed or started",
    )
    result = sdcli("train", "test_resnet", *TRAIN, *options, "--resume", "auto")
    assert result.code == 0 and "run 1 of 2" not in result.err
    assert (runs / "exits" / "seed42" / "log.jsonl").stat().st_mtime_ns == before
    other = sdcli("train", "test_resnet", *TRAIN, *options, "--lr", 0.7, "--resume", "auto")
    seed = runs / "exits" / "seed42"
    refused(
        other,
        f"the recipe of the run in '{seed}' has optimizer.lr = 0.1, not 0.7\n"
        "  expected: the recipe that it was started with; only epochs may change\n"
        "  fix:      leave it out, or start a new run",
    )
    refused(
        sdcli("train", "--seeds", 2, "--resume", runs / "exits"),
        "--seeds and --resume RUN exclude each other\n  expected: --resume auto, which resumes each of the runs",
    )


def test_finished_seeds_go_on_where_more_epochs_are_asked_for(runs, tmp_path, sdcli: Command):
    shutil.copytree(runs / "baseline", tmp_path / "longer")
    options = ("--recipe", "baseline", "--recipe", "schedules/cosine", "--seeds", 2, "-o", tmp_path / "longer")
    more = [value if value != "1" else "2" for value in TRAIN]
    result = sdcli("train", "test_resnet", *more, *options, "--resume", "auto")
    assert result.code == 0, result.err
    logs = [(tmp_path / "longer" / f"seed{seed}" / "log.jsonl").read_text().splitlines() for seed in (42, 43)]
    assert [len(log) for log in logs] == [2, 2]
    fewer = sdcli("train", "test_resnet", *TRAIN, *options, "--resume", "auto")
    assert fewer.code == 2 and "epochs = 1, but the run in" in fewer.err


def test_runs_that_were_not_trained_to_their_end_are_named(runs, tmp_path, sdcli: Command):
    for name in ("baseline", "exits"):
        shutil.copytree(runs / name, tmp_path / "runs" / name)
    begun = tmp_path / "runs" / "exits" / "seed43"
    assert sdcli("compare", begun).code == 0
    (begun / "report.json").unlink()
    found = sdcli("compare", tmp_path / "runs", "--json")
    assert found.code == 0 and f"not trained to the end: {begun} (left out)" in found.err
    assert [group["seeds"] for group in json.loads(found.out)["tasks"][0]["groups"]] == [[42, 43], [42]]
    named = sdcli("compare", tmp_path / "runs" / "baseline", begun)
    assert named.code == 0 and f"not trained to the end: {begun} (scored as it is)" in named.err


def test_checkpoints_without_a_run_are_called_by_their_files(runs, tmp_path, sdcli: Command):
    for name in ("baseline", "exits"):
        (tmp_path / name).mkdir()
        shutil.copy(runs / name / "seed42" / "best.safetensors", tmp_path / name)
    files = [tmp_path / name / "best.safetensors" for name in ("baseline", "exits")]
    found = sdcli("compare", *files, "--json", "--baseline", tmp_path / "exits" / "best")
    assert found.code == 0, found.err
    labels = [group["label"] for group in json.loads(found.out)["tasks"][0]["groups"]]
    assert labels == [str(tmp_path / name / "best") for name in ("exits", "baseline")]


def test_a_record_is_not_scored_on_other_data(runs, tmp_path, sdcli: Command):
    assert sdcli("compare", runs / "exits", "--save", tmp_path, "--checkpoint", "best").code == 0
    file = tmp_path / "exits-seed42.json"
    refused(
        sdcli("compare", file, "--dataset", "digits"),
        f"--dataset: '{file}' is a record, whose run was scored on digits\n"
        "  expected: run folders or checkpoints, which can be scored on other data",
    )
    refused(
        sdcli("compare", file, "--checkpoint", "last"),
        f"--checkpoint last: '{file}' is the record of best\n  expected: run folders, or records of that checkpoint",
    )


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_scored(runs, tmp_path, sdcli: Command):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        result = sdcli("compare", runs, "--dataset", "digits", "--save", folder)
        refused(result, f"--save: '{folder}' cannot be written: Not a directory\n  expected: a writable folder")
        assert "scoring" not in result.err


def test_compare_scores_each_run_once_and_keeps_it(runs, tmp_path, sdcli: Command):
    result = sdcli("compare", runs, "--json", "--save", tmp_path / "records", "--checkpoint", "last")
    assert result.code == 0, result.err
    (task,) = json.loads(result.out)["tasks"]
    assert (task["name"], task["split"], task["num_images"]) == ("test_resnet on digits at 8 px", "test", 359)
    assert [(group["label"], group["seeds"]) for group in task["groups"]] == [
        (BASE, [42, 43]),
        ("exits", [42, 43]),
    ]
    exits = task["groups"][1]
    scored = json.loads(sdcli("eval", runs / "exits" / "seed42" / "last.safetensors", "--json").out)
    assert exits["points"]["final"]["values"][0] == scored["exits"][-1]["top1"]
    assert exits["points"]["ensemble"]["values"][0] == scored["ensemble"]["top1"]
    assert 1.0 < exits["relative_macs"] < 1.5 and not exits["differs"]
    assert (runs / "exits" / "seed42" / "record-last.json").is_file()
    again = sdcli("compare", tmp_path / "records", "--json")
    assert (again.code, again.out) == (0, result.out), "records stand for the runs"
    assert "opening digits" not in again.err
    assert str(runs) not in (tmp_path / "records" / "exits-seed42.json").read_text(), "records are shared"
    kept = sdcli("compare", runs, "--json", "--checkpoint", "last")
    assert (kept.out, "opening digits" in kept.err) == (result.out, False)


def test_a_record_is_not_used_for_another_checkpoint(runs, tmp_path, sdcli: Command):
    own = tmp_path / "run"
    own.mkdir()
    for file in (runs / "exits" / "seed42").iterdir():
        if file.is_file():
            (own / file.name).write_bytes(file.read_bytes())
    assert sdcli("compare", own, "--checkpoint", "last").code == 0
    (own / "last.safetensors").write_bytes((runs / "exits" / "seed43" / "last.safetensors").read_bytes())
    result = sdcli("compare", own, "--checkpoint", "last", "--json")
    scored = json.loads(sdcli("eval", runs / "exits" / "seed43" / "last.safetensors", "--json").out)
    assert json.loads(result.out)["tasks"][0]["groups"][0]["points"]["final"]["values"] == [scored["exits"][-1]["top1"]]


def test_the_tables_name_what_can_be_told_from_noise(runs, sdcli: Command):
    result = sdcli("compare", runs)
    assert result.code == 0
    assert "test_resnet on digits at 8 px  ·  top-1 % (test, 359 images)" in result.out
    assert f"final against {BASE}, in points" in result.out
    # So short a training leaves both finals where they were, without any noise.
    assert "2 paired seeds: differences of exit1 below about" in sdcli("compare", runs, "--point", "exit1").err
    one = sdcli("compare", runs / "baseline" / "seed42", runs / "exits" / "seed42")
    assert "McNemar's p = " in one.err
    assert "one seed: no difference can be told from the noise of training; see sdcli train --seeds" in one.err


def test_the_comparison_as_markdown_latex_csv_and_picture(runs, tmp_path, sdcli: Command):
    markdown = sdcli("compare", runs, "--markdown").out
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert lines[0] == "| recipe | seeds | exit1 | exit2 | exit3 | final | ensemble |"
    assert {line.count("|") for line in lines[:4]} == {8}
    latex = sdcli("compare", runs, "--latex").out
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 3
    assert latex.count("{") == latex.count("}") and r"$\pm$" in latex and r"95 \% interval" in latex
    rows = list(csv.DictReader(sdcli("compare", runs, "--csv").out.splitlines()))
    assert [(r["recipe"], r["point"]) for r in rows] == [
        (BASE, "final"),
        *(("exits", point) for point in ("exit1", "exit2", "exit3", "final", "ensemble")),
    ]
    assert sdcli("compare", runs, "--plot", tmp_path / "c.png").code == 0
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size[0] > 1000


def test_the_picture_shows_every_exit_at_its_cost_and_training_at_its_own(runs, tmp_path, sdcli: Command, figures):
    found = json.loads(sdcli("compare", runs, "--plot", tmp_path / "c.svg", "--json").out)
    (task,), (figure,) = found["tasks"], figures
    use, training = figure.axes
    base, exits = task["groups"]
    for group, drawn in zip(task["groups"], use.containers, strict=True):
        points = [point for point in group["points"] if point != "ensemble"]
        line, _, bars = drawn.lines
        assert drawn.get_label() == group["label"]
        plain = base["macs"]["final"]
        assert list(line.get_xdata()) == pytest.approx([group["macs"][point] / plain for point in points])
        scores = [group["points"][point] for point in points]
        assert list(line.get_ydata()) == pytest.approx([score["mean"] for score in scores])
        # Where no seed differs there are no bars.
        heights = [(high - low) / 2 for bar in bars for (_, low), (_, high) in bar.get_segments()] or [0] * len(points)
        assert heights == pytest.approx([score["sd"] for score in scores])
    spots = [tuple(float(one[0]) for one in drawn.lines[0].get_data()) for drawn in training.containers]
    assert spots[0] == pytest.approx((1, base["points"]["final"]["mean"]))
    assert spots[1] == pytest.approx((exits["relative_macs"], exits["points"]["final"]["mean"]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [BASE, "exits"]


def test_the_picture_takes_names_as_they_are(tmp_path, sdcli: Command, figures):
    for name in ("_hidden", r"$\foo$", "[a] 50 %"):
        save_record(record(name, 1, 52.0, 40.0), tmp_path / "kept")
    result = sdcli("compare", tmp_path / "kept", "--plot", tmp_path / "c.png")
    assert result.code == 0, result.err
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert sorted(names) == sorted(["_hidden", r"$\foo$", "[a] 50 %"])


def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_scored(runs, tmp_path, sdcli: Command):
    (folder := tmp_path / "c.png").mkdir()
    message = f"'{folder}' cannot be written: it is not a regular file\n  expected: a file in a writable folder"
    refused(sdcli("compare", runs, "--plot", folder, "--save", tmp_path / "kept"), message)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(("name", "text", "reason"), [
    ("run.json", "[]", "run.json' is damaged: Input should be an object"),
    ("run.json", '{"label": 3}', "run.json' is damaged: Input should be a valid string"),
    ("log.jsonl", '{"epoch": 1}\n', "log.jsonl' is damaged: line 1 lacks images_per_s, loss, losses, lr, num_images"),
    ("log.jsonl", "[1]\n", "log.jsonl' is damaged: line 1 lacks epoch, images_per_s"),
])  # fmt: skip
def test_a_damaged_file_of_a_run_is_named(runs, tmp_path, sdcli: Command, name, text, reason):
    run = tmp_path / "run"
    shutil.copytree(runs / "exits" / "seed42", run)
    (run / name).write_text(text)
    result = sdcli("compare", run)
    assert (result.code, result.out) == (2, "") and reason in result.err and "Traceback" not in result.err
    if name == "log.jsonl":
        result = sdcli("report", run, "--device", "cpu")
        assert result.code == 2 and reason in result.err


def test_a_network_that_is_not_finite_is_not_compared(runs, tmp_path, sdcli: Command):
    run = tmp_path / "run"
    shutil.copytree(runs / "exits" / "seed42", run)
    (run / "record-best.json").unlink(missing_ok=True)
    with safe_open(run / "best.safetensors", "pt") as opened:
        tensors, about = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    next(tensor for name, tensor in tensors.items() if name.endswith("weight")).fill_(float("nan"))
    save_file(tensors, run / "best.safetensors", about)
    result = sdcli("compare", run)
    assert result.code == 2 and "has an NLL of nan on 359 images" in result.err


def test_seeds_do_not_go_into_a_run_or_beyond_the_largest(runs, tmp_path, sdcli: Command):
    folder = runs / "exits" / "seed42"
    for more in ((), ("--resume", "auto")):
        result = sdcli("train", "test_resnet", *TRAIN, "--seeds", 2, "-o", folder, *more)
        refused(
            result,
            f"output '{folder}' is a run itself\n  expected: a folder for the runs of --seeds, each in a folder of its own\n"
            f"  fix:      --output {folder}-seeds",
        )
    result = sdcli("train", "test_resnet", *TRAIN, "--seed", 2**31 - 1, "--seeds", 2, "-o", tmp_path / "new")
    refused(result, f"--seed {2**31 - 1} --seeds 2 ends at seed {2**31}\n  expected: seeds up to {2**31 - 1}")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "'nowhere' does not exist\n  expected: run folders of sdcli train, folders that hold some, checkpoints, "
         "or records (sdcli compare --save)"),
        (["--json", "--csv", "x"], "--json, --csv, --markdown and --latex exclude each other\n  expected: one of them"),
        (["x", "--plot", "c.gif"], "'c.gif' is not the name of a picture\n  expected: one of .png, .svg, .pdf, .jpg, "
         ".webp\n  fix:      c.png"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_is_scored(sdcli: Command, options, message):
    refused(sdcli("compare", *options), message)


def test_a_point_that_no_run_has_is_refused(runs, sdcli: Command):
    result = sdcli("compare", runs, "--point", "exit9")
    refused(result, "no run has a point 'exit9'\n  expected: one of final, exit1, exit2, exit3, ensemble")


def test_a_folder_without_runs_is_refused(tmp_path, sdcli: Command):
    refused(
        sdcli("compare", tmp_path),
        f"'{tmp_path}' holds no finished run\n  expected: run folders of sdcli train, folders that hold some, checkpoints, or "
        "records (sdcli compare --save)",
    )
