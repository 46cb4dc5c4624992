"""All that a page and a card say about one run, from one pass over its images."""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli.data.dataset import Split
from sdcli.devices import accelerator_for, short_of_memory
from sdcli.evaluation.answers import Answers, answer, nothing
from sdcli.evaluation.early import Early, Watch
from sdcli.evaluation.evaluate import ExitResult, Report, report_of
from sdcli.evaluation.opened import open_checkpoint
from sdcli.evaluation.scoring import check_finite
from sdcli.export.card import license_of
from sdcli.network.checkpoint import Description
from sdcli.run.folder import read_log
from sdcli.run.settings import Settings
from sdcli.toml import write


@dataclass(frozen=True)
class Findings:
    """One run: what it is, how it was trained, and what it answers to the images of a split."""

    name: str
    shown: str
    """The run in commands: its path, or its name alone where the path is absolute."""
    path: Path
    about: Description
    report: Report
    answers: Answers
    split: Split
    early: Early | None
    log: list[dict[str, Any]]
    """One table per epoch; empty for a checkpoint without a run folder."""
    settings: dict[str, Any]
    """Of `run.json`, where there is one."""
    notes: tuple[str, ...]
    license: str
    """Of the pretrained weights that it was trained from; `UNKNOWN` where nobody has stated one."""

    @property
    def classes(self) -> tuple[str, ...]:
        return self.about.blueprint.classes

    @property
    def points(self) -> list[str]:
        """The exits that were scored, shallowest first."""
        return [result.point for result in self.report.exits]

    @property
    def rows(self) -> tuple[ExitResult, ...]:
        """All exits, the ensemble where there are several, and early exit where images may leave."""
        return self.report.rows + ((self.early.result,) if self.early and self.early.leaves else ())

    @property
    def recipe(self) -> str:
        """The resolved recipe as TOML, without paths."""
        return write(self.about.recipe) if self.about.recipe else ""

    @property
    def recipe_name(self) -> str:
        """What the recipe was asked for by, else its title."""
        return str(self.settings.get("label") or self.about.recipe.get("title") or "")

    @property
    def saved(self) -> datetime.date:
        """The day on which the checkpoint was written."""
        return datetime.date.fromtimestamp(self.path.stat().st_mtime)

    @property
    def command(self) -> str:
        """The command that repeats the run from its recipe; "" where its settings are not known."""
        folder = self.shown.removesuffix(f"/{self.path.name}")
        return _command(self.settings, folder) if self.settings else ""


def examine(
    checkpoint: Path,
    path: Path,
    *,
    dataset: str | None = None,
    split: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    limit: int | None = None,
    batch_size: int = 256,
    device: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Findings:
    """Scores all exits of the checkpoint at `path`, which the user has named `checkpoint`, and early exit beside them.

    The images are those that `sdcli eval` scores, seen once. Raises UserError as `score_checkpoint` does.
    """
    opened = open_checkpoint(path, dataset=dataset, image_key=image_key, label_key=label_key)
    network, blueprint = opened.network, opened.about.blueprint
    name, notes = opened.choose(split)
    accelerator = accelerator_for(device)
    chosen, loader, loader_notes = opened.batches(name, limit, batch_size, workers, accelerator.device)
    watch = Watch(network.calibration, blueprint) if network.calibration else None
    at_once = min(batch_size, len(chosen))
    doing, smaller = f"on {accelerator.device} with {at_once} images at a time", f"--batch-size {at_once // 2}"
    with short_of_memory(doing, "a network and a batch that fit", smaller if at_once > 1 else "another --device"):
        answers = answer(
            network.to(accelerator.device),
            loader,
            points=network.classifiers,
            device=accelerator.device,
            progress=lambda done: progress(done, len(chosen)),
            beside=watch or nothing,
        )
    model = blueprint.architecture.model
    costs = blueprint.costs(network.classifiers)
    report = report_of(answers, costs, model=model, dataset=opened.name, split=name)
    check_finite(report, path)
    folder = path.parent
    return Findings(
        name=folder.resolve().name if (folder / "run.json").is_file() else path.stem,
        shown=_shown(checkpoint),
        path=path,
        about=opened.about,
        report=report,
        answers=answers,
        split=chosen,
        early=watch.early(answers) if watch else None,
        log=read_log(folder) if (folder / "run.json").is_file() else [],
        settings=_settings(folder, opened.about.dataset.seed),
        notes=(*opened.notes, *notes, *loader_notes),
        license=license_of(network, opened.about),
    )


def _shown(checkpoint: Path) -> str:
    if not checkpoint.is_absolute():
        return str(checkpoint)
    return f"{checkpoint.parent.name}/{checkpoint.name}" if checkpoint.is_file() else checkpoint.name


def _settings(folder: Path, split_seed: int) -> dict[str, Any]:
    """What `run.json` says; empty where there is none, or one that cannot be read."""
    try:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    # Runs of older versions have one seed for both.
    return {"split_seed": split_seed, **found} if isinstance(found, dict) else {}


LOCAL = ("device", "workers", "save_every", "keep_every", "track", "memory_format", "imports", "weights_file", "label")
"""Settings of a machine rather than of a run."""


def _command(settings: Mapping[str, Any], run: str) -> str:
    """`sdcli train` with the settings that differ from the defaults. Folders of the machine are cut to their names."""
    data = Path(str(settings.get("dataset", "DATA")))
    parts = [
        "sdcli",
        "train",
        str(settings.get("model", "MODEL")),
        "--dataset",
        data.name if data.is_absolute() else str(data),
    ]
    parts += ["--recipe", f"{run}/recipe.toml"]
    defaults = vars(Settings(model="", dataset=""))
    for name, default in defaults.items():
        value = settings.get(name, default)
        if name in LOCAL or name in ("model", "dataset") or value == default or value is None:
            continue
        parts += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    for file in settings.get("imports") or []:
        parts += ["--import", Path(str(file)).name]
    return shlex.join(parts)
