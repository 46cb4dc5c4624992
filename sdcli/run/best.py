"""Chooses the best epoch on the validation split, by the recipe's `best` key."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sdcli.evaluation.evaluate import ExitResult, Report
from sdcli.recipe.schema import MEAN

COARSE = 100
"""With fewer validation images than this, one image is more than a percentage point."""


@dataclass
class Best:
    """The best epoch so far, and the best epoch of each point on its own."""

    by: str
    """`mean` (of all classifiers), `ensemble`, or the name of a point."""
    epoch: int = 0
    """0 before the first epoch."""
    report: Report | None = None
    of_points: dict[str, tuple[int, ExitResult]] = field(default_factory=dict)

    def see(self, epoch: int, report: Report) -> bool:
        """Adds the results of an epoch; returns whether it is the best so far."""
        for result in [*report.exits, *([report.ensemble] if report.ensemble else [])]:
            former = self.of_points.get(result.point)
            if former is None or _quality([result]) > _quality([former[1]]):
                self.of_points[result.point] = epoch, result
        better = self.report is None or quality(report, self.by) > quality(self.report, self.by)
        if better:
            self.epoch, self.report = epoch, report
        return better

    @property
    def epochs(self) -> dict[str, int]:
        """The best epoch of each point, and of the ensemble, on its own."""
        return {point: epoch for point, (epoch, _) in self.of_points.items()}


def quality(report: Report, by: str) -> tuple[float, float]:
    """The value to maximise: top-1, ties broken by the lower NLL, each averaged over the classifiers that `by` names.

    Without an ensemble in the report, `ensemble` compares the last point.
    """
    if by == MEAN:
        return _quality(report.exits)
    together = report.ensemble or report.exits[-1]
    return _quality([next((result for result in report.exits if result.point == by), together)])


def _quality(results: Iterable[ExitResult]) -> tuple[float, float]:
    chosen = list(results)
    return sum(r.top1 for r in chosen) / len(chosen), -sum(r.nll for r in chosen) / len(chosen)
