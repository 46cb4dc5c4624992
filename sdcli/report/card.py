"""The model card of a run: what the Hugging Face hub reads, how good it is, how it was trained, and how to use it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdcli import __version__
from sdcli.errors import counted
from sdcli.evaluation.columns import amount
from sdcli.evaluation.evaluate import ExitResult
from sdcli.export.card import TASK, UNKNOWN, front_matter, hub_id, plain
from sdcli.network.predict import promised
from sdcli.report.findings import Findings
from sdcli.report.page import about, leaving, scores_table

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

MARK = "<!-- Written by sdcli report, which replaces this file. Delete this line to keep your changes. -->"


def card(found: Findings, license: str = "") -> str:
    """The card as Markdown; `license` is that of the weights, where the user states one."""
    license = license or found.license
    report, trained_on = found.report, found.about.dataset.name
    exits = counted(len(found.points) - 1, "exit") if len(found.points) > 1 else "no exits"
    lines = [
        *front_matter(found.about, license, f"{report.model} on {trained_on}", list(_results(found))),
        "",
        MARK,
        "",
        f"# {plain(report.model)}, trained on {plain(trained_on)}",
        "",
        f"An image classifier of {counted(len(found.classes), 'class', 'classes')} with {exits} before its end, "
        f"trained with sdcli {__version__}.",
        "",
        *(f"- **{key}:** {plain(value)}" for key, value in about(found)),
        *([f"- **Licence of the weights:** {plain(license)}"] if license != UNKNOWN else []),
        "",
        "## Exits",
        "",
        *_table(found),
        "",
        *_early(found),
        *_training(found),
        *_use(found),
        *_limits(found),
    ]
    return "\n".join(lines)


def is_card(path: Path) -> bool:
    """Whether a file is a card that this module has written, and that may be replaced."""
    try:
        return MARK in path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return False


def _results(found: Findings) -> Iterator[EvalResult]:
    """Top-1 of every exit, as the hub lists results."""
    from huggingface_hub import EvalResult

    trained_on, scored_on = found.about.dataset, found.report.dataset
    hub = hub_id(trained_on.source) if scored_on == trained_on.name else ""
    for result in found.rows:
        yield EvalResult(
            task_type=TASK,
            dataset_type=hub or scored_on,
            dataset_name=scored_on,
            dataset_split=found.report.split,
            metric_type="accuracy",
            metric_name=f"Top-1 % of {result.point}",
            metric_value=round(result.top1, 2),
        )


def _table(found: Findings) -> list[str]:
    table = scores_table(found)
    lines = [_row(table.titles), "| --- |" + " ---: |" * (len(table.titles) - 1)]
    for place, (name, *cells) in enumerate(table.rows):
        lines.append(
            _row([name, *(f"**{cell}**" if (place, c) in table.best else cell for c, cell in enumerate(cells))])
        )
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _early(found: Findings) -> list[str]:
    """Early exit and its promise, where it is calibrated."""
    early = found.early
    if early is None or not early.leaves:
        return []
    calibration, result = early.calibration, early.result
    lines = [
        "## Early exit",
        "",
        f"Calibrated on {plain(calibration.data)}, {calibration.date}, with the policy {calibration.policy.kind}. "
        f"The images of the table leave at {leaving(early)}, with {result.top1:.2f}% top-1 at {amount(result.macs)} "
        f"MACs on average, {_share(found, result):.2f} of the plain model's.",
        "",
    ]
    if promise := calibration.promise:
        lines += [
            f"Promise: {promised(promise)}, for images like the {promise.num_images:,} held-out images of the "
            f"certificate (measured there: {promise.measured:.2f}).",
            "",
        ]
    return lines


def _share(found: Findings, result: ExitResult) -> float:
    plain_macs = found.about.blueprint.costs()["final"].macs
    return result.macs / plain_macs if plain_macs else 0.0


def _training(found: Findings) -> list[str]:
    lines = ["## Training", ""]
    if found.command:
        lines += [*_fenced(found.command, "sh"), ""]
    if found.recipe:
        lines += ["<details><summary>Recipe</summary>", "", *_fenced(found.recipe, "toml"), "", "</details>", ""]
    return lines if len(lines) > 2 else []


def _fenced(text: str, language: str) -> list[str]:
    """A block of code that nothing in it can end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [fence + language, *text.strip().splitlines(), fence]


def _use(found: Findings) -> list[str]:
    name, file = found.path.name, shlex.quote(found.path.name)
    python = f"""
import sdcli

network = sdcli.load({name!r})
network.predict(["photo.jpg"])  # label, confidence, and the exit that answered
"""
    shell = f"""
sdcli predict {file} PHOTOS
sdcli export {file} --to onnx --exit staged --output onnx
"""
    return ["## Use", "", *_fenced(python, "python"), "", *_fenced(shell, "sh"), ""]


def _limits(found: Findings) -> list[str]:
    """What the figures do not say."""
    report = found.report
    lines = [
        "## Limits",
        "",
        f"- Figures are those of the {report.split} split of {plain(report.dataset)} ({report.num_images:,} images). "
        "Intervals are Wilson's 95%: the noise of the images, not of the training.",
    ]
    if any(line.get("validation") for line in found.log) and found.path.name != "last.safetensors":
        lines.append("- The epoch was chosen on the validation split.")
    lines += [f"- {plain(note[:1].upper() + note[1:])}." for note in found.notes]
    lines.append(f"- It knows the {len(found.classes)} classes of its data, and gives one of them to any image.")
    return [*lines, ""]
