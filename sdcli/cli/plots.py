"""Pictures: a run's curves from its log, and accuracy against cost. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcli.errors import UserError
from sdcli.files import check_writable, replacing
from sdcli.run.folder import read_log
from sdcli.toml import write_value

if TYPE_CHECKING:
    from sdcli.compare.compare import Comparison, Task
    from sdcli.evaluation.calibrate import Calibrated
    from sdcli.run.tune import Search, Trial

FORMATS = (".png", ".svg", ".pdf", ".jpg", ".webp")
WIDTH, HEIGHT = 5.5, 4.2
"""Of a panel, in inches, at 150 dots each."""


def has_matplotlib() -> bool:
    """Whether pictures can be drawn."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def check(file: Path) -> None:
    """Raises UserError where no picture can be drawn into `file`, before anything is computed."""
    if not has_matplotlib():
        raise UserError("pictures need matplotlib", "it installed", "pip install 'sdcli[plots]'")
    if file.suffix.lower() not in FORMATS:
        raise UserError(f"'{file}' is not the name of a picture", "one of " + ", ".join(FORMATS), f"{file.stem}.png")
    if not file.absolute().parent.is_dir():
        raise UserError(f"'{file}' cannot be written: its folder does not exist", "a folder that exists")
    try:
        check_writable(file)
    except OSError as error:
        raise UserError(f"'{file}' cannot be written: {error.strerror}", "a file in a writable folder") from None


def save_curves(run: Path, file: Path) -> None:
    """Draws losses and accuracies by epoch; raises UserError where there is no log or no matplotlib."""
    log = read_log(run)
    if not log:
        raise UserError(f"'{run}' has no epochs to draw", "a run folder whose log.jsonl has a line")
    draw = [_losses, _accuracies] if any(line["validation"] for line in log) else [_losses]
    with drawing(file, len(draw)) as (figure, panels):
        for panel, axes in zip(draw, panels, strict=True):
            panel(axes, log)
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.suptitle(run.resolve().name, fontsize=10)


def save_trade_off(found: Calibrated, file: Path) -> None:
    """Draws accuracy against MACs: the exits alone, and early exit at every setting."""
    with drawing(file, 1) as (_, (axes,)):
        curve, alone = found.calibration.curve, found.exits
        axes.plot([p.cost for p in curve], [p.top1 for p in curve], color="tab:orange", label="early exit", marker=".")
        axes.plot(
            [row.cost for row in alone], [row.top1 for row in alone], "o", color="#1f3f7a", label="one exit alone"
        )
        for row in alone:
            axes.annotate(row.point, (row.cost, row.top1), (4, -10), textcoords="offset points", fontsize=8)
        chosen = next(row for row in found.trade_offs if row.chosen)
        axes.plot([chosen.cost], [chosen.top1], "*", color="tab:red", markersize=12, label="chosen")
        axes.set_xlabel("mean MACs, as a share of the plain model's")
        axes.set_title(f"top-1 % on {found.calibration.data}", fontsize=10, loc="left")
        axes.legend(fontsize=8, frameon=False)


def save_search(search: Search, trials: Sequence[Trial], file: Path) -> None:
    """Draws the score of each trial against each key: complete trials filled, others hollow, the best as a star."""
    scored = [trial for trial in trials if trial.top1 is not None]
    with drawing(file, len(search.space)) as (figure, panels):
        for tried, axes in zip(search.space, panels, strict=True):
            marks = [write_value(choice) for choice in tried.choices]
            for place, trial in enumerate(scored):
                value = trial.values[tried.key]
                at = tried.choices.index(value) if marks else value
                complete, first = trial.state == "complete", place == 0 and trial.state == "complete"
                axes.plot(
                    [at],
                    [trial.top1],
                    "*" if first else "o",
                    color="tab:red" if first else "#1f3f7a",
                    fillstyle="full" if complete else "none",
                    markersize=14 if first else 6,
                    zorder=3 if first else 2,
                )
            if marks:
                axes.set_xticks(range(len(marks)), marks)
                axes.set_xlim(-0.5, len(marks) - 0.5)
            elif tried.log:
                logarithmic(axes, "x")
            axes.set_xlabel(tried.key)
        panels[0].set_title("validation: top-1, %", fontsize=10, loc="left")
        panels[-1].set_title("filled: complete, hollow: ended early", fontsize=8, loc="right")
        figure.suptitle(search.output.resolve().name, fontsize=10)


def save_comparison(found: Comparison, file: Path) -> None:
    """Draws, for every task, accuracy against MACs at use (every exit of every recipe) and against training MACs."""
    labels = list(dict.fromkeys(group.label for task in found.tasks for group in task.groups))
    # Of a recipe in all panels.
    places = {label: place for place, label in enumerate(labels)}
    with drawing(file, 2, rows=len(found.tasks)) as (figure, panels):
        handles: dict[str, Any] = {}
        for task, use, training in zip(found.tasks, panels[::2], panels[1::2], strict=True):
            handles = at_use(use, task, places) | handles
            _in_training(training, task, places)
            use.set_title(f"{task.name}\ntop-1 % ({task.split})", fontsize=9, loc="left")
        shown = [handles[label] for label in labels]
        figure.legend(shown, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=3)


def at_use(axes: Any, task: Task, places: Mapping[str, int]) -> dict[str, Any]:
    """A line through the exits of each recipe, by its label; the plain network is a star."""
    drawn = {}
    plain = next((group.macs["final"] for group in task.groups if "final" in group.macs), 1)
    for group in task.groups:
        place = places[group.label]
        points = [point for point in group.points if point != "ensemble"]
        costs, scores = [group.macs[point] / plain for point in points], [group.points[point] for point in points]
        spread = [score.sd or 0.0 for score in scores]
        marker = _shape(len(points), place)
        drawn[group.label] = axes.errorbar(
            costs,
            [score.mean for score in scores],
            yerr=spread if any(spread) else None,
            label=group.label,
            color=f"C{place % 10}",
            linestyle="-" if place < 10 else "--",
            marker=marker,
            markersize=10 if marker == "*" else 5,
            linewidth=1.2,
            capsize=2,
        )
    axes.set_xlabel("MACs of an exit that is used alone, as a share of the plain network's", fontsize=8)
    return drawn


def _shape(num_points: int, place: int) -> str:
    """A plain network's marker or an exit's; after ten recipes colours come again, with other markers."""
    return ("*" if num_points == 1 else "o", "P" if num_points == 1 else "s")[place // 10 % 2]


def _in_training(axes: Any, task: Task, places: Mapping[str, int]) -> None:
    """The final exit of each recipe against what its training took."""
    base = next((group for group in task.groups if group.label == task.baseline), task.groups[0])
    for group in task.groups:
        place = places[group.label]
        if group.training_macs and base.training_macs and "final" in group.points:
            score = group.points["final"]
            cost = group.training_macs / base.training_macs
            marker = _shape(len(group.points), place)
            axes.errorbar(
                [cost], [score.mean], yerr=[score.sd or 0.0], color=f"C{place % 10}", marker=marker, capsize=2
            )
    axes.set_xlabel(f"training MACs, as a share of {base.label}'s", fontsize=8)
    axes.set_title("final exit", fontsize=9, loc="left")


@contextmanager
def drawing(file: Path, panels: int, rows: int = 1) -> Iterator[tuple[Any, list[Any]]]:
    """A figure with panels side by side, in one row or several, written to `file` at the end."""
    with picture(file, WIDTH * panels, HEIGHT * rows) as figure:
        axes = list(figure.subplots(rows, panels, squeeze=False).flat)
        for panel in axes:
            plain(panel)
        yield figure, axes


def plain(panel: Any) -> None:
    """A panel with a faint grid and two axes."""
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


@contextmanager
def picture(file: Path, width: float, height: float) -> Iterator[Any]:
    """An empty figure of this size in inches, written to `file` at the end; names in it may have any characters."""
    check(file)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    with rc_context({"text.parse_math": False}):
        yield figure
        _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    try:
        with replacing(file) as beside:
            figure.savefig(beside, format=file.suffix.lstrip(".").lower())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"'{file}' cannot be written: {reason}", "a file such as curves.png or curves.svg") from None


def logarithmic(axes: Any, which: str) -> None:
    """Makes the `x` or the `y` axis logarithmic, its numbers without mathematical text."""
    from matplotlib.ticker import LogFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))


def _losses(axes: Any, log: list[dict[str, Any]]) -> None:
    """What each loss adds to the sum, from the largest to the smallest: a logarithm shows them all."""
    epochs = [line["epoch"] for line in log]
    last = {name: value for line in log for name, value in line["losses"].items()}
    names = sorted(last, key=lambda name: -last[name])
    for name in names:
        values = [line["losses"].get(name, float("nan")) for line in log]
        axes.plot(epochs, [value if value > 0 else float("nan") for value in values], label=name, marker=_marker(log))
    logarithmic(axes, "y")
    axes.set_title("training: what each loss adds", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)


def _accuracies(axes: Any, log: list[dict[str, Any]]) -> None:
    """Top-1 on the validation split: exits from light to dark, the ensemble dashed."""
    scored = [line for line in log if line["validation"]]
    axes.set_title("validation: top-1, %", fontsize=10, loc="left")
    epochs = [line["epoch"] for line in scored]
    points = [result["point"] for result in scored[-1]["validation"]["exits"]]
    for place, point in enumerate(points):
        values = [line["validation"]["exits"][place]["top1"] for line in scored]
        shade = 0.25 + 0.75 * (place + 1) / len(points)
        axes.plot(epochs, values, label=point, color=(0.1, 0.3, 0.6, shade), marker=_marker(log))
    if scored[-1]["validation"]["ensemble"]:
        values = [line["validation"]["ensemble"]["top1"] for line in scored]
        axes.plot(epochs, values, label="ensemble", color="tab:orange", linestyle="--", marker=_marker(log))
    axes.legend(fontsize=8, frameon=False)


def _marker(log: list[dict[str, Any]]) -> str:
    """A line of one epoch would not be seen."""
    return "o" if len(log) == 1 else ""
