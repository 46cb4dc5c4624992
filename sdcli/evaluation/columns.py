"""The scores of exits as columns: titles, how a value reads, and which is best. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdcli.evaluation.evaluate import ExitResult

UNITS = ("", "K", "M", "G", "T")


def amount(value: float) -> str:
    """Three digits and a unit, as papers print parameters and MACs: 11.2 M, 555 M, 4.09 G."""
    for unit in UNITS:
        if abs(value) < 999.5 or unit == UNITS[-1]:
            digits = 0 if value == int(value) and not unit else max(0, 3 - len(str(int(abs(value)))))
            return f"{value:.{digits}f} {unit}".rstrip()
        value /= 1000
    raise AssertionError


@dataclass(frozen=True)
class Column:
    """One column of the scores: its title, its field of `ExitResult`, how it reads, and which end is best."""

    title: str
    field: str
    best: str  # "max", "min" or ""
    style: str

    @property
    def heading(self) -> str:
        """The title in two lines, which keep a column narrow."""
        return self.title.replace(" final", "\nfinal") if " final" in self.title else self.title.replace(" %", "\n%")


COLUMNS = (
    Column("top-1 %", "top1", "max", ".2f"),
    Column("top-5 %", "top5", "max", ".2f"),
    Column("NLL", "nll", "min", ".3f"),
    Column("ECE", "ece", "min", ".3f"),
    Column("AUROC", "auroc", "max", ".3f"),
    Column("same as final %", "agreement", "", ".2f"),
    Column("params", "params", "min", "amount"),
    Column("MACs", "macs", "min", "amount"),
    Column("speed-up", "speedup", "max", ".2f"),
)
LATENCY = Column("ms", "latency_ms", "min", ".2f")


def report_columns(num_classes: int) -> list[Column]:
    """The columns of a report for a reader; with five classes or fewer top-5 is always 100 %."""
    return [column for column in COLUMNS if column.field != "top5" or num_classes > 5]


def cell(result: ExitResult, column: Column) -> str:
    """One value as it is shown; "-" where there is none."""
    value = getattr(result, column.field)
    if value is None or not math.isfinite(value):
        return "-"
    if column.style == "amount":
        return amount(value)
    return f"{value:{column.style}}" + ("x" if column.field == "speedup" else "")


def is_best(result: ExitResult, column: Column, rows: Sequence[ExitResult]) -> bool:
    """Whether this is the best value of its column; a single row has no best."""
    found = (getattr(row, column.field) for row in rows)
    values = [value for value in found if value is not None and math.isfinite(value)]
    if len(rows) < 2 or not values or not column.best:
        return False
    return bool(getattr(result, column.field) == (max(values) if column.best == "max" else min(values)))
