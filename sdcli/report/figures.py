"""The figures of a run's page: what it was like to train, how sure it is, what it costs, and which classes it knows.

K classes, N images
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from markupsafe import Markup

from sdcli.errors import counted
from sdcli.evaluation.columns import amount
from sdcli.evaluation.dynamic import EARLY_EXIT
from sdcli.evaluation.evaluate import ExitResult
from sdcli.evaluation.metrics import ECE_BINS, bins
from sdcli.network.blueprint import ENSEMBLE
from sdcli.recipe.address import FINAL
from sdcli.report import charts
from sdcli.report.charts import Row, Series, look, shades
from sdcli.report.findings import Findings

MOST_CLASSES = 24
"""Classes that are all shown; of more, the `EXTREMES` worst and best."""
EXTREMES = 10


@dataclass(frozen=True)
class Figure:
    """One figure: its pictures, a legend where one is needed, and what it shows."""

    title: str
    pictures: tuple[Markup, ...]
    caption: str
    legend: Markup | None = None
    layout: str = ""
    """Of several pictures, a class of the style sheet: `panels` or `halves`."""
    wide: bool = False
    """Whether it takes the whole width of the page."""


def looks_of(found: Findings) -> dict[str, Markup]:
    """The colour of every exit and of the ensemble, the same in all figures."""
    exits = dict(zip(found.points, shades(len(found.points)), strict=True))
    return exits | {ENSEMBLE: look("ensemble")}


def training_figures(found: Findings) -> list[Figure]:
    """Losses and accuracies by epoch; none for a checkpoint without a log."""
    return [figure for figure in (_losses(found.log), _accuracies(found)) if figure is not None]


def _losses(log: Sequence[dict[str, Any]]) -> Figure | None:
    last = {name: value for line in log for name, value in line["losses"].items()}
    names = sorted(last, key=lambda name: -last[name])
    series = [
        Series(
            name,
            [(line["epoch"], line["losses"].get(name, math.nan)) for line in log],
            style,
            (f"{name}: {last[name]:.4g} in the last epoch",),
        )
        for name, style in zip(names, shades(len(names)), strict=True)
    ]
    if not series:
        return None
    svg = charts.line_chart("Training losses by epoch", series, "epoch", log=True, marks=_phases(log))
    caption = "What each loss adds to the sum, on a logarithmic scale; the mean of each epoch."
    return Figure("Training losses", (svg,), caption) if svg else None


def _accuracies(found: Findings) -> Figure | None:
    scored = [line for line in found.log if line.get("validation")]
    if not scored:
        return None
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in scored:
        validation = line["validation"]
        for result in (*validation["exits"], *filter(None, [validation["ensemble"]])):
            curves.setdefault(result["point"], []).append((line["epoch"], result["top1"]))
    looks = looks_of(found)
    series = []
    for point, values in curves.items():
        epoch, best = max(values, key=lambda value: value[1])
        tip = f"{point}: {values[-1][1]:.2f}% in the last epoch, at most {best:.2f}% (epoch {epoch})"
        series.append(Series(point, values, looks.get(point, look("ensemble")), (tip,)))
    svg = charts.line_chart("Top-1 accuracy on validation images by epoch", series, "epoch", marks=_phases(found.log))
    chosen = f" The checkpoint is that of epoch {found.about.epoch}."
    return Figure("Validation accuracy", (svg,), "Top-1 in percent on the validation images after each epoch." + chosen)


def _phases(log: Sequence[dict[str, Any]]) -> list[tuple[float, str]]:
    """Where each phase of a run begins, if there are several."""
    names = [line.get("phase") or "" for line in log]
    starts = [place for place, name in enumerate(names) if name and (not place or name != names[place - 1])]
    return [(log[place]["epoch"], names[place]) for place in starts] if len(starts) > 1 else []


def score_figures(found: Findings) -> list[Figure]:
    """Cost, reliability and classes, in an order that leaves no gaps between two columns."""
    cost, sure, classes = trade_off(found), reliability(found), per_class(found)
    if classes.layout:
        return [cost, sure, replace(classes, wide=True)]
    return [cost, classes, replace(sure, wide=True)]


def trade_off(found: Findings) -> Figure:
    """Accuracy against MACs: every exit alone, the ensemble, and early exit."""
    looks, early = looks_of(found), found.early
    series = []
    if early:
        tips = [f"early exit: {s.top1:.2f}% at {amount(s.macs)} MACs" for s in early.curve]
        curve = [(setting.macs, setting.top1) for setting in early.curve]
        # Else the calibrated setting has the label.
        labels = [] if early.leaves else [EARLY_EXIT if place == len(curve) // 2 else "" for place in range(len(curve))]
        series.append(Series(EARLY_EXIT, curve, look("early"), tips, dots=True, labels=labels))
        series += [_alone(found, early.result, look("early"))] if early.leaves else []
    series += [_alone(found, result, looks[result.point]) for result in found.report.rows]
    svg = charts.dot_chart("Top-1 accuracy against MACs", series, "MACs per image", format_x=_tick)
    caption = "Top-1 in percent of each exit alone and of their ensemble, with 95% intervals, against MACs per image."
    if early:
        caption += " The line is early exit at each calibrated setting, on these images: mean MACs, heads included."
    return Figure("Accuracy against cost", (svg,), caption)


def _tick(macs: float) -> str:
    number, _, unit = amount(macs).partition(" ")
    return f"{float(number):g} {unit}".rstrip()


def _alone(found: Findings, result: ExitResult, style: Markup) -> Series:
    low, high = result.interval(found.report.num_images)
    tip = f"{result.point}: {result.top1:.2f}% ({low:.1f} to {high:.1f}) at {amount(result.macs)} MACs"
    return Series(
        result.point,
        [(result.macs, result.top1)],
        style,
        (tip,),
        [(low, high)],
        dots=True,
        line=False,
        labels=(result.point,),
    )


def reliability(found: Findings) -> Figure:
    """Whether the exits are as sure as they are right."""
    looks = looks_of(found)
    pictures = []
    for result in found.report.rows:
        point = result.point
        bars = bins(found.answers.points[point].confidence, found.answers.correct(point))
        svg = charts.reliability(f"Reliability of {point}", bars, looks[point])
        pictures.append(Markup("<div>{}<p><strong>{}</strong> ECE {:.3f}</p></div>").format(svg, point, result.ece))
    caption = (
        f"Accuracy (upwards) by confidence (to the right) in {ECE_BINS} bins. Where a bar ends below the dashed line, "
        "the exit is too sure; the fainter a bar, the fewer images it stands for. Temperatures of a calibration are "
        "not applied."
    )
    return Figure("Reliability", tuple(pictures), caption, layout="panels")


def per_class(found: Findings) -> Figure:
    """The classes by the accuracy of the final exit, the worst first."""
    answers, num_classes = found.answers, len(found.classes)
    counts = torch.bincount(answers.labels, minlength=num_classes)
    right = {
        point: torch.bincount(answers.labels, answers.correct(point).double(), minlength=num_classes)
        for point in found.points
    }
    accuracy = {point: (100 * hits / counts.clamp(min=1)).tolist() for point, hits in right.items()}

    def row(number: int) -> Row:
        tip = _row_tip(found, number, int(counts[number]), accuracy)
        return Row(found.classes[number], tip, [accuracy[point][number] for point in found.points])

    there = [number for number in range(num_classes) if counts[number]]
    there.sort(key=lambda number: (accuracy[FINAL][number], accuracy[found.points[0]][number]))
    looks = [looks_of(found)[point] for point in found.points]
    groups = {"all classes": there}
    if len(there) > MOST_CLASSES:
        groups = {f"the {EXTREMES} worst": there[:EXTREMES], f"the {EXTREMES} best": there[-EXTREMES:]}
    rows = {title: [row(number) for number in group] for title, group in groups.items()}
    axis = charts.linear([value for group in rows.values() for one in group for value in one.values], 4)
    svgs = [
        charts.row_chart(f"Accuracy per class: {title}", group, looks, axis, f"top-1 %, {title}")
        for title, group in rows.items()
    ]
    least, most = int(counts[there].min()), int(counts[there].max())
    each = counted(most, "image") if least == most else f"{least:,} to {counted(most, 'image')}"
    caption = f"Classes by the accuracy of the final exit (large dot). Each has {each} here."
    if len(groups) > 1:
        caption += f" Shown are {EXTREMES} at each end of {len(there):,} classes."
    legend = charts.legend(found.points, looks)
    return Figure("Accuracy per class", tuple(svgs), caption, legend, "halves" if len(svgs) > 1 else "")


def _row_tip(found: Findings, number: int, images: int, accuracy: dict[str, list[float]]) -> str:
    scores = ", ".join(f"{point} {accuracy[point][number]:.1f}%" for point in found.points)
    return f"{found.classes[number]} ({counted(images, 'image')}): {scores}"
