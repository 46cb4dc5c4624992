"""However a run is interrupted, it saves its state or has one, ends without a traceback, and resumes to the same bits."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import Command, noise, refused
from PIL import Image
from processes import CLOSED, Process, finished
from safetensors import SafetensorError
from test_train import same, state_of

from sdcli.cli.plots import save_curves
from sdcli.data.loaders import Loader
from sdcli.errors import UserError
from sdcli.files import replacing
from sdcli.recipe.load import load_recipe
from sdcli.run import state as states
from sdcli.run.events import Step, Stopped
from sdcli.run.folder import Run, read_log
from sdcli.run.prepare import prepare
from sdcli.run.resume import resume, resumed
from sdcli.run.settings import Settings
from sdcli.run.train import fit

START = ("train", "test_vit", "--dataset", "digits", "--recipe", "quick", "--limit-train", 96, "--limit-val", 30,
         "--batch-size", 24, "--device", "cpu", "--save-every", 1, "--workers", 0)  # fmt: skip
# A policy varies images one by one: by processes of their own, if wanted.
WORKERS = (*START, "--set", "batch.augment.aa=trivial", "--workers", 2)
FOR_EVER = ("--epochs", 100_000)

QUICK = Settings("test_vit", "digits", limit_train=48, limit_val=30, device="cpu", workers=0)


def under_way(process: Process, folder: Path, saves: int = 3) -> None:
    """Waits until the run has saved its state a few times."""
    file = folder / "state" / "last.pt"
    seen: set[int] = set()
    while process.poll() is None and len(seen) < saves:
        if file.exists():
            seen.add(file.stat().st_mtime_ns)
        time.sleep(0.002)


def workers_of(process: Process) -> list[psutil.Process]:
    """The processes that load images."""
    children: list[psutil.Process] = []
    while process.poll() is None and len(children) < 2:
        children = psutil.Process(process.pid).children()
        time.sleep(0.002)
    return children


def gone(processes: list[psutil.Process]) -> bool:
    """Waits for their end."""
    return not psutil.wait_procs(processes, timeout=60)[1]


# Signals


def terminate_as_timeout_does(process: Process) -> None:
    """timeout(1) sends it to its child, then to the group; systemd and Slurm to every process."""
    process.send_signal(signal.SIGTERM)
    process.signal_group(signal.SIGTERM)


def test_a_signal_to_all_processes_saves_the_state_and_ends_the_workers(tmp_path: Path) -> None:
    process = Process(*WORKERS, *FOR_EVER, "--output", tmp_path / "run", leads=True)
    under_way(process, tmp_path / "run")
    workers = workers_of(process)
    terminate_as_timeout_does(process)
    assert process.wait() == 128 + signal.SIGTERM, process.err
    assert "the state is saved" in process.err and "Traceback" not in process.err
    assert gone(workers)


def test_workers_end_when_their_run_is_killed_and_do_not_hold_its_lock(tmp_path: Path) -> None:
    process = Process(*WORKERS, *FOR_EVER, "--output", tmp_path / "run")
    under_way(process, tmp_path / "run")
    workers = workers_of(process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run = Run(tmp_path / "run")
    run.lock()
    run.unlock()
    assert gone(workers)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_saves_the_state_unless_nohup_was_asked_for(ignored: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = Process(*START, *FOR_EVER, "--output", folder, ignored=[signal.SIGHUP] if ignored else [])
    under_way(process, folder)
    process.send_signal(signal.SIGHUP)
    if ignored:
        under_way(process, folder, saves=10)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + (signal.SIGTERM if ignored else signal.SIGHUP), process.err
    assert "the state is saved" in process.err


SLEEPS = """
import time
from pathlib import Path
from sdcli import LOSSES

@LOSSES.register("sleeps", reads="logits")
def sleeps(student, teacher, batch):
    "Sleeps for ever at its third call."
    with Path("calls").open("a") as file:
        file.write(".")
    if Path("calls").stat().st_size == 3:
        time.sleep(1e6)
    return (student - teacher).sum(dim=1) * 0
"""


def test_a_second_ctrl_c_leaves_at_once_and_the_run_resumes(tmp_path: Path) -> None:
    (tmp_path / "sleeps.py").write_text(SLEEPS)
    loss = ["--import", "sleeps.py", "--set", 'losses.sleeps={kind="sleeps", on="final", target="exit1"}']
    process = Process(*START, *loss, "--epochs", 1, "--output", "run", cwd=tmp_path)
    while process.poll() is None and not ((tmp_path / "calls").exists() and (tmp_path / "calls").stat().st_size == 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    # One that follows at once is the same key press, which a launcher passes on.
    process.send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert process.poll() is None, process.err
    process.send_signal(signal.SIGINT)
    assert process.wait() == 128 + signal.SIGINT, process.err
    assert process.err.endswith("\nstopped\n") and "Traceback" not in process.err
    again = finished("train", "--resume", "run", "--import", "sleeps.py", cwd=tmp_path)
    assert again.poll() == 0, again.err


def test_ctrl_c_during_the_preparation_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time, pathlib\npathlib.Path('there').touch()\ntime.sleep(1e6)\n")
    process = Process(*START, "--import", "slow.py", "--output", "run", cwd=tmp_path)
    while process.poll() is None and not (tmp_path / "there").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert process.out == "" and process.err.endswith("stopped\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", ["build", "write_choices", "save"])
def test_ctrl_c_during_the_preparation_leaves_the_folder_free(
    step: str, tmp_path: Path, sdcli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"sdcli.run.prepare.{step}", interrupted)
        stopped = sdcli(*START, "--output", tmp_path / "run")
    assert stopped.code == 130 and stopped.err.endswith("stopped\n")
    assert sdcli(*START, "--epochs", 1, "--output", tmp_path / "run").code == 0


def test_ctrl_c_that_a_library_turns_into_another_error_is_still_one(
    tmp_path: Path, sdcli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ImportError("numpy failed to import") from None

    monkeypatch.setattr("sdcli.run.prepare.build", interrupted)
    stopped = sdcli(*START, "--output", tmp_path / "run")
    assert stopped.code == 130 and stopped.err.endswith("stopped\n")


def test_errors_that_are_each_others_cause_are_one_message(
    tmp_path: Path, sdcli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **options: Any) -> None:
        error, other = UserError("no"), ValueError()
        error.__cause__, other.__cause__ = other, error
        raise error

    monkeypatch.setattr("sdcli.run.prepare.build", failing)
    refused(sdcli(*START, "--output", tmp_path / "run"), "no")


def test_a_signal_while_the_last_epoch_is_scored_on_test_stops_the_run(tmp_path: Path) -> None:
    training = prepare(
        Settings("test_vit", "digits", limit_train=48, val_fraction=0.0, device="cpu", workers=0),
        load_recipe(["quick"], ["epochs=1", "batch.size=24"]),
        tmp_path / "run",
    )
    # Of each update, then while scoring.
    asked = iter([None, None])
    last = list(fit(training, lambda: next(asked, signal.SIGTERM)))[-1]
    assert last == Stopped(1, 2, signal.SIGTERM)
    assert not (tmp_path / "run" / "report.json").exists()
    list(fit(resume(tmp_path / "run", *resumed(tmp_path / "run", {}, None, []))))
    assert (tmp_path / "run" / "report.json").exists()


# Workers and images


def test_a_worker_that_is_killed_is_explained_after_the_state_is_saved(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = Process(*WORKERS, *FOR_EVER, "--output", folder)
    under_way(process, folder)
    worker, other = workers_of(process)
    worker.kill()
    assert process.wait() == 2
    assert process.err[process.err.index("error: ") :] == (
        f"error: process {worker.pid}, one of 2 that load images, was killed by SIGKILL: the machine has probably run "
        "out of memory\n"
        "  expected: processes that last as long as they are needed\n"
        f"  fix:      --workers 0, or fewer than 2; the state is saved; resume with: sdcli train --resume {folder}\n"
    )
    assert gone([other])
    position = state_of(folder)["position"]
    assert (position["epoch"], position["update"]) > (1, 0)


def test_a_worker_that_is_killed_while_scoring_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = UserError("process 7, one of 2 that load images, was killed by SIGKILL", "", "--workers 0")

    def score(*arguments: Any) -> None:
        raise lost

    training = prepare(QUICK, load_recipe(["quick"], ["epochs=2", "batch.size=24"]), tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("sdcli.run.train.score", score)
        with pytest.raises(UserError) as error:
            list(fit(training))
    assert error.value.fix == (f"--workers 0; the state is saved; resume with: sdcli train --resume {tmp_path / 'run'}")
    position = state_of(tmp_path / "run")["position"]
    assert (position["epoch"], position["update"]) == (1, 2)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Images in folders, of two classes."""
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / "train" / name).mkdir(parents=True)
        for number in range(24):
            noise(100 * len(name) + number + (name == "dog")).save(
                tmp_path / "pictures" / "train" / name / f"{number}.png"
            )
    return tmp_path / "pictures"


def test_an_image_that_becomes_unreadable_loses_nothing(pictures: Path, tmp_path: Path) -> None:
    settings = Settings("test_vit", str(pictures), val_fraction=0.25, device="cpu", workers=0)
    recipe = load_recipe(["quick"], ["epochs=3", "batch.size=6", "batch.augment.aa=trivial"])
    expected, folder = tmp_path / "whole", tmp_path / "run"
    list(fit(prepare(settings, recipe, expected)))
    training = prepare(settings, recipe, folder)
    images = {file: file.read_bytes() for file in (pictures / "train").rglob("*.png")}
    with pytest.raises(UserError) as error:
        for event in fit(training):
            if isinstance(event, Step) and event.epoch == 2:
                for file in images:
                    file.write_bytes(b"no image")
    assert "the image cannot be read (unknown format)" in error.value.wrong
    assert error.value.fix == (f"replace or remove it; the state is saved; resume with: sdcli train --resume {folder}")
    position = state_of(folder)["position"]
    assert (position["epoch"], position["update"]) == (2, 1)
    for file, content in images.items():
        file.write_bytes(content)
    list(fit(resume(folder, *resumed(folder, {}, None, []))))
    assert same(expected, folder)


def test_workers_end_with_the_pass_that_a_user_closes(pictures: Path, tmp_path: Path) -> None:
    settings = Settings("test_vit", str(pictures), val_fraction=0.25, device="cpu", workers=2)
    recipe = load_recipe(["quick"], ["epochs=1", "batch.size=6", "batch.augment.aa=trivial"])
    training = prepare(settings, recipe, tmp_path / "run")
    assert isinstance(training.loader, Loader)
    events = fit(training)
    next(events)
    workers = psutil.Process().children()
    own = [child for child in workers if child.pid in {w.pid for w in training.loader._iterator._workers}]
    assert len(own) == 2
    events.close()
    assert gone(own)


# Output that cannot be written


def test_training_outlives_the_reader_of_its_messages(tmp_path: Path) -> None:
    """`sdcli train … 2>&1 | head -1`"""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = Process(*START, "--epochs", 1, "--output", tmp_path / "run", out=pipe, err=pipe)
    with pipe.open() as reader:
        reader.readline()
    assert process.wait() == 0
    assert (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize(("out", "err"), [("/dev/full", "/dev/full"), (CLOSED, CLOSED)])
def test_training_goes_on_where_nothing_can_be_written_to_its_streams(out: str, err: str, tmp_path: Path) -> None:
    process = finished(*START, "--epochs", 1, "--output", tmp_path / "run", out=out, err=err)
    assert process.poll() == 0
    assert (tmp_path / "run" / "report.json").exists()
    # Its files have not taken the places of the streams.
    assert [line["epoch"] for line in read_log(tmp_path / "run")] == [1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    list(fit(prepare(QUICK, load_recipe(["quick"], ["epochs=2", "batch.size=24"]), folder)))
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A run of two epochs, to change."""
    shutil.copytree(trained, tmp_path / "copied")
    return tmp_path / "copied"


@pytest.fixture
def checkpoint(trained: Path) -> Path:
    return trained / "best.safetensors"


def messages(process: Process) -> str:
    """What a process writes to stderr, without the lines that only name what is being done."""
    return "".join(line for line in process.err.splitlines(keepends=True) if not line.endswith("…\n"))


@pytest.mark.parametrize("form", [(), ("--json",)])
@pytest.mark.parametrize(
    ("out", "reason"), [(CLOSED, "it is closed"), ("/dev/full", "No space left on device")], ids=["closed", "full"]
)
def test_results_that_cannot_be_written_are_one_line(
    form: tuple[str, ...], out: str, reason: str, checkpoint: Path
) -> None:
    process = finished("eval", checkpoint, "--limit", 20, *form, out=out)
    assert process.poll() == 2
    assert messages(process) == f"error: the results cannot be written to standard output: {reason}\n"


def test_results_whose_reader_has_left_are_silent(checkpoint: Path, tmp_path: Path) -> None:
    """`sdcli eval … | head -0`"""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = Process("eval", checkpoint, "--limit", 20, out=pipe)
    pipe.open().close()
    assert (process.wait(), messages(process)) == (1, "")


@pytest.mark.parametrize("err", [CLOSED, "/dev/full"])
def test_results_do_not_need_standard_error(err: str, checkpoint: Path) -> None:
    process = finished("eval", checkpoint, "--limit", 20, "--json", err=err)
    assert process.poll() == 0
    assert json.loads(process.out)["num_images"] == 20
    mistaken = finished("eval", checkpoint, "--split", "tset", err=err)
    assert mistaken.poll() == 2


# Run folders


def test_a_run_in_use_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = Process(*START, *FOR_EVER, "--output", folder)
    under_way(process, folder)
    message = (
        f"error: run '{folder}' is in use by process {process.pid} on {os.uname().nodename}\n"
        "  expected: a run that no other process is training\n"
        "  fix:      wait until it finishes, stop it with Ctrl-C or SIGTERM (its state is saved), or choose another "
        "--output\n"
    )
    for second in (
        ["train", "--resume", folder],
        [*START, "--output", folder],
        [*START, "--resume", "auto", "--output", folder],
    ):
        other = finished(*second)
        assert (other.poll(), other.out, messages(other)) == (2, "", message)
    under_way(process, folder)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, process.err
    # The lock's file stays behind, and is no lock.
    assert (folder / "state" / "lock").exists()
    resumed(folder, {}, None, [])
    run = Run(folder)
    run.lock()
    run.unlock()


def unsupported(*arguments: Any) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_file_system_without_locks_is_no_obstacle(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.lockf", unsupported)
    list(fit(resume(copied, *resumed(copied, {}, None, ["epochs=3"]))))


def test_two_writers_of_a_file_do_not_meet(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with replacing(file) as first, replacing(file) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert file.read_text() == "first"
    with pytest.raises(KeyError), replacing(file) as third:
        third.write_text("half")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_temporary_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.begin()
    run.unlock()
    left = [run.folder / ".best.safetensors.7-0a0b0c0d.tmp", run.folder / "state" / ".last.pt.7-0a0b0c0d.tmp"]
    for path in left:
        path.write_text("half")
    run.lock()
    assert not any(path.exists() for path in left)
    run.unlock()


def test_temporary_files_stay_where_another_process_may_be_writing_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.lockf", unsupported)
    run = Run(tmp_path / "run")
    run.begin()
    theirs = run.folder / ".best.safetensors.7-0a0b0c0d.tmp"
    theirs.write_text("half")
    run.lock()
    assert theirs.exists()


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Fails with this error when a file of this name is to take its place."""
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise OSError(number, os.strerror(number), str(source))
        replace(source, target)

    monkeypatch.setattr("os.replace", fail)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("run.json", errno.EROFS),
        ("recipe.toml", errno.ENOSPC),
        ("best.safetensors", errno.EROFS),
        ("report.json", errno.ENOSPC),
    ],
)
def test_a_folder_that_cannot_be_written_is_one_message(
    name: str, number: int, tmp_path: Path, sdcli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        refuse(patch, name, number)
        result = sdcli(*START, "--epochs", 1, "--output", folder)
    begun = (folder / "state" / "last.pt").exists()
    then = f", then: sdcli train --resume {folder}" if begun else ""
    assert result.code == 2 and "Traceback" not in result.err
    assert result.err[result.err.index("error: ") :] == (
        f"error: '{folder / name}' cannot be written: {os.strerror(number)}\n"
        "  expected: a writable run folder, on a disk with free space\n"
        f"  fix:      free space or make it writable{then}\n"
    )
    assert not list(folder.rglob("*.tmp"))
    again = sdcli("train", "--resume", folder) if begun else sdcli(*START, "--epochs", 1, "--output", folder)
    assert again.code == 0 and (folder / "report.json").exists()


def test_a_log_that_cannot_be_written_keeps_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    training = prepare(QUICK, load_recipe(["quick"], ["epochs=1"]), tmp_path / "run")
    before = training.run.state.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError) as error:
            list(fit(training))
    assert error.value.wrong == f"'{tmp_path / 'run' / 'log.jsonl'}' cannot be written: No space left on device"
    assert training.run.state.read_bytes() == before
    list(fit(resume(tmp_path / "run", *resumed(tmp_path / "run", {}, None, []))))
    assert [line["epoch"] for line in read_log(tmp_path / "run")] == [1]


def test_a_checkpoint_that_safetensors_cannot_write_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("sdcli.run.folder.save_checkpoint", full)
    with pytest.raises(UserError, match=r"last\.safetensors' cannot be written: .*No space left on device"):
        Run(tmp_path).save("last", {}, None)


def test_a_picture_that_cannot_be_drawn_does_not_fail_the_run(
    tmp_path: Path, sdcli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "curves.png", errno.ENOSPC)
    result = sdcli(*START, "--epochs", 1, "--output", tmp_path / "run")
    assert result.code == 0 and "curves.png' cannot be written" in result.err.replace("\n", " ")


def test_only_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="it is not a regular file"), replacing(tmp_path / "pipe") as beside:
        beside.write_text("new")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_the_log_grows_by_a_line_and_the_table_is_made_anew_for_a_new_column(tmp_path: Path) -> None:
    run = Run(tmp_path)
    line: dict[str, Any] = {"epoch": 1, "loss": 1.0, "losses": {"task": 1.0}, "lr": 0.1, "validation": None}
    line |= {"num_images": 10, "seconds": 1.0, "images_per_s": 10.0}
    run.log_epoch(line)
    inodes = [(tmp_path / name).stat().st_ino for name in ("log.jsonl", "summary.csv")]
    run.log_epoch({**line, "epoch": 2})
    assert [(tmp_path / name).stat().st_ino for name in ("log.jsonl", "summary.csv")] == inodes
    assert (tmp_path / "summary.csv").read_bytes() == (
        b"epoch,train_loss,train_loss_task,lr\r\n1,1.0,1.0,0.1\r\n2,1.0,1.0,0.1\r\n"
    )
    run.log_epoch({**line, "epoch": 3, "losses": {"task": 0.5, "soft": 0.5}})
    assert (tmp_path / "log.jsonl").stat().st_ino == inodes[0]
    assert (tmp_path / "summary.csv").read_bytes() == (
        b"epoch,train_loss,train_loss_task,lr,train_loss_soft\r\n1,1.0,1.0,0.1,\r\n2,1.0,1.0,0.1,\r\n3,1.0,0.5,0.1,0.5\r\n"
    )
    assert [line["epoch"] for line in read_log(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("half", ['{"epoch": 3, "lo', "\0\0\0\0", '{"epoch": 3, "phase": "tr\xc3'])
def test_a_line_that_was_cut_off_breaks_neither_plot_nor_resume(half: str, copied: Path, sdcli: Command) -> None:
    files = [copied / name for name in ("log.jsonl", "summary.csv")]
    whole = [file.read_bytes() for file in files]
    for file, content in zip(files, whole, strict=True):
        file.write_bytes(content + half.encode("latin-1"))
    assert len(read_log(copied)) == 2
    Run(copied).go_on(2, 2)
    assert [file.read_bytes() for file in files] == whole
    Run(copied).go_on(1, 2)
    assert [file.read_bytes().count(b"\n") for file in files] == [1, 2]


def test_a_log_with_fewer_epochs_than_the_state_is_refused(copied: Path) -> None:
    first, _ = (copied / "log.jsonl").read_text().splitlines(keepends=True)
    (copied / "log.jsonl").write_text(first)
    with pytest.raises(UserError) as error:
        resume(copied, *resumed(copied, {}, None, []))
    assert error.value.wrong == f"'{copied / 'log.jsonl'}' is damaged: it has 1 of 2 epochs"


def test_a_damaged_line_within_the_log_is_named(copied: Path) -> None:
    _, second = (copied / "log.jsonl").read_text().splitlines(keepends=True)
    (copied / "log.jsonl").write_text('{"epoch": 1, "lo\n' + second)
    with pytest.raises(UserError, match=r"log\.jsonl' is damaged: line 1: "):
        read_log(copied)


def test_curves_of_a_run_without_validation_are_one_panel(copied: Path) -> None:
    save_curves(copied, copied / "two.png")
    log = read_log(copied)
    (copied / "log.jsonl").write_text("".join(json.dumps({**line, "validation": None}) + "\n" for line in log))
    save_curves(copied, copied / "one.png")
    sizes = []
    for name in ("two", "one"):
        with Image.open(copied / f"{name}.png") as image:
            sizes.append(image.size)
    (wide, height), (narrow, same_height) = sizes
    assert (narrow, same_height) == (wide // 2, height)


def test_a_taken_output_gets_a_free_name(tmp_path: Path, sdcli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "2").mkdir(parents=True)
    (tmp_path / "mine-2").mkdir()
    refused(
        sdcli(*START, "--output", "mine"),
        "output 'mine' is not an empty folder\n  expected: a new or empty folder\n  fix:      --output mine-3",
    )
    refused(
        sdcli(*START, "--output", "."),
        "output '.' is not an empty folder\n  expected: a new or empty folder\n  fix:      --output run",
    )


@pytest.mark.parametrize(
    ("output", "where", "free"),
    [
        ("pictures", "is the data set's folder", "runs/pictures"),
        ("pictures/train/run", "is inside the data set's folder, 'FOLDER/pictures'", "runs/run"),
        (".", "contains the data set's folder, 'FOLDER/pictures'", "runs/NAME"),
        ("link/run", "is inside the data set's folder, 'FOLDER/pictures'", "runs/run"),
    ],
)
def test_an_output_that_would_mix_with_the_data_is_refused(
    output: str, where: str, free: str, pictures: Path, tmp_path: Path, sdcli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(pictures)
    before = sorted(pictures.rglob("*"))
    result = sdcli(
        "train", "test_vit", "--dataset", "pictures", "--recipe", "quick", "--device", "cpu", "--output", output
    )
    where, free = (text.replace("FOLDER", str(tmp_path)).replace("NAME", tmp_path.name) for text in (where, free))
    refused(
        result,
        f"output '{output}' {where}\n  expected: a folder outside the data set\n  fix:      --output {free}",
    )
    assert sorted(pictures.rglob("*")) == before


def test_a_run_that_is_resumed_with_other_threads_is_noted(copied: Path) -> None:
    assert not [note for note in resume(copied, *resumed(copied, {}, None, [])).notes if "threads" in note]
    state = state_of(copied)
    states.save_state(copied / "state" / "last.pt", {**state, "threads": 64})
    note = f"64 CPU threads before, {torch.get_num_threads()} now: results differ in the last digits, by rounding"
    assert note in resume(copied, *resumed(copied, {}, None, [])).notes


# All kinds, and all that follows


@dataclass(frozen=True)
class Interruption:
    """What happens to a run that is under way, and how it ends."""

    code: int
    happens: Callable[[Process, Path], None] = lambda process, folder: None
    start: tuple[object, ...] = START
    options: dict[str, Any] = field(default_factory=dict)


def killed(number: int) -> Callable[[Process, Path], None]:
    return lambda process, folder: process.send_signal(number)


def second(*arguments: object) -> Callable[[Process, Path], None]:
    def begin(process: Process, folder: Path) -> None:
        other = finished("train", *(folder if argument == "RUN" else argument for argument in arguments))
        assert other.poll() == 2 and "is in use by process" in other.err, other.err

    return begin


def read_a_line(process: Process, folder: Path) -> None:
    with (folder.parent / "pipe").open() as reader:
        reader.readline()


KINDS = {
    "SIGINT": Interruption(130, killed(signal.SIGINT)),
    "SIGTERM": Interruption(143, killed(signal.SIGTERM)),
    "SIGHUP": Interruption(129, killed(signal.SIGHUP)),
    "SIGKILL": Interruption(-9, killed(signal.SIGKILL)),
    "SIGKILL with workers": Interruption(-9, killed(signal.SIGKILL), WORKERS),
    "SIGINT to the group": Interruption(130, lambda p, f: p.signal_group(signal.SIGINT), WORKERS, {"leads": True}),
    "SIGTERM to the group": Interruption(143, lambda p, f: terminate_as_timeout_does(p), WORKERS, {"leads": True}),
    "SIGHUP to the group": Interruption(129, lambda p, f: p.signal_group(signal.SIGHUP), WORKERS, {"leads": True}),
    "SIGTERM to a fork server": Interruption(
        143, lambda p, f: terminate_as_timeout_does(p), WORKERS, {"leads": True, "method": "forkserver"}
    ),
    "a worker killed": Interruption(2, lambda p, f: workers_of(p)[0].kill(), WORKERS),
    "stderr closed": Interruption(0, options={"err": CLOSED}),
    "stdout closed": Interruption(0, options={"out": CLOSED}),
    "stderr full": Interruption(0, options={"err": "/dev/full"}),
    "reader gone": Interruption(0, read_a_line, options={"out": "pipe", "err": "pipe"}),
    "a second run": Interruption(0, second(*START[1:], "--output", "RUN")),
    "resumed beside itself": Interruption(0, second("--resume", "RUN")),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[object, ...], Path]:
    """Runs that nothing has interrupted."""
    runs = {}
    for number, start in enumerate((START, WORKERS)):
        runs[start] = tmp_path_factory.mktemp("whole") / str(number)
        process = finished(*start, "--workers", 0, "--epochs", 8, "--output", runs[start])
        assert process.poll() == 0, process.err
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_ends_with_the_same_log_and_weights(
    kind: str, whole: dict[tuple[object, ...], Path], tmp_path: Path
) -> None:
    interruption, folder = KINDS[kind], tmp_path / "run"
    os.mkfifo(tmp_path / "pipe")
    options = {name: tmp_path / "pipe" if value == "pipe" else value for name, value in interruption.options.items()}
    process = Process(*interruption.start, "--epochs", 8, "--output", folder, **options)
    if "pipe" not in interruption.options.values():
        under_way(process, folder, saves=6)
        assert process.poll() is None
    interruption.happens(process, folder)
    assert process.wait() == interruption.code, process.err
    errors = "" if interruption.options.get("err") else process.err
    assert "Traceback" not in errors and "Exception" not in errors
    again = finished("train", "--resume", folder)
    assert again.poll() == 0 and "Traceback" not in again.err, again.err
    assert same(whole[interruption.start], folder)


@pytest.mark.slow
def test_a_run_that_is_interrupted_again_and_again_ends_with_the_same_log_and_weights(
    whole: dict[tuple[object, ...], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    signals = [kind for kind in KINDS.values() if kind.start == WORKERS]
    process = Process(*WORKERS, "--epochs", 8, "--output", folder, leads=True)
    for interruption in signals:
        under_way(process, folder, saves=2)
        interruption.happens(process, folder)
        assert process.wait() in (interruption.code, 0), process.err
        process = Process("train", "--resume", folder, leads=True)
    assert process.wait() == 0, process.err
    assert same(whole[WORKERS], folder)
