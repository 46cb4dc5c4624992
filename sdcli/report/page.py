"""The page: one HTML file that needs nothing else, with light and dark colours."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from sdcli import __version__
from sdcli.errors import counted
from sdcli.evaluation.columns import Column, amount, cell, is_best, report_columns
from sdcli.evaluation.early import Early
from sdcli.evaluation.evaluate import ExitResult
from sdcli.network.predict import promised
from sdcli.recipe.address import FINAL
from sdcli.report.figures import score_figures, training_figures
from sdcli.report.findings import Findings
from sdcli.report.pictures import Picture, disagreeing, pictures, varied

FEW_RUNS = 3
"""Runs up to which each has `MANY` images in a gallery; of more, each has `FEW`."""
MANY, FEW = 12, 6
"""Images of a gallery: about 4 KB each."""

GENERATOR = f"sdcli {__version__}"


@dataclass(frozen=True)
class Fact:
    """A number of the headline."""

    label: str
    value: str
    more: str


@dataclass(frozen=True)
class Gallery:
    """Images with what the exits say about them."""

    title: str
    caption: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Table:
    """A table with a caption; the first cell of each row is its heading."""

    caption: str
    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()
    """Rows and columns of the best values."""
    note: str = ""


def render(runs: Sequence[Findings]) -> str:
    """The page as text: a section per run and, of several, a comparison."""
    loader = PackageLoader("sdcli.report", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    names = _names(runs)
    images = MANY if len(runs) <= FEW_RUNS else FEW
    sections = [_section(found, name, images) for found, name in zip(runs, names, strict=True)]
    title = sections[0]["title"] if len(runs) == 1 else f"{counted(len(runs), 'run')} compared"
    return environment.get_template("page.html").render(
        generator=GENERATOR,
        title=title,
        sections=sections,
        comparison=comparison(runs, names) if len(runs) > 1 else None,
        made=f"{GENERATOR}, torch {torch.__version__}, timm {timm.__version__}",
        today=datetime.date.today().isoformat(),
    )


def is_page(path: Path) -> bool:
    """Whether a file is a page that this module has written."""
    try:
        with path.open(encoding="utf-8") as file:
            return '<meta name="generator" content="sdcli ' in file.read(1000)
    except (OSError, ValueError):
        return False


def comparison(runs: Sequence[Findings], names: Sequence[str]) -> Table:
    """The exits of all runs side by side."""
    points = list(dict.fromkeys(result.point for found in runs for result in found.rows))
    cells = [{result.point: _compared(result, found) for result in found.rows} for found in runs]
    rows = tuple((point, *(own.get(point, "-") for own in cells)) for point in points)
    seen = {(found.report.dataset, found.report.split, found.report.num_images) for found in runs}
    note = "Whether differences are more than chance: sdcli compare, with several seeds of each recipe."
    if len(seen) > 1:
        note = "The runs were scored on different images: their figures cannot be compared."
    return Table("Top-1 % with 95% intervals, and MACs", ("exit", *names), rows, note=note)


def _compared(result: ExitResult, found: Findings) -> str:
    low, high = result.interval(found.report.num_images)
    return f"{result.top1:.2f} ({low:.1f} to {high:.1f}), {amount(result.macs)}"


def _names(runs: Sequence[Findings]) -> list[str]:
    """A name per run; those that share one get a number."""
    names = [found.name for found in runs]
    several = {name for name in names if names.count(name) > 1}
    return [f"{name} ({place + 1})" if name in several else name for place, name in enumerate(names)]


def _section(found: Findings, name: str, images: int) -> dict[str, Any]:
    """All that the template shows of one run."""
    return {
        "name": name,
        "title": f"{found.report.model} on {found.report.dataset}",
        "about": list(about(found)),
        "facts": list(_facts(found)),
        "table": scores_table(found),
        "early": _early_sentence(found),
        "notes": found.notes,
        "scores": score_figures(found),
        "training": training_figures(found),
        "galleries": [gallery for gallery in _galleries(found, images) if gallery.pictures],
        "recipe": found.recipe,
        "command": found.command,
        "uses": uses(found),
    }


def about(found: Findings) -> Iterator[tuple[str, str]]:
    """What a run is, as names and values."""
    report, blueprint = found.report, found.about.blueprint
    height, width = blueprint.preprocess.size
    yield "Run", found.name
    yield "Model", report.model
    yield "Input", f"{height} by {width} pixels"
    yield "Data", f"{report.dataset}, {counted(len(found.classes), 'class', 'classes')}"
    yield "Scored on", f"{report.split} split, {counted(report.num_images, 'image')}"
    if found.recipe_name:
        yield "Recipe", found.recipe_name
    if "seed" in found.settings:
        yield "Seed", str(found.settings["seed"])
    epochs = f"{found.about.epoch} of {len(found.log)}" if found.log else str(found.about.epoch)
    yield "Epoch", epochs
    if seconds := sum(line.get("seconds", 0.0) for line in found.log):
        yield "Training time", str(datetime.timedelta(seconds=round(seconds)))
    yield "Checkpoint", found.path.name
    yield "Saved", found.saved.isoformat()


def _facts(found: Findings) -> Iterator[Fact]:
    """The exits that matter most: the first, the last, their ensemble, and early exit."""
    results = {result.point: result for result in found.rows}
    wanted = dict.fromkeys([found.points[0], FINAL, "ensemble", "early exit"])
    for point in wanted:
        if point in results:
            result = results[point]
            share = results[FINAL].macs and result.macs / results[FINAL].macs
            yield Fact(point, f"{result.top1:.1f}%", f"top-1 at {share:.2f} of the MACs")


def scores_table(found: Findings) -> Table:
    """Every exit, the ensemble and early exit, with Wilson intervals of top-1."""
    rows, columns = found.rows, report_columns(len(found.classes))
    cells = tuple((result.point, *(_cell(result, column, found) for column in columns)) for result in rows)
    best = frozenset(
        (r, c) for r, result in enumerate(rows) for c, column in enumerate(columns) if is_best(result, column, rows)
    )
    caption = f"{found.report.dataset}, {found.report.split} split, {counted(found.report.num_images, 'image')}"
    return Table(caption, ("exit", *(column.title for column in columns)), cells, best)


def _cell(result: ExitResult, column: Column, found: Findings) -> str:
    text = cell(result, column)
    if column.field != "top1":
        return text
    low, high = result.interval(found.report.num_images)
    return f"{text} ({low:.1f} to {high:.1f})"


def _early_sentence(found: Findings) -> str:
    """What the calibration says, and what it gave here; "" for a network that has no exits."""
    early = found.early
    if len(found.points) == 1:
        return ""
    if early is None:
        return f"Not calibrated for early exit: sdcli calibrate {found.shown} finds when images may leave."
    calibration = early.calibration
    if not early.leaves:
        return f"Calibrated on {calibration.data}, {calibration.date}: no image may leave early."
    promise = f"Promise: {promised(calibration.promise)}." if calibration.promise else "Without a promise."
    return (
        f"Early exit, calibrated on {calibration.data}, {calibration.date}: images leave at {leaving(early)}. {promise}"
    )


def leaving(early: Early) -> str:
    """Where images leave, with their shares."""
    counts = torch.bincount(early.exits, minlength=len(early.points)).tolist()
    shares = (f"{point} ({count / len(early.exits):.1%})" for point, count in zip(early.points, counts, strict=True))
    return ", ".join(shares)


def _galleries(found: Findings, count: int) -> Iterator[Gallery]:
    answers, points = found.answers, found.points
    if len(points) > 1:
        places, total = disagreeing(answers, points, count)
        share = f"{counted(total, 'image')} of {len(answers):,} ({total / len(answers):.1%})"
        yield Gallery(
            "Where the exits disagree",
            f"The exits do not give the same class to {share}. Shown are those of which they are surest, by class.",
            tuple(pictures(found, places)),
        )
    yield from _early_and_late(found, max(1, count // 2))


def _early_and_late(found: Findings, count: int) -> Iterator[Gallery]:
    """Images that leave first and last, or of which the first exit is most and least sure."""
    answers, early = found.answers, found.early
    first = found.points[0]
    score = answers.points[first].confidence
    everywhere = torch.ones(len(answers), dtype=torch.bool)
    if early and early.leaves:
        used = [place for place in range(len(early.points)) if bool((early.exits == place).any())]
        soon, late = (early.exits == used[0], early.exits == used[-1])
        names = f"Leave at {early.points[used[0]]}", f"Reach {early.points[used[-1]]}"
        why = "As calibrated."
    else:
        soon = late = everywhere
        names = f"Easy for {first}", f"Hard for {first}"
        why = "No image may leave early." if early else "Not calibrated for early exit."
    how = (
        f"{why} Shown are the images of which {first} is most sure, by class.",
        f"{why} Shown are the images of which {first} is least sure, by class.",
    )
    for title, caption, among, order in zip(names, how, (soon, late), (score, -score), strict=True):
        yield Gallery(title, caption, tuple(pictures(found, varied(order, among, answers.labels, count))))


def uses(found: Findings) -> str:
    """Commands that use the run, each with what it does."""
    run, name = shlex.quote(found.shown), shlex.quote(f"{found.name}-onnx")
    commands = {
        f"sdcli eval {run}": "score every exit again",
        f"sdcli predict {run} PHOTOS": "classify files or folders",
        f"sdcli calibrate {run}": "find out when images may leave early",
        f"sdcli export {run} --to onnx --exit staged --output {name}": "a file per section, and a runner",
    }
    wide = max(map(len, commands))
    return "\n".join(f"{command:<{wide}}  # {what}" for command, what in commands.items())
