"""The run folder: resolved recipe, log, checkpoints, report.

recipe.toml        the resolved recipe: `--recipe RUN/recipe.toml` trains with it again
run.json           the settings outside the recipe: model, data set, seed, …
log.jsonl          one line per epoch
summary.csv        the same as a table, with timm's columns plus one per exit
last.safetensors   the weights after the latest epoch
best.safetensors   the weights of the best epoch, if there is a validation split
report.json        the scores of best.safetensors, or else of last.safetensors
state/last.pt      the training state, for `--resume` (`state.py`)
state/previous.pt  the training state saved before it
state/lock         locked while a process trains the run (`lock.py`)
curves.png         losses and accuracies by epoch, if matplotlib is installed (`cli/plots.py`)
report.html        the page of `sdcli report`, and README.md its model card (`sdcli.report`)
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from sdcli.errors import UserError, did_you_mean
from sdcli.evaluation.evaluate import Report
from sdcli.files import remove_temporary, replacing
from sdcli.network.checkpoint import Description, save_checkpoint
from sdcli.run.lock import Lock

FOUND = "found.toml"
"""The resolved recipe with the weights that found themselves as numbers."""

LOG, SUMMARY = "log.jsonl", "summary.csv"

IN_LOG = {"epoch", "lr", "loss", "losses", "num_images", "seconds", "images_per_s", "validation"}
"""What every line of the log has."""

EARLY = {"recipe.toml", "run.json", "state"}
"""The files that a run writes before its first state is complete."""

WRITABLE = "a writable run folder, on a disk with free space"


class Run:
    """A run folder. Every process has its path; only the first process locks it and writes to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = Lock(lock_file(folder))
        self._columns: list[str] = []

    def begin(self) -> None:
        """Creates the folder and locks it; raises UserError if it is not empty or another process writes to it."""
        _check_empty(self.folder)
        make_folder(self.folder)
        self.lock()
        # Another process may have started and finished a run here since the first check.
        _check_empty(self.folder)

    def lock(self) -> None:
        """Locks the folder until `unlock` or the end of this process; raises UserError if another process holds it."""
        if self._lock.take(self.folder):
            for folder in (self.folder, self.state.parent):
                remove_temporary(folder)

    def unlock(self) -> None:
        self._lock.release()

    def go_on(self, epochs: int, of: int) -> None:
        """Truncates the log to the first `epochs` epochs, and removes the report of an earlier end if there are to be
        more; raises UserError if the log has fewer."""
        log = read_log(self.folder)
        if len(log) < epochs:
            raise damaged(self.folder / LOG, f"it has {len(log)} of {epochs} epochs")
        with writing(self.folder / LOG) as path:
            write_text(path, "".join(map(_log_line, log[:epochs])))
        if epochs < of:
            with writing(self.folder / "report.json") as path:
                path.unlink(missing_ok=True)
        self._write_summary(log[:epochs])

    @property
    def state(self) -> Path:
        """The file that `--resume` reads."""
        return state_file(self.folder)

    def write_recipe(self, text: str) -> None:
        """Writes the resolved recipe, which `--recipe` accepts."""
        with writing(self.folder / "recipe.toml") as path:
            write_text(path, text)

    def write_found(self, text: str) -> None:
        """Writes the recipe with the weights that were found as numbers."""
        with writing(self.folder / FOUND) as path:
            write_text(path, text)

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Writes the settings that are not in the recipe."""
        with writing(self.folder / "run.json") as path:
            write_text(path, json.dumps(settings, indent=2) + "\n")

    def log_epoch(self, line: Mapping[str, Any]) -> None:
        """Adds an epoch to `log.jsonl` and `summary.csv`; raises UserError if they cannot be written."""
        with writing(self.folder / LOG) as path:
            append_text(path, _log_line(line))
        row = _summary_row(line)
        if set(row) <= set(self._columns):
            with writing(self.folder / SUMMARY) as path:
                append_text(path, _csv([row], self._columns))
        else:
            self._write_summary(read_log(self.folder))

    def _write_summary(self, log: Sequence[Mapping[str, Any]]) -> None:
        rows = [_summary_row(line) for line in log]
        self._columns = list(dict.fromkeys(column for row in rows for column in row))
        with writing(self.folder / SUMMARY) as path:
            write_text(path, _csv([dict(zip(self._columns, self._columns, strict=True)), *rows], self._columns))

    def save(self, name: str, tensors: Mapping[str, Tensor], description: Description) -> Path:
        """Writes the checkpoint `name`: `last`, `best`, or `epoch` with a number."""
        with writing(self.folder / f"{name}.safetensors") as path:
            save_checkpoint(path, tensors, description)
        return path

    def write_report(self, report: Report, checkpoint: str, epoch: int, best_epochs: Mapping[str, int]) -> None:
        """Writes `report.json`: the scores of `checkpoint`, its epoch, and the best epoch of each point."""
        table = {"checkpoint": checkpoint, "epoch": epoch, "best_epochs": dict(best_epochs), **report.to_dict()}
        with writing(self.folder / "report.json") as path:
            write_text(path, json.dumps(table, indent=2) + "\n")


def check_output(folder: Path, dataset: str) -> None:
    """Raises UserError if a new run cannot use this folder: another process trains in it, it is not empty, or it
    overlaps with the folder of a local `dataset`.

    Nothing is ever overwritten, except the leftovers of a run that died before it saved its first state.
    """
    data = Path(dataset)
    # The whole disk is no data set, which is said where it is opened.
    if data.is_absolute() and data != data.parent and os.path.isdir(data):
        _check_apart(folder, data.resolve())
    if (lock := lock_file(folder)).exists():
        probe = Lock(lock)
        probe.take(folder)
        probe.release()
    _check_empty(folder)


def _check_apart(folder: Path, data: Path) -> None:
    output, runs = folder.resolve(), Path("runs")
    if output == data:
        where = "is the data set's folder"
    elif output.is_relative_to(data):
        where = f"is inside the data set's folder, '{data}'"
    elif data.is_relative_to(output):
        where = f"contains the data set's folder, '{data}'"
    else:
        return
    if runs.resolve().is_relative_to(data):
        runs = data.parent / "runs"
    free = _free(runs / (output.name or "run"))
    raise UserError(f"output '{folder}' {where}", "a folder outside the data set", f"--output {free}")


def _check_empty(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and (not any(folder.iterdir()) or _never_began(folder))):
        return
    another = f"--output {_free(folder)}"
    if state_file(folder).exists():
        raise UserError(
            f"output '{folder}' already holds a run",
            "a new or empty folder",
            f"{another}, or resume the run: sdcli train --resume {folder}",
        )
    what = "already holds a run" if (folder / "recipe.toml").exists() else "is not an empty folder"
    raise UserError(f"output '{folder}' {what}", "a new or empty folder", another)


def _free(folder: Path) -> Path:
    """`folder` if it does not exist, or else the first of `folder-2`, `folder-3`, … that does not exist."""
    # "." and "/" have no name to append a number to.
    stem = folder if folder.name else folder / "run"
    names = chain([stem], (stem.with_name(f"{stem.name}-{number}") for number in count(2)))
    return next(path for path in names if not path.exists())


def _never_began(folder: Path) -> bool:
    """Whether the folder holds only the leftovers of a run that died before its first state was complete."""
    left, state = _names(folder), _names(folder / "state")
    return (left <= {"state"} or "run.json" in left <= EARLY) and state <= {"lock"}


def _names(folder: Path) -> set[str]:
    """The names of a folder's entries, without temporary files."""
    return {path.name for path in folder.iterdir() if not path.name.endswith(".tmp")} if folder.is_dir() else set()


def state_file(folder: Path) -> Path:
    """The file that holds a run's training state."""
    return folder / "state" / "last.pt"


def lock_file(folder: Path) -> Path:
    """The file that is locked while a process trains the run."""
    return folder / "state" / "lock"


def make_folder(folder: Path) -> None:
    """Creates a run folder; raises UserError if that fails."""
    try:
        state_file(folder).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output '{folder}' cannot be created: {error.strerror}", "a writable folder") from None


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings in a run's `run.json`; raises UserError if the folder holds no run that can be resumed."""
    settings = folder / "run.json"
    if not state_file(folder).exists() or not settings.exists():
        runs = sorted(path.parents[1] for path in folder.parent.glob("*/state/last.pt"))
        # Only the names are compared: any two long paths in the same parent folder look alike.
        near = [str(run) for run in runs if did_you_mean(folder.name, [run.name])]
        raise UserError(
            f"'{folder}' holds no run to resume",
            "a run folder of sdcli train, with state/last.pt",
            did_you_mean(str(folder), near) or f"start one: sdcli train MODEL --dataset DATA --output {folder}",
        )
    try:
        table: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(settings, error) from None
    return table


def read_log(folder: Path) -> list[dict[str, Any]]:
    """One table per epoch; an empty list if nothing is logged yet.

    An incomplete last line is ignored: its writer was killed, or is still writing it.
    """
    path = folder / LOG
    log: list[dict[str, Any]] = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            table = json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise damaged(path, f"line {number}: {error}") from None
            break
        missing = IN_LOG - table.keys() if isinstance(table, dict) else IN_LOG
        if missing:
            raise damaged(path, f"line {number} lacks {', '.join(sorted(missing))}")
        log.append(table)
    return log


def damaged(path: Path, reason: object) -> UserError:
    """The error for a file of a run that is not as it was written."""
    return UserError(f"'{path}' is damaged: {reason}", "the file as the run wrote it", "restore it from a copy")


def _log_line(line: Mapping[str, Any]) -> str:
    return json.dumps(line) + "\n"


def _csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    table = io.StringIO(newline="")
    csv.DictWriter(table, columns).writerows(rows)
    return table.getvalue()


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Turns an error while writing a file of the run into a UserError."""
    try:
        yield path
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        resume = f", then: sdcli train --resume {path.parent}" if state_file(path.parent).exists() else ""
        raise UserError(
            f"'{path}' cannot be written: {reason}", WRITABLE, f"free space or make it writable{resume}"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Replaces the file; if that fails, it stays as it was."""
    with replacing(path) as beside:
        beside.write_bytes(text.encode())


def append_text(path: Path, text: str) -> None:
    """Appends to the file and syncs it to the disk; if that fails, its last line may be incomplete."""
    with path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _summary_row(line: Mapping[str, Any]) -> dict[str, Any]:
    """An epoch in timm's columns (`epoch, train_*, eval_*, lr`), plus one `eval_top1_POINT` per exit."""
    row: dict[str, Any] = {"epoch": line["epoch"], "train_loss": line["loss"]}
    row |= {f"train_loss_{name}": value for name, value in line["losses"].items()}
    validation = line.get("validation")
    if validation:
        scored = [*validation["exits"], *([validation["ensemble"]] if validation["ensemble"] else [])]
        final = validation["exits"][-1]
        row |= {"eval_loss": final["nll"], "eval_top1": final["top1"], "eval_top5": final["top5"]}
        row |= {f"eval_top1_{result['point']}": result["top1"] for result in scored}
    return row | {"lr": line["lr"]}
