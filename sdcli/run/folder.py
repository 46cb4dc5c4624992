"""The run folder: resolved recipe, log, checkpoints, report.

recipe.toml        the resolved recipe: `--recipe RUN/recipe.toml` trains the same again
run.json           the command's other choices: model, data set, seed
log.jsonl          one line per epoch
summary.csv        the same for a spreadsheet, in timm's columns plus one per exit
last.safetensors   after the last epoch
best.safetensors   the best on the validation split, where there is one
report.json        how that checkpoint scores
state/last.pt      where the run stands, for `--resume` (`state.py`)
state/previous.pt  the state saved before it
curves.png         losses and accuracies by epoch, where there is matplotlib (`cli/plots.py`)
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sdcli.errors import UserError, did_you_mean
from sdcli.evaluation.evaluate import Report
from sdcli.files import replacing
from sdcli.network.checkpoint import Description, save_checkpoint

EARLY = {"recipe.toml", "run.json", "state"}
"""What a run writes before its first state is whole."""


class Run:
    """A run folder. Every process knows where it is; only the first one keeps the log, and writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: list[dict[str, Any]] = []
        self._log = ""

    def begin(self) -> None:
        """Makes the folder; raises UserError where it already holds anything."""
        check_output(self.folder)
        make_folder(self.folder)

    def go_on(self, epochs: int) -> None:
        """Goes on after `epochs` whole ones: what the log tells of later ones is forgotten."""
        for line in read_log(self.folder)[:epochs]:
            self._remember(line)
        self._write_log()

    @property
    def state(self) -> Path:
        """The file that `--resume` reads."""
        return state_file(self.folder)

    def write_recipe(self, text: str) -> None:
        """The resolved recipe, which `--recipe` takes again."""
        write_text(self.folder / "recipe.toml", text)

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """What the command line chose beside the recipe."""
        write_text(self.folder / "run.json", json.dumps(settings, indent=2) + "\n")

    def log_epoch(self, line: Mapping[str, Any]) -> None:
        """Adds an epoch to `log.jsonl` and `summary.csv`."""
        self._remember(line)
        self._write_log()

    def _remember(self, line: Mapping[str, Any]) -> None:
        self._log += json.dumps(line) + "\n"
        self._rows.append(_summary_row(line))

    def _write_log(self) -> None:
        write_text(self.folder / "log.jsonl", self._log)
        columns = list(dict.fromkeys(column for row in self._rows for column in row))
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, columns)
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self.folder / "summary.csv", table.getvalue())

    def save(self, name: str, tensors: Mapping[str, Tensor], description: Description) -> Path:
        """Writes `last` or `best`."""
        path = self.folder / f"{name}.safetensors"
        save_checkpoint(path, tensors, description)
        return path

    def write_report(self, report: Report, checkpoint: str) -> None:
        """How `checkpoint` scores."""
        write_text(
            self.folder / "report.json", json.dumps({"checkpoint": checkpoint, **report.to_dict()}, indent=2) + "\n"
        )


def check_output(folder: Path) -> None:
    """Raises UserError where a run's folder already holds anything: nothing is ever overwritten.

    What a run has left that died before its first state does not count."""
    if not folder.exists() or (folder.is_dir() and (not any(folder.iterdir()) or _never_began(folder))):
        return
    if state_file(folder).exists():
        raise UserError(
            f"output '{folder}' holds a run already",
            "a new or empty folder",
            f"another --output, or go on with it: sdcli train --resume {folder}",
        )
    what = "holds a run already" if (folder / "recipe.toml").exists() else "is not an empty folder"
    raise UserError(
        f"output '{folder}' {what}", "a new or empty folder", f"another --output, or remove it: rm -r {folder}"
    )


def _never_began(folder: Path) -> bool:
    """Whether a run died here before its first state was whole: it has left these files and nothing else."""
    left = {path.name for path in folder.iterdir() if not path.name.endswith(".tmp")}
    return (not left or "run.json" in left <= EARLY) and not state_file(folder).exists()


def state_file(folder: Path) -> Path:
    """Where a run keeps its state."""
    return folder / "state" / "last.pt"


def make_folder(folder: Path) -> None:
    """Raises UserError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output '{folder}' cannot be made: {error.strerror}", "a folder to write to") from None


def read_settings(folder: Path) -> dict[str, Any]:
    """What the command line of a run chose; raises UserError where the folder holds no run that can go on."""
    settings = folder / "run.json"
    if not state_file(folder).exists() or not settings.exists():
        runs = sorted(path.parents[1] for path in folder.parent.glob("*/state/last.pt"))
        # By name alone: in a long path any two folders are alike.
        near = [str(run) for run in runs if did_you_mean(folder.name, [run.name])]
        raise UserError(
            f"'{folder}' holds no run to resume",
            "a run folder of sdcli train, with state/last.pt",
            did_you_mean(str(folder), near) or f"sdcli train MODEL --dataset DATA --output {folder} starts one",
        )
    try:
        table: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(settings, error) from None
    return table


def read_log(folder: Path) -> list[dict[str, Any]]:
    """One table per epoch; none where nothing is logged yet."""
    path = folder / "log.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    except ValueError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: ValueError) -> UserError:
    return UserError(f"'{path}' is not what a run has written: {error}", "the file as the run wrote it", "put it back")


def write_text(path: Path, text: str) -> None:
    """Raises UserError where it cannot be written; the file is then as it was."""
    try:
        with replacing(path) as beside:
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"'{path}' cannot be written: {error.strerror}", "a folder with room to write to") from None


def _summary_row(line: Mapping[str, Any]) -> dict[str, Any]:
    """An epoch in timm's columns: `epoch, train_*, eval_*, lr`, and one `eval_top1_POINT` per exit."""
    row: dict[str, Any] = {"epoch": line["epoch"], "train_loss": line["loss"]}
    row |= {f"train_loss_{name}": value for name, value in line["losses"].items()}
    validation = line.get("validation")
    if validation:
        scored = [*validation["exits"], *([validation["ensemble"]] if validation["ensemble"] else [])]
        final = validation["exits"][-1]
        row |= {"eval_loss": final["nll"], "eval_top1": final["top1"], "eval_top5": final["top5"]}
        row |= {f"eval_top1_{result['point']}": result["top1"] for result in scored}
    return row | {"lr": line["lr"]}
