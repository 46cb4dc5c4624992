"""Pictures of `eval`: accuracy against MACs with a reliability diagram, and the confusion matrix. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcli.cli.plots import picture, plain
from sdcli.evaluation.columns import amount
from sdcli.evaluation.ensembles import PROBABILITIES, WEIGHTED
from sdcli.network.blueprint import ENSEMBLE

if TYPE_CHECKING:
    from sdcli.evaluation.evaluate import ExitResult
    from sdcli.evaluation.scoring import Scored

EARLY, TOGETHER, TRUE = "#d1495b", "#e08e0b", "#9a9a9a"
MARKERS = {ENSEMBLE: "D", PROBABILITIES: "s", WEIGHTED: "^"}
LETTER = 0.09
"""Inches."""
MOST_NAMED, MOST_NUMBERED = 40, 16
"""Classes that are named on the axes of a confusion matrix, and those whose counts are written into its cells."""


def shades(count: int) -> list[tuple[float, float, float]]:
    """The colours of so many exits, from light to dark: deeper exits are darker."""
    light, dark = (0.56, 0.77, 0.87), (0.07, 0.20, 0.38)
    steps = [place / max(count - 1, 1) for place in range(count)] if count > 1 else [1.0]
    return [tuple(a + (b - a) * step for a, b in zip(light, dark, strict=True)) for step in steps]  # type: ignore[misc]


def save_scores(scored: Scored, file: Path) -> None:
    """Draws top-1 against MACs, and for every exit how often it is right against how sure it is."""
    report = scored.report
    across = math.ceil(math.sqrt(len(report.rows)))
    down = math.ceil(len(report.rows) / across)
    beside = 1.65 * max(across, 2)
    with picture(file, 6.4 + beside, max(4.9, 0.7 + 1.85 * down)) as figure:
        left, right = figure.add_gridspec(1, 2, width_ratios=(6.0, beside))
        cost = figure.add_subplot(left)
        plain(cost)
        _against_cost(cost, scored)
        panels = list(right.subgridspec(down, across).subplots(sharex=True, sharey=True, squeeze=False).flat)
        _reliability(panels, scored, across)
        about = f"{report.dataset} ({report.split}, {report.num_images:,} images)"
        figure.suptitle(f"{report.model}  ·  {about}", fontsize=11)


def _against_cost(axes: Any, scored: Scored) -> None:
    report = scored.report
    for result, shade in zip(report.exits, shades(len(report.exits)), strict=True):
        _dot(axes, result, report.num_images, shade, "o")
    for result in (
        *([report.ensemble] if report.ensemble else []),
        *(scored.ensembles.results if scored.ensembles else ()),
    ):
        _dot(axes, result, report.num_images, TOGETHER, MARKERS[result.point])
    early = scored.early
    if early:
        axes.plot(
            [spot.macs for spot in early.curve], [spot.top1 for spot in early.curve], "-", color=EARLY, linewidth=1.6,
            label="early exit: all settings",
        )  # fmt: skip
    leaving = scored.dynamic.result if scored.dynamic else early.result if early and early.leaves else None
    if leaving:
        label = "early exit: as calibrated"
        axes.plot([leaving.macs], [leaving.top1], "*", color=EARLY, markersize=13, zorder=5, label=label)
    axes.margins(x=0.06, y=0.1)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda macs, _: _tick(macs))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("MACs per image", fontsize=9)
    axes.set_title("top-1 %, with 95 % intervals", fontsize=9, loc="left")
    # Below the axes, where it covers no dot.
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4)


def _dot(axes: Any, result: ExitResult, num_images: int, colour: Any, marker: str) -> None:
    low, high = result.interval(num_images)
    axes.errorbar(
        [result.macs],
        [result.top1],
        yerr=[[max(result.top1 - low, 0)], [max(high - result.top1, 0)]],
        fmt=marker,
        color=colour,
        elinewidth=1,
        markersize=7,
        fillstyle="none" if marker in "s^" else "full",
        zorder=3,
        label=result.point,
    )


def _tick(macs: float) -> str:
    number, _, unit = amount(macs).partition(" ")
    return f"{float(number):g} {unit}".rstrip()


def _reliability(panels: Sequence[Any], scored: Scored, across: int) -> None:
    """A small panel for every exit: bars that end below the diagonal are surer than right; faint ones are few
    images."""
    from sdcli.evaluation.metrics import bins

    report, answers = scored.report, scored.answers
    colours: list[Any] = [*shades(len(report.exits)), TOGETHER]
    for number, axes in enumerate(panels):
        if number >= len(report.rows):
            axes.set_visible(False)
            continue
        result = report.rows[number]
        plain(axes)
        axes.set_aspect("equal")
        found = bins(answers.points[result.point].confidence, answers.correct(result.point))
        for one in found:
            fullness = 0.25 + 0.75 * min(1.0, math.sqrt(one.images / report.num_images) * 2)
            axes.bar(
                one.low, one.accuracy, one.high - one.low, align="edge", color=colours[number], alpha=fullness,
                edgecolor="white", linewidth=0.6,
            )  # fmt: skip
        axes.plot([0, 1], [0, 1], "--", color=TRUE, linewidth=1)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=7)
        axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=7)
        axes.set_title(f"{result.point}, ECE {result.ece:.3f}", fontsize=8, loc="left")
        if number % across == 0:
            axes.set_ylabel("accuracy", fontsize=8)
        if number + across >= len(report.rows):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("confidence", fontsize=8)


def save_confusion(matrix: Any, classes: Sequence[str], point: str, file: Path) -> None:
    """Draws a confusion matrix, each row as shares of its class; small ones are darker than in proportion."""
    from matplotlib.colors import PowerNorm

    counts = matrix.numpy()
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    side = min(1.0 + 0.28 * len(classes), 11.0) if len(classes) <= MOST_NAMED else 8.0
    with picture(file, max(side + 1.6, 5.0), max(side + 1.0, 4.4)) as figure:
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
        axes.spines[:].set_visible(False)
        if len(classes) <= MOST_NAMED:
            short = [name if len(name) <= 18 else f"{name[:17]}…" for name in classes]
            upright = LETTER * max(map(len, short)) > side / len(classes)
            axes.set_xticks(range(len(classes)), short, rotation=90 if upright else 0, fontsize=8)
            axes.set_yticks(range(len(classes)), short, fontsize=8)
            axes.tick_params(length=0)
        if len(classes) <= MOST_NUMBERED:
            for row, column in zip(*counts.nonzero(), strict=True):
                dark = shares[row, column] > 0.3
                axes.text(
                    column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=7,
                    color="white" if dark else "#1b2a3d",
                )  # fmt: skip
        axes.set_xlabel(f"answer of {point}", fontsize=9)
        axes.set_ylabel("class", fontsize=9)
        bar = figure.colorbar(image, ax=axes, shrink=0.7)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8)
        bar.set_label("share of the class's images", fontsize=9)
