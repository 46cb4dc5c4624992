"""pydantic's complaints about a recipe in our words, with the file or flag that brought the value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ValidationError

from sdcli.errors import UserError, default_of, did_you_mean, invalid
from sdcli.recipe.schema import (
    TABLES,
    Augment,
    BatchTable,
    Derived,
    Ema,
    Loss,
    Network,
    Optimizer,
    Phase,
    Recipe,
    Schedule,
    View,
    WeightSchedule,
)


@contextmanager
def blaming(origins: Mapping[str, str]) -> Iterator[None]:
    """Says of each mistake that is found within who brought the value: the file or the flag, by the dotted key that the
    message begins with."""
    try:
        yield
    except UserError as error:
        found = re.match(r"([A-Za-z][\w-]*(?:\.[\w-]+)*)(?=:| = | at | has )(?:: unknown key '([\w-]+)')?", error.wrong)
        keys = [*found[1].split("."), *([found[2]] if found[2] else [])] if found else []
        while keys and ".".join(keys) not in origins:
            keys.pop()
        if keys:
            error.wrong = f"{origins['.'.join(keys)]}: {error.wrong}"
        raise


def explained(error: ValidationError, origins: Mapping[str, str]) -> UserError:
    """Pydantic's complaint as one of ours, with the file or flag that brought the value."""
    problems = error.errors(include_url=False)
    # A union reports each of its branches: the branch's name is no part of the key.
    for problem in problems:
        problem["loc"] = tuple(
            p for p in problem["loc"] if isinstance(p, int) or (re.fullmatch(r"[\w-]+", p) and p not in _BRANCHES)
        )
    # Of a table that may stand for a number the mistake is inside.
    whole = {p["loc"] for p in problems if isinstance(p["input"], Mapping)}
    inside = [p for p in problems if any(p["loc"][: len(at)] == at and p["loc"] != at for at in whole)]
    first = min(inside or problems, key=lambda p: p["type"] != "extra_forbidden")
    path = [str(p) for p in first["loc"]]
    result = invalid([first], "", keys_at(path[:-1]))
    same = [p for p in problems if p["loc"] == first["loc"]]
    if len(same) > 1:
        said = dict.fromkeys(
            "a table" if p["type"] == "model_type" else re.sub(r"^(Value error, |Input should be )+", "", str(p["msg"]))
            for p in same
        )
        result.expected = ", or ".join(said)
        if first["type"] not in ("int_type", "float_type"):
            # The first branch's idea of what was meant is not the others'.
            near = did_you_mean(first["input"], re.findall(r"'([^']+)'", result.expected))
            result.fix = near or default_of(path[-1], keys_at(path[:-1]))
    if "." not in (key := ".".join(path)) and first["type"] == "missing":
        result.fix = f'add a [{key}.NAME] table, or extends = "baseline"'
    elif first["type"] in ("model_type", "dict_type") and path[:1] in (["losses"], ["networks"]) and path[2:] == []:
        result.fix = f"[{path[0]}.NAME], with a name of your own"
    elif first["type"] == "extra_forbidden" and not result.fix and (place := _table_of(path[-1])):
        result.fix = f"{path[-1]} belongs into [{place}]" if place.rpartition(".")[2] != path[-1] else f"[{place}]"
    while path and ".".join(path) not in origins:
        path.pop()
    if path:
        result.wrong = f"{origins['.'.join(path)]}: {result.wrong}"
    return result


def _table_of(key: str) -> str:
    """The table that has a key, or is called so; "" where there is none."""
    return next(
        (place for place, model in TABLES.items() if key in model.model_fields or place.endswith(f".{key}")), ""
    )


_BRANCHES = {"int", "float", "str", "constrained-int", "constrained-float", "WeightSchedule"}


def keys_at(path: Sequence[str]) -> dict[str, Any]:
    """The keys that the table at `path` may have, with their defaults."""
    model: type[BaseModel] | None = Recipe
    path = list(path)
    tables: dict[str, type[BaseModel]] = {
        "networks": Network, "losses": Loss, "batch": BatchTable, "augment": Augment,
        "optimizer": Optimizer, "schedule": Schedule, "ema": Ema,
        "signals": Derived, "views": View, "phases": Phase, "weight": WeightSchedule,
    }  # fmt: skip
    if path:
        model = tables.get(path[-1]) or tables.get(path[-2] if len(path) > 1 else "")
    keys = {name: field.default for name, field in sorted(model.model_fields.items())} if model else {}
    return keys if path else {**keys, "extends": None}
