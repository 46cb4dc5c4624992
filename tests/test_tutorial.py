"""README's way from a folder of photos to a certified ONNX, command by command."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from subprocess import run

import pytest
import timm
import torch
from conftest import Command
from photos import photo
from PIL import Image
from safetensors.torch import save_file

README = Path(__file__).parents[1] / "README.md"
HEADING = "## From a folder of photos to a certified ONNX\n"


def commands_of(heading: str) -> list[list[str]]:
    """The commands below a heading, as words."""
    block = README.read_text(encoding="utf-8").split(heading)[1].split("\n## ")[0]
    lines = [line for line in block.splitlines() if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in lines]


def test_the_six_commands_work_in_turn(sdcli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    # Two classes of photos that differ by their colour, of which one can be sure.
    for place, name in ((0, "tulip"), (2, "rose")):
        for number in range(48):
            image = photo(number + 100 * place).convert("L")
            channels = [image if channel == place else image.point(lambda value: value // 4) for channel in range(3)]
            file = Path("photos" if number < 42 else "new-photos") / name / f"{name}{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.merge("RGB", channels).save(file)
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), "pretrained.safetensors")

    *commands, runner = commands_of(HEADING)
    assert [words[:2] for words in commands] == [
        ["sdcli", name] for name in ("train", "calibrate", "eval", "predict", "export")
    ]
    # The network is a small one, and its weights are here.
    train = ["test_resnet" if word == "tf_efficientnet_lite0" else word for word in commands[0]]
    train += ["--weights", "pretrained.safetensors", "--exits", "2", "--image-size", "32", "--workers", "0"]
    train += ["--epochs", "3", "--lr", "0.01"]
    # A promise needs more images than these few.
    calibrate = ["50" if word == "6" else word for word in commands[1]]
    said = {}
    for words in (train, calibrate, *commands[2:]):
        done = sdcli(*words[1:])
        assert done.code == 0, done.err
        said[words[1]] = done.out
        if words[1] == "eval":
            assert "has no test split: the validation split is scored" in done.err
            assert "note: early exit was calibrated on these images" in done.err
    assert "early exit" in said["eval"]
    rows = [line.split(",") for line in said["predict"].splitlines()[1:]]
    answers = {Path(row[0]).name: row[1] for row in rows}
    assert len(answers) == 12
    files = sorted(map(str, Path("new-photos").rglob("*.jpg")))
    assert (runner[0], runner[2]) == ("python", "new-photos/*.jpg")
    done = run([sys.executable, runner[1], *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {Path(row["file"]).name: row["label"] for row in found} == answers
    manifest = json.loads(Path("photos-onnx/manifest.json").read_text())
    assert manifest["calibration"]["promise"]["limit"] == 50
