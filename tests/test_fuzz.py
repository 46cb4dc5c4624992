"""Recipes that somebody has changed by accident: one message or none, never a traceback."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import tomlkit
from mutations import mutated

from sdcli.errors import UserError
from sdcli.method.check import check_names, remarks
from sdcli.recipe.load import load_recipe, recipe_names, to_toml


def plain(value: object) -> object:
    """The value as TOML can hold it."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [plain(inner) for inner in value if inner is not None]
    return value


@pytest.mark.parametrize("name", recipe_names())
def test_mutated_recipes_are_one_message_or_right(name: str, tmp_path: Path) -> None:
    tables, random = load_recipe([name]).model_dump(exclude_none=True), Random(name)
    refused = 0
    for number in range(15):
        changed = tables
        for _ in range(random.choice([1, 1, 2, 4])):
            changed = mutated(changed, random)
            changed = changed if isinstance(changed, dict) else {"epochs": changed}
        file = tmp_path / f"{number}.toml"
        file.write_text(tomlkit.dumps(plain(changed)), encoding="utf-8")
        try:
            recipe = load_recipe([str(file)])
            check_names(recipe)
            remarks(recipe)
            assert load_recipe([_written(tmp_path, to_toml(recipe))]) == recipe
        except UserError as error:
            refused += 1
            assert "\n" not in error.wrong and len(str(error)) < 8000
    assert refused > 3, "most changes are mistakes"


def _written(folder: Path, text: str) -> str:
    file = folder / "again.toml"
    file.write_text(text, encoding="utf-8")
    return str(file)
