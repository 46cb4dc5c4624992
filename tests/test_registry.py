"""A function's keyword-only arguments are its recipe keys."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field

from sdcli.errors import UserError
from sdcli.registry import Registry


def registry() -> Registry:
    things = Registry("thing")

    @things.register("scale", reads="logits")
    def scale(value: int, *, factor: Annotated[float, Field(gt=0)], mode: Literal["up", "down"] = "up") -> float:
        return value * factor

    return things


def test_keys_defaults_and_inputs_come_from_the_signature():
    entry = registry().find("scale")
    assert entry.takes == {"value"} and list(entry.options) == ["factor", "mode"]
    assert entry.check({"factor": 2}, "here") == {"factor": 2.0, "mode": "up"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "here.factor is missing\n  expected: a value: it has no default"),
        ({"factor": 0}, "here.factor = 0\n  expected: greater than 0"),
        ({"factor": "two"}, "here.factor = 'two'\n  expected: a valid number"),
        (
            {"factor": 1, "mode": "left"},
            "here.mode = 'left'\n  expected: 'up' or 'down'\n  fix:      the default is 'up'",
        ),
        (
            {"facter": 1},
            "here: unknown key 'facter'\n  expected: one of factor, mode\n  fix:      did you mean 'factor'?",
        ),
    ],
)
def test_wrong_keys_types_and_ranges_are_explained(options, message):
    with pytest.raises(UserError) as error:
        registry().find("scale").check(options, "here")
    assert str(error.value) == message


def test_a_key_may_have_any_name_that_an_argument_may_have():
    things = Registry("thing")

    @things.register("odd")
    def odd(value: int, *, schema: int = 1, model_config: int = 2, copy: int = 3) -> None: ...

    assert things.find("odd").check({"schema": 4}, "here") == {"schema": 4, "model_config": 2, "copy": 3}


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UserError) as error:
        registry().find("scael", "losses.soft")
    assert (
        str(error.value)
        == "losses.soft: unknown thing 'scael'\n  expected: one of scale\n  fix:      did you mean 'scale'?"
    )
