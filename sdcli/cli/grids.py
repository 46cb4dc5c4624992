"""A table as data, for a terminal, as Markdown and as LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from sdcli.cli.tables import plain_table

LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    letter: f"\\{letter}" for letter in "&%$#_{}"
}
MATH = {"±": r"$\pm$", "·": r"$\cdot$"}


@dataclass(frozen=True)
class Cell:
    """One value as it is shown."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Grid:
    """A table whose first column is names and whose others are numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def rich_table(grid: Grid) -> Table:
    """For the terminal; the best values are bold."""
    table = plain_table("")
    table.title = Text(grid.title, style="bold")
    for place, title in enumerate(grid.header):
        # Titles of two lines keep their columns narrow; names may be wrapped.
        table.add_column(Text(title), justify="right" if place else "left", no_wrap=bool(place))
    for row in grid.rows:
        table.add_row(
            *(Text(cell.text, style="bold" if cell.best or not place else "") for place, cell in enumerate(row))
        )
    return table


def markdown(grid: Grid) -> str:
    """For a README."""
    header = [title.replace("\n", " ") for title in grid.header]
    lines = [f"**{_plain(grid.title)}**", "", _line(header), "| --- |" + " ---: |" * (len(header) - 1)]
    lines += [
        _line([f"**{_plain(cell.text)}**" if cell.best else _plain(cell.text) for cell in row]) for row in grid.rows
    ]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _plain(text: str) -> str:
    return re.sub(r"([|\\*_`<])", r"\\\1", text)


def latex(grid: Grid) -> str:
    """For a paper, with the package booktabs."""
    columns = "l" + "r" * (len(grid.header) - 1)
    lines = [f"% {grid.title}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [_latex_line([escaped(title.replace("\n", " ")) for title in grid.header]), r"\midrule"]
    for row in grid.rows:
        lines.append(_latex_line([rf"\textbf{{{escaped(c.text)}}}" if c.best else escaped(c.text) for c in row]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(LATEX.get(letter) or MATH.get(letter, letter) for letter in text)
