"""What reaches the terminal: text as text, results alone on stdout, JSON that parses, and what is being done."""

from __future__ import annotations

import io
import json
import logging
import math
import re
from pathlib import Path

import pytest
from conftest import Command, Terminal, noise
from rich.table import Table

from sdcli.cli import talk
from sdcli.cli.progress import _epoch_table
from sdcli.cli.talk import line, message, note, print_json, printable, stages
from sdcli.errors import counted
from sdcli.run.events import Epoch

RED, CLEAR, REVERSED = "[red]x[/red]", "\x1b[2J", "\u202egnp"
SHORT = ("--recipe", "quick", "--epochs", 1, "--batch-size", 8, "--device", "cpu", "-j", 0, "--image-size", 32)


def test_what_a_terminal_would_obey_is_printed_as_its_escape():
    assert printable("a\x1b[2Jb") == r"a\x1b[2Jb"
    assert printable("\r\x07\x9b\u202e\u2066\udcff") == r"\r\x07\x9b\u202e\u2066\udcff"
    assert printable("tab\tand\nnewline, é, 犬, 🐕") == "tab\tand\nnewline, é, 犬, 🐕"


@pytest.mark.parametrize("text", [RED, CLEAR, "[/]", ":dog:", "[link=x]y", REVERSED])
def test_names_are_printed_as_they_are_in_messages_notes_lines_and_tables(text, capsys):
    message("on ", (text, "bold"))
    note(text)
    line(text)
    table = Table("name", title=text)
    table.add_row(text)
    talk.output().print(table)
    said = capsys.readouterr()
    assert said.err == f"on {printable(text)}\nnote: {printable(text)}\n"
    assert said.out.count(printable(text)) == 3
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", said.out + said.err)


def test_a_loss_named_like_markup_does_not_end_a_run():
    epoch = Epoch(1, "", 0.1, {"[/]": 1.0, CLEAR: 2.0}, 10, 1.0, 10.0, {})
    console = talk._Console(file=io.StringIO(), width=100, markup=False)
    console.print(_epoch_table([epoch], "mean"))
    assert "[/]" in console.file.getvalue() and CLEAR not in console.file.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A data set whose folders are named to do harm, 22 images of one class and 2 of another, without a test split."""
    folder = tmp_path / RED.replace("/", "")
    for name, count in ((RED.replace("/", ""), 22), (CLEAR, 2)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            noise(number).save(folder / name / f"{number}.png")
    return folder


def test_hostile_folder_names_go_through_training_and_evaluation(photos, tmp_path, sdcli: Command):
    run = tmp_path / "run"
    trained = sdcli("train", "test_resnet", "--dataset", photos, *SHORT, "--output", run)
    assert trained.code == 0, trained.err
    assert "imbalanced classes: from 1 image of '\\x1b[2J' to 20 images of '[red]x[red]'" in trained.err
    assert f"test_resnet on {photos.name}: 2 classes; images: 21 train, 3 validation\n" in trained.err
    next_command = re.search(r"^next: sdcli (.*)$", trained.err, re.M)
    assert next_command and next_command[1] == f"eval {run} --split validation"
    scored = sdcli(*next_command[1].split(), "-j", 0)
    assert scored.code == 0 and f"{photos.name} (validation, 3 images)" in scored.out
    assert "\x1b" not in trained.err + trained.out + scored.err + scored.out
    # With two classes each image is among the first five.
    assert "top-1" in scored.out and "top-5" not in scored.out
    assert "top-5 %" not in sdcli("eval", run, "--markdown", "-j", 0).out
    assert json.loads(sdcli("eval", run, "--json", "-j", 0).out)["dataset"] == photos.name


def test_a_character_that_the_encoding_lacks_is_printed_as_its_escape(monkeypatch):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", file)
    line("3 · 犬")
    talk.output().print("█")
    file.flush()
    assert file.buffer.getvalue() == rb"3 \xb7 \u72ac" + b"\n" + rb"\u2588" + b"\n"


def test_json_has_null_for_what_is_no_number(capsys):
    print_json({"a": math.nan, "b": [math.inf, 1.5], "c": {"d": (-math.inf, CLEAR)}})
    said = capsys.readouterr().out
    assert json.loads(said, parse_constant=pytest.fail) == {"a": None, "b": [None, 1.5], "c": {"d": [None, CLEAR]}}
    assert "\x1b" not in said


def test_scores_that_are_not_finite_are_null_in_json(tmp_path, sdcli: Command, monkeypatch):
    run = tmp_path / "run"
    sdcli(
        "train", "test_resnet", "--dataset", "digits", "--limit-train", 24, "--limit-val", 10, *SHORT, "--output", run
    )
    monkeypatch.setattr("sdcli.evaluation.evaluate.ece", lambda confidence, correct: math.nan)
    result = sdcli("eval", run, "--limit", 10, "-j", 0, "--json")
    report = json.loads(result.out, parse_constant=pytest.fail)
    assert [scored["ece"] for scored in report["exits"]] == [None] * 4 and report["num_images"] == 10
    assert re.search(r"final +\S+ +\S+ +\S+ +\S+ +- ", sdcli("eval", run, "--limit", 10, "-j", 0).out)


def test_what_an_imported_file_prints_is_no_result(tmp_path, sdcli: Command):
    (tmp_path / "loud.py").write_text("print('hello')\n", encoding="utf-8")
    result = sdcli("recipes", "losses", "kl", "--json", "--import", tmp_path / "loud.py")
    assert json.loads(result.out)[0]["name"] == "kl" and result.err == "hello\n"


@pytest.mark.parametrize(("number", "said"), [(0, "0 epochs"), (1, "1 epoch"), (2, "2 epochs"), (1294, "1,294 epochs")])
def test_a_number_agrees_with_its_noun(number, said):
    assert counted(number, "epoch") == said
    assert counted(1, "class", "classes") == "1 class" and counted(3, "class", "classes") == "3 classes"


def test_in_a_pipe_each_stage_is_a_line_and_nothing_is_wrapped(tmp_path, sdcli: Command):
    run = tmp_path / "a-folder-with-a-name-that-alone-is-longer-than-a-terminal-of-eighty-columns-is-wide"
    result = sdcli("train", "test_resnet", "--dataset", "digits", "--limit-train", 24, "--limit-val", 10, *SHORT,
                   "--output", run)  # fmt: skip
    lines = result.err.splitlines()
    stages = [text for text in lines if text.endswith(" …")]
    assert lines[: len(stages)] == stages
    assert stages == ["checking the recipe with test_resnet …", "opening digits …", "measuring the images …",
                      "building test_resnet …", "decoding 24 images …", "decoding 10 images …"]  # fmt: skip
    assert lines[len(stages)] == "test_resnet on digits: 10 classes; images: 24 train, 10 validation, 359 test"
    assert lines[len(stages) + 1] == f"1 epoch of 3 updates, on cpu; run folder: {run}"
    assert lines[-1] == f"next: sdcli eval {run}"
    assert any(text.startswith("best epoch: 1 (best.safetensors)  |  validation top-1 %: exit1 ") for text in lines)
    assert result.out == ""


def test_on_a_terminal_a_stage_is_replaced_and_at_the_end_removed(monkeypatch):
    log, shown = logging.getLogger("sdcli.test"), Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    with stages():
        log.info("opening %s", CLEAR)
        log.debug("decoding images: %s of %s", 1, 2)
    log.info("not shown any more")
    stage = "\x1b[2mopening \\x1b[2J …\x1b[0m", "\x1b[2mdecoding images: 1 of 2 …\x1b[0m", ""
    assert shown.getvalue().split("\r\x1b[2K") == list(stage)


def test_only_the_first_of_several_processes_shows_stages(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with stages():
        logging.getLogger("sdcli.test").info("opening digits")
    assert capsys.readouterr().err == ""
