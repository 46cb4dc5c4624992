"""A table as data, for a terminal, as Markdown and as LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sdcli.cli.tables import plain_table

LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    letter: f"\\{letter}" for letter in "&%$#_{}"
}
WIDEST = 100
"""Columns of a terminal that a table uses at most."""
MATH = {"±": r"$\pm$", "·": r"$\cdot$", "≤": r"$\leq$"}


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
    line_after: int | None = None
    """The row below which a terminal shows a line."""

    def without(self, *titles: str) -> Grid:
        """The grid without the columns of these titles."""
        places = [place for place, title in enumerate(self.header) if title not in titles]
        rows = tuple(tuple(row[place] for place in places) for row in self.rows)
        return replace(self, header=tuple(self.header[place] for place in places), rows=rows)


def rich_table(grid: Grid) -> Table:
    """For the terminal; the best values are bold."""
    table = plain_table("")
    table.title = Text(grid.title, style="bold")
    for place, title in enumerate(grid.header):
        # Titles of two lines keep their columns narrow; names may be wrapped.
        table.add_column(Text(title), justify="right" if place else "left", no_wrap=bool(place))
    for number, row in enumerate(grid.rows):
        cells = (Text(cell.text, style="bold" if cell.best or not place else "") for place, cell in enumerate(row))
        table.add_row(*cells, end_section=number == grid.line_after)
    return table


def fitted(grid: Grid, console: Console, droppable: Sequence[str], at_most: int = WIDEST) -> tuple[Table, list[str]]:
    """The table for the terminal, and the titles of the columns that it has no room for, taken from `droppable`."""
    widest = min(console.width, at_most) if console.is_terminal else console.width
    dropped: list[str] = []
    for title in (None, *droppable):
        dropped += [title] if title in grid.header else []
        table = rich_table(grid.without(*dropped))
        if Measurement.get(console, console.options.update(max_width=1000), table).maximum <= widest:
            break
    return table, [_one_line(title) for title in dropped]


def markdown(grid: Grid) -> str:
    """For a README."""
    header = [_one_line(title) for title in grid.header]
    lines = [f"**{_plain(grid.title)}**", "", _line(header), "| --- |" + " ---: |" * (len(header) - 1)]
    lines += [
        _line([f"**{_plain(cell.text)}**" if cell.best else _plain(cell.text) for cell in row]) for row in grid.rows
    ]
    return "\n".join(lines)


def _one_line(title: str) -> str:
    return title.replace("-\n", "-").replace("\n", " ")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _plain(text: str) -> str:
    return re.sub(r"([|\\*_`<])", r"\\\1", _joined(text))


def _joined(text: str) -> str:
    """In one line, whatever characters a name has."""
    return re.sub(r"[^\S ]|[\x00-\x1f]", " ", text)


def latex(grid: Grid) -> str:
    """For a paper, with the package booktabs."""
    columns = "l" + "r" * (len(grid.header) - 1)
    lines = [f"% {_joined(grid.title)}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [_latex_line([escaped(_one_line(title)) for title in grid.header]), r"\midrule"]
    for row in grid.rows:
        cells = [rf"\textbf{{{escaped(c.text)}}}" if c.best else escaped(c.text) for c in row]
        # After a line's end [ would begin its height, and * be part of it.
        lines.append(_latex_line(["{}" * cells[0].startswith(("[", "*")) + cells[0], *cells[1:]]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(LATEX.get(letter) or MATH.get(letter, letter) for letter in _joined(text))
