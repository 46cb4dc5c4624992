"""Runs grouped by task and recipe, and every recipe against a baseline, seed by seed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import nan, sqrt
from typing import Any

import numpy as np

from sdcli.compare.record import EarlyExit, Record
from sdcli.compare.statistics import (
    Difference,
    McNemar,
    Overall,
    detectable,
    holm,
    mcnemar,
    over_tasks,
    paired_difference,
)
from sdcli.errors import UserError, counted, unknown
from sdcli.recipe.address import FINAL, STUDENT
from sdcli.recipe.schema import Recipe

LEAST_TASKS = 3
"""From so many tasks on an average over them is shown."""
PROTOCOL = ("batch.size", "batch.augment", "optimizer", "schedule")
"""The keys of a recipe in which methods that are compared should not differ."""


@dataclass(frozen=True)
class Score:
    """One measured value over the seeds of a group."""

    mean: float
    sd: float | None
    """None for one run."""
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Score:
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)), sd, tuple(values))


@dataclass(frozen=True)
class Early:
    """Early exit in one setting, over the seeds of a group."""

    top1: Score
    macs: float
    """Mean share of the plain network's."""
    time: float | None
    """Mean share of the plain network's; None if it was not measured."""


@dataclass(frozen=True)
class Group:
    """The runs of one recipe on one task."""

    label: str
    seeds: tuple[int | None, ...]
    points: dict[str, Score]
    """Top-1 in percent of every exit, `final` and the ensemble."""
    nll: dict[str, Score]
    ece: dict[str, Score]
    params: dict[str, int]
    """When a point is used alone."""
    macs: dict[str, int]
    epochs: int | None
    training_macs: float | None
    """Mean of a run."""
    seconds: float | None
    cpu_seconds: float | None
    versus: dict[str, Difference]
    """From the baseline's point of the same name, else from its `final`, by point; empty for the baseline."""
    p_holm: dict[str, float]
    """The p-values of `versus`, corrected for the number of recipes."""
    relative_macs: float | None
    """Training MACs, divided by the baseline's."""
    relative_seconds: float | None
    """The same in CPU seconds, or else in seconds."""
    differs: tuple[str, ...]
    """In what the protocol differs from the baseline's."""
    uneven: tuple[str, ...] = ()
    """In what its own runs differ from the first one, besides the seed."""
    mcnemar: McNemar | None = None
    """Of `final`, where both groups are one run."""
    early: dict[str, Early] = field(default_factory=dict)
    """By the budget, as text, and `calibrated`: what all runs of the group have."""


@dataclass(frozen=True)
class Noise:
    """What the differences of a point can tell."""

    sd: float
    """Of the paired differences, pooled over the recipes."""
    detectable: dict[int, float]
    """The smallest difference, in points, that a paired test finds with 80 % power, by the numbers of pairs of seeds
    that recipes have, from two on."""


@dataclass(frozen=True)
class Task:
    """Runs that may be compared: one network on the same images."""

    name: str
    split: str
    num_images: int
    groups: tuple[Group, ...]
    baseline: str | None
    """None where no run of the baseline is there."""
    noise: dict[str, Noise]
    """By point, where a recipe has two pairs of seeds or more."""


@dataclass(frozen=True)
class Comparison:
    """All tasks, and the recipes over all of them where there are at least three."""

    tasks: tuple[Task, ...]
    overall: dict[str, Overall] = field(default_factory=dict)
    """Of `final`, by recipe."""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def compare(records: Sequence[Record], baseline: str | None = None) -> Comparison:
    """Compares recipes within every task, each against `baseline`, the label of a group.

    By default that is the recipe called baseline, or else the first one. Raises UserError for a baseline that is not
    there, and for two runs of one recipe and seed.
    """
    tasks: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        tasks.setdefault(_task_of(record, records), {}).setdefault(record.label, []).append(record)
    labels = list(dict.fromkeys(record.label for record in records))
    if baseline is not None and baseline not in labels:
        raise unknown("recipe", baseline, labels)
    plain = sorted((label for label in labels if label.split(" ")[0].rstrip(",") == "baseline"), key=len)
    against = baseline or (plain or labels)[0]
    names = _short_names(list(tasks))
    made = [_task(names[key], groups, against) for key, groups in tasks.items()]
    notes = [*_apart(list(tasks)), *_versions(records)]
    notes += ["one run: there is nothing to compare it with"] if len(records) == 1 else []
    notes += [f"{task.name}: no runs of {against}: nothing to compare with" for task in made if task.baseline is None]
    return Comparison(tuple(made), _overall(tasks, against), tuple(notes))


def _task_of(record: Record, records: Sequence[Record]) -> str:
    """All in which runs must agree to be compared, as JSON.

    A record that does not say what its labels are belongs to the first one, otherwise of the same task, that does.
    """
    alike = (other.label_set for other in (record, *records) if other.label_set and other.task == record.task)
    return json.dumps({**record.task, "set of labels": next(alike, "")}, sort_keys=True)


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """A task's name for readers: model and data, and in what it differs from the other tasks."""
    tables = [json.loads(key) for key in keys]
    varying = [name for name in tables[0] if len({json.dumps(table[name]) for table in tables}) > 1]
    names = {}
    for key, table in zip(keys, tables, strict=True):
        more = [f"{name} {_plain(table[name])}" for name in varying if name not in ("model", "data")]
        size = "" if "image size" in varying else f" at {table['image size']} px"
        names[key] = ", ".join([f"{table['model']} on {table['data']}{size}", *more])
    return names


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}={_plain(inner)}" for name, inner in value.items()) or "as in timm"
    return f"{value:,}" if isinstance(value, int) else str(value).replace(" ", "")


def _apart(keys: Sequence[str]) -> Iterator[str]:
    """Notes on tasks of one model and data set that are told apart by something else: perhaps by mistake."""
    alike: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for table in map(json.loads, keys):
        alike.setdefault((table["model"], table["data"]), []).append(table)
    for name in dict.fromkeys(name for tables in alike.values() for name in tables[0]):
        for tables in alike.values():
            values = list(dict.fromkeys(_plain(table[name]) for table in tables))
            if len(values) > 1:
                yield f"not compared with each other, because of another {name}: {', '.join(values)}"


def _versions(records: Sequence[Record]) -> Iterator[str]:
    for name in ("sdcli", "torch", "timm"):
        values = sorted({record.versions[name] for record in records if name in record.versions})
        if len(values) > 1:
            yield f"scored with different versions of {name}: {', '.join(values)}"


def _task(name: str, groups: Mapping[str, list[Record]], against: str) -> Task:
    base = groups.get(against)
    made = [_group(label, runs, None if label == against else base) for label, runs in groups.items()]
    made = _corrected(made)
    # The baseline first, then in the order in which they were named.
    made.sort(key=lambda group: group.label != against)
    first = next(iter(groups.values()))[0].test
    return Task(name, first.split, first.num_images, tuple(made), against if base else None, dict(_noise(made)))


def _noise(groups: Sequence[Group]) -> Iterator[tuple[str, Noise]]:
    for point in dict.fromkeys(point for group in groups for point in group.versus):
        found = [group.versus[point] for group in groups if point in group.versus]
        # Seeds that all differ by the same, such as by 0 over a frozen network, show no noise.
        spread = [(d.sd, d.num_seeds) for d in found if d.sd]
        if spread:
            squares = sum(sd**2 * (seeds - 1) for sd, seeds in spread)
            sd = sqrt(squares / sum(seeds - 1 for _, seeds in spread))
            yield point, Noise(sd, {pairs: detectable(sd, pairs) for pairs in sorted({seeds for _, seeds in spread})})


def _group(label: str, runs: list[Record], base: list[Record] | None) -> Group:
    runs = sorted(runs, key=lambda run: -1 if run.seed is None else run.seed)
    seeds = [run.seed for run in runs]
    if twice := sorted({str(seed) for seed in seeds if seeds.count(seed) > 1}):
        raise UserError(
            f"{label}: {counted(len(runs), 'run')} with seed {', '.join(twice)} more than once",
            "one run of each recipe and seed on a task",
            "leave one of them out, or tell them apart: sdcli train --set title=NAME",
        )
    points = [row.point for row in runs[0].test.rows]
    if any([row.point for row in run.test.rows] != points for run in runs):
        of = ", ".join(f"seed {run.seed}: {len(run.test.exits)}" for run in runs)
        raise UserError(
            f"{label}: its runs have different exits ({of})",
            "the same exits in all runs of a recipe",
            "leave some of them out, or tell them apart: sdcli train --set title=NAME",
        )
    rows = {point: [row for run in runs for row in run.test.rows if row.point == point] for point in points}
    versus = {point: found for point in points if base and (found := _versus(runs, base, point))}
    return Group(
        label=label,
        seeds=tuple(seeds),
        points={point: Score.of([row.top1 for row in own]) for point, own in rows.items()},
        nll={point: Score.of([row.nll for row in own]) for point, own in rows.items()},
        ece={point: Score.of([row.ece for row in own]) for point, own in rows.items()},
        params={point: own[0].params for point, own in rows.items()},
        macs={point: own[0].macs for point, own in rows.items()},
        epochs=runs[0].training.epochs if runs[0].training else None,
        training_macs=_mean(runs, "macs"),
        seconds=_mean(runs, "seconds"),
        cpu_seconds=_mean(runs, "cpu_seconds"),
        versus=versus,
        p_holm={},
        relative_macs=_ratio(runs, base, "macs"),
        relative_seconds=_ratio(runs, base, "cpu_seconds") or _ratio(runs, base, "seconds"),
        differs=tuple(_differences(runs[0], base[0], "baseline")) if base else (),
        uneven=tuple(dict.fromkeys(text for run in runs[1:] for text in _uneven(run, runs[0]))),
        mcnemar=_mcnemar(runs, base),
        early=_early(runs),
    )


def _early(runs: Sequence[Record]) -> dict[str, Early]:
    found: dict[str, list[EarlyExit]] = {}
    for run in runs:
        for own in run.early:
            found.setdefault("calibrated" if own.budget is None else f"{own.budget:g}", []).append(own)
    return {
        name: Early(
            Score.of([one.top1 for one in own]),
            float(np.mean([one.macs for one in own])),
            None if any(one.time is None for one in own) else float(np.mean([one.time for one in own if one.time])),
        )
        for name, own in found.items()
        if len(own) == len(runs)
    }


def _versus(runs: Sequence[Record], base: Sequence[Record], point: str) -> Difference | None:
    """The differences of a point from the baseline, over the seeds that both have; None without such a seed.

    An exit that the baseline does not have is compared with its `final`: what the plain network would give.
    """
    theirs = {run.seed: run for run in base}
    other = point if all(_top1(run, point) is not None for run in base) else FINAL
    pairs = [(_top1(run, point), _top1(theirs[run.seed], other)) for run in runs if run.seed in theirs]
    found = [own - its for own, its in pairs if own is not None and its is not None]
    return paired_difference(found) if found else None


def _top1(run: Record, point: str) -> float | None:
    return next((row.top1 for row in run.test.rows if row.point == point), None)


def _mean(runs: Sequence[Record], cost: str) -> float | None:
    values = [getattr(run.training, cost) for run in runs if run.training]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(runs) else None


def _ratio(runs: Sequence[Record], base: Sequence[Record] | None, cost: str) -> float | None:
    own, its = _mean(runs, cost), _mean(base, cost) if base else None
    return own / its if own and its else None


def _mcnemar(runs: Sequence[Record], base: Sequence[Record] | None) -> McNemar | None:
    if base is None or len(runs) > 1 or len(base) > 1 or not (FINAL in runs[0].correct and FINAL in base[0].correct):
        return None
    return mcnemar(runs[0].right(FINAL), base[0].right(FINAL))


def _differences(run: Record, base: Record, other: str) -> Iterator[str]:
    """In what the protocol of a run differs from that of `base`, as `key = value (other: value)`."""
    own, its = (Recipe.model_validate(one.recipe).model_dump() for one in (run, base))
    for key in PROTOCOL:
        yield from _changes(key, _at(own, key), _at(its, key), other)
    students = [table["networks"].get("student", {}) for table in (own, its)]
    mine, theirs = (student.get("stem", "auto") for student in students)
    yield from _changes("stem", mine, theirs, other)
    yield from _course(run, base, other)


def _course(run: Record, base: Record, other: str) -> Iterator[str]:
    """Whether one of them starts from trained weights, and how long they were trained."""
    students = [Recipe.model_validate(one.recipe).model_dump()["networks"].get("student", {}) for one in (run, base)]
    weights = [student.get("weights", "random") for student in students]
    starts = ["random" if name == "random" else "trained" for name in weights]
    if starts[0] != starts[1]:
        yield f"weights at the start = {starts[0]} ({other}: {starts[1]})"
    if run.training and base.training:
        for name in ("epochs", "images"):
            seen, theirs = getattr(run.training, name), getattr(base.training, name)
            if seen != theirs:
                yield f"{name} = {seen:,} ({other}: {theirs:,})"
                return


def _uneven(run: Record, first: Record) -> Iterator[str]:
    """In what two runs of one recipe differ: its title and the files that weights come from may."""
    seed = f"seed {first.seed}"
    own, its = (_same_for_all(one) for one in (run, first))
    for key in own:
        yield from _changes(key, own[key], its[key], seed)
    yield from _course(run, first, seed)


def _same_for_all(run: Record) -> dict[str, Any]:
    """What all runs of a recipe should have in common."""
    recipe = Recipe.model_validate(run.recipe)
    table = recipe.model_dump(exclude={"title", "paper", "epochs"})
    networks = {STUDENT: recipe.student.model_dump(), **table["networks"]}
    networks = {name: {key: own[key] for key in own if key != "weights"} for name, own in networks.items()}
    return {**table, "networks": networks}


def _changes(key: str, mine: Any, theirs: Any, other: str) -> Iterator[str]:
    flat_mine, flat_theirs = dict(_flat(key, mine)), dict(_flat(key, theirs))
    for name in dict.fromkeys([*flat_mine, *flat_theirs]):
        if flat_mine.get(name) != flat_theirs.get(name):
            yield f"{name} = {flat_mine.get(name)} ({other}: {flat_theirs.get(name)})"


def _at(table: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        table = table[part]
    return table


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(f"{key}.{name}", inner)
    else:
        yield key, value


def _corrected(groups: Sequence[Group]) -> list[Group]:
    """The groups with Holm's correction of their p-values, point by point."""
    corrected: list[dict[str, float]] = [{} for _ in groups]
    for point in dict.fromkeys(point for group in groups for point in group.versus):
        tested = [
            (place, found.p)
            for place, group in enumerate(groups)
            if (found := group.versus.get(point)) and found.p is not None
        ]
        for (place, _), p in zip(tested, holm([p for _, p in tested]), strict=True):
            corrected[place][point] = p
    return [replace(group, p_holm=own) for group, own in zip(groups, corrected, strict=True)]


def _overall(tasks: Mapping[str, Mapping[str, list[Record]]], against: str) -> dict[str, Overall]:
    """Each recipe over all tasks that it and the baseline have, where there are at least three."""
    with_base = {key: groups for key, groups in tasks.items() if against in groups}
    labels = dict.fromkeys(label for groups in with_base.values() for label in groups)
    found = {}
    for label in labels:
        own = {key: _finals(groups[label]) for key, groups in with_base.items() if label in groups}
        if len(own) >= LEAST_TASKS and len(own) == len(with_base):
            found[label] = over_tasks(own, {key: _finals(with_base[key][against]) for key in own})
    return found


def _finals(runs: Sequence[Record]) -> list[float]:
    return [top1 if (top1 := _top1(run, FINAL)) is not None else nan for run in runs]
