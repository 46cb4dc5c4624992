"""Errors that a user can fix: each message states what is wrong, what was expected and how to fix it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher, get_close_matches
from typing import Any

LONG, NEAREST = 8, 6
"""A list of more than `LONG` names is cut to the `NEAREST` ones."""


class UserError(Exception):
    """A mistake that the user can fix; the command line prints it without a traceback and exits with code 2.

    `key` is the dotted recipe key that is wrong, if any, and `source` the file or option that has set it.
    """

    def __init__(self, wrong: str, expected: str = "", fix: str = "", *, key: str = "", source: str = "") -> None:
        super().__init__(wrong)
        self.wrong, self.expected, self.fix = wrong, expected, fix
        self.key, self.source = key, source

    @property
    def headline(self) -> str:
        """The first line of the message: the source of the mistake, if known, and what is wrong."""
        return f"{self.source}: {self.wrong}" if self.source else self.wrong

    def __str__(self) -> str:
        lines = [self.headline]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.fix:
            lines.append(f"  fix:      {self.fix}")
        return "\n".join(lines)

    def but(self, **changes: str) -> UserError:
        """The same error with some of its parts replaced."""
        parts = ("wrong", "expected", "fix", "key", "source")
        return type(self)(**{name: changes.get(name, getattr(self, name)) for name in parts})

    def within(self, context: str, *, key: str = "") -> UserError:
        """The same error with `context` before its message; `key` is the recipe key at fault, if none is set yet."""
        return self.but(wrong=f"{context}: {self.wrong}", key=self.key or key)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name as a question ("did you mean 'byot'?"), or "" if none is near."""
    names = list(known)
    near = get_close_matches(str(name), names, n=1, cutoff=0.6)
    # "kl_div" and "randaugment" start with the name that was meant ("kl", "rand").
    near = near or sorted((k for k in names if len(k) > 1 and str(name).startswith(k)), key=len)[-1:]
    return f"did you mean '{near[0]}'?" if near else ""


def unknown(what: str, name: str, known: Iterable[str], fix: str = "", *, lists: str = "") -> UserError:
    """An error for a name that is not among the known ones.

    Of a long list the nearest names are shown; `lists` is the command that prints all of them.
    """
    names = sorted(known)
    listed = ", ".join(names)
    if len(names) > LONG:
        nearest = sorted(names, key=lambda other: -SequenceMatcher(None, str(name), other).ratio())
        listed = ", ".join(nearest[:NEAREST]) + f", …; {len(names)} in all" + (f": {lists}" if lists else "")
    return UserError(f"unknown {what} '{name}'", f"one of {listed}", did_you_mean(name, names) or fix)


def invalid(problems: Sequence[Mapping[str, Any]], where: str, keys: Mapping[str, Any]) -> UserError:
    """One of pydantic's problems with a table as a UserError: the key, its value and what was expected.

    `where` names the table ("losses.soft"); `keys` are the keys that it may have, with their defaults.
    """
    # An unknown key is reported first: it is often the reason why another one is missing.
    problem = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    path, kind, value = [str(part) for part in problem["loc"]], problem["type"], problem["input"]
    place = ".".join(filter(None, [where, *path]))
    if kind == "extra_forbidden":
        table = ".".join(filter(None, [where, *path[:-1]])) or "recipe"
        names = sorted(keys)
        near = did_you_mean(path[-1], names)
        return UserError(f"{table}: unknown key '{path[-1]}'", "one of " + ", ".join(names), near, key=place)
    if kind == "missing":
        return UserError(f"{place} is missing", "a value: it has no default", key=place)
    if kind in ("model_type", "dict_type"):
        return UserError(f"{place} = {shown(value)}", "a table", key=place)
    # "Input should be a valid integer" reads better without its subject.
    expected = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    if kind == "too_short":
        expected = "one entry or more"
    fix = _mended(place, kind, value, expected) or default_of(path[-1], keys)
    return UserError(f"{place} = {shown(value)}", expected, fix, key=place)


def default_of(key: str, keys: Mapping[str, Any]) -> str:
    """The default of a key, as a fix; "" if it has none worth mentioning."""
    default = keys.get(key)
    return f"the default is {shown(default)}" if isinstance(default, (str, int, float)) and default != "" else ""


def shown(value: Any) -> str:
    """A value as messages quote it."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: "1 epoch", "2 epochs", "1,294 images"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _mended(place: str, kind: str, value: Any, expected: str) -> str:
    """The correction for common mistakes; "" otherwise."""
    key, number = place.rpartition(".")[2], str(value).strip()
    if (
        kind in ("int_type", "float_type")
        and isinstance(value, str)
        and re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", number)
    ):
        return f"without quotes: {key} = {number}"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"{key} = {value:.0f}"
    if kind == "bool_type" and number.lower() in ("true", "false"):
        return f"without quotes: {key} = {number.lower()}"
    if kind == "list_type" and isinstance(value, (int, float)):
        return f"in brackets: {key} = [{shown(value)}]"
    return did_you_mean(value, re.findall(r"'([^']+)'", expected)) if isinstance(value, str) else ""
