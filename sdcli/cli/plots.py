"""A run's curves as a picture, from its log. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdcli.errors import UserError
from sdcli.files import replacing
from sdcli.run.folder import read_log

WIDTH, HEIGHT = 5.5, 4.2
"""Of a panel, in inches, at 150 dots each."""


def has_matplotlib() -> bool:
    """Whether pictures can be drawn."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def save_curves(run: Path, file: Path) -> None:
    """Draws losses and accuracies by epoch; raises UserError where there is no log or no matplotlib."""
    log = read_log(run)
    if not log:
        raise UserError(f"'{run}' has no epochs to draw", "a run folder whose log.jsonl has a line")
    if not has_matplotlib():
        raise UserError("pictures need matplotlib", "it installed", "pip install 'sdcli[plots]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    draw = [_losses, _accuracies] if any(line["validation"] for line in log) else [_losses]
    figure = Figure(figsize=(WIDTH * len(draw), HEIGHT), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for panel, axes in zip(draw, figure.subplots(1, len(draw), squeeze=False)[0], strict=True):
        panel(axes, log)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(run.resolve().name, fontsize=10)
    try:
        with replacing(file) as beside:
            figure.savefig(beside, format=file.suffix.lstrip(".") or "png")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"'{file}' cannot be written: {reason}", "a file such as curves.png or curves.svg") from None


def _losses(axes: Any, log: list[dict[str, Any]]) -> None:
    """What each loss adds to the sum, from the largest to the smallest: a logarithm shows them all."""
    epochs = [line["epoch"] for line in log]
    last = {name: value for line in log for name, value in line["losses"].items()}
    names = sorted(last, key=lambda name: -last[name])
    for name in names:
        values = [line["losses"].get(name, float("nan")) for line in log]
        axes.plot(epochs, [value if value > 0 else float("nan") for value in values], label=name, marker=_marker(log))
    axes.set_yscale("log")
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
