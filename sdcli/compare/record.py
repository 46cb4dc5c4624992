"""What is known about a finished run: all that comparing it needs, in a few kilobytes."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from errno import ENOTDIR
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from sdcli import __version__
from sdcli.devices import accelerator_for
from sdcli.errors import UserError, counted
from sdcli.evaluation.answers import answer, nothing
from sdcli.evaluation.dynamic import Dynamic, evaluate_dynamic
from sdcli.evaluation.early import Early, Watch
from sdcli.evaluation.evaluate import Report, report_of
from sdcli.evaluation.opened import Opened, open_checkpoint
from sdcli.evaluation.scoring import check_finite
from sdcli.files import check_writable, replacing
from sdcli.network.blueprint import ENSEMBLE
from sdcli.network.checkpoint import find_checkpoint
from sdcli.recipe.address import FINAL
from sdcli.recipe.check import check_recipe
from sdcli.recipe.schema import Recipe
from sdcli.run.folder import damaged, read_log

FORMAT = 1
BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of the plain network's MACs at which early exit is scored."""
Which: TypeAlias = Literal["best", "last"]


@dataclass(frozen=True)
class Costs:
    """What a run cost to train, without validation."""

    epochs: int
    images: int
    """Images seen, over all epochs."""
    seconds: float
    macs: int | None = None
    """Of all forward and backward passes of all networks; None for a run whose log does not have them."""
    cpu_seconds: float | None = None
    """Of all cores together, on a CPU; None for a run whose process was not alone at work."""

    @classmethod
    def of(cls, log: Sequence[Mapping[str, Any]]) -> Costs | None:
        """From a run's log; None without epochs."""
        if not log:
            return None
        images = sum(line["num_images"] for line in log)
        macs = [int(line.get("macs", 0)) for line in log]
        timed = [(line, _timed_images(line)) for line in log]
        seconds = sum(line["seconds"] * line["num_images"] / max(seen, 1) for line, seen in timed)
        known = [(line["cpu_seconds"], seen) for line, seen in timed if line.get("cpu_seconds") is not None]
        cpu = sum(taken for taken, _ in known) / max(1.0, sum(seen for _, seen in known)) * images if known else None
        return cls(len(log), images, round(seconds, 1), sum(macs) if all(macs) else None, cpu and round(cpu, 1))


def _timed_images(line: Mapping[str, Any]) -> float:
    """The images of an epoch whose time was measured: where it was resumed, those since then."""
    return float(min(line["images_per_s"] * line["seconds"], line["num_images"]))


@dataclass(frozen=True)
class EarlyExit:
    """Early exit on the test split, in one setting of a calibrated checkpoint."""

    budget: float | None
    """At most this share of the plain network's MACs, on the validation images; None: as it was calibrated."""
    macs: float
    """Mean on these images, with the heads that an image passes, as a share of the plain network's."""
    top1: float
    """In percent."""
    time: float | None = None
    """As a share of the plain network's on the same batches, if it was measured."""


@dataclass(frozen=True)
class Record:
    """A finished run."""

    label: str
    """What tables call its recipe."""
    model: str
    model_args: dict[str, Any]
    image_size: int
    dataset: str
    val_fraction: float
    split_seed: int
    recipe: dict[str, Any]
    """What differs from the defaults of the recipe language."""
    checkpoint: str
    """`best`, chosen on the validation split, or `last`; of another file, its name."""
    epoch: int
    test: Report
    """The scores on the test split; where there is none, on the validation split."""
    validation: Report | None = None
    """The scores on the validation split, as the checkpoint has them."""
    seed: int | None = None
    limit_train: int | None = None
    precision: str = "fp32"
    training: Costs | None = None
    correct: dict[str, str] = field(default_factory=dict)
    """Which images of the test split `final` and the ensemble classify right: bits in base64."""
    early: tuple[EarlyExit, ...] = ()
    """Of a calibrated checkpoint."""
    label_set: str = ""
    """A fingerprint of the classes and of the label of each image that was scored: two data sets may have one name.
    Records of earlier versions do not have it."""
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def name(self) -> str:
        """Of its file."""
        label = re.sub(r"[^\w.+-]+", "-", self.label.replace(" + ", "+"))
        return label[:100] + (f"-seed{self.seed}" if self.seed is not None else "")

    @property
    def task(self) -> dict[str, Any]:
        """All in which runs must agree to be compared, but for `label_set`; the names are those that notes show."""
        return {
            "model": self.model,
            "model_args": self.model_args,
            "image size": self.image_size,
            "data": self.dataset,
            "training images": self.limit_train or "all",
            "val_fraction": self.val_fraction,
            "split_seed": self.split_seed,
            "scored split": self.test.split,
            "scored images": self.test.num_images,
            "checkpoint": self.checkpoint if self.checkpoint in ("best", "last") else "file",
            "precision": self.precision,
        }

    def stands_for(self, other: Record) -> bool:
        """Whether both may be of the same run."""
        same_labels = not (self.label_set and other.label_set) or self.label_set == other.label_set
        return same_labels and (self.label, self.seed, self.task) == (other.label, other.seed, other.task)

    def right(self, point: str) -> NDArray[np.bool_]:
        """Which images a point classifies right [N]."""
        bits = np.frombuffer(base64.b64decode(self.correct[point]), dtype=np.uint8)
        return np.unpackbits(bits, count=self.test.num_images).astype(np.bool_)

    def to_json(self) -> str:
        """As `read` reads it."""
        return json.dumps(asdict(self), indent=1) + "\n"


_RECORD = TypeAdapter(Record)


def read_record(path: Path) -> Record:
    """A record from its file; raises UserError for any other file, and for records of other versions."""
    expected = "a file of sdcli compare --save"
    try:
        record = _RECORD.validate_json(path.read_bytes())
        # Of the recipe too: its language may have changed.
        Recipe.model_validate(record.recipe)
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}", expected) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise UserError(f"'{path}' is not a record of a run: {reason}", expected) from None
    if record.format != FORMAT:
        raise UserError(
            f"'{path}' is a record of format {record.format}, which this version does not read",
            f"format {FORMAT}",
            "sdcli compare RUN --save FOLDER with this version",
        )
    if not any(row.point == FINAL for row in record.test.rows):
        raise UserError(f"'{path}' is not a record of a run: it has no scores of '{FINAL}'", expected)
    for point in record.correct:
        try:
            whole = len(base64.b64decode(record.correct[point], validate=True)) == (record.test.num_images + 7) // 8
        except ValueError:
            whole = False
        if not whole:
            raise UserError(f"'{path}' is damaged: correct.{point} is not one bit per image", expected)
    check_finite(record.test, path)
    return record


def check_names(records: Sequence[Record], folder: Path) -> None:
    """Raises UserError where two records would be written to files of one name, or one over that of another run."""
    names = [record.name for record in records]
    twice = list(dict.fromkeys(name for name in names if names.count(name) > 1))
    if twice:
        raise UserError(
            f"--save: {counted(len(twice), 'file')} would hold two runs each: {', '.join(twice[:3])}",
            "runs of one network, data set and regime, whose recipes and seeds tell them apart",
            "save each task into a folder of its own",
        )
    for record in records:
        file = folder / f"{record.name}.json"
        if file.exists() and not read_record(file).stands_for(record):
            raise UserError(
                f"--save: '{file}' is the record of another run: {_what(read_record(file))}, not {_what(record)}",
                "a folder for each task",
                "--save another folder",
            )


def _what(record: Record) -> str:
    seed = "" if record.seed is None else f", seed {record.seed}"
    return f"{record.label}{seed}, {record.model} on {record.dataset}"


def check_save(folder: Path) -> None:
    """Raises UserError where no records can be written into `folder`, before anything is scored."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        if not there.is_dir():
            raise NotADirectoryError(ENOTDIR, os.strerror(ENOTDIR))
        check_writable(there / "record.json")
    except OSError as error:
        raise UserError(f"--save: '{folder}' cannot be written: {error.strerror}", "a writable folder") from None


def save_record(record: Record, folder: Path) -> Path:
    """Writes a record into a folder, which is made if it does not exist."""
    path = folder / f"{record.name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_text(record.to_json(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"'{path}' cannot be written: {error.strerror}", "a writable folder") from None
    return path


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run folders, checkpoints and records: those named, and all inside folders that are no run themselves.

    Raises UserError for a path without any.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        inside = list(_runs_in(path))
        if not inside:
            raise UserError(
                f"'{path}' holds no finished run" if path.exists() else f"'{path}' does not exist",
                "run folders of sdcli train, folders that hold some, checkpoints, or records (sdcli compare --save)",
            )
        for run in inside:
            # One run may be named in two ways: relative to the working folder or not, or by a link.
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_in(path: Path) -> Iterator[Path]:
    if path.is_file() or (path / "run.json").is_file():
        yield path
    elif path.is_dir():
        runs = {file.parent for file in path.rglob("run.json")}
        records = {file for file in path.rglob("*.json") if file.parent not in runs and _looks_like_record(file)}
        yield from sorted({run for run in runs if is_finished(run)} | records)


def is_finished(run: Path) -> bool:
    """Whether the run in a folder was trained to its end."""
    return (run / "report.json").is_file()


def unfinished(paths: Sequence[Path]) -> list[Path]:
    """The run folders among `paths` and inside them that were not trained to their end."""
    runs = [run for path in paths if path.is_dir() for run in sorted(file.parent for file in path.rglob("run.json"))]
    return [run for run in dict.fromkeys(runs) if not is_finished(run)]


def _looks_like_record(file: Path) -> bool:
    with suppress(OSError, ValueError):
        table = json.loads(file.read_text(encoding="utf-8"))
        return isinstance(table, dict) and {"label", "test", "format"} <= table.keys()
    return False


def record_of(
    path: Path,
    *,
    which: Which | None = None,
    dataset: str | None = None,
    batch_size: int = 256,
    device: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Record:
    """The record of a run folder, a checkpoint, or a record's own file.

    Of a run folder `which` chooses the checkpoint, by default `best` or else `last`. It is scored on the test split
    unless the folder has its scores from before. Raises UserError as `sdcli eval` does.
    """
    if path.suffix == ".json":
        record = read_record(path)
        if dataset is not None:
            raise UserError(
                f"--dataset: '{path}' is a record, whose run was scored on {record.dataset}",
                "run folders or checkpoints, which can be scored on other data",
            )
        if which is not None and record.checkpoint != which:
            raise UserError(
                f"--checkpoint {which}: '{path}' is the record of {record.checkpoint}",
                "run folders, or records of that checkpoint",
            )
        return record
    checkpoint = path / f"{which}.safetensors" if which and path.is_dir() else find_checkpoint(path)
    kept = checkpoint.with_name(f"record-{checkpoint.stem}.json")
    digest = _digest(checkpoint) if checkpoint.is_file() else ""
    if dataset is None and (before := _kept(kept, digest)):
        return _described(before, checkpoint)
    opened = open_checkpoint(checkpoint, dataset=dataset)
    record = _scored(opened, batch_size, device, workers, progress)
    record = _described(replace(record, versions={**record.versions, "checkpoint": digest}), checkpoint)
    if dataset is None and (checkpoint.parent / "run.json").is_file():
        with suppress(UserError, OSError), replacing(kept) as beside:
            beside.write_text(record.to_json(), encoding="utf-8")
    return record


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _kept(file: Path, digest: str) -> Record | None:
    """The record in a run folder, if it is that of the checkpoint as it is now."""
    with suppress(UserError):
        record = read_record(file)
        if record.versions.get("checkpoint") == digest and record.format == FORMAT:
            return record
    return None


def _scored(
    opened: Opened,
    batch_size: int,
    device: str | None,
    workers: int | None,
    progress: Callable[[int, int], None],
) -> Record:
    """What the checkpoint itself says, and its scores."""
    about, network = opened.about, opened.network
    split, _ = opened.choose(None)
    accelerator = accelerator_for(device)
    chosen, loader, _ = opened.batches(split, None, batch_size, workers, accelerator.device)
    calibration = network.calibration if network.calibration and network.calibration.policy.exits else None
    watch = Watch(calibration, about.blueprint) if calibration else None
    total = len(chosen) * (2 if watch else 1)
    answers = answer(
        network.to(accelerator.device),
        loader,
        points=network.classifiers,
        device=accelerator.device,
        progress=lambda done: progress(done, total),
        beside=watch or nothing,
    )
    early: tuple[EarlyExit, ...] = ()
    if watch and calibration:
        timed = evaluate_dynamic(
            network, loader, calibration.policy, accelerator.device, lambda done: progress(len(chosen) + done, total)
        )
        early = tuple(_early(watch.early(answers), timed))
    blueprint = about.blueprint
    report = report_of(answers, blueprint.costs(), model=blueprint.architecture.model, dataset=opened.name, split=split)
    check_finite(report, opened.path)
    order = np.argsort(answers.index.numpy(), kind="stable")
    points = [point for point in (FINAL, ENSEMBLE) if point in answers.points]
    return Record(
        # As it was named: copies of two runs' checkpoints may have one name in two folders.
        label=str(opened.path.with_suffix("")),
        model=blueprint.architecture.model,
        model_args={name: value for name, value in blueprint.architecture.model_args.items() if name != "num_classes"},
        image_size=blueprint.plan.input_size[1],
        dataset=opened.name,
        val_fraction=about.dataset.val_fraction,
        split_seed=about.dataset.seed,
        recipe=check_recipe(about.recipe).model_dump(exclude_defaults=True, exclude_none=True),
        checkpoint=opened.path.stem,
        epoch=about.epoch,
        test=report,
        validation=Report.from_dict(about.scores) if about.scores else None,
        correct={point: _bits(answers.correct(point).numpy()[order]) for point in points},
        early=early,
        label_set=_fingerprint(opened.data.classes, chosen.labels),
        versions={"sdcli": __version__, "torch": version("torch"), "timm": version("timm")},
    )


def _early(found: Early, timed: Dynamic) -> Iterator[EarlyExit]:
    """As it was calibrated, and within each budget that can be met."""
    yield EarlyExit(None, 1 / timed.result.speedup, timed.result.top1, timed.seconds / timed.plain_seconds)
    plain = timed.result.macs * timed.result.speedup
    for budget in BUDGETS:
        within = [spot for spot in found.curve if spot.expected <= budget]
        if within:
            best = max(within, key=lambda spot: spot.expected)
            yield EarlyExit(budget, best.macs / plain, best.top1)


def _bits(right: NDArray[np.bool_]) -> str:
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def _fingerprint(classes: Sequence[str], labels: NDArray[np.int64]) -> str:
    return hashlib.sha256(repr((list(classes), labels.tolist())).encode()).hexdigest()[:12]


class _Settings(TypedDict, total=False):
    """What a record has of `run.json`."""

    label: str | None
    seed: int | None
    limit_train: int | None
    precision: str


def _described(record: Record, checkpoint: Path) -> Record:
    """The record with what only the run folder knows."""
    folder = checkpoint.parent
    file = folder / "run.json"
    if not file.is_file():
        return record
    try:
        settings = TypeAdapter(_Settings).validate_json(file.read_bytes(), strict=True)
    except (OSError, ValidationError) as error:
        reason = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else error
        raise damaged(file, reason) from None
    return replace(
        record,
        label=settings.get("label") or record.recipe.get("title", record.label),
        seed=settings.get("seed"),
        limit_train=settings.get("limit_train"),
        precision=settings.get("precision", "fp32"),
        training=Costs.of(read_log(folder)),
    )
