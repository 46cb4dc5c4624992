"""Writes tables as TOML text, optionally with a comment after each value."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

GAP = 2
"""The minimum number of spaces between a value and its comment."""
WIDEST = 46
"""The longest value that can push the column of comments to the right."""


def write(tables: Mapping[str, Any], comment: Callable[[str], str] | None = None) -> str:
    """`tables` as a TOML file: values before subtables, lists and empty tables on one line.

    `comment` returns the comment for a dotted key; all comments start in the same column.
    """
    import tomlkit

    widths = [len(f"{key.rpartition('.')[2]} = {write_value(value)}") for key, value in _values(tables)]
    column = max((width for width in widths if width <= WIDEST), default=0) + GAP
    document = tomlkit.document()
    _fill(document, tables, comment, column, "")
    return tomlkit.dumps(document)


def write_value(value: Any) -> str:
    """One value on one line, as it is written after `=`."""
    return str(_item(value).as_string())


def _values(tables: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that gets a line of its own, with its dotted key."""
    for key, value in tables.items():
        place = f"{at}.{key}" if at else key
        if _is_table(value):
            yield from _values(value, place)
        elif _is_list_of_tables(value):
            for table in value:
                yield from _values(table, place)
        else:
            yield place, value


def _fill(into: Any, tables: Mapping[str, Any], comment: Callable[[str], str] | None, column: int, at: str) -> None:
    import tomlkit

    # A table's own values come first: after the header of a subtable they would belong to the subtable.
    for key, value in sorted(tables.items(), key=lambda pair: _is_table(pair[1]) or _is_list_of_tables(pair[1])):
        place = f"{at}.{key}" if at else key
        if _is_table(value):
            # A table that only contains tables needs no header.
            inner = tomlkit.table(is_super_table=all(_is_table(v) or _is_list_of_tables(v) for v in value.values()))
            _fill(inner, value, comment, column, place)
            into.append(key, inner)
        elif _is_list_of_tables(value):
            several = tomlkit.aot()
            for table in value:
                inner = tomlkit.table()
                _fill(inner, table, comment, column, place)
                several.append(inner)
            into.append(key, several)
        else:
            item = _item(value)
            if comment and (words := comment(place)):
                item.comment(words)
                item.trivia.comment_ws = " " * max(GAP, column - len(f"{key} = {item.as_string()}"))
            into.append(key, item)


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _is_list_of_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _item(value: Any) -> Any:
    import tomlkit

    if isinstance(value, float) and "e" in repr(value):
        # 5e-7 rather than Python's 5e-07.
        short = re.sub(r"e([+-])0+(?=\d)", r"e\1", repr(value))
        return tomlkit.items.Float(value, tomlkit.items.Trivia(), short)
    if not isinstance(value, Mapping):
        return tomlkit.item(value)
    table = tomlkit.inline_table()
    for key, inner in value.items():
        table.append(key, _item(inner))
    return table
