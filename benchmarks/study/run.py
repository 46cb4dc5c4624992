"""Runs what is missing of a study: cells of network x regime x row x seed, each an `sdcli train` command.

    python benchmarks/study/run.py benchmarks/study/cifar100.toml --data ../shared/data/cifar100 --dry-run
    python benchmarks/study/run.py benchmarks/study/cifar100.toml --data ../shared/data/cifar100

`--lanes` cells run side by side, with one thread each; on a GPU, where the study names one, with as many as they like.
Ctrl-C or SIGTERM stops them with their state saved, and the same command resumes them. A finished cell is a small JSON
file in the folder that the study names, which `sdcli compare` reads; the run folders in `--runs` can then be deleted:
a cell that others start from is run once more, and gets a new record, if its weights are gone.
`--dry-run` prints what is missing, and about how long it takes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
STOPPED = (130, 143, 129)


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    network: str
    regime: str
    row: str
    seed: int
    epochs: int
    options: tuple[str, ...]
    """Of `sdcli train`."""
    start: str | None = None
    """The cell whose weights it starts from; None: random ones, or those that the options name."""
    teacher: str | None = None
    """The cell whose network teaches it; None: it has no second network."""
    cost: float = 1.0
    """The time of an epoch beside the baseline's, as long as none was measured."""
    calibrate: tuple[str, ...] = ()
    """Options of `sdcli calibrate`; without any, exits are not calibrated."""

    @property
    def name(self) -> str:
        return f"{self.network}/{self.regime}/{self.row}-seed{self.seed}"

    def command(self, dataset: str, runs: Path, pretrained: str | None = None, device: str = "cpu") -> list[str]:
        """The arguments of sdcli; a file of `pretrained` weights replaces those of the hub."""
        options, weights = list(self.options), None
        if self.start:
            weights = runs / self.start / "last.safetensors"
        elif "--pretrained" in options:
            weights = pretrained
        if weights:
            options = [*(option for option in options if option != "--pretrained"), "--weights", str(weights)]
        if self.teacher:
            options += ["--set", f"networks.teacher.weights={runs / self.teacher / 'last.safetensors'}"]
        if device != "cpu":
            options += ["--device", device]
        own = ["--seed", str(self.seed), "--workers", "0", "--resume", "auto", "--output", str(runs / self.name)]
        return ["train", *options, "--dataset", dataset, *own]


def read_study(file: Path) -> dict[str, Any]:
    """A study's tables; ends with a message for a file that is none."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"error: {file} cannot be read: {error}\n  expected: a study's file, such as cifar100.toml"
        ) from None


def read_cells(study: dict[str, Any]) -> list[Cell]:
    """The cells of a study, in the order in which they are run."""
    cells: dict[str, Cell] = {}
    check_names(study)
    for part in study["plan"]:
        for network in part.get("networks", study["networks"]):
            for regime in part["regimes"]:
                for seed in part["seeds"]:
                    for row in part["rows"]:
                        about, data, how = study["networks"][network], study["regimes"][regime], study["rows"][row]
                        epochs = round(data["epochs"] * how.get("epochs", 1))
                        options = [about["model"], *about["options"], *data["options"], *how["options"]]
                        options += ["--epochs", str(epochs), "--set", f"title={row}"]
                        start = f"{network}/{regime}/{how['start']}-seed{seed}" if "start" in how else None
                        teacher = None
                        if "teacher" in how:
                            teacher = f"{about['teacher']}/{regime}/{how['teacher']}-seed{seed}"
                            options += [
                                "--set",
                                f"networks.teacher.model={study['networks'][about['teacher']]['model']}",
                            ]
                        cost = how.get("cost", 1.0)
                        calibrate = tuple(how.get("calibrate", study.get("calibrate", ())))
                        cell = Cell(network, regime, row, seed, epochs, tuple(options), start, teacher, cost, calibrate)
                        cells.setdefault(cell.name, cell)
    return list(cells.values())


def check_names(study: dict[str, Any]) -> None:
    """Ends with a message where the plan names what the study does not have, or a row has a name that no file has."""
    for row in study["rows"]:
        if not re.fullmatch(r"[\w.+-]{1,100}", row):
            raise SystemExit(f"error: row {row!r}\n  expected: letters, digits and ._+-: it names a file")
    for part in study["plan"]:
        for kind in ("networks", "regimes", "rows"):
            for name in part.get(kind, ()):
                if name not in study[kind]:
                    known = ", ".join(study[kind])
                    raise SystemExit(f"error: the plan names {name!r}, which is none of [{kind}]\n  expected: {known}")


class Lanes:
    """Cells side by side, each a process of its own."""

    def __init__(self, study: dict[str, Any], cells: list[Cell], options: argparse.Namespace) -> None:
        self.study, self.cells, self.options = study, list(cells), options
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.lock = threading.Lock()
        self.stopping = False
        self.failed: list[str] = []

    def stop(self, *_: object) -> None:
        """Tells all runs to save their state and end."""
        self.stopping = True
        for process in list(self.running.values()):
            process.terminate()

    def lane(self) -> None:
        """Takes one cell after the other until none is left."""
        while not self.stopping and self.cells:
            cell = self.next_ready()
            if cell is None:
                if not self.running:
                    return
                time.sleep(1)
                continue
            start = time.monotonic()
            try:
                code = self.work(cell)
            except (OSError, ValueError, KeyError) as error:
                print(f"{cell.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                code = 1
            if self.stopping or code in STOPPED:
                return
            how = f"{(time.monotonic() - start) / 60:.1f} min" if code == 0 else f"exit code {code}"
            print(f"{cell.name}: {how}", flush=True)
            if code:
                self.failed.append(cell.name)

    def next_ready(self) -> Cell | None:
        """The next cell whose weights to start from and teacher are there; None where others have to end first."""
        with self.lock:
            for cell in self.cells:
                needed = [name for name in (cell.start, cell.teacher) if name]
                if all((self.options.runs / name / "report.json").exists() for name in needed):
                    self.cells.remove(cell)
                    return cell
        return None

    def work(self, cell: Cell) -> int:
        """Trains a cell unless it is trained, calibrates its exits if the study says how, scores it, and keeps its
        record."""
        run = self.options.runs / cell.name
        if not (run / "report.json").exists():
            code = self.call(cell, self.options.command(cell), "train.log")
            if code:
                return code
        checkpoint = run / f"{self.study['checkpoint']}.safetensors"
        exits = json.loads((run / "report.json").read_text(encoding="utf-8"))["exits"]
        if cell.calibrate and len(exits) > 1:
            how = ["calibrate", str(checkpoint), *cell.calibrate, "--device", device_of(self.study)]
            code = self.call(cell, how, "calibrate.log")
            if code:
                return code
        save = ["compare", str(checkpoint), "--save", str(record_of(self.study, cell).parent)]
        save += ["--device", device_of(self.study)]
        return self.call(cell, save, "score.log")

    def call(self, cell: Cell, arguments: list[str], log: str) -> int:
        """Runs sdcli, on a CPU with one thread; what it prints goes into a file beside the run."""
        place = self.options.runs / "logs" / cell.name
        place.mkdir(parents=True, exist_ok=True)
        with (place / log).open("ab") as file:
            command = [sys.executable, "-m", "sdcli", *arguments]
            threads = ONE_THREAD if device_of(self.study) == "cpu" else {}
            process = subprocess.Popen(command, env=os.environ | threads, stdout=file, stderr=file, process_group=0)
            self.running[cell.name] = process
            if self.stopping:
                process.terminate()
            code = process.wait()
            del self.running[cell.name]
        return code


def give_way() -> None:
    """Lets everything else on this machine go first; on Linux `nice` alone acts only within one session."""
    os.nice(19)
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text("19", encoding="ascii")


def device_of(study: dict[str, Any]) -> str:
    """Where the cells run: "cpu", or the GPU that the study names."""
    return str(study.get("device", "cpu"))


def record_of(study: dict[str, Any], cell: Cell) -> Path:
    """The file of a finished cell."""
    return Path(study["results"]) / f"{cell.name}.json"


def needed_again(study: dict[str, Any], missing: list[Cell], runs: Path) -> list[Cell]:
    """The cells that have a record, but whose weights some of the missing ones need and are no longer in `runs`."""
    again: list[Cell] = []
    while True:
        # Of those that are run again too.
        needed = {name for cell in (*missing, *again) for name in (cell.start, cell.teacher) if name}
        gone = [cell for cell in read_cells(study) if cell.name in needed and cell not in (*missing, *again)]
        gone = [cell for cell in gone if not (runs / cell.name / "report.json").exists()]
        if not gone:
            return again
        again = gone + again


def expected_hours(study: dict[str, Any], cells: list[Cell], missing: list[Cell]) -> float:
    """Hours of one core, or of one GPU, for what is missing.

    A cell that was measured stands for others with its row, or else the longest of its network and regime; before
    anything was measured, the images per second that the study names.
    """
    known: dict[tuple[str, str, str], float] = {}
    for cell in cells:
        if (record := record_of(study, cell)).exists():
            cost = json.loads(record.read_text(encoding="utf-8"))["training"]
            if not cost:
                continue
            # The time of a core, if it is known: a run may have been stopped for a while, or have had company.
            known[cell.network, cell.regime, cell.row] = (cost.get("cpu_seconds") or cost["seconds"]) / cell.epochs
    total = 0.0
    for cell in missing:
        place = cell.network, cell.regime
        alike = [cost for (network, regime, _), cost in known.items() if (network, regime) == place]
        guess = max(alike, default=study["regimes"][cell.regime]["images"] / study["networks"][cell.network]["speed"])
        total += cell.epochs * known.get((cell.network, cell.regime, cell.row), guess * cell.cost)
    return total / 3600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="a study's file, such as benchmarks/study/cifar100.toml")
    parser.add_argument("--data", help="the data set's folder, if it is on this machine")
    parser.add_argument("--weights", help="a file in place of the hub's pretrained weights")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="where run folders go")
    parser.add_argument("--lanes", type=int, default=2, help="cells at once, one thread each")
    parser.add_argument("--only", default="", help="only cells whose names contain this")
    parser.add_argument("--dry-run", action="store_true", help="print what is missing")
    options = parser.parse_args()
    if options.lanes < 1:
        parser.error("--lanes: at least 1")
    study = read_study(options.study)
    place = options.data or study["dataset"], options.runs, options.weights, device_of(study)
    options.command = lambda cell: cell.command(*place)
    cells = [cell for cell in read_cells(study) if options.only in cell.name]
    if not cells:
        parser.error(f"--only {options.only}: no cell of the plan has this in its name")
    missing = [cell for cell in cells if not record_of(study, cell).exists()]
    print(f"{len(cells) - len(missing)} of {len(cells)} cells are done, {len(missing)} are missing:")
    if again := needed_again(study, missing, options.runs):
        print("run once more, for their weights: " + ", ".join(cell.name for cell in again))
    missing = again + missing
    hours = expected_hours(study, cells, missing)
    one = "core" if device_of(study) == "cpu" else "GPU"
    print(f"about {hours:.1f} h of one {one}, {hours / options.lanes:.1f} h in {options.lanes} lanes", flush=True)
    if options.dry_run:
        for cell in missing:
            print(shlex.join(["sdcli", *options.command(cell)]))
        return 0
    give_way()
    lanes = Lanes(study, missing, options)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lanes.stop)
    threads = [threading.Thread(target=lanes.lane) for _ in range(options.lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in lanes.failed:
        print(f"failed: {name}; see {options.runs}/logs/{name}", file=sys.stderr)
    if lanes.cells and not lanes.stopping:
        print("waiting for others: " + ", ".join(cell.name for cell in lanes.cells), file=sys.stderr)
    return 1 if lanes.failed or (lanes.cells and not lanes.stopping) else 0


if __name__ == "__main__":
    sys.exit(main())
