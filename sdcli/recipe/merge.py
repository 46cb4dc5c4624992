"""Recipes refined: the tables of one file over those of another, and options over both."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdcli.errors import UserError, did_you_mean
from sdcli.recipe.explain import removable, tables_at

DEEPEST = 16
"""How many tables may lie in each other."""


@dataclass(frozen=True)
class Override:
    """One value that an option sets, or takes away."""

    key: str
    """Dotted, as in `--set`."""
    value: Any
    source: str
    """The option as it was typed, which messages name: `--set epochs=3`, `--lr 0.1`."""
    removes: bool = False

    @classmethod
    def parse(cls, text: str) -> Override:
        """`--set KEY=VALUE`. The value is TOML, or else a string. Raises UserError for any other form."""
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text!r}", "KEY=VALUE", "for example --set losses.soft.weight=0.5")
        source = f"--set {text}"
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            parsed = value.strip()
        except ValueError:
            raise too_large(source) from None
        return cls(_dotted(key, source), check_values(parsed, source), source)

    @classmethod
    def unset(cls, key: str) -> Override:
        """`--unset KEY`: takes a table or a value away. Raises UserError for what is no key."""
        source = f"--unset {key}"
        return cls(_dotted(key, source), None, source, removes=True)


def _dotted(key: str, source: str) -> str:
    parts = [part.strip() for part in key.split(".")]
    if not all(re.fullmatch(r"[A-Za-z0-9_-]+", part) for part in parts) or len(parts) > DEEPEST:
        raise UserError(f"{source}: {key!r} is not a key", "names with dots between them, such as losses.soft.weight")
    return ".".join(parts)


def check_values(value: Any, source: str, depth: int = 0) -> Any:
    """`value` itself; raises UserError for integers that TOML does not have and tables that are nested too deeply."""
    if depth > DEEPEST:
        raise UserError(f"{source}: tables are nested more than {DEEPEST} deep", "the tables of a recipe")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise too_large(source)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for item in inner:
        check_values(item, source, depth + 1)
    return value


def too_large(source: str) -> UserError:
    """The error for an integer that TOML does not have."""
    return UserError(f"{source}: an integer is too large", "integers of 64 bits, as TOML has them")


def apply(override: Override, into: dict[str, Any], origins: dict[str, str]) -> None:
    """Refines `into` by what one option sets or takes away."""
    path = override.key.split(".")
    if not override.removes:
        tables = override.value
        for part in reversed(path):
            tables = {part: tables}
        merge(into, tables, origins, override.source)
        return
    table: Any = into
    for number, part in enumerate(path):
        if isinstance(table, list) and part.isdigit() and int(part) < len(table):
            part = int(part)  # type: ignore[assignment]
        elif not isinstance(table, dict) or part not in table:
            around = ".".join(path[:number])
            known = [f"{around}.{key}" if around else key for key in table] if isinstance(table, dict) else []
            raise UserError(
                f"{override.source}: the recipe does not set {override.key}",
                f"one of {', '.join(known)}" if known else "a key that a recipe or an option has set",
                did_you_mean(override.key, known),
            )
        if number + 1 == len(path):
            del table[part]
        else:
            # Others may hold the same list.
            table[part] = table[part].copy()
            table = table[part]
    _forget(override.key, origins)


def merge(into: dict[str, Any], part: Mapping[str, Any], origins: dict[str, str], source: str, at: str = "") -> None:
    """Refines `into` by `part`, table by table, and records the source of each value.

    `false` in the place of a table, or of a value that may be absent, takes it away: `losses.hint = false`. Entries of
    a list of tables are refined by their numbers: `phases.1.rounds=3` is the second phase's.
    """
    for key, value in part.items():
        place = f"{at}.{key}" if at else key
        former = into.get(key)
        if value is False and removable(place.split(".")):
            _take_away(key, into, place, origins, source)
            continue
        origins[place] = source
        if not isinstance(value, Mapping):
            into[key] = value
        elif isinstance(former, list) and all(number.isdigit() for number in value):
            # Others may hold the same list.
            into[key] = [dict(entry) if isinstance(entry, dict) else entry for entry in former]
            _merge_entries(into[key], value, origins, source, place)
        elif place == "phases":
            raise UserError(f"{source}: the recipe has no phases", "a recipe with [[phases]], like born-again")
        else:
            into[key] = dict(former) if isinstance(former, dict) else {}
            merge(into[key], value, origins, source, place)


def _merge_entries(
    entries: list[Any], part: Mapping[str, Any], origins: dict[str, str], source: str, place: str
) -> None:
    for number, table in part.items():
        if int(number) >= len(entries) or not isinstance(table, Mapping):
            raise UserError(
                f"{source}: there is no {place}.{number} with keys", f"{place}.0 to {place}.{len(entries) - 1}"
            )
        merge(entries[int(number)], table, origins, source, f"{place}.{number}")


def _take_away(key: str, table: dict[str, Any], place: str, origins: dict[str, str], source: str) -> None:
    """Removes what `place = false` names; raises UserError where a table with a name is not there."""
    if key not in table and "NAME" in tables_at(place.split("."))[0]:
        around = place.rpartition(".")[0]
        known = [f"{around}.{name}" for name in table]
        raise UserError(
            f"{source}: {place} = false, and there is no {place}",
            f"one of {', '.join(known)}" if known else f"a name in [{around}]",
            did_you_mean(place, known),
        )
    table.pop(key, None)
    _forget(place, origins)


def _forget(place: str, origins: dict[str, str]) -> None:
    for key in [key for key in origins if key == place or key.startswith(f"{place}.")]:
        del origins[key]


def sources(
    parts: Sequence[tuple[str, Mapping[str, Any]]], overrides: Sequence[Override]
) -> tuple[Any, dict[str, str]]:
    """The tables that files and options make together, in this order, and the source of each dotted key."""
    tables: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source, part in parts:
        merge(tables, part, origins, source)
    for override in overrides:
        apply(override, tables, origins)
    return tables, origins
