"""Command lines that cannot be parsed: one message in the form of all others, exit code 2."""

from __future__ import annotations

import re
import shlex

import pytest
import typer
from conftest import Command, refused

from sdcli.cli import app
from sdcli.cli.timm_flags import ELSEWHERE, OTHERS, TIMM
from sdcli.cli.usage import _options
from sdcli.method.losses import LOSSES
from sdcli.recipe.explain import keys_at

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]
COMMANDS += [group.name for group in app.registered_groups]

OPTIONS = {name: _options(command) for name, command in typer.main.get_command(app).commands.items()}
NAMED = [
    "--model",
    "--data-dir",
    "--dataset-download",
    "--amp",
    "--sched",
    "--opt",
    "--weight-decay",
    "--mixup",
    "--cutmix",
    "--smoothing",
    "--checkpoint",
    "--initial-checkpoint",
    "--model-ema",
    "--warmup-epochs",
    "--min-lr",
    "--momentum",
    "--clip-grad",
    "--hflip",
    "--reprob",
    "--aa",
    "--drop",
    "--drop-path",
    "--num-classes",
    "--img-size",
    "--input-size",
    "--val-split",
    "--train-split",
    "--log-interval",
    "--experiment",
    "--world-size",
    "--local-rank",
    "--start-epoch",
    "--decay-epochs",
    "--decay-milestones",
    "--decay-rate",
    "--class-map",
    "--use-multi-epochs-loader",
    "--channels-last",
    "--torchcompile",
    "--sync-bn",
    "--model-kwargs",
]
"""Options of timm's train.py that a timm user is likely to type."""

MESSAGES = {
    "train resnet18 --amp": (
        "--amp is timm's: sdcli has --precision bf16\n  expected: an option that sdcli train --help lists"
    ),
    "train resnet18 --channels-last": (
        "--channels-last is timm's: sdcli has --memory-format channels-last\n"
        "  expected: an option that sdcli train --help lists"
    ),
    "train resnet18 --weight-decay 0.05": (
        "--weight-decay is timm's: sdcli has --set optimizer.weight_decay=0.05\n"
        "  expected: an option that sdcli train --help lists"
    ),
    "train resnet18 --weight-decay=0.05": (
        "--weight-decay is timm's: sdcli has --set optimizer.weight_decay=0.05\n"
        "  expected: an option that sdcli train --help lists"
    ),
    "train resnet18 --local_rank 0": (
        "--local-rank is timm's: sdcli leaves processes to a launcher: torchrun --nproc-per-node N -m sdcli train MODEL\n"
        "  expected: an option that sdcli train --help lists"
    ),
    "train --model resnet50": (
        "--model is timm's: sdcli takes the model as an argument: sdcli train resnet50\n"
        "  expected: an option that sdcli train --help lists"
    ),
    "train resnet18 --imgsz 64": (
        "no option --imgsz: sdcli has --image-size 64\n  expected: an option that sdcli train --help lists"
    ),
    "eval runs/first --amp": (
        "--amp is timm's: sdcli train has --precision bf16\n  expected: an option that sdcli eval --help lists"
    ),
    "eval --checkpoint best.safetensors": (
        "--checkpoint is timm's: sdcli takes the checkpoint as an argument: sdcli eval best.safetensors\n"
        "  expected: an option that sdcli eval --help lists"
    ),
    "inspect --model resnet50": (
        "--model is timm's: sdcli takes the model as an argument: sdcli inspect resnet50\n"
        "  expected: an option that sdcli inspect --help lists"
    ),
    "train resnet18 --batch_size 32": (
        "sdcli train has no option --batch_size\n"
        "  expected: an option that sdcli train --help lists\n"
        "  fix:      did you mean '--batch-size'?"
    ),
    "train resnet18 -epochs 3": (
        "sdcli train has no option -epochs\n"
        "  expected: an option that sdcli train --help lists\n"
        "  fix:      did you mean '--epochs'?"
    ),
    "train resnet18 --split test": (
        "sdcli train has no option --split\n"
        "  expected: an option that sdcli train --help lists\n"
        "  fix:      --split is an option of sdcli eval"
    ),
    "recipes show byot --plan": (
        "sdcli recipes show has no option --plan\n"
        "  expected: an option that sdcli recipes show --help lists\n"
        "  fix:      did you mean '--plain'?"
    ),
    "train resnet18 --epochs": "--epochs has no value\n  expected: an integer of 1 or more",
    "train resnet18 --pretrained=yes": "--pretrained takes no value\n  expected: --pretrained",
    "train --help=me": "--help takes no value\n  expected: --help",
    "train resnet18 --epochs ten": "invalid value: --epochs ten\n  expected: an integer of 1 or more",
    "train resnet18 -b 0": "invalid value: --batch-size 0\n  expected: an integer of 1 or more",
    "train resnet18 --lr fast": "invalid value: --lr fast\n  expected: a number",
    "train resnet18 --val-fraction 2": "invalid value: --val-fraction 2\n  expected: a number from 0 to 0.9",
    "train resnet18 --precision bf61": (
        "invalid value: --precision bf61\n  expected: one of fp32, bf16, fp16\n  fix:      did you mean 'bf16'?"
    ),
    "train resnet18 --image-size 100000": "invalid value: --image-size 100000\n  expected: an integer from 1 to 4096",
    "inspect resnet18 --image-size 100000": "invalid value: --image-size 100000\n  expected: an integer from 1 to 4096",
    "inspect resnet18 --num-classes 10000000": (
        "invalid value: --num-classes 10000000\n  expected: an integer from 1 to 100000"
    ),
    "eval": (
        "RUN|MODEL is missing\n  expected: a run folder (its best checkpoint, or the last one where none was chosen), a "
        ".safetensors file, or a timm model with --weights or --pretrained\n  fix:      sdcli eval runs/first"
    ),
    "trian resnet18": (
        f"sdcli has no command 'trian'\n  expected: one of {', '.join(COMMANDS)}\n  fix:      did you mean 'train'?"
    ),
    "recipes chek": (
        "sdcli recipes has no command 'chek'\n"
        "  expected: one of list, show, copy, check, diff, losses, heads, signals, policies\n"
        "  fix:      did you mean 'check'?"
    ),
    "train resnet18 resnet50": (
        "unexpected argument 'resnet50'\n  expected: sdcli train MODEL\n  fix:      sdcli train --help"
    ),
}
EXPECTED = "  expected: options as --NAME VALUE, keys of the recipe as --set KEY=VALUE\n"
MISPLACED = {
    "train resnet18 head=linear": "--head linear",
    "train head=linear": "--head linear",
    "train resnet18 lr=0.1": "--lr 0.1",
    "train resnet18 weight_decay=0.05": "--set optimizer.weight_decay=0.05",
    "train resnet18 losses.soft.weight=0.5": "--set losses.soft.weight=0.5",
    "train resnet18 branches=3": "--set networks.student.branches=3",
    "train resnet18 data=photos": "--dataset photos",
    "train model=resnet18": "sdcli train resnet18",
    "train resnet18 colour=red": "sdcli train --help",
    "recipes show byot epochs=30": "--set epochs=30",
    "recipes check byot.toml lr=0.1": "--set optimizer.lr=0.1",
}


@pytest.mark.parametrize("line", MESSAGES)
def test_a_command_line_that_cannot_be_parsed_is_explained(line: str, sdcli: Command) -> None:
    refused(sdcli(*shlex.split(line)), MESSAGES[line])


@pytest.mark.parametrize("line", MISPLACED)
def test_key_and_value_without_an_option_are_sent_to_one(line: str, sdcli: Command) -> None:
    result = sdcli(*shlex.split(line))
    assert result.code == 2 and result.err.startswith("error: unexpected argument '")
    assert result.err.endswith(f"{EXPECTED}  fix:      {MISPLACED[line]}\n")


@pytest.mark.parametrize("flag", sorted({*NAMED, *TIMM, *OTHERS}))
def test_an_option_of_another_trainer_is_answered_with_ours(flag: str, sdcli: Command) -> None:
    result = sdcli("train", "resnet18", flag, "7")
    whose = f"{flag} is timm's" if flag not in OTHERS else f"no option {flag}"
    assert result.code == 2 and result.err.startswith(f"error: {whose}: sdcli ")
    assert flag not in OPTIONS["train"]


def test_what_is_named_in_their_place_exists() -> None:
    answers = [(None, answer) for answer in [*TIMM.values(), *OTHERS.values()]]
    answers += [(command, answer) for command, table in ELSEWHERE.items() for answer in table.values()]
    keys = [key for _, answer in answers for key in re.findall(r"--set '?([\w.]+)=", answer)]
    assert len(keys) > 20
    for key in keys:
        *table, name = key.split(".")
        if table[0] == "losses":
            assert name in LOSSES.entries["cross_entropy"].options
        elif table[-1] != "model_args":
            assert name in keys_at(table), key
    everywhere = {option for options in OPTIONS.values() for option in options} | {"--nproc-per-node"}
    for command, answer in answers:
        known = OPTIONS[command] if command else everywhere
        assert set(re.findall(r"--[a-z][\w-]*", answer)) <= {*known}, answer


def test_a_command_without_arguments_prints_its_help(sdcli: Command) -> None:
    result = sdcli("recipes")
    assert result.code == 2 and "Usage:" in result.out and result.err == ""
