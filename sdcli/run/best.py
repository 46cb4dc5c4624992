"""Which epoch is the best, by the validation split and the recipe's `best`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sdcli.evaluation.evaluate import ExitResult, Report
from sdcli.recipe.schema import MEAN

COARSE = 100
"""With fewer validation images than this, one image is more than a percentage point."""


@dataclass
class Best:
    """The best epoch so far, and that of each point by itself."""

    by: str
    """`mean` of all classifiers, `ensemble`, or a point."""
    epoch: int = 0
    """0: none yet."""
    report: Report | None = None
    of_points: dict[str, tuple[int, ExitResult]] = field(default_factory=dict)

    def see(self, epoch: int, report: Report) -> bool:
        """Compares another epoch; returns whether it is the best so far."""
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
        """The best epoch of each point by itself."""
        return {point: epoch for point, (epoch, _) in self.of_points.items()}


def quality(report: Report, by: str) -> tuple[float, float]:
    """What epochs are compared by: top-1, and where that is equal the lower NLL, each a mean over what `by` names."""
    if by == MEAN:
        return _quality(report.exits)
    together = report.ensemble or report.exits[-1]
    return _quality([next((result for result in report.exits if result.point == by), together)])


def _quality(results: Iterable[ExitResult]) -> tuple[float, float]:
    chosen = list(results)
    return sum(r.top1 for r in chosen) / len(chosen), -sum(r.nll for r in chosen) / len(chosen)
