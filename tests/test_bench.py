"""`sdcli bench`: every way through a network takes its turn, and what was not measured is said."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Command, refused
from photos import calibrated, save_network

from sdcli.cli import bench as command
from sdcli.evaluation import bench as measuring
from sdcli.network.weights import load

QUICK = ["--batch-size", "1,3", "--seconds", 0, "--device", "cpu"]


@pytest.fixture(autouse=True)
def _a_quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "current_load", lambda: 0.0)
    monkeypatch.setattr(measuring, "IMAGES", 8)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_network(tmp_path / "run" / "best.safetensors")
    return tmp_path / "run"


def said(err: str) -> list[str]:
    return [line for line in err.splitlines() if not line.endswith(" …")]


def test_every_subject_is_measured_at_every_batch_size(sdcli: Command, run: Path):
    calibrated(run / "best.safetensors")
    result = sdcli("bench", run, *QUICK, "--json")
    assert result.code == 0
    found = json.loads(result.out)
    subjects = ["exit1", "exit2", "exit3", "plain", "all exits", "early exit"]
    assert [(row["batch_size"], row["subject"]) for row in found["timings"]] == [
        (b, s) for b in (1, 3) for s in subjects
    ]
    for row in found["timings"]:
        assert row["rounds"] == measuring.LEAST_ROUNDS and 0 < row["median_ms"] <= row["p95_ms"]
        assert row["images_per_s"] == pytest.approx(1000 * row["batch_size"] / row["median_ms"])
        assert (row["ratio"] == 1) == (row["subject"] == "plain")
    assert found["images"] == "digits (test)"
    assert math.isclose(sum(found["leaving"].values()), 1) and found["leaving"].keys() <= {"exit1", "final"}


def test_macs_of_early_exit_are_those_of_the_images_that_were_measured(run: Path):
    calibration = calibrated(run / "best.safetensors")
    network = load(run)
    images = measuring.random_images(network, 8)
    strategy = network.strategy()
    found = measuring.bench(
        network, images, strategy, about_images="", batch_sizes=[8], device=torch.device("cpu"), seconds=0
    )
    routed = network.route(images, calibration.policy)
    passing = network.blueprint.passing(calibration.policy.exits)
    macs = sum(passing[routed.points[place]] for place in routed.exits) / 8
    rows = {row.subject: row for row in found.timings}
    assert rows["early exit"].macs_ratio == pytest.approx(macs / network.blueprint.plan.macs)
    heads = sum(cost.macs for point, cost in network.blueprint.head_costs().items() if point != "final")
    assert rows["all exits"].macs_ratio == pytest.approx(1 + heads / network.blueprint.plan.macs)
    assert rows["plain"].macs_ratio == 1


def test_without_a_calibration_early_exit_is_left_out_and_that_is_said(sdcli: Command, run: Path):
    result = sdcli("bench", run, *QUICK)
    assert "early exit" not in result.out and "all exits" in result.out
    assert f"note: early exit is left out: not calibrated (sdcli calibrate {run}); --threshold T measures it" in said(
        result.err
    )


def test_a_model_gets_random_weights_and_images(sdcli: Command):
    result = sdcli("bench", "test_resnet", *QUICK, "--threshold", 0)
    assert "early exit" in result.out
    (device, random, leaving) = said(result.err)
    assert device.startswith("note: on cpu (") and random.startswith("note: random images cannot show how many")
    assert leaving == "note: early exit on random: answered 100.0% at exit1"


def test_data_that_cannot_be_opened_are_named(sdcli: Command, run: Path, monkeypatch: pytest.MonkeyPatch):
    calibrated(run / "best.safetensors")
    monkeypatch.setattr(measuring, "open_dataset", lambda *args, **named: command_fails())
    result = sdcli("bench", run, *QUICK)
    assert result.code == 0
    assert "note: the data set cannot be opened: the hub does not answer" in said(result.err)
    assert any(line.startswith("note: random images cannot show") for line in said(result.err))


def command_fails() -> None:
    raise command.UserError("the hub does not answer")


def test_a_busy_machine_is_mentioned(sdcli: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measuring, "current_load", lambda: 2.5)
    monkeypatch.setattr(measuring, "busiest", lambda: ["ffmpeg 98% of a core"])
    result = sdcli("bench", "test_resnet", *QUICK, "--json")
    assert json.loads(result.out)["load"] == [2.5, 2.5]
    assert said(result.err) == [
        "note: the machine was busy before: load 2.5 (ffmpeg 98% of a core); the ratios are more reliable "
        "than the times"
    ]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="other systems do not say")
def test_other_programs_that_compute_are_named():
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as busy:
        try:
            busy.stdout.readline()
            assert any(name.startswith("python") for name in measuring.busiest(count=10))
        finally:
            busy.kill()


def test_compiled_networks_stand_beside_eager_ones(sdcli: Command, monkeypatch: pytest.MonkeyPatch):
    compiled = []

    def pretend(call, **options):
        compiled.append(call)
        if len(compiled) == 1:
            raise_on = RuntimeError("no compiler")
            return lambda images: (_ for _ in ()).throw(raise_on)
        return call

    monkeypatch.setattr(torch, "compile", pretend)
    result = sdcli("bench", "test_resnet", "--batch-size", 2, "--seconds", 0, "--threshold", 0, "--compile", "--json")
    found = json.loads(result.out)
    rows = [row["subject"] for row in found["timings"] if row["mode"] == "compiled"]
    assert rows == ["exit2", "exit3", "plain", "all exits"]
    assert found["left_out"] == {"exit1": "no compiler"}
    assert "note: exit1 cannot be compiled: no compiler" in said(result.err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nothing/here"],
            "checkpoint 'nothing/here' does not exist\n  expected: a run folder, or a file such as RUN/best.safetensors",
        ),
        (
            ["test_resnet", "--batch-size", "1,many"],
            "invalid value: --batch-size 1,many\n  expected: numbers from 1 to 65536: 1,32,128",
        ),
        (
            ["test_resnet", "--budget", 0.5, "--threshold", 0.5],
            "--budget and --threshold exclude each other\n  expected: one of them",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_message(sdcli: Command, arguments: list, message: str):
    refused(sdcli("bench", *arguments), message)


def test_far_more_threads_than_cores_are_refused_before_anything(sdcli: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(command, "load_imports", None)
    refused(
        sdcli("bench", "test_resnet", "--threads", 9),
        "--threads 9: this machine has 2 cores\n  expected: a number from 1 to 8\n  fix:      --threads 2",
    )


def test_the_threads_are_those_that_were_asked_for(sdcli: Command, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert sdcli("bench", "test_resnet", "--batch-size", 1, "--seconds", 0, "--device", "cpu", "--threads", 2).code == 0
    assert asked == [2]
