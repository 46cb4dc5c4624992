"""What `eval` shows: tables, CSV, JSON and sentences."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sdcli.cli.grids import Cell, Grid
from sdcli.errors import counted
from sdcli.evaluation.columns import COLUMNS, LATENCY, cell, is_best, report_columns
from sdcli.network.blueprint import ENSEMBLE

if TYPE_CHECKING:
    from torch import Tensor

    from sdcli.evaluation.dynamic import Dynamic
    from sdcli.evaluation.evaluate import ExitResult, Report
    from sdcli.evaluation.fidelity import Against
    from sdcli.evaluation.scoring import Scored

INTERVAL = "95 %\ninterval"
DROPPABLE = ("top-5\n%", "same as\nfinal %", "AUROC", "params", INTERVAL, "ECE", "speed-\nup")
"""What a narrow terminal does without first."""


def rows_of(scored: Scored) -> list[ExitResult]:
    """All exits, then their ensembles, then early exit."""
    more = scored.ensembles.results if scored.ensembles else ()
    return [*scored.report.rows, *more, *([scored.dynamic.result] if scored.dynamic else [])]


def grids(scored: Scored, *, per_class: bool) -> Iterator[Grid]:
    """The tables, the scores first."""
    yield scores_grid(scored)
    if scored.dynamic:
        yield leaving_grid(scored.dynamic)
        yield ways_grid(scored.report, scored.dynamic)
    if scored.against:
        yield against_grid(scored.against)
    if per_class:
        yield classes_grid(scored)


def scores_grid(scored: Scored) -> Grid:
    """A row per exit: the best of each column is bold."""
    report, rows = scored.report, rows_of(scored)
    columns = [*report_columns(len(scored.classes)), *([LATENCY] if scored.latency_on else [])]
    if len(rows) == 1:
        columns = [column for column in columns if column.field != "agreement"]
    title = f"{report.model}  ·  {report.dataset} ({report.split}, {counted(report.num_images, 'image')})"
    header = ["exit"]
    for column in columns:
        header += [column.heading, *([INTERVAL] if column.field == "top1" else [])]
    lines = []
    for result in rows:
        cells = [Cell(result.point)]
        for column in columns:
            cells.append(Cell(cell(result, column), is_best(result, column, rows)))
            if column.field == "top1":
                low, high = result.interval(report.num_images)
                cells.append(Cell(f"{low:.1f}-{high:.1f}"))
        lines.append(tuple(cells))
    return Grid(title, tuple(header), tuple(lines), line_after=len(report.exits) - 1)


def leaving_grid(leaving: Dynamic) -> Grid:
    """What `--dynamic` adds: who leaves where."""

    def score(value: float | None) -> Cell:
        return Cell("-" if value is None else f"{value:.2f}")

    rows = (
        (Cell(row.point), Cell(f"{row.share:.1%}"), score(row.top1), score(row.plain_top1)) for row in leaving.exits
    )
    return Grid("early exit", ("leave at", "images", "top-1 %", "top-1 % of\nthe plain model"), tuple(rows))


def ways_grid(report: Report, leaving: Dynamic) -> Grid:
    """What `--dynamic` adds: early exit beside each exit alone, which may be as good."""
    rows, plain = [], leaving.result.macs * leaving.result.speedup
    for result in (*report.exits, leaving.result):
        if result is leaving.result:
            time = leaving.seconds / leaving.plain_seconds
        else:
            time = leaving.times.get(result.point, 1.0)
        rows.append(
            (Cell(result.point), Cell(f"{result.top1:.2f}"), Cell(f"{result.macs / plain:.2f}"), Cell(f"{time:.2f}"))
        )
    header = ("answers", "top-1 %", "share of the\nplain MACs", "share of\nits time")
    return Grid("early exit beside each exit alone", header, tuple(rows), line_after=len(report.exits) - 1)


def better_alone(report: Report, leaving: Dynamic) -> str:
    """The exit that is at least as accurate as early exit for no more MACs, in a sentence; "" if there is none."""
    own = leaving.result
    as_good = [row for row in report.exits if row.macs <= own.macs and row.top1 >= own.top1]
    if not as_good:
        return ""
    best = max(as_good, key=lambda row: row.top1)
    return (
        f"{best.point} alone is as good, {best.top1:.2f} % for {1 / best.speedup:.2f} of the plain model's MACs: on "
        f"these images early exit gains nothing over it (sdcli export --exit {best.point} ships it)"
    )


def leaving_time(leaving: Dynamic) -> str:
    """The work and the time of early exit, in a sentence."""
    own, plain = leaving.seconds, leaving.plain_seconds
    shares = f"{1 / leaving.result.speedup:.2f} of the plain model's MACs and {own / plain:.2f} of its time"
    return f"{shares}: {_duration(own)} against {_duration(plain)}, loading not counted."


def _duration(seconds: float) -> str:
    """ "2.5 s", "83 ms", "0.4 ms"."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.1f} ms"


def against_grid(against: Against) -> Grid:
    """What `--against` adds: how closely every exit follows the other network."""
    best = min(row.kl for row in against.points), max(row.agreement for row in against.points)
    several = len(against.points) > 1
    rows = (
        (
            Cell(row.point),
            Cell(f"{row.agreement:.2f}", several and row.agreement == best[1]),
            Cell(f"{row.kl:.4f}", several and row.kl == best[0]),
        )
        for row in against.points
    )
    return Grid("fidelity", ("exit", "same class %", "mean KL"), tuple(rows))


def classes_grid(scored: Scored) -> Grid:
    """What `--per-class` adds: the accuracy of every class, the worst first."""
    table = class_accuracies(scored)
    points = [name for name in table[0] if name not in ("class", "images")]
    rows = (
        (Cell(row["class"]), Cell(f"{row['images']:,}"), *(Cell(f"{100 * row[point]:.2f}") for point in points))
        for row in table
    )
    header = ("class", "images", *(f"{point}\ntop-1 %" for point in points))
    return Grid("classes, the worst first", header, tuple(rows))


def shown_points(scored: Scored) -> list[str]:
    """The deepest exit that was scored, and the ensemble where there is one."""
    return [scored.report.exits[-1].point, *([ENSEMBLE] if scored.report.ensemble else [])]


def confusion(scored: Scored, point: str) -> Tensor:
    """The confusion matrix of one point [K, K], true classes in rows."""
    from sdcli.evaluation.metrics import confusion_matrix

    answers = scored.answers
    return confusion_matrix(answers.points[point].predicted, answers.labels, len(scored.classes))


def class_accuracies(scored: Scored) -> list[dict[str, Any]]:
    """For every class that has images its name, their number and its accuracies, the worst of the first point first."""
    from sdcli.evaluation import metrics

    points = shown_points(scored)
    matrices = {point: confusion(scored, point) for point in points}
    shares = {point: metrics.class_accuracies(matrix).tolist() for point, matrix in matrices.items()}
    counts = matrices[points[0]].sum(dim=1).tolist()
    order = sorted(
        (number for number, count in enumerate(counts) if count),
        key=lambda number: [shares[point][number] for point in points],
    )
    return [
        {"class": scored.classes[n], "images": counts[n], **{point: shares[point][n] for point in points}}
        for n in order
    ]


def balanced(scored: Scored) -> dict[str, float]:
    """The balanced accuracy of every point, in percent."""
    from sdcli.evaluation.metrics import balanced_accuracy

    return {result.point: 100 * balanced_accuracy(confusion(scored, result.point)) for result in scored.report.rows}


def most_confused(scored: Scored) -> dict[str, Any] | None:
    """Which class the deepest exit most often takes for which other one; None where it makes no mistake."""
    matrix = confusion(scored, shown_points(scored)[0])
    mistakes = matrix.clone().fill_diagonal_(0)
    if not mistakes.any():
        return None
    label, taken_for = divmod(int(mistakes.argmax()), len(scored.classes))
    return {
        "class": scored.classes[label],
        "taken_for": scored.classes[taken_for],
        "images": int(mistakes[label, taken_for]),
        "of": int(matrix[label].sum()),
    }


def sentences(scored: Scored, *, per_class: bool, with_confusion: bool) -> Iterator[str]:
    """Results that are no table."""
    if scored.dynamic:
        yield leaving_time(scored.dynamic)
    if found := scored.against:
        yield (
            f"fidelity: the class of, and KL from, the final exit of {found.checkpoint} ({found.model}, top-1 "
            f"{found.top1:.2f} % on these images)."
        )
    if scored.ensembles:
        used = ((point, weight) for point, weight in scored.ensembles.weights.items() if weight)
        weights = " + ".join(f"{weight:.3f} {point}" for point, weight in used)
        fitted = counted(scored.ensembles.num_images, "validation image")
        yield f"weighted ensemble: {weights}, fitted on {fitted}."
    if per_class:
        shares = ", ".join(f"{point} {share:.2f} %" for point, share in balanced(scored).items())
        yield f"balanced accuracy: {shares}."
    if with_confusion:
        point, pair = shown_points(scored)[0], most_confused(scored)
        if pair is None:
            yield f"most confused classes of {point}: none, all images are right."
        else:
            yield (
                f"most confused classes of {point}: {pair['images']:,} of {counted(pair['of'], 'image')} of "
                f"'{pair['class']}' classified as '{pair['taken_for']}'."
            )
    if sharp := scored.sharpness:
        largest = "not found" if sharp.largest_eigenvalue is None else f"{sharp.largest_eigenvalue:.4g}"
        yield (
            f"sharpness of final: Hessian trace {sharp.trace:.4g} ± {sharp.trace_error:.2g} (standard error of "
            f"{sharp.num_vectors} draws), largest eigenvalue {largest}; loss {sharp.loss:.4g} on "
            f"{counted(sharp.num_images, 'image')} of the {scored.report.split} split."
        )


def notes_of(scored: Scored) -> Iterator[str]:
    """What a reader should know about the scores."""
    if scored.latency_on:
        yield f"ms: the median time of one image on {scored.latency_on}, each exit alone"
    if scored.dynamic and (better := better_alone(scored.report, scored.dynamic)):
        yield better
    yield from scored.notes


def as_json(scored: Scored, *, per_class: bool, with_confusion: bool) -> dict[str, Any]:
    """All that was scored as plain values."""

    def row(result: ExitResult) -> dict[str, Any]:
        low, high = result.interval(scored.report.num_images)
        return {**asdict(result), "top1_low": low, "top1_high": high}

    report = scored.report
    table: dict[str, Any] = report.to_dict() | {
        "exits": [row(result) for result in report.exits],
        "ensemble": row(report.ensemble) if report.ensemble else None,
    }
    if leaving := scored.dynamic:
        table["early_exit"] = {**asdict(leaving), "result": row(leaving.result)}
    if found := scored.ensembles:
        table["ensembles"] = {**asdict(found), "results": [row(result) for result in found.results]}
    if scored.against:
        table["against"] = asdict(scored.against)
    if scored.latency_on:
        table["latency_on"] = scored.latency_on
    if per_class:
        table["per_class"] = class_accuracies(scored)
        table["balanced_accuracy"] = balanced(scored)
    if with_confusion:
        table["most_confused"] = most_confused(scored)
    if scored.sharpness:
        table["sharpness"] = asdict(scored.sharpness)
    return table


def as_csv(scored: Scored) -> str:
    """All values in full, one line per exit, ensemble and early exit."""
    report = scored.report
    fields = [column.field for column in COLUMNS] + (["latency_ms"] if scored.latency_on else [])
    at = fields.index("top1") + 1
    fields[at:at] = ["top1_low", "top1_high"]
    fidelity: Mapping[str, Any] = {row.point: row for row in scored.against.points} if scored.against else {}
    more = ["against_agreement", "against_kl"] if scored.against else []
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "dataset", "split", "num_images", "point", *fields, *more])
    for result in rows_of(scored):
        low, high = result.interval(report.num_images)
        values = {**asdict(result), "top1_low": low, "top1_high": high}
        followed = fidelity.get(result.point)
        close = [followed.agreement, followed.kl] if followed else [None, None]
        about = [report.model, report.dataset, report.split, report.num_images, result.point]
        writer.writerow([*about, *(values[field] for field in fields), *(close if more else [])])
    return text.getvalue().rstrip("\n")
