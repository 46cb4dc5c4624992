"""Values that somebody or something has changed."""

from __future__ import annotations

from random import Random
from typing import Any

OTHERS = [None, True, -1, 0, 10**7, 2**70, 1e400, -0.5, "", "x" * 5000, "\N{DOG FACE}", [], [[]], {}, {"a": {}}, "nan"]


def mutated(value: Any, random: Random) -> Any:
    """The value with one of its parts replaced by something else, changed a little, or left out."""
    if isinstance(value, dict) and value and random.random() < 0.93:
        key = random.choice(sorted(value))
        if random.random() < 0.08:
            return {name: part for name, part in value.items() if name != key}
        if random.random() < 0.04:
            return {random.choice(["", "a b", "[/]", "keys", "x" * 300, key.upper()]): value[key], **value}
        return {**value, key: mutated(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.93:
        place = random.randrange(len(value))
        return [*value[:place], mutated(value[place], random), *value[place + 1 :]]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and random.random() < 0.4:
        return random.choice([value + 1, value - 1, value * 2, -value, value * 1000])
    return random.choice(OTHERS)
