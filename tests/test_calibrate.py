"""When images may leave early: thresholds against loops, promises against simulation, and the command on real runs."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from safetensors.torch import load_file

from sdcli.cli import main
from sdcli.cli.scores import _duration
from sdcli.cli.tables import trade_off_table
from sdcli.errors import UserError
from sdcli.evaluation.calibrate import Goal, calibrate, choose, losses, temperature_of
from sdcli.evaluation.latency import Latency, measure_latencies
from sdcli.evaluation.metrics import auroc
from sdcli.evaluation.outputs import Outputs
from sdcli.evaluation.promise import betting, bound_of, clopper_pearson, fixed_sequence, images_for
from sdcli.evaluation.search import Costs, best_policy, passing_ms
from sdcli.evaluation.thresholds import Exits, Setting, area, frontier, geometric, lagrangian, measure
from sdcli.network.blueprint import Blueprint
from sdcli.network.checkpoint import Description, TrainedOn, load_checkpoint, save_checkpoint
from sdcli.network.multi_exit import build
from sdcli.network.policies import decide
from sdcli.recipe.schema import Network

EXITS = ["exit1", "exit2"]


@pytest.fixture(scope="module")
def blueprint() -> Blueprint:
    table = Network(exits=3, head="linear")
    return Blueprint.draft(table, "test_resnet", [str(number) for number in range(10)], image_size=32)


def population(num: int, seed: int = 0, strengths: tuple[float, ...] = (1.6, 2.2, 2.6)) -> Outputs:
    """Answers of three exits to images that are easy or hard for all of them alike."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (num,), generator=generator)
    ease, shared = torch.randn(num, 1, generator=generator), torch.randn(num, 10, generator=generator)
    logits = {}
    for point, strength in zip([*EXITS, "final"], strengths, strict=True):
        own = torch.randn(num, 10, generator=generator)
        signal = torch.nn.functional.one_hot(labels, 10) * (strength + ease)
        logits[point] = signal + shared + 0.7 * own
    return Outputs(logits, labels)


def small_exits(seed: int, num_exits: int = 2, num_images: int = 7) -> Exits:
    generator = np.random.default_rng(seed)
    scores = generator.choice(np.linspace(0.1, 0.9, 6), size=(num_exits, num_images))
    right = generator.integers(0, 2, size=(num_exits + 1, num_images)).astype(float)
    return Exits(scores, right, np.linspace(0.3, 1.0, num_exits + 1))


def by_loop(exits: Exits, limits: np.ndarray) -> tuple[float, float]:
    """Accuracy and mean cost, image by image."""
    right = cost = 0.0
    num_exits, num_images = exits.scores.shape
    for image in range(num_images):
        leaves = next((k for k in range(num_exits) if exits.scores[k, image] >= limits[k]), num_exits)
        right += exits.right[leaves, image]
        cost += exits.costs[leaves]
    return right / num_images, cost / num_images


@pytest.mark.parametrize("seed", range(20))
def test_settings_are_measured_as_a_loop_over_images_does(seed):
    exits = small_exits(seed)
    for limits in itertools.product([0.0, 0.3, 0.55, math.inf], repeat=2):
        setting = measure(exits, np.array(limits))
        assert (setting.top1, setting.cost) == pytest.approx(by_loop(exits, np.array(limits)))


@pytest.mark.parametrize("price", [0.0, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("seed", range(20))
def test_no_exit_of_the_lagrangian_can_do_better_by_itself(seed, price):
    exits = small_exits(seed)
    limits = lagrangian(exits, price)

    def worth(limits: np.ndarray) -> float:
        right, cost = by_loop(exits, limits)
        return right - price * cost

    for k, other in itertools.product(range(2), [0.0, *np.linspace(0.05, 0.95, 19), math.inf]):
        tried = limits.copy()
        tried[k] = other
        assert worth(tried) <= worth(limits) + 1e-9


@pytest.mark.parametrize("ratio", [0.2, 1.0, 1.7])
def test_geometric_shares_leave_the_surest_first(ratio):
    generator = np.random.default_rng(0)
    exits = Exits(generator.random((3, 200)), np.ones((4, 200)), np.linspace(0.3, 1.0, 4))
    shares = ratio ** np.arange(4) / (ratio ** np.arange(4)).sum()
    left, expected = np.ones(200, dtype=bool), []
    for k in range(3):
        surest = [image for image in np.argsort(-exits.scores[k]) if left[image]][: math.floor(200 * shares[k])]
        left[surest] = False
        expected.append(len(surest))
    where = exits.leaving(geometric(exits, ratio))
    assert np.bincount(where, minlength=4)[:3].tolist() == expected


def test_thresholds_lie_between_two_scores():
    exits = Exits(np.array([[0.9, 0.5, 0.5, 0.1]]), np.ones((2, 4)), np.array([0.5, 1.0]))
    assert exits.limits[0].tolist()[0] == pytest.approx(0.7)
    assert math.isnan(exits.limits[0, 1]), "images that are equally sure leave together"
    assert exits.limits[0, 2:].tolist() == pytest.approx([0.3, 0.0])


def test_the_frontier_has_what_nothing_beats():
    a, b, c = Setting((), 0.5, 0.41), Setting((), 0.6, 0.71), Setting((), 0.55, 0.8)
    assert frontier([c, b, a]) == [a, b]
    # 40 budgets from 0.025 in equal steps.
    assert area([a, b, c]) == pytest.approx((12 * 0.5 + 12 * 0.6) / 40)


def test_the_exact_bound_without_a_change_is_the_rule_of_three():
    assert clopper_pearson(0, 0, 100, 0.1) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert clopper_pearson(100, 0, 100, 0.1) == 1.0
    # log(0.05) / log(0.99) is 298.07.
    assert images_for(np.zeros(10, dtype=int), 0.01, 0.1) == 299
    assert clopper_pearson(0, 0, 299, 0.1) <= 0.01 < clopper_pearson(0, 0, 298, 0.1)


def test_images_that_were_won_lower_the_bound():
    assert clopper_pearson(20, 18, 1000, 0.1) < clopper_pearson(20, 0, 1000, 0.1)
    values = np.array([1] * 20 + [-1] * 18 + [0] * 962)
    assert bound_of(values, 0.1) == clopper_pearson(20, 18, 1000, 0.1)


def test_betting_equals_its_formula_written_as_a_loop():
    values = np.array([1] * 4 + [-1] * 3 + [0] * 593)
    for limit in (0.002, 0.005, 0.008, 0.01, 0.02, 0.05):
        order = np.random.default_rng(0).permutation(values)
        total, squares, variance, capital, best = 0.5, 0.25, 0.25, 1.0, 1.0
        for number, loss in enumerate(order, 1):
            stake = min(math.sqrt(2 * math.log(10) / (len(order) * variance)), 0.75 / (1 - limit))
            capital *= 1 - stake * (loss - limit)
            best = max(best, capital)
            total += loss
            squares += (loss - total / (number + 1)) ** 2
            variance = squares / (number + 1)
        assert betting(values, 0.1, limit) == (best >= 10), limit


@pytest.mark.parametrize("limit", [1.0, 1.5])
def test_betting_holds_wherever_nothing_more_can_be_lost(limit, blueprint):
    assert betting(np.ones(20, dtype=int), 0.1, limit)
    assert not betting(np.ones(20, dtype=int), 0.1, 0.999)
    found = calibrate(population(100), blueprint, EXITS, Goal(max_drop=100, test="betting"), data="")
    assert found.calibration.promise.limit == 100 and found.calibration.policy.exits


def test_the_sequence_ends_before_the_first_step_that_fails():
    steps = [np.array([number]) for number in (0, 0, 1, 0)]
    assert fixed_sequence(steps, lambda loss: loss[0] == 0) == 2
    assert fixed_sequence(steps[2:], lambda loss: loss[0] == 0) == 0


@pytest.mark.parametrize(("worse", "better"), [(4, 0), (9, 5), (2, 7), (0, 0)])
def test_the_images_that_a_limit_needs_are_those_at_which_the_bound_holds(worse, better):
    values = np.array([1] * worse + [-1] * better + [0] * (200 - worse - better))
    needed = images_for(values, 0.03, 0.1)

    def bound(num: int) -> float:
        return clopper_pearson(worse * num / 200, better * num / 200, num, 0.1)

    assert bound(needed) <= 0.03 < bound(needed - 1)
    assert (needed <= 200) == (bound_of(values, 0.1) <= 0.03)
    assert images_for(np.tile(values, 10), 0.03, 0.1) == needed


def test_no_number_of_images_brings_the_bound_below_the_measured_loss():
    values = np.array([1] * 4 + [0] * 196)
    assert images_for(values, 0.02, 0.1) is None and images_for(values, 0.0199, 0.1) is None
    assert images_for(values, 0.0201, 0.1) > 100_000


DRAWS, LIMIT = 200, 4.0


@pytest.fixture(scope="module")
def simulated(blueprint) -> dict[str, list[tuple[float, float]]]:
    """For each way to choose, of each draw of 800 images the true drop of what was chosen, in points, and its cost."""
    everyone = population(4000)
    costs = Costs(blueprint, None)
    goals = {
        "clopper-pearson": Goal(max_drop=LIMIT),
        "betting": Goal(max_drop=LIMIT, test="betting"),
        "no guarantee": Goal(max_drop=LIMIT, guarantee=False),
    }
    chosen: dict[str, list[tuple[float, float]]] = {name: [] for name in goals}
    generator = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for a few numbers at a time
    for _ in range(DRAWS):
        # With replacement, so that the drop of all is the true one.
        first, second = everyone.select(torch.randint(len(everyone), (800,), generator=generator)).halves()
        found, _ = best_policy(first, ("exit1",), {}, costs, "confidence", False)
        for name, goal in goals.items():
            step, promise, _ = choose(goal, found, len(first), second, costs)
            assert (promise is not None) == (goal.guarantee and bool(step.policy.exits))
            chosen[name].append((100 * float(losses(step.policy, everyone).mean()), step.cost))
    torch.set_num_threads(threads)
    for name, draws in chosen.items():
        broken, mean = sum(drop > LIMIT for drop, _ in draws), np.mean([cost for _, cost in draws])
        print(f"{name}: {broken} of {DRAWS} draws lose more than {LIMIT:g} points; mean cost {mean:.3f}")
    return chosen


@pytest.mark.parametrize("test", ["clopper-pearson", "betting"])
def test_a_promise_is_broken_no_more_often_than_it_says(simulated, test):
    # At most 20 are expected; a fair promise is above 29 in 2 % of such tests.
    assert sum(drop > LIMIT for drop, _ in simulated[test]) <= 29
    assert sum(cost < 1 for _, cost in simulated[test]) > 150, "most draws have a promise"


def test_a_setting_without_a_promise_breaks_the_limit_far_more_often(simulated):
    assert sum(drop > LIMIT for drop, _ in simulated["no guarantee"]) > 40


def test_the_images_that_would_do_are_not_named_where_there_are_enough(blueprint):
    """Where leaving early wins answers, the bound may lie far below the limit."""
    logits = {point: torch.zeros(144, 10) for point in (*EXITS, "final")}
    logits["exit1"][:, 0] = 3 + torch.linspace(0, 1, 144)
    # Wrong on a fifth of the images, on which exit1 is right.
    logits["final"][torch.arange(144), (torch.arange(144) % 10 < 2).long()] = 5.0
    outputs = Outputs(logits, torch.zeros(144, dtype=torch.long))
    found = calibrate(outputs, blueprint, EXITS, Goal(max_drop=6), data="")
    assert found.calibration.promise.measured < -10
    assert found.notes == ("this setting by itself passes at 3 points too, with these images",)


def test_a_limit_below_what_was_lost_is_met_by_no_number_of_images(blueprint):
    """The exits are equally sure of all images, and lose one in 20."""
    logits = {point: torch.zeros(800, 10) for point in (*EXITS, "final")}
    lost = torch.arange(800) // 2 % 20 == 0
    logits["exit1"][torch.arange(800), lost.long()] = 3.0
    logits["exit2"] = logits["exit1"].clone()
    logits["final"][:, 0] = 5.0
    outputs = Outputs(logits, torch.zeros(800, dtype=torch.long))
    found = calibrate(outputs, blueprint, EXITS, Goal(max_drop=1), data="", kind="confidence", agreement=False)
    assert found.calibration.promise is None
    assert len(found.notes) == 2 and found.notes[1].startswith("no number of images will do at 1 point: a cost of ")
    kept = calibrate(outputs, blueprint, EXITS, Goal(max_drop=9), data="", kind="confidence", agreement=False)
    assert kept.calibration.promise.measured == pytest.approx(5.0)
    assert kept.notes == ("no number of images will do at 4.5 points: this setting lost 5.00 points",)


def test_the_temperature_minimises_the_negative_log_likelihood():
    outputs = population(2000)
    assert temperature_of(3 * outputs.logits["final"], outputs.labels) == pytest.approx(
        3 * temperature_of(outputs.logits["final"], outputs.labels), rel=1e-2
    )


def test_auroc_counts_pairs():
    confidence, correct = torch.tensor([0.9, 0.8, 0.7, 0.7]), torch.tensor([True, False, True, False])
    assert auroc(confidence, correct) == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert auroc(confidence, torch.ones(4, dtype=torch.bool)) is None


def test_a_budget_is_kept_and_chosen_on_one_half_alone(blueprint):
    outputs = population(2000)
    found = calibrate(outputs, blueprint, EXITS, Goal(budget=0.8), data="")
    policy = found.calibration.policy
    first, second = outputs.halves()
    passing = blueprint.passing(policy.exits)
    for half in (first, second):
        decided = decide(policy, half.logits)
        cost = np.mean([passing[decided.points[place]] for place in decided.exits]) / blueprint.plan.macs
        assert cost <= 0.8 + (0.02 if half is second else 0.0)
    chosen = next(row for row in found.trade_offs if row.chosen)
    assert chosen.cost == pytest.approx(cost), "what is reported was measured on the other half"
    other = Outputs(outputs.logits, outputs.labels.clone())
    other.labels[1::2] = outputs.labels[1::2].flip(0)
    assert calibrate(other, blueprint, EXITS, Goal(budget=0.8), data="").calibration.policy == policy


@pytest.mark.parametrize("budget", [0.62, 0.655, 0.69, 0.74, 0.83])
def test_no_setting_within_the_budget_is_better_than_the_one_that_is_taken(blueprint, budget):
    first, second = population(1000).halves()
    temperatures = dict.fromkeys((*EXITS, "final"), 1.0)
    costs = Costs(blueprint, None)
    found, _ = best_policy(first, tuple(EXITS), temperatures, costs, None, None)
    chosen, _, _ = choose(Goal(budget=budget), found, len(first), second, costs)
    within = [step.setting.top1 for step in found if step.cost <= budget]
    assert len(within) > 5 and chosen.setting.top1 == max(within)
    limit = found[0].setting.top1 - 0.01
    chosen, _, _ = choose(Goal(max_drop=1, guarantee=False), found, len(first), second, costs)
    assert chosen.cost == min(step.cost for step in found if step.setting.top1 >= limit)


def test_a_budget_never_takes_a_plain_network_that_is_worse(blueprint):
    """What is found for one goal answers a later budget as `calibrate --budget` would."""
    outputs = population(1000, strengths=(2.6, 2.2, 0.2))
    found = calibrate(outputs, blueprint, EXITS, Goal(max_drop=1), data="").calibration
    asked = calibrate(outputs, blueprint, EXITS, Goal(budget=1.0), data="").calibration
    assert found.curve[-1].thresholds == {} and found.curve[-1].cost == 1
    assert found.at_budget(1.0) == found.at_budget(5.0) == asked.policy == asked.at_budget(1.0)
    assert asked.policy.exits
    first, second = outputs.halves()
    for point in found.curve:
        for half, top1 in ((first, point.chosen_by), (second, point.top1)):
            answers = decide(found.policy.at(point.thresholds), half.logits).answers.argmax(dim=1)
            assert 100 * float((answers == half.labels).double().mean()) == pytest.approx(top1)


def test_what_early_exit_takes_by_itself_counts_once_for_an_image():
    latencies = {"exit1": Latency(1.0, 0.2), "exit2": Latency(2.0, 0.4), "final": Latency(4.0, 0.0, 0.5)}
    assert passing_ms(latencies, ["exit1", "exit2"]).tolist() == pytest.approx([1.7, 3.1, 5.1])
    assert passing_ms(latencies, []).tolist() == [4.0]


def test_what_early_exit_takes_is_measured_only_where_it_is_used(blueprint, monkeypatch):
    network = build(blueprint)
    routed = measure_latencies(network, EXITS, torch.device("cpu"), routed=True)
    # At some exits of some networks no image can leave, and the latency of each alone is asked for all the same.
    monkeypatch.setattr(network, "route", None)
    alone = measure_latencies(network, EXITS, torch.device("cpu"))
    assert alone.keys() == routed.keys() == {*EXITS, "final"}
    assert alone["final"].routing == alone["final"].head == routed["final"].head == 0


def test_one_exit_has_nothing_to_agree_with(blueprint):
    with pytest.raises(UserError, match="--agreement with one exit, exit1"):
        calibrate(population(200), blueprint, ["exit1"], Goal(budget=0.9), data="", agreement=True)


def test_a_budget_below_the_cheapest_exit_names_it(blueprint):
    with pytest.raises(UserError, match=r"a budget of 0\.01 cannot be met: the cheapest exit costs 0\.\d+") as error:
        calibrate(population(200), blueprint, EXITS, Goal(budget=0.01), data="")
    least = float(error.value.fix.split()[1].rstrip(","))
    assert calibrate(population(200), blueprint, EXITS, Goal(budget=least), data="").calibration.policy.exits


def test_a_promise_that_cannot_be_kept_keeps_the_plain_network_and_says_what_would_do(blueprint):
    found = calibrate(population(100), blueprint, EXITS, Goal(max_drop=0.5), data="")
    assert found.calibration.policy.exits == () and found.calibration.promise is None
    assert "no saving can be certified at 0.5 points with 50 images: the plain network is kept" in found.notes
    assert any("held-out images would certify" in note or "no number" in note for note in found.notes)


def test_without_labels_the_answers_of_the_plain_network_count(blueprint):
    outputs = population(4000)
    unknown = Outputs(outputs.logits, torch.zeros_like(outputs.labels))
    found = calibrate(unknown, blueprint, EXITS, Goal(max_drop=3, loss="change"), data="")
    assert found == calibrate(outputs, blueprint, EXITS, Goal(max_drop=3, loss="change"), data="")
    policy, second = found.calibration.policy, outputs.halves()[1]
    changed = decide(policy, second.logits).answers.argmax(dim=1) != second.logits["final"].argmax(dim=1)
    assert found.calibration.promise.measured == pytest.approx(100 * float(changed.double().mean()))
    assert 0 < found.calibration.promise.measured <= 3


def test_too_few_images_are_refused(blueprint):
    with pytest.raises(UserError, match="only 19 held-out images"):
        calibrate(population(19), blueprint, EXITS, Goal(budget=0.5), data="")


def test_the_table_of_trade_offs_has_exits_in_order_and_no_row_twice(blueprint):
    found = calibrate(population(400), blueprint, EXITS, Goal(budget=0.9), data="", kind="confidence", agreement=False)
    plain = found.trade_offs[-1]
    one = replace(plain, thresholds={"exit2": 0.5}, shares={"exit10": 0.3, "exit2": 0.2, "final": 0.5}, chosen=False)
    same = replace(one, thresholds={"exit2": 0.6}, chosen=True)
    table = trade_off_table(replace(found, trade_offs=(one, same, plain)), 0.9, change=False)
    assert [column.header for column in table.columns][-3:] == ["exit2", "exit10", "final"]
    assert list(table.columns[0].cells) == (["→", "→"] if plain.chosen else ["→", ""])


# The command


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on digits with 287 validation images."""
    folder = tmp_path_factory.mktemp("calibrate") / "run"
    options = "--dataset digits --recipe quick --epochs 2 --val-fraction 0.2 --workers 0 --device cpu --image-size 16"
    options += " --head linear --unset losses.hint --limit-train 300"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sdcli", "train", "test_resnet", *options.split(), "--output", str(folder)])
        with pytest.raises(SystemExit) as end:
            main()
            sys.exit(0)
    assert not end.value.code
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_calibrate_writes_policy_and_promise_beside_the_same_tensors(sdcli, run):
    path = run / "best.safetensors"
    before = load_file(path)
    result = sdcli("calibrate", run, "--max-drop", "4", "--device", "cpu")
    assert result.code == 0, result.err
    tensors, about = load_checkpoint(path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    calibration = about.early_exit
    assert calibration is not None and calibration.data == "digits (validation)"
    assert set(calibration.policy.temperatures) == {"exit1", "exit2", "exit3", "final"}
    assert [point.cost for point in calibration.curve] == sorted(point.cost for point in calibration.curve)
    promised = (
        "Certified: at most 4 points of top-1 accuracy lost against the plain network, with 90% confidence"
        in result.out
    )
    assert promised == (calibration.promise is not None)
    tried = next(line for line in result.out.splitlines() if line.startswith("Policies tried"))
    assert f" {calibration.policy.kind}" in tried.split(", taken")[0]
    assert all(name in tried for name in ("ensemble", "confidence", "margin", "entropy"))
    assert "test split" not in result.out and f"stored in {path}" in result.err


def test_another_file_is_written_and_the_first_one_stays(sdcli, run, tmp_path):
    before = (run / "best.safetensors").read_bytes()
    other = tmp_path / "half.safetensors"
    result = sdcli("calibrate", run, "--budget", "0.9", "--output", other, "--plot", tmp_path / "a.png", "--json")
    assert result.code == 0, result.err
    assert (run / "best.safetensors").read_bytes() == before
    found = json.loads(result.out)
    assert found["checkpoint"] == str(other)
    assert found["calibration"] == json.loads(json.dumps(load_checkpoint(other)[1].early_exit.to_dict()))
    chosen = next(row for row in found["trade_offs"] if row["chosen"])
    assert sum(chosen["shares"].values()) == pytest.approx(1)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 500
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "half.safetensors", "run"]


def test_another_file_is_not_written_over_something_else(sdcli, run, tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    piped = sdcli("calibrate", run, "--budget", "0.9", "--output", tmp_path / "pipe.safetensors")
    assert piped.code == 2 and "is not an earlier result" in piped.err
    own = (run / "best.safetensors").read_bytes()
    other = tmp_path / "taken.safetensors"
    # Something else, and the same network with another weight.
    for content in (b"mine", own[:-1] + bytes([own[-1] ^ 1])):
        other.write_bytes(content)
        refused(
            sdcli("calibrate", run / "best.safetensors", "--budget", "0.9", "--output", other),
            f"'{other}' exists and is not an earlier result for '{run}/best.safetensors'\n"
            "  expected: a new file, or one with the same weights\n"
            "  fix:      choose another --output",
        )
        assert other.read_bytes() == content
    refused(
        sdcli("calibrate", run, "--budget", "0.9", "--output", tmp_path / "report.json"),
        f"'{tmp_path}/report.json' does not end in .safetensors\n"
        "  expected: a checkpoint's name\n"
        f"  fix:      --output {tmp_path}/report.json.safetensors",
    )
    for budget in ("0.9", "0.95"):
        assert sdcli("calibrate", run, "--budget", budget, "--output", tmp_path / "other.safetensors").code == 0


def test_a_latency_is_measured_on_this_device(sdcli, run):
    found = json.loads(sdcli("calibrate", run, "--latency-ms", "10000", "--json").out)
    assert all(row["latency_ms"] > 0 for row in found["trade_offs"])
    refusal = sdcli("calibrate", run, "--latency-ms", "0.000001")
    assert refusal.code == 2 and "the cheapest exit takes" in refusal.err


def test_early_exit_is_scored_beside_the_exits_as_calibrated(sdcli, run):
    assert sdcli("eval", run, "--dynamic").err.count("sdcli calibrate") == 1
    assert sdcli("calibrate", run, "--max-drop", "100", "--no-guarantee").code == 0
    result = sdcli("eval", run, "--dynamic", "--json")
    scored = json.loads(result.out)
    early = scored["early_exit"]
    assert sum(row["share"] for row in early["exits"]) == pytest.approx(1)
    mean = sum(row["share"] * (row["top1"] or 0) for row in early["exits"])
    assert early["result"]["top1"] == pytest.approx(mean)
    plain = sum(row["share"] * (row["plain_top1"] or 0) for row in early["exits"])
    assert scored["exits"][-1]["top1"] == pytest.approx(plain)
    assert early["result"]["macs"] < scored["exits"][-1]["macs"]
    assert list(early["times"]) == ["exit1", "exit2", "exit3"] and min(early["times"].values()) > 0
    shown = sdcli("eval", run, "--dynamic")
    assert "early exit" in shown.out and "of the plain model's MACs and" in shown.out
    assert "early exit beside each exit alone" in shown.out
    # All images leave at exit1: that exit could be shipped alone.
    assert [row["share"] for row in early["exits"]] == [1, 0]
    assert "note: exit1 alone is as good" in shown.err and "sdcli export --exit exit1 ships it" in " ".join(
        shown.err.split()
    )
    assert sdcli("eval", run, "--dynamic", "--csv").out.splitlines()[-1].split(",")[4] == "early exit"
    assert "\n| early exit | " in sdcli("eval", run, "--dynamic", "--markdown").out


def test_short_times_are_in_milliseconds():
    assert [_duration(seconds) for seconds in (12.34, 0.25, 0.0304, 0.0004)] == ["12.3 s", "250 ms", "30 ms", "0.4 ms"]


def test_a_budget_of_eval_chooses_among_the_settings(sdcli, run):
    assert sdcli("calibrate", run, "--max-drop", "100", "--no-guarantee").code == 0
    calibration = load_checkpoint(run / "best.safetensors")[1].early_exit
    curve, policy = calibration.curve, calibration.at_budget(1.0)
    (taken,) = [point for point in curve if point.thresholds == policy.thresholds]
    assert taken.chosen_by == max(point.chosen_by for point in curve if point.cost <= 1)
    scored = json.loads(sdcli("eval", run, "--dynamic", "--budget", "1.0", "--split", "val", "--json").out)
    assert [row["point"] for row in scored["early_exit"]["exits"]] == [*policy.exits, "final"]
    assert scored["early_exit"]["result"]["speedup"] >= 1
    refused(
        sdcli("eval", run, "--dynamic", "--budget", "0.001"),
        f"a budget of 0.001 cannot be met\n  expected: {math.ceil(1000 * curve[0].cost) / 1000:g} or more"
        "\n  fix:      a larger budget, one exit alone (sdcli predict --exit), or exits with a cheaper head (--head linear)",
    )


def test_a_limit_below_twenty_images_is_named_before_the_network_runs(sdcli, run, monkeypatch):
    monkeypatch.setattr("sdcli.evaluation.held_out.open_checkpoint", None)
    refused(
        sdcli("calibrate", run, "--limit", "19"),
        "only 19 held-out images\n"
        "  expected: at least 20, and some thousands for a useful promise\n"
        "  fix:      --limit 20 or more, or leave it out",
    )


def test_a_calibration_is_written_through_a_symbolic_link(sdcli, run, tmp_path):
    link = tmp_path / "link.safetensors"
    link.symlink_to(run / "best.safetensors")
    result = sdcli("calibrate", link, "--max-drop", "100", "--test", "betting")
    assert result.code == 0, result.err
    assert link.is_symlink() and load_checkpoint(run / "best.safetensors")[1].early_exit.promise.limit == 100
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.safetensors", "run"]


def test_photos_without_labels_are_enough_for_consistency(sdcli, run, tmp_path):
    photos = tmp_path / "photos" / "mixed"
    photos.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(40):
        pixels = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
    result = sdcli("calibrate", run, "--consistency", "--dataset", photos, "--max-drop", "50")
    assert result.code == 0, result.err
    assert load_checkpoint(run / "best.safetensors")[1].early_exit.num_images == 40


def save_noise(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number:02}.png")
    return folder


def test_photos_that_cannot_be_read_are_all_named_and_left_out(sdcli, run, tmp_path):
    photos = save_noise(tmp_path / "photos", 30)
    (photos / "03.png").write_bytes((photos / "03.png").read_bytes()[:60])
    (photos / "11.png").write_bytes(b"")
    result = sdcli("calibrate", run, "--consistency", "--dataset", photos, "--max-drop", "50")
    assert result.code == 0, result.err
    assert "note: left out 2 images that cannot be read" in result.err
    assert f"'{photos}/03.png'" in result.err and f"'{photos}/11.png'" in result.err
    calibration = load_checkpoint(run / "best.safetensors")[1].early_exit
    assert (calibration.num_images, calibration.data) == (28, "photos (validation)")


def test_few_photos_ask_for_more_photos(sdcli, run, tmp_path):
    photos = save_noise(tmp_path / "photos", 12)
    refused(
        sdcli("calibrate", run, "--consistency", "--dataset", photos),
        "only 12 held-out images\n"
        "  expected: at least 20, and some thousands for a useful promise\n"
        f"  fix:      add images to '{photos}'",
    )


def test_photos_without_classes_need_consistency(sdcli, run, tmp_path):
    photos = save_noise(tmp_path / "photos", 2)
    refused(
        sdcli("calibrate", run, "--max-drop", "1", "--dataset", photos),
        f"'{photos}' has no class folders, and right answers cannot be counted without labels\n"
        "  expected: images sorted into val/CLASS/\n"
        "  fix:      --consistency, which limits the share of answers that change and needs no labels",
    )


@pytest.mark.parametrize("words", [("calibrate",), ("eval", "--dynamic")])
def test_a_network_without_exits_is_refused_with_what_to_train(sdcli, tmp_path, words):
    path = tmp_path / "best.safetensors"
    blueprint = Blueprint.draft(Network(exits="none"), "test_resnet", [str(n) for n in range(10)], image_size=32)
    about = Description(blueprint, TrainedOn("digits", "digits", 0.1, 42), {}, 1)
    save_checkpoint(path, build(blueprint).state_dict(), about)
    command, *options = words
    refused(
        sdcli(command, path, *options),
        f"'{path}' has no exits: images cannot leave it early\n"
        "  expected: a network that was trained with exits\n"
        "  fix:      train one with a recipe that has exits, such as --recipe default",
    )
    benched = sdcli("bench", path, "--batch-size", "1", "--seconds", "0")
    assert "early exit is left out: the network has no exits; a recipe such as default trains them" in benched.err
    image = save_noise(tmp_path / "photos", 1)
    refused(
        sdcli("predict", path, image, "--ensemble"),
        "an ensemble without effect: the network has no exit but final\n"
        "  expected: a network with exits\n"
        "  fix:      leave it out",
    )


def test_a_run_that_trained_on_everything_cannot_be_calibrated(sdcli, tmp_path):
    options = (
        "--dataset digits --recipe quick --epochs 1 --limit-train 60 --val-fraction 0 --device cpu --image-size 32"
    )
    assert sdcli("train", "test_resnet", *options.split(), "--output", tmp_path / "run").code == 0
    path = tmp_path / "run" / "last.safetensors"
    before = path.read_bytes()
    refused(
        sdcli("calibrate", tmp_path / "run"),
        f"'{path}' was trained on all images of digits: none is left to calibrate on\n"
        "  expected: images that it has not seen, other than the test split, which only measures\n"
        "  fix:      train with --val-fraction 0.1, or name other data with --dataset",
    )
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-drop", "1", "--budget", "0.5"), "--max-drop and --budget exclude each other"),
        (("--budget", "0.5", "--no-guarantee"), "--no-guarantee has no effect with --budget"),
        (("--budget", "0.5", "--test", "betting"), "--test has no effect with --budget, which promises nothing"),
        (("--policy", "sureness"), "unknown policy 'sureness'"),
        (("--output", "nowhere/x.safetensors"), "'nowhere/x.safetensors' cannot be written: No such file or directory"),
        (("--plot", "a.txt"), "'a.txt' is not the name of a picture"),
        (("--limit", "5"), "only 5 held-out images"),
    ],
)
def test_a_mistake_of_calibrate_is_one_message(sdcli, run, options, message):
    before = (run / "best.safetensors").read_bytes()
    result = sdcli("calibrate", run, *options)
    assert (result.code, result.out) == (2, "")
    assert f"error: {message}" in result.err and "Traceback" not in result.err
    assert (run / "best.safetensors").read_bytes() == before
