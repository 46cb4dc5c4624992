"""Recipe files: found, read, extended, overridden, copied and written.

A recipe is TOML. `extends` names another whose tables this one refines key by key; several recipes given together
refine each other from left to right; `--set losses.soft.weight=0.5` refines them all.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdcli import toml
from sdcli.errors import UserError, unknown
from sdcli.recipe.check import check_recipe
from sdcli.recipe.schema import Recipe


def recipe_folder() -> Path:
    """Where the recipes lie that come with sdcli: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parents[1] / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def recipe_names() -> list[str]:
    """Names that `--recipe` takes, schedules and other parts aside."""
    return sorted(path.stem for path in recipe_folder().glob("*.toml"))


def load_recipe(names: Sequence[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that `names` (of recipes or files) and `KEY=VALUE` overrides make together.

    Raises UserError for a file that is not there or not TOML, and for any key, type or range that is wrong, saying
    which file brought the value.
    """
    return read_recipe(names, overrides)[0]


def read_recipe(names: Sequence[str], overrides: Sequence[str] = ()) -> tuple[Recipe, dict[str, str]]:
    """`load_recipe`, and which file or flag brought each dotted key; what is not among these is a default."""
    tables: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name in names:
        for source, part in _chain(name, Path()):
            _merge(tables, part, origins, source)
    for override in overrides:
        _merge(tables, _parse_override(override), origins, f"--set {override}")
    return check_recipe(tables, origins), origins


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as a file that `--recipe` takes again."""
    return toml.write(recipe.model_dump(exclude_none=True))


def recipe_file(name: str) -> Path:
    """The file of the recipe called `name`, or at that path; raises UserError where there is none."""
    return _find(name, Path())


def copy_recipe(name: str, to: Path) -> None:
    """Copies a recipe's file as it is, header included. What it extends by path stays found from the new place.

    Raises UserError for a place that is taken or cannot be written.
    """
    source = recipe_file(name)
    parent = _read(source).get("extends")
    text = source.read_bytes().decode("utf-8")
    # A path is relative to the file that has it; a name is the same from anywhere.
    if isinstance(parent, str) and _is_path(parent) and not Path(parent).expanduser().is_absolute():
        whole = str((source.parent / parent).resolve())
        text = re.sub(r"(?m)^extends\s*=[^\r\n]*", lambda _: f"extends = {toml.write_value(whole)}", text, count=1)
    try:
        with to.open("xb") as file:
            file.write(text.encode("utf-8"))
    except FileExistsError:
        raise UserError(
            f"'{to}' exists already", "a file that is not there yet: nothing is overwritten", "another name"
        ) from None
    except OSError as error:
        raise UserError(f"'{to}' cannot be written: {error.strerror}", "a file in a folder that is there") from None


def _chain(name: str, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The recipe called `name` and all that it extends, the farthest ancestor first."""
    links: list[tuple[str, dict[str, Any]]] = []
    seen: list[Path] = []
    while True:
        try:
            path = _find(name, folder)
        except UserError as error:
            if links:
                error.wrong = f"{links[-1][0]}: extends = {name!r}: {error.wrong}"
            raise
        if path in seen:
            loop = " -> ".join(p.name for p in [*seen, path])
            raise UserError(f"{path}: 'extends' goes round in a circle: {loop}", "a chain that ends")
        seen.append(path)
        tables = _read(path)
        parent = tables.pop("extends", None)
        links.append((_short(path), tables))
        if parent is None:
            return iter(reversed(links))
        if not isinstance(parent, str):
            raise UserError(f"{_short(path)}: extends = {parent!r}", "the name of one recipe, or its path")
        name, folder = parent, path.parent


def _find(name: str, folder: Path) -> Path:
    """The file of a recipe: a path (relative to the file that extends it), else one of our own."""
    if _is_path(name):
        path = folder / Path(name).expanduser()
        if path.is_dir():
            raise UserError(f"recipe '{name}' is a folder", "a .toml file")
        if not path.is_file():
            raise UserError(f"recipe file '{path}' does not exist", "a path, or one of " + ", ".join(recipe_names()))
        return path.resolve()
    path = recipe_folder() / f"{name}.toml"
    if not path.is_file():
        raise unknown("recipe", name, recipe_names(), f"for a file of your own write its path: ./{name}.toml")
    return path


def _is_path(name: str) -> bool:
    return name.endswith(".toml") or name.startswith((".", "/", "~"))


def _short(path: Path) -> str:
    """How messages call a recipe file: our own by name, others by path."""
    folder = recipe_folder().resolve()
    inside = path.resolve().is_relative_to(folder)
    return f"recipes/{path.resolve().relative_to(folder)}" if inside else str(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(
            f"{_short(path)} is not TOML: {error}", "[TABLE] and KEY = VALUE", _faulty(path, error)
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{_short(path)} cannot be read: {error}", "a recipe file") from None


def _faulty(path: Path, error: tomllib.TOMLDecodeError) -> str:
    """The line that is not TOML, and what is wrong with it where that is plain."""
    found = re.search(r"at line (\d+)", str(error))
    line = path.read_text(encoding="utf-8").split("\n")[int(found[1]) - 1].strip() if found else ""
    word = re.fullmatch(r"([\w.-]+)\s*=\s*([A-Za-z][\w/.+-]*)", line)
    if word:
        return f'text stands in quotes: {word[1]} = "{word[2]}"'
    return f"look at line {found[1]}: {line}" if found and line else ""


def _parse_override(text: str) -> dict[str, Any]:
    """`losses.soft.weight=0.5` as nested tables; a value that is not TOML is taken as a string."""
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(re.fullmatch(r"[\w-]+", part) for part in parts):
        raise UserError(f"--set {text!r}", "KEY=VALUE", "for example --set losses.soft.weight=0.5")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    for part in reversed(parts):
        parsed = {part: parsed}
    return dict(parsed)


def _merge(into: dict[str, Any], part: Mapping[str, Any], origins: dict[str, str], source: str, at: str = "") -> None:
    """Refines `into` by `part`, table by table; notes where each value comes from. Entries of a list of tables are
    refined by their numbers: `phases.1.rounds=3` is the second phase's."""
    for key, value in part.items():
        place = f"{at}.{key}" if at else key
        origins[place] = source
        if isinstance(value, Mapping):
            former = into.get(key)
            if place == "phases" and not former:
                raise UserError(f"{source}: the recipe has no phases", "a recipe with [[phases]], like born-again")
            if isinstance(former, list) and all(number.isdigit() for number in value):
                # Others may hold the same list.
                into[key] = [dict(entry) if isinstance(entry, dict) else entry for entry in former]
                for number, table in value.items():
                    if int(number) >= len(former) or not isinstance(table, Mapping):
                        raise UserError(
                            f"{source}: there is no {place}.{number} with keys",
                            f"{place}.0 to {place}.{len(former) - 1}",
                        )
                    _merge(into[key][int(number)], table, origins, source, f"{place}.{number}")
                continue
            if not isinstance(former, dict):
                into[key] = {}
            _merge(into[key], value, origins, source, place)
        else:
            into[key] = value
