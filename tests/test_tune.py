"""`sdcli tune`: it finds what is hidden, shares a search, survives whatever ends it, and refuses what cannot work."""

from __future__ import annotations

import json
import signal
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, refused
from processes import Process

from sdcli.errors import UserError
from sdcli.recipe.load import load_recipe
from sdcli.recipe.space import Tried, checked, extension
from sdcli.run.folder import read_log
from sdcli.run.prepare import settled
from sdcli.run.tune import Search, _shown

MISLEAD = """
from torch.nn.functional import cross_entropy

from sdcli import LOSSES


@LOSSES.register("mislead", reads="logits")
def mislead(student, batch, *, at: float = 0.0):
    \"\"\"Teaches wrong labels, the less the nearer `at` is to 0.37.\"\"\"
    return 60 * (at - 0.37) ** 2 * cross_entropy(student, (batch.labels + 1) % 10, reduction="none")
"""
MINE = """
extends = "baseline"
optimizer = { opt = "adamw", weight_decay = 0.0 }
schedule = { sched = "none" }

[losses.mislead]
kind = "mislead"
on = "final"
"""
SMALL = ("test_resnet", "--exits", "none", "--dataset", "digits", "--workers", 0, "--device", "cpu")
QUICK = (*SMALL, "--recipe", "baseline", "--batch-size", 32, "--limit-train", 64, "--limit-val", 40)
LR = ("--try", "optimizer.lr=0.001..0.1")


def found(result: Any) -> dict[str, Any]:
    """What `--json` has printed."""
    assert result.code == 0, result.err
    return json.loads(result.out)


def by_number(table: dict[str, Any]) -> dict[int, Any]:
    """The results of all trials, without the times."""
    keys = ("values", "state", "top1", "nll", "epochs")
    return {trial["number"]: {key: trial[key] for key in keys} for trial in table["trials"]}


# What is found


def test_a_hidden_optimum_is_found_and_its_recipe_trains(sdcli: Command, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mislead.py").write_text(MISLEAD)
    Path("mine.toml").write_text(MINE)
    using = ("--recipe", "mine.toml", "--import", "mislead.py")
    common = (*SMALL, *using, "--limit-train", 480, "--batch-size", 16, "--lr", 0.003, "--epochs", 1)
    result = sdcli("tune", *common, "--try", "losses.mislead.at=0..1", "--budget", 12, "--json", "-o", "search")
    table = found(result)
    assert abs(table["best"]["values"]["losses.mislead.at"] - 0.37) < 0.1
    scores = [trial["top1"] for trial in table["trials"]]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1] + 20
    assert (table["images"], table["full_runs"]) == (12 * 480, 12.0)
    assert "cost of the search: 5,760 images trained on in " in result.err
    assert "as much as 12.0 full runs of 1 epoch\n" in result.err
    assert f"next: sdcli eval search/trials/{table['best']['number']:03d}\n" in result.err
    assert Path("search/tune.png").stat().st_size > 10_000

    best = load_recipe(["search/best.toml"])
    assert 'extends = "../mine.toml"' in Path("search/best.toml").read_text()
    assert best.losses["mislead"].options == {"at": table["best"]["values"]["losses.mislead.at"]}
    assert (best.epochs, best.optimizer.lr, best.batch.size) == (1, 0.003, 16)
    assert sdcli("recipes", "check", "search/best.toml", "--import", "mislead.py").code == 0
    again = ("--recipe", "search/best.toml", "--import", "mislead.py", "--limit-train", 480, "--workers", 0)
    assert sdcli("train", *SMALL[:1], "--dataset", "digits", *again, "--device", "cpu", "-o", "run").code == 0
    top1 = read_log(Path("run"))[-1]["validation"]["exits"][-1]["top1"]
    assert top1 == pytest.approx(table["best"]["top1"])


def test_the_table_has_the_best_first_and_pruned_trials_are_short(sdcli: Command, tmp_path: Path) -> None:
    command = ("tune", *QUICK, *LR, "--epochs", 2, "--budget", 5, "-o", tmp_path / "search")
    shown = sdcli(*command)
    assert shown.code == 0 and "test_resnet on digits  ·  5 trials, scored by mean" in shown.out
    table = found(sdcli(*command, "--json"))
    states = {trial["state"]: trial["epochs"] for trial in table["trials"]}
    assert states == {"complete": 2, "pruned": 1}
    assert table["trials"][0] == table["best"] and table["best"]["state"] == "complete"
    assert table["images"] == sum(64 * trial["epochs"] for trial in table["trials"])
    # Where the logarithm is even, so are the values.
    assert min(trial["values"]["optimizer.lr"] for trial in table["trials"]) < 0.01


def test_few_combinations_are_each_tried_once(sdcli: Command, tmp_path: Path) -> None:
    tried = ("--try", "optimizer.opt=sgd,adamw", "--try", "schedule.warmup_epochs=0,0.5")
    table = found(sdcli("tune", *QUICK, *tried, "--epochs", 1, "--json", "-o", tmp_path / "search"))
    tried = {tuple(trial["values"].values()) for trial in table["trials"]}
    assert tried == {("sgd", 0), ("sgd", 0.5), ("adamw", 0), ("adamw", 0.5)} and len(table["trials"]) == 4
    assert {trial["state"] for trial in table["trials"]} == {"complete"}


def test_trials_that_diverge_or_are_refused_do_not_end_the_search(sdcli: Command, tmp_path: Path) -> None:
    tried = ("--try", "optimizer.lr=0.01,1e30", "--try", "batch.mates=0,1", "--try", "batch.size=32,33")
    result = sdcli("tune", *QUICK, *tried, "--epochs", 1, "--json", "-o", tmp_path / "search")
    states = [trial["state"] for trial in found(result)["trials"]]
    assert states.count("refused") == 2 and states.count("diverged") == 3 and states.count("complete") == 3
    assert "diverged after 0 epochs: " in result.err and " was not finite in epoch 1" in result.err
    assert "refused after 0 epochs: batch.size = 33: batch.mates = 1 makes groups of 2 images" in result.err


def test_a_trial_that_cannot_be_trained_does_not_end_the_search(sdcli: Command, tmp_path: Path) -> None:
    result = sdcli("tune", *QUICK, "--try", "batch.size=1,32", "--epochs", 1, "--json", "-o", tmp_path / "search")
    states = {trial["values"]["batch.size"]: trial["state"] for trial in found(result)["trials"]}
    assert states == {1: "refused", 32: "complete"}
    assert "refused after 0 epochs: a batch norm received a single image" in result.err


def test_what_no_trial_can_do_ends_the_search(sdcli: Command, tmp_path: Path) -> None:
    command = ["tune", *SMALL, "--recipe", "baseline", *LR, "--epochs", 1, "-o", tmp_path / "search"]
    result = sdcli(*command, "--limit-train", 1)
    assert result.code == 2 and result.err.count("refused after 0 epochs") == 2
    assert "error: a batch norm received a single image" in result.err and "train on 2 images or more" in result.err


def test_epochs_in_which_the_student_rests_have_no_score(sdcli: Command, tmp_path: Path) -> None:
    command = [*SMALL, "--recipe", "eskd", "--batch-size", 32, "--limit-train", 64, "--limit-val", 40, *LR]
    teacher = ("--set", "networks.teacher.model=test_resnet", "--budget", 2)
    table = found(sdcli("tune", *command, *teacher, "--epochs", 2, "--json", "-o", tmp_path / "search"))
    assert table["best"]["epochs"] == 3 and table["best"]["top1"] > 0


# Searches that are shared, killed and continued


def test_processes_share_a_search_by_its_folder_and_by_its_storage(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    storage = ("--storage", f"sqlite:///{tmp_path}/shared.db")
    command = ("tune", *QUICK, *LR, "--epochs", 1, "--budget", 6, *storage, "--json")
    started = [Process(*command, "-o", folder, cwd=tmp_path) for folder in (here, here, there)]
    assert [process.wait() for process in started] == [0, 0, 0], [process.err for process in started]
    ran = [[int(line.split()[1][:-1]) for line in p.err.splitlines() if " after 1 epoch" in line] for p in started]
    # Every trial was run once, and several processes had some.
    assert sorted(number for numbers in ran for number in numbers) == list(range(6)) and sum(map(bool, ran)) > 1
    assert {int(path.name) for path in (here / "trials").iterdir()} == {*ran[0], *ran[1]}
    assert {int(path.name) for path in (there / "trials").iterdir()} == {*ran[2]}
    # Who ends first may see trials that others have only begun; who ends last sees all.
    tables = [json.loads(process.out)["trials"] for process in started]
    whole = [trials for trials in tables if [trial["state"] for trial in trials] == ["complete"] * 6]
    values = [trial["values"]["optimizer.lr"] for trial in whole[-1]]
    assert len(set(values)) == 6


def test_a_killed_search_continues_to_what_it_would_have_found(sdcli: Command, tmp_path: Path) -> None:
    command = ("tune", *QUICK, *LR, "--epochs", 2, "--budget", 2, "--no-pruning", "--json")
    table = found(sdcli(*command, "-o", tmp_path / "whole"))
    folder = tmp_path / "killed"
    process = Process(*command, "--save-every", 1, "-o", folder, cwd=tmp_path)
    while process.poll() is None and len(read_log(folder / "trials" / "001")) < 1:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    continued = sdcli(*command, "-o", folder)
    assert by_number(found(continued)) == by_number(table)
    assert "trial 0:" not in continued.err and "trial 1: optimizer.lr" in continued.err
    assert "; resumed in epoch " in continued.err
    assert not list((folder / "trials").glob("*.lock"))


def test_ctrl_c_stops_the_search_and_the_same_command_continues(
    sdcli: Command, tmp_path: Path, monkeypatch: Any
) -> None:
    @contextmanager
    def stopping() -> Any:
        asked = iter(range(4))
        yield lambda: None if next(asked, 4) < 3 else signal.SIGINT

    command = ("tune", *QUICK, *LR, "--epochs", 2, "--budget", 2, "--json", "-o", tmp_path / "search")
    with monkeypatch.context() as patch:
        patch.setattr("sdcli.cli.tune.stopping", stopping)
        stopped = sdcli(*command)
    assert (stopped.code, stopped.out) == (130, "")
    assert "note: the search is stopped and its runs are saved; the same command continues it\n" in stopped.err
    table = found(sdcli(*command))
    assert table["best"]["epochs"] == 2 and len(table["trials"]) == 2


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to try\n  expected: --try KEY=A..B or --try KEY=A,B,C\n  fix:      --try optimizer.lr=0.01..1"),
        (
            ["--try", "losses.task.weight=-1..1"],
            "--try losses.task.weight=-1..1: losses.task.weight = -1\n"
            "  expected: greater than or equal to 0, or a table, or a valid list\n  fix:      the default is 1.0",
        ),
        (
            ["--try", "losses.task.smoothing=0,2"],
            "--try losses.task.smoothing=0,2: losses.task.smoothing = 2\n"
            "  expected: less than 1\n  fix:      the default is 0.0",
        ),
        (
            ["--try", "lr=0.1..1"],
            "--try lr=0.1..1: recipe: unknown key 'lr'\n  expected: one of batch, best, ema, epochs, extends, losses, "
            "networks, optimizer, paper, phases, random_weights, rules, schedule, signals, title, updates\n  fix:      lr belongs in [optimizer]",
        ),
        (
            ["--try", "networks.student.exits=2,99", "--exits", "auto"],
            "",
        ),
        (
            ["--try", "epochs=1..2", "--val-fraction", "0"],
            "trials are compared on a validation split, and there is none with --val-fraction 0\n"
            "  expected: images that are held out of training\n  fix:      --val-fraction 0.1",
        ),
        (["--try", "epochs=1..2", "--budget", "0"], "invalid value: --budget 0\n  expected: an integer of 1 or more"),
        (
            ["--try", "epochs=1..2", "--storage", "nodb://me:secret@host/name"],
            "storage 'nodb://me:***@host/name' cannot be used: Can't load plugin: sqlalchemy.dialects:nodb\n  expected: "
            "a URL such as sqlite:///search.db or mysql://USER:PASSWORD@HOST/NAME, or a file for a journal",
        ),
        (
            ["--try", "epochs=1..2", "--try", "epochs=3,4"],
            "--try epochs: epochs is tried already\n  expected: each key once",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_written(
    sdcli: Command, tmp_path: Path, monkeypatch: Any, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = sdcli("tune", *SMALL, "--recipe", "baseline", *options)
    if message:
        refused(result, message)
    assert result.code == 2 and "Traceback" not in result.err and not Path("runs/tune-test_resnet-baseline").exists()


def test_a_folder_or_storage_of_another_search_is_refused(sdcli: Command, tmp_path: Path) -> None:
    folder, storage = tmp_path / "search", ("--storage", tmp_path / "journal.log")
    command = ("tune", *QUICK, *LR, "--epochs", 1, "--budget", 1, *storage)
    assert sdcli(*command, "-o", folder).code == 0
    for where, output in ((f"output '{folder}'", folder), (f"storage '{storage[1]}'", tmp_path / "other")):
        refused(
            sdcli(*command, "--seed", 1, "-o", output),
            f"{where} holds another search: seed = 42 there, 1 here\n  expected: the same search; only --budget, "
            "--no-pruning, --device, --workers, --compile, --grad-accum-steps, --save-every, --keep-every, --import may change\n"
            "  fix:      the same options, or another --output and --storage",
        )
    assert not (tmp_path / "other").exists()
    # A finished search is shown again, and a larger budget goes on.
    assert len(found(sdcli(*command, "--budget", 2, "--json", "-o", folder))["trials"]) == 2


def test_a_missing_extra_is_one_message(sdcli: Command, monkeypatch: Any) -> None:
    monkeypatch.setattr("sdcli.cli.tune.find_spec", lambda name: None if name == "optuna" else find_spec(name))
    refused(
        sdcli("tune", *SMALL, *LR),
        "a search needs optuna, which is not installed\n  expected: the extra 'tune'\n"
        "  fix:      pip install 'sdcli[tune]'",
    )


# The parts


def test_what_is_tried_has_the_type_of_its_key() -> None:
    def check(overrides: Any) -> object:
        return load_recipe(["baseline"], overrides)

    texts = ("epochs=1..8", "optimizer.lr=1..8", "optimizer.weight_decay=1e-5..1e-3", "schedule.sched=cosine,step",
             "networks.student.exits=auto,none,2", "batch.mixup=0..1", "batch.mates=0,1")  # fmt: skip
    epochs, lr, decay, sched, exits, mixup, mates = checked([Tried.parse(text) for text in texts], check)
    assert (epochs.whole, lr.whole, mixup.whole) == (True, False, False)
    assert (epochs.log, lr.log, decay.log, mixup.log) == (False, False, True, False)
    assert (sched.choices, mates.choices) == (("cosine", "step"), (0, 1))
    assert exits.choices == ("auto", "none", 2)
    assert decay.rounded(0.000123456) == 0.0001235 and decay.rounded(9.99999e-4) == 1e-3
    assert Tried.parse('a.b=["x", "y"],["z"]').choices == (["x", "y"], ["z"])


@pytest.mark.parametrize(
    "text", ["epochs", "epochs=", "epochs=1", "epochs=1,1", "epochs=2..1", "epochs=1..1", "e p=1..2"]
)
def test_what_leaves_nothing_to_search_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--"):
        Tried.parse(text)


@pytest.mark.parametrize(
    ("names", "overrides", "values"),
    [
        (["byot"], [], {"losses.soft.weight": 0.2}),
        (["quick"], ["epochs=3", "losses.hint=false"], {"losses.soft.temperature": 4.0}),
        (["default", "schedules/transformer"], [], {"optimizer.lr": 0.001}),
        (["schedules/transformer", "default"], [], {"optimizer.lr": 0.001}),
        (["born-again"], [], {"phases.1.rounds": 3, "optimizer.lr": 0.01}),
        (["ema-teacher"], ["ema.decay=0.9"], {"losses.soft.weight.value": 2.0}),
        (["bake"], ["batch.mates=1"], {"batch.size": 64}),
        (["./mine.toml"], ["networks.student.weights=./w.safetensors"], {"losses.labels.weight": 0.7}),
    ],
)
def test_a_recipe_that_extends_another_is_the_one_that_was_found(
    names: list[str], overrides: list[str], values: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text('extends = "deep-supervision"\nbest = "final"\n')
    Path("search").mkdir()
    sets = [*overrides, *(f"{key}={value}" for key, value in values.items())]
    recipe = load_recipe(names, sets)
    text = extension(names, recipe, values, Path("search"), settled)
    Path("search/best.toml").write_text(text)
    assert text.startswith("extends = ")
    written, trained = (
        settled(r).model_dump(exclude={"title", "paper"}) for r in (load_recipe(["search/best.toml"]), recipe)
    )
    assert written == trained


def test_a_storage_is_named_without_its_password() -> None:
    search = Search(None, [], [], [], Path("out"), 1, storage="mysql://me:p@ss:w@host/name")  # type: ignore[arg-type]
    assert _shown(search) == "mysql://me:***@host/name"
