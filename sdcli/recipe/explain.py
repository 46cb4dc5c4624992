"""pydantic's complaints about a recipe as messages of sdcli, with the file or option that set the value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from sdcli.errors import UserError, default_of, did_you_mean, invalid
from sdcli.recipe.schema import (
    RENAMED,
    TABLES,
    Recipe,
    WeightSchedule,
)


@contextmanager
def blaming(origins: Mapping[str, str]) -> Iterator[None]:
    """Adds to an error about a recipe key the file or option that set it; `origins` as `read_recipe` returns them."""
    try:
        yield
    except UserError as error:
        if error.source or not (source := source_of(error.key, origins)):
            raise
        raise error.but(source=source) from error


def source_of(key: str, origins: Mapping[str, str]) -> str:
    """The file or option that set a dotted key, or else the table around it; "" where the default holds."""
    while key not in origins:
        if not key:
            return ""
        key = key.rpartition(".")[0]
    return origins[key]


def explained(error: ValidationError, origins: Mapping[str, str]) -> UserError:
    """pydantic's complaint as one error: the key, its value, what was expected, and the source of the value."""
    problems: list[Any] = error.errors(include_url=False)
    # A union reports each of its branches: the branch's name is no part of the key.
    for problem in problems:
        problem["loc"] = tuple(p for p in problem["loc"] if isinstance(p, int) or not _BRANCH.fullmatch(p))
    # Where a table may stand for a number, the mistake is inside the table.
    whole = {p["loc"] for p in problems if isinstance(p["input"], Mapping)}
    inside = [p for p in problems if any(p["loc"][: len(at)] == at and p["loc"] != at for at in whole)]
    first = min(inside or problems, key=lambda p: p["type"] != "extra_forbidden")
    path = [str(p) for p in first["loc"] if p != "[key]"]
    if first["loc"] and first["loc"][-1] == "[key]":
        return _bad_name(path, origins)
    keys = keys_at(path[:-1])
    result = invalid([{**first, "loc": path}], "", keys)
    same = [p for p in problems if p["loc"] == first["loc"]]
    if len(same) > 1:
        wanted = dict.fromkeys(
            "a table" if p["type"] == "model_type" else re.sub(r"^(Value error, |Input should be )+", "", str(p["msg"]))
            for p in same
        )
        result = result.but(expected=", or ".join(wanted))
        if first["type"] not in ("int_type", "float_type"):
            # The fix that suits the first branch need not suit the others.
            near = did_you_mean(first["input"], re.findall(r"'([^']+)'", result.expected))
            result = result.but(fix=near or default_of(path[-1], keys))
    if fix := _better_fix(first["type"], path, result.fix):
        result = result.but(fix=fix)
    return result.but(source=source_of(".".join(path), origins))


def _better_fix(kind: str, path: Sequence[str], fix: str) -> str:
    """A fix that knows the recipe's tables; "" where the general one is good enough."""
    if kind == "missing" and len(path) == 1:
        return f'add a [{path[0]}.NAME] table, or extends = "baseline"'
    if kind in ("model_type", "dict_type") and path[0] in ("losses", "networks") and len(path) == 2:
        return f"[{path[0]}.NAME], with a name of your own"
    if kind == "list_type" and path == ["phases"]:
        return '[[phases]] tables, each with losses = ["NAME"]'
    if kind != "extra_forbidden":
        return ""
    *table, key = path
    if new := RENAMED.get((tables_at(table)[0], key)):
        return f"{key} is called {new} now"
    if not fix and (place := table_of(key)):
        return f"[{place}]" if place.rpartition(".")[2] == key else f"{key} belongs in [{place}]"
    return ""


def _bad_name(path: Sequence[str], origins: Mapping[str, str]) -> UserError:
    """The error for a table whose name is not a word."""
    *table, name = path
    return UserError(
        f"{'.'.join(table)}: {name!r} is not a name",
        "a letter, then letters, digits, _ or -",
        "rename the table",
        key=".".join(path),
        source=source_of(".".join(table), origins),
    )


def table_of(key: str) -> str:
    """The table that has a key, or is called so; "" where there is none."""
    return next(
        (place for place, model in TABLES.items() if key in model.model_fields or place.endswith(f".{key}")), ""
    )


_BRANCH = re.compile(r"int|float|str|constrained-\w+|WeightSchedule|(?:literal|list|nullable|function-\w+)\[.*\]")
"""What pydantic calls the branches of a union."""


def tables_at(path: Sequence[str]) -> tuple[str, type[BaseModel] | None]:
    """The entry of `TABLES` that a path of keys leads to, with its model; "" and the recipe itself for no path."""
    if not path:
        return "", Recipe
    if path[-1] == "weight":
        return "losses.NAME.weight", WeightSchedule
    for place, model in TABLES.items():
        parts = place.split(".")
        given = [part for part in path if not part.isdigit()]
        if len(parts) == len(given) and all(p in ("NAME", g) for p, g in zip(parts, given, strict=True)):
            return place, model
    return ".".join(path), None


def keys_at(path: Sequence[str]) -> dict[str, Any]:
    """The keys that the table at `path` may have, with their defaults."""
    _, model = tables_at(path)
    keys = {name: field.default for name, field in sorted(model.model_fields.items())} if model else {}
    return keys if path else {**keys, "extends": None}


def removable(path: Sequence[str]) -> bool:
    """Whether `path` may be left out: a table with a name, `[ema]`, `[[phases]]`, or a key without a default."""
    place, model = tables_at(path)
    if model is not None:
        return place.endswith(".NAME") or place in ("ema", "phases")
    _, table = tables_at(path[:-1])
    field = table.model_fields.get(path[-1]) if table and path else None
    return field is not None and field.default is None and type(None) in get_args(field.annotation)
