"""What `compare` shows: tables, CSV and sentences."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sdcli.cli.grids import Cell, Grid
from sdcli.compare.statistics import least_p
from sdcli.errors import counted
from sdcli.evaluation.columns import amount
from sdcli.recipe.address import FINAL

if TYPE_CHECKING:
    from sdcli.compare.compare import Comparison, Group, Score, Task
    from sdcli.compare.statistics import Difference

HEADER = (
    "task", "recipe", "seeds", "point", "top1", "top1_sd", "nll", "ece", "params", "macs", "epochs", "training_macs",
    "seconds", "cpu_seconds", "difference", "low", "high", "p", "p_holm", "differs",
)  # fmt: skip


DROPPABLE = (
    "p", "params", "training\ntime", "pairs", "MACs\n≤ 0.9", "MACs\n≤ 0.6", "its\ntime", "MACs\n≤ 0.8", "seeds", "MACs",
    "exit2", "its\nMACs", "exit3", "95 % interval", "training\nMACs", "MACs\n≤ 0.7", "ensemble\nNLL",
    "ensemble\nECE",
)  # fmt: skip
"""What a narrow terminal does without first."""
WIDEST = 130
"""Columns of a terminal that a table uses at most."""


def grids(comparison: Comparison, point: str) -> Iterator[Grid]:
    """The tables: for every task the scores, and each recipe against the baseline at one point."""
    for task in comparison.tasks:
        yield _scores(task)
        if task.baseline is not None and len(task.groups) > 1:
            yield _differences(task, point)
            yield _confidence(task)
        if any(group.early for group in task.groups):
            yield _early(task)
    if comparison.overall:
        yield _overall(comparison)


def _scores(task: Task) -> Grid:
    points = _points(task)
    best = {p: max((g.points[p].mean for g in task.groups if p in g.points), default=0.0) for p in points}
    several = len(task.groups) > 1
    rows = []
    for group in task.groups:
        cells = [
            Cell(score(group.points[p]), several and group.points[p].mean == best[p]) if p in group.points else Cell("")
            for p in points
        ]
        rows.append((Cell(_name(group)), Cell(str(len(group.seeds))), *cells))
    title = f"{task.name}  ·  top-1 % ({task.split}, {counted(task.num_images, 'image')})"
    return Grid(title, ("recipe", "seeds", *points), tuple(rows))


def _points(task: Task) -> list[str]:
    """The points of all groups, shallowest first, the ensemble last."""
    longest = max(task.groups, key=lambda group: len(group.points))
    points = list(longest.points)
    return points + [p for group in task.groups for p in group.points if p not in points]


def _differences(task: Task, point: str) -> Grid:
    rows = []
    for group in task.groups:
        found = group.versus.get(point)
        numbers = difference_cells(found, group.p_holm.get(point)) if found else ("-",) * 5
        if group.label == task.baseline:
            # What the others are multiples of.
            training = (_amount(group.training_macs), _hours(group.cpu_seconds or group.seconds))
        else:
            training = (_times(group.relative_macs), _times(group.relative_seconds))
        at = point if point in group.macs else ""
        use = (amount(group.params[at]), amount(group.macs[at])) if at else ("-", "-")
        rows.append(tuple(map(Cell, (_name(group), *numbers, *training, *use))))
    header = (
        "recipe", "pairs", "difference", "95 % interval", "p", "p (Holm)", "training\nMACs", "training\ntime",
        "params", "MACs",
    )  # fmt: skip
    return Grid(f"{task.name}  ·  {point} against {task.baseline}, in points", header, tuple(rows))


def _confidence(task: Task) -> Grid:
    """How well probabilities fit, of `final` and the ensemble: top-1 does not see it."""
    points = _points(task)
    columns = [(point, name) for point in points[points.index(FINAL) :] for name in ("nll", "ece")]
    of = {(group.label, point, name): own for group in task.groups for point, name in columns
          if (own := (group.nll if name == "nll" else group.ece).get(point))}  # fmt: skip
    least = {column: min(own.mean for (_, *place), own in of.items() if tuple(place) == column) for column in columns}
    rows = []
    for group in task.groups:
        found = [(column, of.get((group.label, *column))) for column in columns]
        cells = [Cell(score(own, 3), own.mean == least[column]) if own else Cell("") for column, own in found]
        rows.append((Cell(_name(group)), *cells))
    header = ("recipe", *(f"{point}\n{name.upper()}" for point, name in columns))
    return Grid(f"{task.name}  ·  how well confidence fits: the less, the better", header, tuple(rows))


def _early(task: Task) -> Grid:
    """What images that leave early are worth, where checkpoints are calibrated."""
    groups = [group for group in task.groups if group.early]
    budgets = sorted({name for group in groups for name in group.early if name != "calibrated"})
    best = {name: max(group.early[name].top1.mean for group in groups if name in group.early) for name in budgets}
    rows = []
    for group in groups:
        cells = [
            Cell(score(own.top1), len(groups) > 1 and own.top1.mean == best[name])
            if (own := group.early.get(name))
            else Cell("-")
            for name in budgets
        ]
        own = group.early.get("calibrated")
        as_found = (score(own.top1), f"{own.macs:.2f}", f"{own.time:.2f}" if own.time else "-") if own else ("-",) * 3
        rows.append((Cell(_name(group)), *cells, *map(Cell, as_found)))
    header = ("recipe", *(f"MACs\n≤ {name}" for name in budgets), "as\ncalibrated", "its\nMACs", "its\ntime")
    title = f"{task.name}  ·  top-1 % of early exit, by its share of the plain network's MACs"
    return Grid(title, header, tuple(rows))


def difference_cells(found: Difference, p_holm: float | None) -> tuple[str, ...]:
    """A difference, its interval and p-values."""
    interval = "-" if found.low is None or found.high is None else f"{signed(found.low)} to {signed(found.high)}"
    p, corrected = ("-" if value is None else f"{value:.3f}" for value in (found.p, p_holm))
    return str(found.num_seeds), signed(found.mean), interval, p, corrected


def _overall(comparison: Comparison) -> Grid:
    rows = [
        tuple(map(Cell, (label, f"{found.iqm:.2f}", f"{found.low:.2f} to {found.high:.2f}", f"{found.improves:.2f}")))
        for label, found in comparison.overall.items()
    ]
    header = ("recipe", "IQM", "95 % interval", "beats the\nbaseline")
    return Grid("all tasks  ·  final: interquartile mean of top-1 %", header, tuple(rows))


def score(value: Score, digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{value.mean:.{digits}f}"
    return mean if value.sd is None else f"{mean} ± {value.sd:.{digits}f}"


def signed(value: float) -> str:
    """With its sign: +0.35, -0.35."""
    return f"{value:+.2f}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _amount(macs: float | None) -> str:
    return "-" if macs is None else amount(round(macs))


def _hours(seconds: float | None) -> str:
    """A training time, in the largest unit of which it is one or more."""
    if seconds is None:
        return "-"
    size, unit = next(((size, unit) for size, unit in ((3600, "h"), (60, "min")) if seconds >= size), (1, "s"))
    return f"{seconds / size:.3g} {unit}"


def _name(group: Group) -> str:
    """The recipe, with a mark if it was trained otherwise than the baseline."""
    return group.label + ("*" if group.differs else "")


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:4]) + (", …" if len(texts) > 4 else "")


def _seeds(group: Group) -> str:
    return ", ".join(str(seed) for seed in group.seeds)


def remarks(comparison: Comparison, point: str = FINAL) -> Iterator[str]:
    """What the tables do not say: what differs besides the recipe, and which differences of a point can be told from
    noise."""
    for task in comparison.tasks:
        where = f"{task.name}: " if len(comparison.tasks) > 1 else ""
        for group in task.groups:
            if group.differs:
                yield f"{where}* {group.label} differs in more than its method: {_some(group.differs)}"
            if group.uneven:
                yield f"{where}the runs of {group.label} were not trained alike: {_some(group.uneven)}"
            if task.baseline is not None and group.label != task.baseline and not group.versus:
                base = next(other for other in task.groups if other.label == task.baseline)
                yield (
                    f"{where}{group.label} and {base.label} have no seed in common "
                    f"({_seeds(group)}; {_seeds(base)}), so their difference has no pairs"
                )
            if found := group.mcnemar:
                yield (
                    f"{where}{counted(found.only_first, 'image')} only {group.label} classifies correctly, "
                    f"{found.only_second:,} only {task.baseline}: McNemar's p = {found.p:.3g}, for these two networks "
                    "and not for their recipes"
                )
        for group in task.groups:
            for exit, budgets in _better_alone(group).items():
                yield (
                    f"{where}{exit} of {group.label} alone has {group.points[exit].mean:.2f} % for "
                    f"{_share(group, exit):.2f} of the MACs, more than its early exit has for at most "
                    + ", ".join(budgets)
                )
        noise = task.noise.get(point)
        if noise is not None:
            (fewest, limit), *more = noise.detectable.items()
            yield (
                f"{where}{fewest} paired seeds: differences of {point} below about {limit:.1f} points cannot be told "
                f"from noise here (80 % power; the differences have a standard deviation of {noise.sd:.2f}), and no p "
                f"can be below {least_p(fewest):.2g}"
                + "".join(f"; with {pairs}: {limit:.1f} points, {least_p(pairs):.2g}" for pairs, limit in more)
            )
        single = [group.label for group in task.groups if point in group.versus and group.versus[point].num_seeds == 1]
        if single and noise is not None:
            yield f"{where}one seed only, which cannot be told from the noise of training: {', '.join(single)}"
        elif single:
            yield f"{where}one seed: no difference can be told from the noise of training; see sdcli train --seeds"


def _share(group: Group, point: str) -> float:
    return group.macs[point] / group.macs[FINAL]


def _better_alone(group: Group) -> dict[str, list[str]]:
    """The exits that are better than early exit, each with the settings that may cost as much as it does."""
    found: dict[str, list[str]] = {}
    exits = [point for point in list(group.points)[: list(group.points).index(FINAL)] if group.early]
    for name, own in group.early.items():
        within = [p for p in exits if name != "calibrated" and _share(group, p) <= float(name)]
        best = max(within, key=lambda point: group.points[point].mean, default=None)
        if best and group.points[best].mean > own.top1.mean:
            found.setdefault(best, []).append(name)
    return found


def as_csv(comparison: Comparison) -> str:
    """All values in full, one line for each recipe and point."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for task in comparison.tasks:
        for group in task.groups:
            for point, own in group.points.items():
                found = group.versus.get(point)
                versus = (found.mean, found.low, found.high, found.p) if found else (None,) * 4
                costs = (group.epochs, group.training_macs, group.seconds, group.cpu_seconds)
                scores = (own.mean, own.sd, group.nll[point].mean, group.ece[point].mean)
                sizes = (group.params[point], group.macs[point])
                last = (*versus, group.p_holm.get(point), "; ".join(group.differs))
                writer.writerow([task.name, group.label, len(group.seeds), point, *scores, *sizes, *costs, *last])
    return text.getvalue().rstrip("\n")
