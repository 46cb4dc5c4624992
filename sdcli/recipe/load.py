"""Recipe files: found, read, extended, overridden, copied and written.

A recipe is TOML. `extends` names another, or several in a list, whose tables this one refines key by key; several
recipes together, in a list or on the command line, refine each other from left to right; `--set
losses.soft.weight=0.5` refines them all.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdcli import toml
from sdcli.errors import UserError, did_you_mean, unknown
from sdcli.recipe.check import check_recipe
from sdcli.recipe.merge import Override, check_values, sources, too_large
from sdcli.recipe.schema import Recipe

LARGEST_FILE = 1_000_000
"""Bytes."""
MOST_FILES = 100
"""How many files may make one recipe."""


def recipe_folder() -> Path:
    """The folder of the recipes that come with sdcli: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parents[1] / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def recipe_names() -> list[str]:
    """The names that `--recipe` takes, schedules and other parts aside."""
    return sorted(path.stem for path in recipe_folder().glob("*.toml"))


def load_recipe(names: Sequence[str], overrides: Sequence[str | Override] = ()) -> Recipe:
    """The recipe that `names` (of recipes or files) and overrides make together; a string override is `KEY=VALUE`.

    Raises UserError for a file that does not exist or is not TOML, and for any key, type or range that is wrong, with
    the file or option that set the value.
    """
    return read_recipe(names, overrides)[0]


def read_recipe(names: Sequence[str], overrides: Sequence[str | Override] = ()) -> tuple[Recipe, dict[str, str]]:
    """`load_recipe`, and the file or option that set each dotted key; a key that is missing has its default."""
    typed = [Override.parse(given) if isinstance(given, str) else given for given in overrides]
    tables, origins = sources([part for name in names for part in _chain(name)], typed)
    return check_recipe(tables, origins), origins


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as a file that `--recipe` takes again."""
    table = recipe.model_dump(exclude_none=True)
    for network in table["networks"].values():
        for part in ("optimizer", "schedule"):
            if part in network:
                # What it takes over from the recipe's own table follows that, also where it is changed later.
                network[part] = {key: value for key, value in network[part].items() if value != table[part].get(key)}
    return toml.write(table)


def recipe_file(name: str) -> Path:
    """The file of the recipe called `name`, or at that path; raises UserError where there is none."""
    return _find(name, Path())


def copy_recipe(name: str, to: Path) -> None:
    """Copies a recipe's file as it is, header included. What it extends by path is still found from the new place.

    Raises UserError for a file that exists already or cannot be written.
    """
    source = recipe_file(name)
    extends = _read(source).get("extends")
    text = source.read_bytes().decode("utf-8-sig")
    parents = _parents(extends, _short(source))
    moved = [_moved(parent, source.parent, to.resolve().parent) for parent in parents]
    if moved != parents:
        written = toml.write_value(moved if isinstance(extends, list) else moved[0])
        text = re.sub(r"(?m)^extends\s*=\s*(\[[^\]]*\]|[^\r\n]*)", lambda _: f"extends = {written}", text, count=1)
    try:
        with to.open("xb") as file:
            file.write(text.encode("utf-8"))
    except FileExistsError:
        raise UserError(
            f"'{to}' exists already", "a file that does not exist: nothing is overwritten", "another name"
        ) from None
    except OSError as error:
        raise UserError(f"'{to}' cannot be written: {error.strerror}", "a file in an existing folder") from None


def name_from(name: str, folder: Path) -> str:
    """How a recipe file in `folder` calls the recipe that is called `name` here."""
    return _from_folder(Path(name).expanduser(), folder) if _is_path(name) else name


def _moved(parent: str, folder: Path, to: Path) -> str:
    """What a file in `folder` extends, as a file in the folder `to` writes it: a path is relative to the file that has
    it, a name is the same from anywhere."""
    if not _is_path(parent) or Path(parent).expanduser().is_absolute():
        return parent
    return _from_folder(folder / parent, to)


def _from_folder(file: Path, folder: Path) -> str:
    """A file's name or path as a recipe in `folder` writes it."""
    import os

    file, folder = file.resolve(), folder.resolve()
    near = file.is_relative_to(folder.parent)
    path = Path(os.path.relpath(file, folder)).as_posix() if near else str(file)
    return _shipped_name(file) or path


def _shipped_name(path: Path) -> str:
    """The name of a recipe that comes with sdcli ("byot", "schedules/cifar"); "" for any other file."""
    folder = recipe_folder().resolve()
    inside = path.resolve().is_relative_to(folder)
    return path.resolve().relative_to(folder).with_suffix("").as_posix() if inside else ""


def _chain(name: str) -> list[tuple[str, dict[str, Any]]]:
    """The recipe called `name` and all that it extends, the farthest ancestor first."""
    links: list[tuple[str, dict[str, Any]]] = []
    _link(_find(name, Path()), (), links)
    return links


def _link(path: Path, below: tuple[Path, ...], links: list[tuple[str, dict[str, Any]]]) -> None:
    """Adds a file to `links`, behind all that it extends; `below` are the files that lead to it."""
    if path in below:
        loop = " -> ".join(p.name for p in [*below, path])
        raise UserError(f"{_short(path)}: 'extends' forms a circle: {loop}", "a chain that ends")
    tables = _read(path)
    for parent in _parents(tables.pop("extends", None), _short(path)):
        try:
            found = _find(parent, path.parent)
        except UserError as error:
            raise error.within(f"{_short(path)}: extends = {parent!r}") from None
        _link(found, (*below, path), links)
    links.append((_short(path), tables))
    # Lists that extend lists double with every step.
    if len(links) > MOST_FILES or len(below) > MOST_FILES:
        raise UserError(f"{_short(path)}: 'extends' leads to over {MOST_FILES} files", "fewer recipes")


def _parents(extends: Any, source: str) -> list[str]:
    """The names that `extends` gives, in order; raises UserError for anything else than one name or a list of them."""
    parents = extends if isinstance(extends, list) else [] if extends is None else [extends]
    if not all(isinstance(parent, str) for parent in parents):
        raise UserError(f"{source}: extends = {extends!r}", "the name of a recipe, or its path, or a list of these")
    return parents


def _find(name: str, folder: Path) -> Path:
    """The file of a recipe: a path (relative to the file that extends it), or one that comes with sdcli."""
    try:
        if _is_path(name):
            path = folder / Path(name).expanduser()
            if path.is_dir():
                raise UserError(f"recipe '{name}' is a folder", "a .toml file")
            if path.suffix != ".toml":
                raise UserError(
                    f"recipe '{name}' is not a .toml file", "a recipe: a TOML file whose name ends in .toml"
                )
            if not path.exists():
                raise unknown_file(path)
            return path.resolve()
        path = recipe_folder() / f"{name}.toml"
        known = path.is_file() and path.resolve().is_relative_to(recipe_folder().resolve())
    except (OSError, ValueError, RuntimeError) as error:
        # Names that are too long, hold a null character, or name the home of nobody.
        raise UserError(
            f"recipe {name[:60]!r} is not a name or a path: {_reason(error)}", "a recipe's name, or a .toml file"
        ) from None
    if not known:
        raise unknown("recipe", name, recipe_names(), _fix_for(name), lists="sdcli recipes list")
    return path


def unknown_file(path: Path) -> UserError:
    """The error for a recipe file that does not exist, with files that do."""
    beside = sorted(path.parent.glob("*.toml")) if path.parent.is_dir() else []
    # By name alone: in a long path any two files are alike.
    near = did_you_mean(str(path), [str(other) for other in beside if did_you_mean(path.stem, [other.stem])])
    near = near or did_you_mean(path.stem, recipe_names())
    near = near or (f"files in '{path.parent}': {', '.join(other.name for other in beside[:5])}" if beside else "")
    return UserError(f"recipe file '{path}' does not exist", "a .toml file, or a name of sdcli recipes list", near)


def _fix_for(name: str) -> str:
    """How a name that no recipe has could have been meant."""
    if Path(name).suffix in (".yaml", ".yml", ".json"):
        return "recipes are TOML files: sdcli recipes copy default mine.toml makes one to change"
    return f"for your own file write its path: ./{name}.toml" if re.fullmatch(r"[\w-]+", name) else ""


def _is_path(name: str) -> bool:
    return name.endswith(".toml") or name.startswith((".", "/", "~"))


def _short(path: Path) -> str:
    """How messages call a recipe file: those that come with sdcli by name, others by path."""
    shipped = _shipped_name(path)
    return f"recipes/{shipped}.toml" if shipped else str(path)


def _read(path: Path) -> dict[str, Any]:
    source = _short(path)
    try:
        if not path.is_file():
            raise UserError(f"{source} is not a regular file", "a recipe file")
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{source} has {path.stat().st_size:,} bytes", f"a recipe file of at most {LARGEST_FILE:,}")
        # Some editors begin a file with a byte-order mark.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source} cannot be read: {_reason(error)}", "a recipe file in UTF-8") from None
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{source} is not TOML: {error}", "[TABLE] and KEY = VALUE", _faulty(text, error)) from None
    except RecursionError:
        raise UserError(f"{source} is nested too deeply", "the tables of a recipe") from None
    except ValueError:
        raise too_large(source) from None
    check_values(tables, source)
    return tables


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _faulty(text: str, error: tomllib.TOMLDecodeError) -> str:
    """The line that is not TOML, and the line that was meant where that is plain."""
    found = re.search(r"at line (\d+)", str(error))
    line = text.split("\n")[int(found[1]) - 1].strip() if found else ""
    word = re.fullmatch(r"([\w.-]+)\s*=\s*([A-Za-z][\w/.+-]*)", line)
    if word:
        return f'text stands in quotes: {word[1]} = "{word[2]}"'
    return f"look at line {found[1]}: {line[:80]}" if found and line else ""
