"""A state file is used as it was saved, or refused with one message."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from processes import SERVER

from sdcli.errors import UserError
from sdcli.recipe.load import load_recipe
from sdcli.run import state as states
from sdcli.run.events import Epoch, Stopped
from sdcli.run.prepare import prepare
from sdcli.run.resume import read_state, resume, resumed
from sdcli.run.settings import Settings
from sdcli.run.train import fit, train_epoch
from sdcli.run.training import Training, restore, save

QUICK = Settings("test_vit", "digits", limit_train=96, limit_val=30, device="cpu", workers=0)
SHORT = ["epochs=2", "batch.size=24", "ema.decay=0.9"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped in its second epoch, after 2 of 4 updates."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    asked = iter(range(100))
    events = list(fit(prepare(QUICK, load_recipe(["quick"], SHORT), folder), lambda: 15 if next(asked) == 7 else None))
    assert events[-1] == Stopped(2, 2, 15)
    return folder


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    """A run folder whose state may be changed."""
    (tmp_path / "run" / "state").mkdir(parents=True)
    for file in [*stopped.glob("*.*"), *stopped.glob("state/*.pt")]:
        (tmp_path / "run" / file.relative_to(stopped)).write_bytes(file.read_bytes())
    return tmp_path / "run"


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        resume(folder, *resumed(folder, {}, None, []))
    return str(error.value)


# Damage


def test_a_damaged_state_is_refused_and_the_one_before_it_is_offered(folder: Path) -> None:
    last, previous = folder / "state" / "last.pt", folder / "state" / "previous.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    assert refusal(folder) == (
        f"state cannot be used: '{last}': it is damaged: its content does not match its checksum\n"
        "  expected: the state as sdcli train saved it\n"
        f"  fix:      go back to the previous state, then resume: mv {previous} {last}"
    )
    previous.rename(last)
    training = resume(folder, *resumed(folder, {}, None, []))
    assert (training.position.epoch, training.position.update) == (2, 0)


def test_a_damaged_state_without_an_earlier_one_is_refused(folder: Path) -> None:
    (folder / "state" / "last.pt").write_bytes(b"")
    (folder / "state" / "previous.pt").write_bytes(b"sdcli")
    assert refusal(folder) == (
        f"state cannot be used: '{folder}/state/last.pt': it is damaged: its first line is not that of a state\n"
        "  expected: the state as sdcli train saved it\n"
        "  fix:      start a new run"
    )


def test_the_state_of_another_version_is_refused(folder: Path) -> None:
    last = folder / "state" / "last.pt"
    content = last.read_bytes()
    for written, version in ((content.replace(b"state 6", b"state 7", 1), "7"), (b"PK\x03\x04" * 20, "2 or older")):
        last.write_bytes(written)
        assert refusal(folder) == (
            f"state cannot be used: '{last}' has format {version}\n"
            "  expected: format 6, which this sdcli reads\n"
            "  fix:      resume with the version of sdcli that saved it"
        )


def test_a_run_that_is_killed_while_it_saves_keeps_the_former_state(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each step of the way there is a whole last state."""
    last = folder / "state" / "last.pt"
    before, steps = last.read_bytes(), []
    training = resume(folder, *resumed(folder, {}, None, []))
    for name in ("fsync", "link", "replace", "unlink"):
        function = getattr(states.os, name)

        def noted(*arguments: Any, name: str = name, function: Callable[..., Any] = function, **named: Any) -> Any:
            states.load_state(last)
            steps.append(name)
            return function(*arguments, **named)

        monkeypatch.setattr(states.os, name, noted)
    save(training)
    assert [step for step in steps if step != "unlink"] == ["fsync", "link", "replace", "replace"]
    assert (folder / "state" / "previous.pt").read_bytes() == before


def test_the_former_state_is_copied_where_the_disk_has_no_links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError("no links")

    before = (folder / "state" / "last.pt").read_bytes()
    training = resume(folder, *resumed(folder, {}, None, []))
    monkeypatch.setattr(states.os, "link", refuse)
    save(training)
    assert (folder / "state" / "previous.pt").read_bytes() == before
    states.load_state(folder / "state" / "last.pt")


# Content that does not fit


WRONG: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("key", lambda s: s.pop("ema"), "ema: field required"),
    ("stray", lambda s: s.update(more=1), "more: extra inputs are not permitted"),
    ("position", lambda s: s["position"].pop("update"), "position.update: field required"),
    ("type", lambda s: s["position"].update(epoch="2"), "position.epoch: input should be a valid integer"),
    ("range", lambda s: s["position"].update(update=-1), "position.update: input should be greater than or equal to 0"),
    ("place", lambda s: s["position"].update(update=5), "update 5 of 4"),
    ("sums", lambda s: s["position"].update(sums=torch.ones(3)), "position.sums is not one number for each of 4 losses"),
    ("phase", lambda s: s.update(phase=1), "phase 2 of 1"),
    ("random", lambda s: s["random"][0].update(torch=torch.zeros(3, dtype=torch.uint8)), "random: "),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_state_that_is_not_one_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    state = states.load_state(folder / "state" / "last.pt")
    change(state)
    states.save_state(folder / "state" / "last.pt", state)
    assert refusal(folder).startswith(f"state cannot be used: '{folder}/state/last.pt': {message}")


CONV = "networks.student.backbone.patch_embed.proj.weight"
MISFITS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("tensor", lambda s: s["learner"].pop(CONV), f"learner.{CONV} is missing"),
    ("stray", lambda s: s["ema"].update(more=torch.ones(2)), "ema.more is not part of this run"),
    ("shape", lambda s: s["learner"].update({CONV: torch.ones(3)}), f"learner.{CONV} has shape [3], not [64, 3, 1, 1]"),
    ("dtype", lambda s: s["learner"].update({CONV: s["learner"][CONV].half()}), f"learner.{CONV} is float16, not float32"),
    ("momentum", lambda s: s["optimizers"]["student"]["state"][0].update(momentum_buffer=torch.ones(1)),
     "optimizers.student.state.0.momentum_buffer has shape [1], not [1, 1, 64]"),
    ("none", lambda s: s["optimizers"]["student"]["state"][0].update(momentum_buffer=None),
     "optimizers.student.state.0.momentum_buffer is nothing, not a tensor"),
    ("parameter", lambda s: s["optimizers"]["student"]["state"].update({999: {}}), "optimizers.student.state.999 belongs to no parameter"),
    ("group", lambda s: s["optimizers"]["student"]["param_groups"][0]["params"].pop(), "optimizers.student.param_groups.0 has other parameters"),
    ("rate", lambda s: s["optimizers"]["student"]["param_groups"][0].update(lr="x"), "optimizers.student.param_groups.0.lr is str, not a number"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in MISFITS], ids=[case[0] for case in MISFITS])
def test_the_state_of_another_network_is_refused_before_anything_is_changed(
    folder: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    """A wrong shape would be a crash in a fused optimizer."""
    training = resume(folder, *resumed(folder, {}, None, []))
    before = copy.deepcopy((training.learner.state_dict(), training.optimizers["student"].state_dict()["state"]))
    generator = torch.get_rng_state()
    state = states.load_state(folder / "state" / "last.pt")
    change(state)
    states.save_state(folder / "state" / "last.pt", state)
    with pytest.raises(UserError) as error:
        restore(training, read_state(folder, *resumed(folder, {}, None, [])))
    assert str(error.value) == (
        f"state cannot be used: '{folder}/state/last.pt': {message}\n"
        "  expected: the state of this run, saved with the same versions of sdcli, timm and torch\n"
        "  fix:      resume with those versions, or start a new run"
    )
    assert equal(before[0], training.learner.state_dict())
    assert torch.equal(torch.get_rng_state(), generator)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("opt", ["adamw", "lamb", "radam", "adafactorbv"])
def test_the_state_of_other_optimizers_is_used(opt: str, tmp_path: Path) -> None:
    asked = iter(range(100))
    recipe = load_recipe(["quick"], [*SHORT, f"optimizer.opt={opt}", "optimizer.lr=0.001"])
    list(fit(prepare(QUICK, recipe, tmp_path / "run"), lambda: 15 if next(asked) == 2 else None))
    training = resume(tmp_path / "run", *resumed(tmp_path / "run", {}, None, []))
    assert (training.position.epoch, training.position.update) == (1, 3)
    assert isinstance(list(train_epoch(training))[-1], Epoch)


FOREIGN: list[Callable[[dict[str, Any]], Any]] = [
    lambda entry: entry.clear(),
    lambda entry: entry.update({name: torch.ones(7) for name in entry}),
    lambda entry: entry.update({name: "x" for name in entry}),
    lambda entry: entry.popitem(),
]


@pytest.mark.parametrize("opt", ["lamb", "adopt", "lion", "adafactor", "radam"])
def test_a_forged_state_of_other_optimizers_is_refused_before_anything_is_changed(opt: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    asked = iter(range(100))
    recipe = load_recipe(["quick"], [*SHORT, f"optimizer.opt={opt}", "optimizer.lr=0.001"])
    list(fit(prepare(QUICK, recipe, folder), lambda: 15 if next(asked) == 2 else None))
    training = resume(folder, *resumed(folder, {}, None, []))
    before = copy.deepcopy((training.learner.state_dict(), training.optimizers["student"].state_dict()["state"]))
    state = states.load_state(folder / "state" / "last.pt")
    for change in FOREIGN:
        forged = copy.deepcopy(state)
        change(forged["optimizers"]["student"]["state"][0])
        try:
            restore(training, forged)
        except UserError as error:
            assert error.wrong.startswith(f"state cannot be used: '{folder}/state/last.pt': the optimizer cannot take")
            assert equal(before[0], training.learner.state_dict())
        else:
            # What an optimizer makes anew it does not miss.
            assert change in (FOREIGN[0], FOREIGN[3])
            assert isinstance(list(train_epoch(training))[-1], Epoch)
            training = resume(folder, *resumed(folder, {}, None, []))


# Whatever may be in the file


def damaged(content: bytes, random: Random) -> bytes:
    """The bytes cut short, or with a few bits flipped."""
    if random.random() < 0.4:
        return content[: random.choice([0, 1, 40, 78, 79, 200, random.randrange(len(content)), len(content) - 1])]
    changed = bytearray(content)
    for _ in range(random.choice([1, 1, 3])):
        changed[random.choice([random.randrange(len(content)), random.randrange(300)])] ^= 1 << random.randrange(8)
    return bytes(changed)


OTHERS = [None, True, -1, 10**7, 2**70, float("nan"), "", "x", [], [[]], {}, {"a": {}}, torch.ones(2), torch.ones(0)]


def changed(value: Any, random: Random) -> Any:
    """The value with one of its parts replaced, left out, reshaped, or exchanged with another."""
    if isinstance(value, dict) and value and random.random() < 0.95:
        key, other = random.choice(list(value)), random.choice(list(value))
        if random.random() < 0.1:
            return {name: part for name, part in value.items() if name != key}
        if random.random() < 0.1:
            return {**value, key: value[other], other: value[key]}
        return {**value, key: changed(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.95:
        place = random.randrange(len(value))
        return [
            *value[:place],
            *([changed(value[place], random)] if random.random() < 0.9 else []),
            *value[place + 1 :],
        ]
    if isinstance(value, torch.Tensor) and random.random() < 0.8:
        return random.choice([
            value[None], value.flatten()[1:], value.double(), value.to(torch.int8), value.flatten(),
            torch.zeros(1).expand(value.shape), value.float().to_sparse() if value.ndim else value[None],
        ])  # fmt: skip
    return random.choice(OTHERS)


def attempt_all(folder: str, results: str) -> None:
    """Tries 25 damaged files and 60 with other content; writes what came of each, one line before each attempt."""
    torch.set_num_threads(1)
    # What is loaded already need not be looked through at each attempt.
    gc.freeze()
    run, random = Path(folder), Random("states")
    settings = resumed(run, {}, None, [])
    training = resume(run, *settings)
    last = run / "state" / "last.pt"
    content, state = last.read_bytes(), states.load_state(last)
    with Path(results).open("w", buffering=1) as file:
        for number in range(85):
            if number < 25:
                last.write_bytes(damaged(content, random))
            else:
                part = random.choice([None, "position", "learner", "optimizers", "optimizers", "ema", "random", "data"])
                mine = copy.deepcopy(state)
                states.save_state(last, {**mine, part: changed(mine[part], random)} if part else changed(mine, random))
            file.write(f"{number} {outcome(training, run, settings)}\n")


def outcome(training: Training, run: Path, settings: Any) -> str:
    try:
        restore(training, read_state(run, *settings))
        return f"trains: {len(list(train_epoch(training)))}"
    except UserError as error:
        return f"refused: {error.wrong}"


def test_no_state_file_is_a_traceback_a_crash_or_a_hang(folder: Path, tmp_path: Path) -> None:
    process = SERVER.Process(target=attempt_all, args=(str(folder), str(tmp_path / "results")))
    process.start()
    process.join(timeout=300)
    if process.exitcode is None:
        process.kill()
    lines = (tmp_path / "results").read_text().splitlines()
    assert process.exitcode == 0, lines[-1:]
    assert len(lines) == 85
    assert all("refused: state cannot be used: " in line for line in lines[:25])
    refused = [line for line in lines[25:] if " refused: " in line]
    assert all(" refused: " in line or " trains: " in line for line in lines)
    assert len(refused) > 40, "most changes are mistakes"
