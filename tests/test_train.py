"""A run is the same however it is interrupted, shared out or worked off."""

from __future__ import annotations

import copy
import errno
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from processes import Process, finished, together
from safetensors.torch import load_file, save_file

from sdcli.errors import UserError
from sdcli.evaluation.scoring import score_checkpoint
from sdcli.method.losses import LOSSES
from sdcli.network.blueprint import Blueprint
from sdcli.network.checkpoint import save_checkpoint
from sdcli.network.memory_format import suitable_format
from sdcli.network.multi_exit import build as build_exits
from sdcli.recipe.load import load_recipe
from sdcli.recipe.schema import Network, Recipe
from sdcli.registry import Entry
from sdcli.run import prepare as prepares
from sdcli.run import state as states
from sdcli.run.events import Epoch, Finished, Step, Stopped
from sdcli.run.folder import read_log
from sdcli.run.prepare import prepare
from sdcli.run.resume import resume, resumed
from sdcli.run.settings import Settings
from sdcli.run.train import fit, next_update, train_epoch, train_step
from sdcli.run.training import Training, enter_phase, save
from sdcli.run.watch import explained, gradient_norms, gradient_shares

QUICK = Settings("test_vit", "digits", limit_train=96, limit_val=30, device="cpu", workers=0)

AVERAGED = """
extends = "quick"
epochs = 2
ema = { decay = 0.9 }
[batch]
size = 24
mixup = 0.4
cutmix = 1.0
[networks.student]
model_args = { drop_path_rate = 0.2 }
"""

TWO_NETWORKS = """
extends = "quick"
epochs = 2
[batch]
size = 24
[networks.student]
exits = 2
[networks.peer]
model = "test_efficientnet"
exits = "none"
[losses.peer]
kind = "cross_entropy"
on = "peer.final"
[losses.learned]
kind = "kl"
on = "final"
target = "peer.final"
temperature = 1.0
[losses.taught]
kind = "kl"
on = "peer.final"
target = "final"
temperature = 1.0
"""


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recipes")
    texts = {"averaged": AVERAGED, "two networks": TWO_NETWORKS}
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)
    return {name: folder / f"{name}.toml" for name in texts}


def load(path: Path, *overrides: str) -> Recipe:
    return load_recipe([str(path)], overrides)


def after(updates: int, number: int = signal.SIGTERM) -> Callable[[], int | None]:
    """Tells to stop at the `updates`-th question."""
    asked = iter(range(1, updates + 1))
    return lambda: None if next(asked, updates) < updates else number


def finish(training: Training) -> list[Any]:
    return list(fit(training))


def outcome(folder: Path) -> tuple[list[dict[str, Any]], dict[str, dict[str, torch.Tensor]], str]:
    """All that a run leaves, times aside."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in log:
        del line["seconds"], line["cpu_seconds"], line["images_per_s"]
    weights = {name: load_file(folder / f"{name}.safetensors") for name in ("last", "best")}
    return log, weights, (folder / "report.json").read_text()


def same(one: Path, other: Path) -> bool:
    first, second = outcome(one), outcome(other)
    return (
        first[0] == second[0]
        and first[2] == second[2]
        and equal(first[1], second[1])
        and equal(*map(state_of, (one, other)))
    )


def state_of(folder: Path) -> dict[str, Any]:
    """Where a run stands, times aside: weights, optimizer, average, all random numbers."""
    return states.load_state(folder / "state" / "last.pt")


def equal(one: Any, other: Any) -> bool:
    """Whether both hold the same, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


# Exactness


@pytest.fixture(scope="module", params=["averaged", "two networks"])
def whole(request: pytest.FixtureRequest, recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that was never stopped, and its recipe."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(prepare(QUICK, load(recipes[request.param]), folder))
    return load(recipes[request.param]), folder


# An epoch has 4 updates and 2 scored batches, each of which asks: in an update, between epochs, while scoring.
@pytest.mark.parametrize("questions", [[1], [4], [5], [7], [2, 3, 1, 2], [1] * 6])
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(
    whole: tuple[Recipe, Path], questions: list[int], tmp_path: Path
) -> None:
    recipe, expected = whole
    folder = tmp_path / "run"
    training = prepare(QUICK, recipe, folder)
    for number in questions:
        last = list(fit(training, after(number)))[-1]
        assert isinstance(last, Stopped) and last.signal == signal.SIGTERM
        # Other work in between leaves other random states.
        torch.manual_seed(99)
        random.seed(99)
        training = resume(folder, *resumed(folder, {}, None, []))
    finish(training)
    assert same(expected, folder)


def test_a_run_with_random_weights_resumes_with_the_same_ones(tmp_path: Path) -> None:
    recipe = load_recipe(["quick"], ["random_weights=true", "epochs=2", "losses.hint=false"])
    finish(prepare(QUICK, recipe, tmp_path / "whole"))
    list(fit(prepare(QUICK, recipe, tmp_path / "parts"), after(3)))
    finish(resume(tmp_path / "parts", *resumed(tmp_path / "parts", {}, None, [])))
    assert same(tmp_path / "whole", tmp_path / "parts")


def killed_at_random(folder: Path, start: list[object], kills: int, seed: int) -> int:
    """Runs a real process, kills it and resumes it, again and again, and lets the last one finish. How many kills met a
    process that ran."""
    hits = 0
    draw = random.Random(seed)
    process = Process(*start, "--output", folder)
    file = folder / "state" / "last.pt"
    for _ in range(kills):
        while process.poll() is None and not file.exists():
            time.sleep(0.02)
        saved = file.stat().st_mtime_ns
        while process.poll() is None and file.stat().st_mtime_ns == saved:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.3)
        process.send_signal(draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        ended = process.wait()
        assert ended in (-signal.SIGKILL, 128 + signal.SIGTERM, 0), process.err
        hits += ended != 0
        process = Process("train", "--resume", folder)
    assert process.wait() == 0, process.err
    return hits


@pytest.mark.parametrize(
    ("kills", "name"),
    [
        (3, "averaged"),
        pytest.param(3, "two networks", marks=pytest.mark.slow),
        pytest.param(20, "averaged", marks=pytest.mark.slow),
        pytest.param(20, "two networks", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_killed_at_random_and_resumed_ends_with_the_same_bits(
    recipes: dict[str, Path], tmp_path: Path, kills: int, name: str
) -> None:
    start = ["train", "test_vit", "--dataset", "digits", "--recipe", recipes[name], "--limit-train", 96,
             "--limit-val", 30, "--device", "cpu", "--workers", 0, "--save-every", 1, "--epochs", 4 * kills]  # fmt: skip
    expected, folder = tmp_path / "whole", tmp_path / "killed"
    assert finished(*start, "--output", expected).wait() == 0
    hits = killed_at_random(folder, start, kills, seed=kills)
    assert hits > kills // 2, "most kills have to meet a run that is under way"
    assert same(expected, folder)


def test_a_longer_run_goes_on_where_a_finished_one_ended(recipes: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finish(prepare(QUICK, load(recipes["averaged"], "epochs=1"), folder))
    settings, recipe = resumed(folder, {}, None, ["epochs=2"])
    events = finish(resume(folder, settings, recipe))
    assert [event.epoch for event in events if isinstance(event, Epoch)] == [2]
    assert [json.loads(line)["epoch"] for line in (folder / "log.jsonl").read_text().splitlines()] == [1, 2]
    again = finish(resume(folder, *resumed(folder, {}, None, [])))
    assert [type(event) for event in again] == [Finished]


def test_what_makes_another_run_is_refused(whole: tuple[Recipe, Path]) -> None:
    recipe, folder = whole

    def refused(given: dict[str, Any], recipe: Recipe | None = None, overrides: list[str] | None = None) -> str:
        with pytest.raises(UserError) as error:
            resumed(folder, given, recipe, overrides or [])
        return str(error.value)

    assert refused({"seed": 7}) == (
        f"the run in '{folder}' was started with seed = 42, not 7\n"
        "  expected: the same value; only these may change: --epochs, --device, --workers, --compile, --grad-accum-steps, "
        "--save-every, --keep-every, --track, --import\n"
        "  fix:      leave --seed out, or start a new run"
    )
    assert refused({"model": "resnet50"}).endswith("  fix:      leave MODEL out, or start a new run")
    assert refused({}, None, ["optimizer.lr=0.5"]).startswith(
        f"the recipe of the run in '{folder}' has optimizer.lr = 0.05, not 0.5\n"
    )
    assert "has networks.student.exits = " in refused({}, load_recipe(["baseline"]))
    assert resumed(folder, {"workers": 3, "seed": 42}, recipe, [])[0].workers == 3


def test_a_run_keeps_the_defaults_that_it_was_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An sdcli with other defaults goes on as the run began, and refuses the recipe that would now mean something else."""
    folder = tmp_path / "run"
    prepare(QUICK, load_recipe(["quick"]), folder)
    written = load_recipe([str(folder / "recipe.toml")]).losses["soft"].options
    kl = LOSSES.find("kl")
    assert written == {**kl.options, "temperature": 1.0}

    monkeypatch.setitem(kl.call.__kwdefaults__, "rescale", False)
    fresh = Entry("kl", kl.call, kl.reads)
    monkeypatch.setitem(LOSSES.entries, "kl", fresh)
    assert fresh.options["rescale"] is False
    assert resumed(folder, {}, None, [])[1].losses["soft"].options == written
    with pytest.raises(UserError, match=r"has losses\.soft\.rescale = True, not False"):
        resumed(folder, {}, load_recipe(["quick"]), [])


def test_other_data_are_refused(whole: tuple[Recipe, Path], tmp_path: Path) -> None:
    _, folder = whole
    copied = tmp_path / "run"
    shutil.copytree(folder, copied)
    state = states.load_state(copied / "state" / "last.pt")
    # As if the folder of the data had lost an image since.
    state["data"]["num_images"] = 95
    states.save_state(copied / "state" / "last.pt", state)
    with pytest.raises(UserError) as error:
        resume(copied, *resumed(copied, {}, None, []))
    assert str(error.value) == (
        "the training data have changed since the run was started: 96 images now, 95 then\n"
        "  expected: the same data\n"
        "  fix:      restore the data, or start a new run"
    )


@pytest.mark.parametrize(("file", "old", "new", "message"), [
    ("recipe.toml", "lr = 0.05", "lr = 0.5", "recipe.toml' has optimizer.lr = 0.5, but the run was started with 0.05"),
    ("run.json", '"seed": 42', '"seed": 43', "run.json' has seed = 43, but the run was started with 42"),
])  # fmt: skip
def test_files_of_a_run_that_were_edited_are_refused(
    whole: tuple[Recipe, Path], tmp_path: Path, file: str, old: str, new: str, message: str
) -> None:
    copied = tmp_path / "run"
    shutil.copytree(whole[1], copied)
    text = (copied / file).read_text()
    assert old in text
    (copied / file).write_text(text.replace(old, new))
    with pytest.raises(UserError) as error:
        resume(copied, *resumed(copied, {}, None, []))
    assert message in str(error.value)


def test_no_file_that_a_run_folder_names_is_run(whole: tuple[Recipe, Path], tmp_path: Path) -> None:
    """Whoever hands over a run folder may have named any file in it."""
    copied, evil = tmp_path / "run", tmp_path / "evil.py"
    shutil.copytree(whole[1], copied)
    evil.write_text(f"from pathlib import Path\nPath({str(tmp_path / 'hacked')!r}).touch()\n")
    settings = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**settings, "imports": [str(evil)]}))
    with pytest.raises(UserError) as error:
        resume(copied, *resumed(copied, {}, None, []))
    assert str(error.value) == (
        f"the run in '{copied}' was started with --import {evil}\n"
        "  expected: the same --import again: for safety, files named in a run folder are not imported automatically\n"
        f"  fix:      if you trust these files: sdcli train --resume {copied} --import {evil}"
    )
    resume(copied, *resumed(copied, {"imports": []}, None, []))
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(("settings", "reason"), [
    ({"imports": [3]}, "imports.0: input should be a valid string"),
    ({"seed": "7"}, "seed: input should be a valid integer"),
    ({"model": None}, "model: input should be a valid string"),
    ([], "model: field required"),
    (3, "it does not hold a table"),
])  # fmt: skip
def test_settings_of_other_types_are_named(
    whole: tuple[Recipe, Path], tmp_path: Path, settings: Any, reason: str
) -> None:
    shutil.copytree(whole[1], copied := tmp_path / "run")
    own = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**own, **settings} if isinstance(settings, dict) else settings))
    with pytest.raises(UserError) as error:
        resumed(copied, {}, None, [])
    assert error.value.wrong == f"'{copied / 'run.json'}' is damaged: {reason}"


@pytest.mark.parametrize("file", ["run.json", "log.jsonl"])
def test_a_damaged_file_of_a_run_is_named(whole: tuple[Recipe, Path], tmp_path: Path, file: str) -> None:
    copied = tmp_path / "run"
    shutil.copytree(whole[1], copied)
    (copied / file).write_text('{"epoch": 1, "lo')
    with pytest.raises(UserError, match=f"{file}' is damaged"):
        finish(resume(copied, *resumed(copied, {}, None, [])))


def test_fewer_epochs_than_are_done_are_refused(whole: tuple[Recipe, Path]) -> None:
    with pytest.raises(UserError) as error:
        resume(whole[1], *resumed(whole[1], {}, None, ["epochs=1"]))
    assert str(error.value).startswith(
        f"epochs = 1, but the run in '{whole[1]}' has already started epoch 2\n  expected: 2 or more"
    )


def test_a_fresh_phase_that_begins_from_a_file_wants_it_before_it_goes_on(tmp_path: Path) -> None:
    short = ["epochs=1", "batch.size=24"]
    finish(prepare(QUICK, load_recipe(["baseline"], short), tmp_path / "first"))
    weights = tmp_path / "first" / "last.safetensors"
    recipe = load_recipe(["born-again"], [*short, f'networks.student.weights="{weights}"'])
    assert isinstance(list(fit(prepare(QUICK, recipe, tmp_path / "run"), after(2)))[-1], Stopped)
    moved = weights.rename(tmp_path / "moved.safetensors")
    with pytest.raises(UserError, match="a later phase starts from it"):
        resume(tmp_path / "run", *resumed(tmp_path / "run", {}, None, []))
    moved.rename(weights)
    finish(resume(tmp_path / "run", *resumed(tmp_path / "run", {}, None, [])))


PHASES = """
extends = "averaged.toml"
batch = { mixup = 0.0, cutmix = 0.0 }
epochs = 1
phases = [{ name = "first" }, { name = "further" }, { name = "anew", fresh = true }]
"""


def test_an_average_goes_on_in_the_next_phase_and_begins_anew_with_a_fresh_one(recipes: dict[str, Path]) -> None:
    file = recipes["averaged"].with_name("phases.toml")
    file.write_text(PHASES)
    training = prepare(QUICK, load(file, "ema.warmup=false", "ema.decay=0.999"), file.parent / "phases")
    averaged: list[int] = []
    update = training.ema.update

    def noted(network: Any, step: int) -> None:
        averaged.append(step)
        update(network, step=step)

    training.ema.update = noted
    finish(training)
    assert averaged == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4]
    # And a run that was stopped in the second phase ends alike.
    assert isinstance(
        list(fit(prepare(QUICK, load(file, "ema.warmup=false", "ema.decay=0.999"), file.parent / "parts"), after(8)))[
            -1
        ],
        Stopped,
    )
    finish(resume(file.parent / "parts", *resumed(file.parent / "parts", {}, None, [])))
    assert same(file.parent / "phases", file.parent / "parts")


def test_a_run_in_parts_of_updates_ends_with_the_same_bits_when_it_was_stopped(
    recipes: dict[str, Path], tmp_path: Path
) -> None:
    settings = replace(QUICK, grad_accum_steps=3)
    finish(prepare(settings, load(recipes["averaged"]), tmp_path / "whole"))
    assert isinstance(list(fit(prepare(settings, load(recipes["averaged"]), tmp_path / "run"), after(3)))[-1], Stopped)
    finish(resume(tmp_path / "run", *resumed(tmp_path / "run", {}, None, [])))
    assert same(tmp_path / "whole", tmp_path / "run")


def test_a_run_is_not_resumed_with_other_images_in_an_epoch(tmp_path: Path) -> None:
    """62 images: batches of 20 use all of them, in two parts each the last two are left out."""
    settings = replace(QUICK, limit_train=62)
    recipe = load_recipe(["quick"], ["batch.size=20", "epochs=2"])
    assert isinstance(list(fit(prepare(settings, recipe, tmp_path / "run"), after(1)))[-1], Stopped)
    with pytest.raises(UserError) as error:
        resume(tmp_path / "run", *resumed(tmp_path / "run", {"grad_accum_steps": 2}, None, []))
    assert error.value.wrong == ("--grad-accum-steps 2 with 1 process: an epoch has 60 images, not 62 as until now")
    finish(resume(tmp_path / "run", *resumed(tmp_path / "run", {}, None, [])))


def test_a_run_that_was_stopped_counts_the_time_of_all_its_parts(tmp_path: Path) -> None:
    recipe = load_recipe(["quick"], ["batch.size=16", "epochs=1"])
    assert isinstance(list(fit(prepare(QUICK, recipe, tmp_path / "run"), after(5)))[-1], Stopped)
    before = states.load_state(tmp_path / "run" / "state" / "last.pt")["position"]
    assert before["seconds"] > 0 and before["cpu_seconds"] > 0
    finish(resume(tmp_path / "run", *resumed(tmp_path / "run", {}, None, [])))
    (line,) = read_log(tmp_path / "run")
    assert line["seconds"] > before["seconds"] and line["cpu_seconds"] > before["cpu_seconds"]
    assert line["images_per_s"] * line["seconds"] == pytest.approx(96, rel=0.01)


def test_options_without_effect_are_named(tmp_path: Path) -> None:
    recipe = load_recipe(["quick"], ["batch.size=32", "epochs=1"])
    settings = replace(QUICK, keep_every=2, save_every=3, val_fraction=0.0)
    assert [note for note in prepare(settings, recipe, tmp_path / "run").notes if "no effect" in note] == [
        "--keep-every 2 has no effect: the run has 1 epoch",
        "--save-every 3 has no effect: the state is saved after every epoch, of 3 updates",
        "--limit-val has no effect: no images are held out of training",
    ]
    whole = replace(QUICK, keep_every=1, save_every=2)
    assert not [note for note in prepare(whole, recipe, tmp_path / "other").notes if "no effect" in note]


def test_a_finished_run_that_goes_on_has_no_report_until_it_ends(tmp_path: Path) -> None:
    recipe = load_recipe(["quick"], ["batch.size=32", "epochs=1"])
    finish(prepare(QUICK, recipe, tmp_path / "run"))
    report = tmp_path / "run" / "report.json"
    assert report.is_file()
    resume(tmp_path / "run", *resumed(tmp_path / "run", {}, None, [])).run.unlock()
    assert report.is_file(), "there was nothing to train"
    training = resume(tmp_path / "run", *resumed(tmp_path / "run", {}, None, ["epochs=2"]))
    assert not report.exists()
    finish(training)
    assert json.loads(report.read_text())["epoch"] in (1, 2)


def test_steps_of_a_short_run_are_one_update_long_at_least(tmp_path: Path) -> None:
    recipe = load_recipe(["quick"], ["batch.size=32", "epochs=1", "schedule.sched=step", "schedule.warmup_epochs=0"])
    assert recipe.schedule.decay_epochs < 0.5, "less than half of the three updates"
    assert isinstance(finish(prepare(QUICK, recipe, tmp_path / "run"))[-1], Finished)


def test_a_run_goes_on_from_another_folder_and_without_the_weights_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for number in range(8):
            pixels = np.random.RandomState(number).randint(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "train" / name / f"{number}.png")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = replace(QUICK, dataset="./data", val_fraction=0.25, limit_train=None, limit_val=None)
    short = ["epochs=2", "batch.size=4"]
    finish(prepare(settings, load_recipe(["quick"], short), tmp_path / "first"))
    weights = tmp_path / "first" / "last.safetensors"
    begun = load_recipe(["quick"], [*short, f'networks.student.weights="{weights}"'])
    assert isinstance(list(fit(prepare(settings, begun, tmp_path / "run"), after(3)))[-1], Stopped)
    weights.unlink()
    monkeypatch.chdir(tmp_path / "elsewhere")
    finish(resume(tmp_path / "run", *resumed(tmp_path / "run", {}, None, [])))
    shipped = (tmp_path / "run" / "last.safetensors").read_bytes()
    assert str(tmp_path).encode() not in shipped, "paths stay on their machine"
    monkeypatch.chdir(tmp_path)
    assert resumed(tmp_path / "run", {"dataset": "data"}, None, [])[0].dataset == str(tmp_path / "data")


# Weights from a file


@pytest.fixture(scope="module")
def timms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in timm's own format."""
    file = tmp_path_factory.mktemp("weights") / "test_resnet.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), file)
    return file


def starting_from(file: Path, run: Path, **settings: Any) -> Training:
    recipe = load_recipe(["quick"], ["batch.size=24", "epochs=2", f'networks.student.weights="{file}"'])
    return prepare(replace(QUICK, model="test_resnet", limit_train=48, **settings), recipe, run)


def test_a_file_in_timms_format_brings_the_preprocessing_of_the_pretrained_model(timms: Path, tmp_path: Path) -> None:
    training = starting_from(timms, tmp_path / "run")
    found, wanted = training.description.blueprint.preprocess, timm.get_pretrained_cfg("test_resnet")
    assert (found.input_size, found.mean, found.std) == (wanted.input_size, wanted.mean, wanted.std)
    assert found.size == (160, 160) and found.crop_pct == wanted.crop_pct
    note = "input size 160x160, mean (0.5, 0.5, 0.5) and standard deviation (0.5, 0.5, 0.5) are those of the weights"
    assert f"{note}; --image-size sets another size" in training.notes


def test_the_image_size_may_differ_from_that_of_the_weights(timms: Path, tmp_path: Path) -> None:
    training = starting_from(timms, tmp_path / "run", image_size=32)
    found = training.description.blueprint.preprocess
    assert (found.size, found.mean) == ((32, 32), (0.5, 0.5, 0.5))
    assert any(note.endswith("the input size 32x32 is that of --image-size") for note in training.notes)
    # A stem for small images keeps the kernels of the weights.
    assert training.description.blueprint.architecture.stem in ("imagenet", "unstrided")
    assert not any("conv1" in note and "fresh" in note for note in training.notes)


def test_a_checkpoint_brings_its_own_preprocessing_also_when_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(
        replace(QUICK, model="test_resnet", limit_train=48, image_size=48),
        load_recipe(["quick"], ["epochs=1", "batch.size=24"]),
        tmp_path / "first",
    )
    colours = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    blueprint = first.description.blueprint
    blueprint = replace(blueprint, preprocess=replace(blueprint.preprocess, **colours))
    weights = tmp_path / "w.safetensors"
    save_checkpoint(weights, first.network.state_dict(), replace(first.description, blueprint=blueprint))
    planned: list[Any] = []
    check = prepares.check_with_model
    monkeypatch.setattr(
        prepares, "check_with_model", lambda *a, **k: planned.append(check(*a, **k).student.plan.input_size)
    )
    training = starting_from(weights, tmp_path / "run")
    assert planned == [(3, 48, 48)], "the recipe is checked with the size of the weights, once"
    assert training.description.blueprint.preprocess == blueprint.preprocess
    list(fit(training, after(2)))
    weights.unlink()
    again = resume(tmp_path / "run", *resumed(tmp_path / "run", {}, None, []))
    assert again.description.blueprint == training.description.blueprint
    assert planned == [(3, 48, 48)] * 2


def test_a_run_that_died_before_its_first_state_leaves_its_folder_free(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    training = prepare(QUICK, load_recipe(["quick"]), folder)
    training.run.state.unlink()
    assert {path.name for path in folder.iterdir()} == {"recipe.toml", "run.json", "state"}
    prepare(QUICK, load_recipe(["quick"]), folder)
    with pytest.raises(UserError, match="already holds a run"):
        prepare(QUICK, load_recipe(["quick"]), folder)
    # A recipe of the user's own is no such thing.
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "recipe.toml").write_text('extends = "quick"')
    with pytest.raises(UserError, match="already holds a run"):
        prepare(QUICK, load_recipe(["quick"]), mine)


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        resumed(tmp_path, {}, None, [])
    assert error.value.wrong == f"'{tmp_path}' holds no run to resume"


def test_the_state_runs_no_code_of_its_own(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("touch hacked",)

    states.save_state(tmp_path / "last.pt", {"evil": Evil()})
    with pytest.raises(UserError, match=r"state cannot be used: .*Weights only load failed"):
        states.load_state(tmp_path / "last.pt")
    assert not Path("hacked").exists()


MEMORY = """
import re, sys
from pathlib import Path
import torch
from sdcli.devices import keep_freed_memory
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
keep_freed_memory(torch.device(sys.argv[1]))
block = torch.ones(64 * 2**20)
before = resident()
del block
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to")
@pytest.mark.parametrize(("device", "environment", "kept"), [
    ("cpu", {}, True), ("cuda", {}, False), ("cpu", {"MALLOC_MMAP_THRESHOLD_": "131072"}, False),
])  # fmt: skip
def test_freed_memory_is_kept_for_the_next_step(device: str, environment: dict[str, str], kept: bool) -> None:
    call = [sys.executable, "-c", MEMORY, device]
    given_back = int(subprocess.check_output(call, env=os.environ | environment, text=True))
    assert given_back < 10 if kept else given_back > 200


HUGE = """
import re, sys
from pathlib import Path
import torch
from sdcli.devices import keep_freed_memory
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
small, before = torch.ones(2**14), resident()
keep_freed_memory(torch.device("cpu"))
print(resident() - before)
block = torch.ones(2**26)
parts = re.split(r"^(?=\\w+-\\w+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
for tensor in (small, block):
    for part in parts:
        found = re.match(r"(\\w+)-(\\w+) .*\\[heap\\]", part)
        if found and int(found[1], 16) <= tensor.data_ptr() < int(found[2], 16):
            print("hg" in re.search("VmFlags:(.*)", part)[1].split())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="only Linux has huge pages, and only glibc can be told to keep memory",
)
def test_what_is_kept_lies_in_huge_pages_where_linux_has_them() -> None:
    """Also what the heap held before. What is reserved is not used."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    lines = subprocess.check_output([sys.executable, "-c", HUGE], env=clean, text=True).split()
    assert int(lines[0]) < 100
    assert lines[1:] == ["True", "True"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_no_memory_is_reserved_where_a_process_may_have_only_so_much() -> None:
    """The reserve would fit, and take what libraries and threads need."""
    script = """
import re, resource
from pathlib import Path
import torch
from sdcli.devices import keep_freed_memory
resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))
def addresses():
    return int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
before = addresses()
keep_freed_memory(torch.device("cpu"))
print(addresses() - before)
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    assert int(subprocess.check_output([sys.executable, "-c", script], env=clean, text=True)) < 100


# Shared out


SHARED = ("test_vit", "--dataset", "digits", "--recipe", "quick", "--limit-val", 60, "--device", "cpu", "--batch-size", 24,
          "--lr", 0.02, "--workers", 0)  # fmt: skip


def test_two_processes_and_parts_train_as_one_process_does(tmp_path: Path) -> None:
    """Twenty updates of a network without batch statistics; scores are of the same weights, up to rounding."""
    settings = replace(QUICK, limit_train=480, limit_val=60)
    recipe = load_recipe(["quick"], ["epochs=1", "batch.size=24", "optimizer.lr=0.02"])
    finish(prepare(settings, recipe, tmp_path / "one"))
    finish(prepare(replace(settings, grad_accum_steps=3), recipe, tmp_path / "parts"))
    two = together(2, "train", *SHARED, "--epochs", 1, "--limit-train", 480, "--output", tmp_path / "two")
    assert [process.wait() for process in two] == [0, 0], two[0].err
    assert "2 processes: each sees 12 of the 24 images of a batch" in two[0].err
    assert "deprecated" not in two[0].err + two[1].err
    one = json.loads((tmp_path / "one" / "log.jsonl").read_text())
    for name in ("two", "parts"):
        other = json.loads((tmp_path / name / "log.jsonl").read_text())
        assert other["num_images"] == one["num_images"] == 480
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-5), name
        for ours, theirs in zip(one["validation"]["exits"], other["validation"]["exits"], strict=True):
            assert theirs["nll"] == pytest.approx(ours["nll"], rel=1e-5)
            assert theirs["top1"] == ours["top1"]
        assert other["validation"]["num_images"] == 60


TOGETHER = """
extends = "bake"
ema = { decay = 0.9 }
[batch]
size = 32
[networks.student]
exits = 3
[signals.past]
kind = "memory"
of = "final"
[signals.mix]
kind = "gated"
of = "all"
[losses.task]
on = ["all", "mix"]
[losses.past]
kind = "kl"
on = "exits"
target = "past"
weight = { share = 0.5, of = "task" }
[[phases]]
name = "first"
epochs = 1
losses = ["task", "soft", "past"]
[[phases]]
name = "second"
epochs = 1
losses = ["task"]
"""


def test_two_processes_score_what_they_save_whatever_the_recipe(tmp_path: Path) -> None:
    """Batch norms see other images in each, what is remembered of images is told to all, and phases come and go."""
    recipe = tmp_path / "together.toml"
    recipe.write_text(TOGETHER)
    two = together(2, "train", "test_resnet", "--dataset", "digits", "--recipe", recipe, "--limit-train", 256,
                   "--val-fraction", 0, "--device", "cpu", "--workers", 0, "--output", tmp_path / "run")  # fmt: skip
    assert [process.wait() for process in two] == [0, 0], two[0].err
    told = "signals.neighbours compares images with each other: 16 at a time, not all 32 of a batch"
    assert told in two[0].err
    logged = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["weights"]
    assert load_recipe([str(tmp_path / "run" / "found.toml")]).losses["past"].weight == logged["past"] > 0
    state = states.load_state(tmp_path / "run" / "state" / "last.pt")
    assert state["learner"]["derived.past.make.seen"].sum() > 128, "each process has seen 128"
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    alone = score_checkpoint(tmp_path / "run" / "last.safetensors", device="cpu").to_dict()
    for ours, theirs in zip(report["exits"], alone["exits"], strict=True):
        assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-5)
        assert ours["top1"] == theirs["top1"]


def test_two_processes_that_were_stopped_end_with_the_same_bits(tmp_path: Path) -> None:
    """Also where batch norms, which see other images in each, are read as they are: by the average that teaches."""
    start = ["train", "test_resnet", "--dataset", "digits", "--recipe", "ema-teacher", "--batch-size", 24, "--limit-train",
             480, "--limit-val", 30, "--epochs", 2, "--lr", 0.05, "--device", "cpu", "--workers", 0,
             "--save-every", 3]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert [process.wait() for process in together(2, *start, "--output", whole)] == [0, 0]
    two = together(2, *start, "--output", parts)
    # In the middle of the second epoch.
    file = parts / "state" / "last.pt"
    while two[0].poll() is None and not (
        file.exists()
        and states.load_state(file)["position"]["epoch"] == 2
        and states.load_state(file)["position"]["update"] > 0
    ):
        time.sleep(0.05)
    for process in two:
        process.send_signal(signal.SIGKILL)
    assert {process.wait() for process in two} == {-signal.SIGKILL}, two[0].err
    assert states.load_state(file)["position"]["update"] > 0
    two = together(2, "train", "--resume", parts)
    assert [process.wait() for process in two] == [0, 0], two[0].err
    assert equal(*(load_file(folder / "last.safetensors") for folder in (whole, parts)))


def test_when_a_process_dies_the_others_end_and_the_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "sdcli", "train"]
    options = [*SHARED, "--epochs", 50, "--limit-train", 96, "--output", folder]
    two = subprocess.Popen([*torchrun, *map(str, options)], stderr=subprocess.PIPE, text=True)
    log = folder / "log.jsonl"
    while two.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 1):
        time.sleep(0.05)
    psutil.Process(two.pid).children()[-1].kill()
    two.communicate(timeout=120)
    assert two.returncode != 0
    settings, recipe = resumed(folder, {}, None, [])
    training = resume(folder, settings, recipe)
    assert training.position.epoch >= 2
    assert "2 processes before, 1 now: the run continues with different random numbers" in training.notes


# What a run may meet


@pytest.fixture
def training(recipes: dict[str, Path], tmp_path: Path) -> Training:
    return prepare(QUICK, load(recipes["averaged"]), tmp_path / "run")


def test_precision_compilation_and_checkpointing_change_little(recipes: dict[str, Path], tmp_path: Path) -> None:
    def losses(**options: Any) -> list[float]:
        AcceleratorState._reset_state(reset_partial_state=True)  # it holds one precision per process
        name = "-".join(options) or "plain"
        settings = replace(QUICK, limit_train=48, **options)
        training = prepare(settings, load_recipe(["quick"], ["batch.size=24"]), tmp_path / name)
        epoch = list(train_epoch(training))[-1]
        assert isinstance(epoch, Epoch)
        return list(epoch.losses.values())

    plain = losses()
    assert losses(grad_checkpointing=True) == pytest.approx(plain, rel=1e-5)
    assert losses(memory_format="channels-last") == pytest.approx(plain, rel=1e-4)
    assert losses(precision="bf16") == pytest.approx(plain, rel=0.05)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("model", "device", "wanted"),
    [
        ("test_resnet", "cpu", "channels-last"),
        ("test_efficientnet", "cpu", "channels-last"),
        ("test_vit", "cpu", "contiguous"),
        ("vgg11", "cpu", "contiguous"),
        ("test_resnet", "cuda", "contiguous"),
    ],
)
def test_the_memory_format_follows_network_and_device(model: str, device: str, wanted: str) -> None:
    network = build_exits(Blueprint.draft(Network(), model, image_size=64), device="meta")
    assert suitable_format([network], torch.device(device)) == wanted


def test_maps_and_tokens_together_are_contiguous() -> None:
    networks = [build_exits(Blueprint.draft(Network(), m), device="meta") for m in ("test_resnet", "test_vit")]
    assert suitable_format(networks, torch.device("cpu")) == "contiguous"


def test_a_run_stores_its_memory_format_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(QUICK, model="test_resnet", limit_train=48)
    training = prepare(settings, load_recipe(["quick"], ["epochs=2", "batch.size=24"]), tmp_path / "run")
    assert "memory format: channels-last, faster on a CPU" in training.notes
    assert json.loads((tmp_path / "run" / "run.json").read_text())["memory_format"] == "channels-last"
    convolution = next(m for m in training.learner.student.modules() if isinstance(m, torch.nn.Conv2d))
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    training.loader.set_epoch(1)
    (batch,) = next_update(training, iter(training.loader))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    # A later rule does not change a run.
    monkeypatch.setattr(prepares, "suitable_format", lambda *_: "contiguous")
    again, recipe = resumed(tmp_path / "run", {"memory_format": "auto"}, None, [])
    assert again.memory_format == "channels-last" and resume(tmp_path / "run", again, recipe).settings == again
    with pytest.raises(UserError) as error:
        resumed(tmp_path / "run", {"memory_format": "contiguous"}, None, [])
    assert error.value.wrong.endswith("was started with memory_format = 'channels-last', not 'contiguous'")


def test_a_convolutional_run_that_is_stopped_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    settings = replace(QUICK, model="test_resnet", limit_train=48)
    recipe = load_recipe(["quick"], ["epochs=2", "batch.size=24"])
    finish(prepare(settings, recipe, tmp_path / "whole"))
    assert isinstance(list(fit(prepare(settings, recipe, tmp_path / "run"), after(3)))[-1], Stopped)
    finish(resume(tmp_path / "run", *resumed(tmp_path / "run", {}, None, [])))
    assert same(tmp_path / "whole", tmp_path / "run")


# Torch's default backend needs a compiler for C++ on the machine; graph breaks are the same without it.
@pytest.mark.parametrize(
    ("model", "backend"),
    [
        ("test_resnet", "aot_eager"),
        pytest.param("test_vit", "aot_eager", marks=pytest.mark.slow),
        pytest.param("resnet18", "inductor", marks=pytest.mark.slow),
        pytest.param("vit_tiny_patch16_224", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_without_a_graph_break_the_losses_are_the_same(model: str, backend: str, tmp_path: Path) -> None:
    settings = replace(QUICK, model=model, image_size=32, limit_train=32)
    training = prepare(settings, load_recipe(["quick"], ["batch.size=16"]), tmp_path / "run")
    training.loader.set_epoch(1)
    batch = next(iter(training.loader))
    training.module.train()
    # Of each network a copy: batch norms remember what they saw.
    eager = copy.deepcopy(training.learner)(batch)
    torch._dynamo.reset()
    training.learner.compile(backend=backend, fullgraph=True)
    total, parts = training.learner(batch)
    total.backward()
    assert total.item() == pytest.approx(eager[0].item(), rel=1e-4)
    for name, part in parts.items():
        assert part.item() == pytest.approx(eager[1][name].item(), rel=1e-4, abs=1e-6), name
    assert all(p.grad is not None for p in training.learner.parameters() if p.requires_grad)


def test_the_average_is_what_is_scored_and_saved(training: Training) -> None:
    events = finish(training)
    saved = load_file(training.run.folder / "last.safetensors")
    averaged, student = training.ema.module.state_dict(), training.learner.student.state_dict()
    assert all(torch.equal(saved[name], averaged[name]) for name in averaged)
    assert not torch.equal(averaged["backbone.blocks.0.attn.qkv.weight"], student["backbone.blocks.0.attn.qkv.weight"])
    assert isinstance(events[-1], Finished)


def test_shares_of_the_gradient_add_up_and_leave_no_trace(training: Training) -> None:
    training.loader.set_epoch(1)
    batch = next(iter(training.loader))
    before = {name: tensor.clone() for name, tensor in training.learner.state_dict().items()}
    generator = torch.get_rng_state()
    shares = gradient_shares(gradient_norms(training, batch))
    assert list(shares) == ["task", "exits", "soft", "hint"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.learner.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in training.learner.parameters())


def test_shares_of_the_gradient_have_the_weights_of_their_own_update(recipes: dict[str, Path], tmp_path: Path) -> None:
    """The hint begins with the second epoch: its first update is measured with it, after a resume too."""
    recipe = load(recipes["averaged"], "losses.hint.weight={ value = 1.0, start = 1.0 }")

    def measured(events: list[Any]) -> list[dict[str, float]]:
        return [event.shares for event in events if isinstance(event, Step) and event.shares]

    first, second = measured(finish(prepare(QUICK, recipe, tmp_path / "whole")))
    assert first["hint"] == 0 < second["hint"]
    list(fit(prepare(QUICK, recipe, tmp_path / "run"), after(4)))
    assert measured(finish(resume(tmp_path / "run", *resumed(tmp_path / "run", {}, None, [])))) == [second]


def poisoned(training: Training, at: int) -> None:
    """Makes the hint infinite at one update."""
    objective = training.learner.objective
    forward, calls = objective._parts, iter(range(1, 1000))

    def parts(*given: Any) -> Any:
        found = forward(*given)
        return {**found, "hint": found["hint"] * float("inf")} if next(calls) == at else found

    objective._parts = parts


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_state(training: Training) -> None:
    # The first call measures the gradient's shares, so the fourth is the third update's.
    poisoned(training, at=4)
    before = training.run.state.read_bytes()
    with pytest.raises(UserError) as error:
        finish(training)
    assert error.value.wrong.startswith("losses.hint was not finite in epoch 1, update 3, at learning rate 0.0")
    assert training.run.state.read_bytes() == before


def test_an_update_that_is_not_finite_is_left_out_where_the_recipe_says_so(
    recipes: dict[str, Path], tmp_path: Path
) -> None:
    recipe = load(recipes["averaged"], 'optimizer.nonfinite="skip"')
    training = prepare(QUICK, recipe, tmp_path / "run")
    poisoned(training, at=4)
    events = finish(training)
    assert isinstance(events[-1], Finished)
    assert all(tensor.isfinite().all() for tensor in training.learner.state_dict().values())
    assert [event.skipped for event in events if isinstance(event, Epoch)] == [1, 0]
    first, second = (line["losses"]["task"] for line in outcome(tmp_path / "run")[0])
    # What was left out counts for nothing in the mean either.
    assert first == pytest.approx(second, rel=0.1)


def test_a_run_gives_up_where_every_update_is_left_out(tmp_path: Path) -> None:
    recipe = load_recipe(["quick"], ["batch.size=24", "epochs=2", "optimizer.lr=1e30", 'optimizer.nonfinite="skip"'])
    training = prepare(QUICK, recipe, tmp_path / "run")
    with pytest.raises(UserError) as error:
        finish(training)
    assert "were skipped: losses.task" in str(error.value) or "NLL" in str(error.value)
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_weights_that_the_last_update_has_ruined_are_not_saved(tmp_path: Path) -> None:
    # One update per epoch: its loss is finite, what it makes of the weights says nothing.
    recipe = load_recipe(["quick"], ["batch.size=96", "epochs=2", "optimizer.lr=1e30"])
    training = prepare(QUICK, recipe, tmp_path / "run")
    with pytest.raises(UserError, match="the checkpoints saved before are intact"):
        finish(training)
    state = states.load_state(tmp_path / "run" / "state" / "last.pt")
    assert (state["position"]["epoch"], state["position"]["update"]) == (1, 0)
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_an_update_that_is_left_out_leaves_no_trace_in_batch_norms(tmp_path: Path) -> None:
    recipe = load_recipe(["quick"], ["batch.size=24", 'optimizer.nonfinite="skip"'])
    training = prepare(replace(QUICK, model="test_resnet"), recipe, tmp_path / "run")
    training.loader.set_epoch(1)
    batches = next_update(training, iter(training.loader))
    batches[0].images[0, 0, 0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in training.learner.state_dict().items()}
    training.module.train()
    assert not train_step(training, batches)[0].isfinite().all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.learner.state_dict().items())


def all_tensors(training: Training) -> dict[str, Any]:
    """Copies of all that an update may change."""
    return copy.deepcopy({
        "learner": training.learner.state_dict(),
        "optimizer": training.optimizers["student"].state_dict()["state"],
        "ema": training.ema.module.state_dict(),
    })  # fmt: skip


def infinite_gradient(training: Training, at: int) -> None:
    """Makes one gradient of one backward pass infinite; all losses stay finite."""
    calls = iter(range(1, 1000))
    weight = training.learner.student.get_parameter("backbone.blocks.0.mlp.fc1.weight")
    weight.register_hook(lambda gradient: gradient * float("inf") if next(calls) == at else gradient)


@pytest.mark.parametrize("clip_grad", [[], ["optimizer.clip_grad=1.0"]])
def test_an_update_with_an_infinite_gradient_is_skipped_where_the_recipe_asks_for_it(
    recipes: dict[str, Path], clip_grad: list[str], tmp_path: Path
) -> None:
    recipe = load(recipes["averaged"], 'optimizer.nonfinite="skip"', *clip_grad)
    training = prepare(QUICK, recipe, tmp_path / "run")
    infinite_gradient(training, at=2)
    training.module.train()
    batches, tensors = [], []
    training.loader.set_epoch(1)
    loaded = iter(training.loader)
    for _ in range(3):
        batches.append(next_update(training, loaded))
        losses, norm = train_step(training, batches[-1])
        assert losses.isfinite().all() and bool(norm.isfinite()) == (len(batches) != 2)
        tensors.append(all_tensors(training))
        training.position.update += 1
    assert equal(tensors[0], tensors[1])
    assert not equal(tensors[1]["learner"], tensors[2]["learner"])
    assert (training.position.skipped, training.position.skipped_images, training.position.in_a_row) == (1, 24, 0)
    assert all(tensor.isfinite().all() for tensor in tensors[2]["learner"].values())


@pytest.mark.parametrize("clip_grad", [[], ["optimizer.clip_grad=1.0"]])
def test_an_infinite_gradient_stops_the_run_and_keeps_the_state(
    recipes: dict[str, Path], clip_grad: list[str], tmp_path: Path
) -> None:
    training = prepare(QUICK, load(recipes["averaged"], *clip_grad), tmp_path / "run")
    # The first update measures the gradients of four losses before its own.
    infinite_gradient(training, at=4 + 3)
    before = training.run.state.read_bytes()
    with pytest.raises(UserError) as error:
        finish(training)
    rate = training.schedules["student"]._get_lr(2)[0]
    assert str(error.value) == (
        "the gradient of losses.task, losses.exits, losses.soft, losses.hint was not finite in epoch 1, update 3, "
        f"at learning rate {rate:g}, but all losses were\n"
        "  expected: a finite gradient\n"
        "  fix:      a lower --lr, or losses whose gradient is always finite; "
        'optimizer.nonfinite = "skip" skips such updates'
    )
    assert training.run.state.read_bytes() == before


def test_a_run_that_skips_every_update_names_the_loss_to_blame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root of 0 is finite, its gradient is not."""

    def root(student: torch.Tensor, batch: Any) -> torch.Tensor:
        return (0 * student).abs().sqrt().mean(dim=1)

    monkeypatch.setitem(LOSSES.entries, "root", Entry("root", root, reads="logits"))
    file = tmp_path / "root.toml"
    file.write_text('extends = "quick"\n[losses.root]\nkind = "root"\non = "final"\n[optimizer]\nnonfinite = "skip"\n')
    with pytest.raises(UserError) as error:
        finish(prepare(QUICK, load(file, "batch.size=48"), tmp_path / "run"))
    assert str(error.value) == (
        "2 updates in a row were skipped: losses.root or its gradient was not finite\n"
        "  expected: finite losses and gradients; a run ends after 100 skipped updates in a row or a whole skipped epoch\n"
        "  fix:      a lower --lr or a smaller weight for that loss, in a new run"
    )


@pytest.mark.parametrize(("nonfinite", "skipped"), [("stop", 0), ("skip", 1)])
def test_an_overflow_that_a_gradient_scaler_handles_is_no_error(
    recipes: dict[str, Path], nonfinite: str, skipped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with fp16 on a GPU: the scale falls, the weights stay; with "skip" everything else does too."""
    recipe = load(recipes["averaged"], f'optimizer.nonfinite="{nonfinite}"', "optimizer.clip_grad=1.0", "epochs=1")
    training = prepare(QUICK, recipe, tmp_path / "run")
    scaler = training.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monkeypatch.setattr(training.accelerator, "native_amp", True)
    monkeypatch.setattr(type(training.accelerator), "mixed_precision", "fp16")
    monkeypatch.setattr(training.accelerator, "autocast", nullcontext)
    enter_phase(training, 0)
    # The first update measures the gradients of four losses before its own.
    infinite_gradient(training, at=4 + 3)
    tensors = []

    def noted(training: Training, batches: Any) -> Any:
        result = train_step(training, batches)
        tensors.append(all_tensors(training))
        return result

    monkeypatch.setattr("sdcli.run.train.train_step", noted)
    epoch = list(train_epoch(training))[-1]
    assert isinstance(epoch, Epoch) and epoch.skipped == skipped
    assert scaler.get_scale() == 512.0
    assert equal(tensors[1]["optimizer"], tensors[2]["optimizer"])
    assert equal(tensors[1], tensors[2]) == bool(skipped)
    assert not equal(tensors[2], tensors[3])


def test_a_full_disk_keeps_the_state(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    save(training)
    before = training.run.state.read_bytes()

    def full(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError) as error:
        save(training)
    assert str(error.value) == (
        f"the run's state cannot be written to '{training.run.state}': no space left on the disk; "
        "the previous state is intact\n"
        "  expected: free space for the run folder\n"
        f"  fix:      free some space and resume: sdcli train --resume {training.run.folder}"
    )
    assert training.run.state.read_bytes() == before
    assert {file.name for file in training.run.state.parent.iterdir()} == {"last.pt", "previous.pt", "lock"}


def test_too_little_memory_says_what_to_lower(training: Training) -> None:
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.25 GiB is free."
    )
    told = explained(error, training)
    assert told is not None and str(told) == (
        "out of memory on cpu with 24 images at a time: failed to allocate 2.50 GiB (1.25 GiB free)\n"
        "  expected: a network and a batch that fit\n"
        "  fix:      --grad-accum-steps 2 (same batch, smaller micro-batches); in a new run --precision bf16, "
        "--grad-checkpointing or a smaller --batch-size"
    )
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3145728 bytes.")
    told = explained(error, training)
    assert told is not None and told.wrong == "out of memory on cpu with 24 images at a time: failed to allocate 3 MiB"
    assert explained(ValueError("a bug"), training) is None


def test_too_little_memory_is_explained_before_and_after_a_run_too(
    monkeypatch: pytest.MonkeyPatch, training: Training
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    monkeypatch.setattr("sdcli.run.prepare.enter_phase", full)
    with pytest.raises(UserError) as error:
        prepare(QUICK, load_recipe(["quick"]), training.run.folder.parent / "other")
    assert str(error.value) == (
        "out of memory on cpu before the first batch: failed to allocate 2.50 GiB\n"
        "  expected: networks that fit\n"
        "  fix:      a smaller model, another --device"
    )
    assert not (training.run.folder.parent / "other").exists()

    list(fit(training))
    monkeypatch.setattr("sdcli.evaluation.scoring.answer", full)
    with pytest.raises(UserError) as error:
        score_checkpoint(training.run.folder / "last.safetensors", device="cpu", batch_size=32)
    assert str(error.value) == (
        "out of memory on cpu with 32 images at a time: failed to allocate 2.50 GiB\n"
        "  expected: a network and a batch that fit\n"
        "  fix:      --batch-size 16"
    )


def test_a_batch_norm_that_sees_one_image_is_explained(tmp_path: Path) -> None:
    # The digits' last map is a single place.
    one = replace(QUICK, model="test_resnet", limit_train=4)
    with pytest.raises(UserError) as error:
        finish(prepare(one, load_recipe(["quick"], ["batch.size=1"]), tmp_path / "run"))
    assert str(error.value) == (
        "a batch norm received a single image\n"
        "  expected: two or more images per micro-batch in each process\n"
        "  fix:      --batch-size 2"
    )


def test_steps_tell_where_training_is(training: Training) -> None:
    events: Iterator[Any] = fit(training)
    first = next(events)
    assert isinstance(first, Step)
    assert (first.epoch, first.update, first.updates) == (1, 1, 4)
    assert first.shares is not None and set(first.losses) == {"task", "exits", "soft", "hint"}


TAUGHT = """
extends = "quick"
epochs = 2
[batch]
size = 24
[networks.teacher]
model = "test_resnet"
exits = "none"
learns = false
weights = "{weights}"
[losses.taught]
kind = "kl"
on = "final"
target = "teacher.final"
"""


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe with a teacher that does not learn, and the file of its weights."""
    folder = tmp_path_factory.mktemp("taught")
    short = replace(QUICK, model="test_resnet", limit_train=48)
    finish(prepare(short, load_recipe(["baseline"], ["epochs=1", "batch.size=24"]), folder / "teacher"))
    weights = folder / "teacher" / "last.safetensors"
    (folder / "taught.toml").write_text(TAUGHT.format(weights=weights))
    return folder / "taught.toml", weights


def test_a_frozen_network_neither_learns_nor_moves(taught: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, weights = taught
    training = prepare(replace(QUICK, limit_train=48), load(recipe), tmp_path / "run")
    teacher = training.learner.networks["teacher"]
    finish(training)
    assert equal(dict(teacher.state_dict()), load_file(weights))
    with pytest.raises(UserError) as error:
        prepare(QUICK, load(recipe, "losses.taught.on=teacher.final", "losses.taught.target=final"), tmp_path / "x")
    assert error.value.wrong == "losses.taught.on = 'teacher.final': networks.teacher does not learn"
    assert not (tmp_path / "x").exists()


def test_a_frozen_network_is_not_saved_but_loaded_again(taught: tuple[Path, Path], tmp_path: Path) -> None:
    """Nor is the average twice, where it teaches."""
    recipe, _ = taught
    settings, overrides = replace(QUICK, limit_train=48), ["ema.decay=0.9", "losses.soft.target=ema.final"]
    finish(prepare(settings, load(recipe, *overrides), tmp_path / "whole"))
    assert isinstance(list(fit(prepare(settings, load(recipe, *overrides), tmp_path / "run"), after(1)))[-1], Stopped)
    state = state_of(tmp_path / "run")
    assert {name.split(".")[1] for name in state["learner"] if name.startswith("networks.")} == {"student"}
    finish(resume(tmp_path / "run", *resumed(tmp_path / "run", {}, None, [])))
    assert same(tmp_path / "whole", tmp_path / "run")
    assert not any("teacher" in name for name in load_file(tmp_path / "run" / "best.safetensors"))


def test_a_frozen_network_with_other_weights_is_refused(taught: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, weights = taught
    prepare(replace(QUICK, limit_train=48), load(recipe), tmp_path / "run")
    content = weights.read_bytes()

    def refused() -> str:
        with pytest.raises(UserError) as error:
            resume(tmp_path / "run", *resumed(tmp_path / "run", {}, None, []))
        return str(error.value)

    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert refused() == (
            "networks.teacher, which does not learn, has other weights than when the run was started\n"
            f"  expected: the same weights from {weights}\n"
            "  fix:      restore the file"
        )
        weights.unlink()
        assert refused() == (
            f"networks.teacher.weights = '{weights}': file not found, and networks.teacher is loaded from it\n"
            "  expected: the file that the run was started from\n"
            "  fix:      restore the file"
        )
    finally:
        weights.write_bytes(content)


def test_a_frozen_network_with_random_weights_is_refused_as_a_teacher(
    taught: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe, _ = taught
    with pytest.raises(UserError) as error:
        prepare(replace(QUICK, limit_train=48), load(recipe, "networks.teacher.weights=random"), tmp_path / "run")
    assert str(error.value) == (
        "networks.teacher does not learn and has random weights: it would teach noise\n"
        "  expected: weights: pretrained, a run, or a .safetensors file\n"
        "  fix:      --set networks.teacher.weights=pretrained"
    )
    assert not (tmp_path / "run").exists()


def test_a_frozen_network_whose_classifier_is_fresh_is_refused_as_a_teacher(
    taught: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe, _ = taught
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "seven.safetensors")
    begins = ["networks.teacher.weights=" + str(tmp_path / "seven.safetensors")]
    with pytest.raises(UserError) as error:
        prepare(replace(QUICK, limit_train=48), load(recipe, *begins), tmp_path / "run")
    assert error.value.wrong == (
        "networks.teacher.weights: the network tells 7 classes apart, whose names are not known, and the data have 10"
    )
    assert not (tmp_path / "run").exists()
    # Its maps are those of the file: a loss on them may read it.
    prepare(replace(QUICK, limit_train=48), load(recipe, *begins, "losses.taught.kind=fitnet"), tmp_path / "run")


# The check before the run sees the model as the run will build it


REFUSED_AT_SMALL_SIZES = (
    "module 'maxpool' of test_resnet returns its input unchanged\n"
    "  expected: a module that is called once and returns a map\n"
    "  fix:      name others, such as layer1, layer2, layer3"
)


def never(*arguments: Any, **named: Any) -> Any:
    raise AssertionError("too late")


def test_the_check_builds_the_model_at_the_size_of_a_known_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small images get a stem without a pool; at the model's own size there is one.
    recipe = load_recipe(["quick"], ['networks.student.exits=["maxpool"]'])
    monkeypatch.setattr("sdcli.run.prepare.open_dataset", never)
    with pytest.raises(UserError) as caught:
        prepare(replace(QUICK, model="test_resnet"), recipe, tmp_path / "run")
    assert str(caught.value) == REFUSED_AT_SMALL_SIZES
    assert not (tmp_path / "run").exists()


def test_the_check_is_repeated_once_the_size_is_known_and_before_weights_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, number in (("train", 12), ("test", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / f"{i}.png")
    recipe = load_recipe(["quick"], ['networks.student.exits=["maxpool"]'])
    monkeypatch.setattr("sdcli.run.prepare.build_network", never)
    settings = replace(QUICK, model="test_resnet", dataset=str(tmp_path / "images"), limit_train=None, limit_val=None)
    with pytest.raises(UserError) as caught:
        prepare(settings, recipe, tmp_path / "run")
    assert str(caught.value) == REFUSED_AT_SMALL_SIZES
    assert not (tmp_path / "run").exists()
    # With a size of the user's own the first check was the right one.
    monkeypatch.setattr("sdcli.run.prepare.open_dataset", never)
    with pytest.raises(UserError, match="returns its input unchanged"):
        prepare(replace(settings, image_size=16), recipe, tmp_path / "run")
