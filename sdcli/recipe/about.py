"""Describes a recipe from its tables: what it needs, its formula, and how two recipes differ. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdcli import toml
from sdcli.recipe.address import STUDENT
from sdcli.recipe.headers import Header, parse_header
from sdcli.recipe.load import load_recipe, recipe_file
from sdcli.recipe.schema import Derived, Loss, Recipe, WeightSchedule

ORDINARY = {"title", "paper", "epochs", "losses", "networks", "optimizer", "schedule"}
"""Tables that every recipe has; any other table counts as a need. Parts of `networks` and `batch` can count too."""
ORDINARY_BATCH = {"size", "augment", "mixup_prob"}


@dataclass(frozen=True)
class Overview:
    """One recipe, as lists and documents show it."""

    name: str
    recipe: Recipe
    header: Header
    text: str
    """The content of the file."""

    @property
    def body(self) -> str:
        """The file without its header."""
        lines = self.text.splitlines()
        first = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
        return "\n".join(lines[first:]).strip() + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "title": self.recipe.title,
            "paper": self.recipe.paper,
            "idea": self.header.idea,
            "commands": list(self.header.commands),
            "loss": formula(self.recipe),
            "needs": needs(self.recipe),
            **self.header.sections,
            "measured": self.header.measured,
        }


def overview(name: str) -> Overview:
    """Reads the recipe called `name`, or the one at that path, and its header."""
    text = recipe_file(name).read_text(encoding="utf-8")
    return Overview(name, load_recipe([name]), parse_header(text), text)


def needs(recipe: Recipe) -> list[str]:
    """What a recipe uses beyond one network, labels and ordinary batches, a few words for each.

    Looks at all tables, so that a new kind of table shows up without a change here.
    """
    tables = _given(recipe)
    found = [f"{recipe.student.branches} branches"] if recipe.student.branches else []
    if "heads" in (recipe.student.trains, *(phase.get("trains") for phase in tables.get("phases", []))):
        found.append("frozen backbone")
    if recipe.student.gradients != "sum":
        found.append(GRADIENTS[recipe.student.gradients])
    if recipe.student.weights == "pretrained":
        found.append("pretrained weights")
    if any(loss.share is not None for loss in recipe.losses.values()):
        found.append("weights found automatically")
    if recipe.awaited:
        found.append("a trained teacher" if len(recipe.awaited) == 1 else f"{len(recipe.awaited)} trained teachers")
    for name, network in recipe.others.items():
        if not network.awaited:
            kind = network.model or "a checkpoint's"
            found.append(f"network {name} ({kind}{'' if network.learns else ', frozen'})")
    for key, value in tables.get("batch", {}).items():
        if key not in ORDINARY_BATCH:
            found += _in_words(key, value)
    for key, value in tables.items():
        if key not in ORDINARY and key != "batch":
            found += _in_words(key, value)
    return found


GRADIENTS = {"equilibrium": "balanced gradients", "detached": "gradients that stay in the heads"}
"""What `gradients` of the student stands for."""
VIEWS = {"itself": "second view of each image", "class": "second image of the same class"}
"""What `of` of a further view stands for."""


def _in_words(key: str, value: Any) -> list[str]:
    """A table or key in a few words; one that has none here by its name and that of its parts."""
    match key:
        case "mixup" | "cutmix":
            return [f"{key} (alpha {value:g})"]
        case "mates":
            return [f"{value} extra images of the same class"]
        case "views":
            return [VIEWS[view["of"]] for view in value.values()]
        case "signals":
            return [f"derived predictions ({signal['kind']})" for signal in value.values()]
        case "ema":
            return ["EMA of the weights"]
        case "phases":
            pruned = ["pruning"] if any("prune" in phase for phase in value) else []
            return [f"{len(value)} phases", *pruned]
        case "rules":
            return [f"a rule ({rule['kind']})" for rule in value.values()]
        case "updates":
            return ["updates in turn"]
        case "random_weights":
            return ["random weights of the losses"]
    return [f"{len(value)} {key}" if isinstance(value, list) else f"{key} {_names(value)}".strip()]


def _names(value: Any) -> str:
    """A value in a word or two; for a table, the names of its subtables."""
    if isinstance(value, Mapping):
        tables = [key for key, inner in value.items() if isinstance(inner, Mapping)]
        return ", ".join(tables) or str(value.get("kind", ""))
    return value if isinstance(value, str) else toml.write_value(value)


def formula(recipe: Recipe) -> str:
    """The objective, one line per loss: weight, kind, points, target, the loss's own keys; then the signals."""
    weights = ["random" if recipe.random_weights else _plain(loss.weight) for loss in recipe.losses.values()]
    wide = max(len(weight) for weight in weights)
    signs = [" ", *("+" * (len(weights) - 1))]
    losses = recipe.losses.values()
    lines = [f"{s} {w:>{wide}} {_call(x)}" for s, w, x in zip(signs, weights, losses, strict=True)]
    return "\n".join([*lines, *(f"{name} = {_made(signal)}" for name, signal in recipe.signals.items())])


def _as_set(value: Any) -> str:
    """A value as `--set` reads it: a plain word needs no quotes."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w+-]*", value) and value not in _NOT_WORDS:
        return value
    return toml.write_value(value)


_NOT_WORDS = ("true", "false", "inf", "nan")
"""Words that TOML reads as something else."""


def _call(loss: Loss) -> str:
    points = loss.on if isinstance(loss.on, str) else ", ".join(loss.on)
    targets = loss.target if isinstance(loss.target, str) else ", ".join(loss.target)
    against = "" if targets == "label" else f" <- {targets}"
    keys = "".join(f", {key} {_plain(value)}" for key, value in loss.options.items())
    return f"{loss.kind}({points}{against}{keys})"


def _made(signal: Derived) -> str:
    points = signal.of if isinstance(signal.of, str) else ", ".join(signal.of)
    return (
        f"{signal.kind}({points}" + "".join(f", {key} {_plain(value)}" for key, value in signal.options.items()) + ")"
    )


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(_plain(entry) for entry in value)
    if isinstance(value, WeightSchedule):
        own = _plain(value.value) if value.share is None else f"{_plain(value.share)} of {value.of}"
        shapes = {
            name: time
            for name, time in value.model_dump(exclude_none=True).items()
            if name not in ("value", "share", "of")
        }
        return own + "".join(f" {name} {_plain(time)}" for name, time in shapes.items())
    return toml.write_value(int(value) if isinstance(value, float) and value.is_integer() else value)


def show(recipe: Recipe, origins: Mapping[str, str], *, comments: bool = True) -> str:
    """A recipe as TOML, with the source of each value in a comment; `origins` as returned by `read_recipe`."""
    return toml.write(_dump(recipe), (lambda key: origin_of(key, origins)) if comments else None)


def origin_of(key: str, origins: Mapping[str, str]) -> str:
    """The source of a dotted key's value: the name of a recipe, the path of a file, `--set`, or `default`."""
    while key not in origins:
        # Below a list of tables only the list itself has an origin.
        key, dot, _ = key.rpartition(".")
        if not dot or (key in origins and any(other.startswith(f"{key}.") for other in origins)):
            return "default"
    source = origins[key]
    if source.startswith("--set "):
        return "--set"
    return source.removeprefix("recipes/").removesuffix(".toml") if source.startswith("recipes/") else source


@dataclass
class Difference:
    """The differences between two recipes by dotted key, in the recipe's order, titles and papers excluded."""

    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    removed: dict[str, Any] = field(default_factory=dict)
    """Values that only the first has, except defaults."""
    added: dict[str, Any] = field(default_factory=dict)
    """Values that only the second has."""
    gone: list[str] = field(default_factory=list)
    """The tables and keys that are absent from the second."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "changed": {key: {"from": old, "to": new} for key, (old, new) in self.changed.items()},
            "removed": self.removed,
            "added": self.added,
        }

    def rows(self) -> list[tuple[str, Any, Any]]:
        """Key, first value, second value, with None for an absent value; rows of the same table are adjacent."""
        rows = [(key, old, new) for key, (old, new) in self.changed.items()]
        rows += [(key, value, None) for key, value in self.removed.items()]
        rows += [(key, None, value) for key, value in self.added.items()]
        tables = list(dict.fromkeys(key.rpartition(".")[0] for key, _, _ in rows))
        return sorted(rows, key=lambda row: tables.index(row[0].rpartition(".")[0]))

    def overrides(self) -> tuple[list[str], list[str]]:
        """The values for `--set` and the keys for `--unset` that turn the first recipe into the second."""
        return [f"{key}={_as_set(new)}" for key, _, new in self.rows() if new is not None], self.gone


def difference(one: Recipe, other: Recipe) -> Difference:
    """The changes that turn `one` into `other`."""
    # A weight can be a number in one and a table in the other: it is then compared as a whole.
    values = [pair for recipe in (one, other) for pair in _flat(_dump(recipe))]
    plain = {key for key, value in values if not isinstance(value, Mapping)}
    first, second = (dict(_flat(_dump(recipe), plain)) for recipe in (one, other))
    given_first, given_second = (dict(_flat(_given(recipe), plain)) for recipe in (one, other))
    found = Difference()
    for key in dict.fromkeys([*first, *given_first, *second, *given_second]):
        if key in ("title", "paper"):
            continue
        if key in first and key in second:
            if first[key] != second[key]:
                found.changed[key] = (first[key], second[key])
        elif key in given_first and not _has(second, key):
            found.removed[key] = given_first[key]
            parts = key.split(".")
            prefixes = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
            found.gone.append(next(prefix for prefix in prefixes if not _has(second, prefix)))
        elif key in given_second and not _has(first, key):
            found.added[key] = given_second[key]
    found.gone = list(dict.fromkeys(found.gone))
    return found


def _has(flat: Mapping[str, Any], key: str) -> bool:
    """Whether there is a value or a table called `key`."""
    return key in flat or any(other.startswith(f"{key}.") for other in flat)


def _dump(recipe: Recipe) -> dict[str, Any]:
    """All values, including the student's table if the recipe leaves it out."""
    tables = recipe.model_dump(exclude_none=True)
    tables["networks"] = {STUDENT: recipe.student.model_dump(exclude_none=True), **tables["networks"]}
    return tables


def _given(recipe: Recipe) -> dict[str, Any]:
    """The values that are not defaults. An optional table is kept even if it is empty."""
    return recipe.model_dump(exclude_none=True, exclude_defaults=True)


def _flat(tables: Mapping[str, Any], plain: Collection[str] = (), at: str = "") -> list[tuple[str, Any]]:
    """Every value by its dotted key; tables at the keys in `plain` count as values too."""
    found: list[tuple[str, Any]] = []
    for key, value in tables.items():
        place = f"{at}.{key}" if at else key
        inside = isinstance(value, Mapping) and value and place not in plain
        found += _flat(value, plain, place) if inside else [(place, value)]
    return found
