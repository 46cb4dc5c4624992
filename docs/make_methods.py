"""Writes docs/methods.md, every recipe and every name that one may use, and docs/recipes.md, every key, from the recipe
files and the code.

python docs/make_methods.py
"""

from __future__ import annotations

import ast
import inspect
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel

from sdcli.method.catalogue import Item, Key, heads, losses, signals, type_words
from sdcli.recipe import schema as language
from sdcli.recipe.about import Overview, formula, needs, overview
from sdcli.recipe.load import recipe_names
from sdcli.recipe.schema import TABLES, Recipe, WeightSchedule
from sdcli.toml import write_value

FOLDER = Path(__file__).parent

OPENING = """\
# Methods

Made by `python docs/make_methods.py` from the recipes' headers and the code's docstrings: change those, not this file.
`sdcli recipes show NAME` prints a recipe with all that it extends, `sdcli recipes losses NAME` what is known of a loss.
[recipes.md](recipes.md) has the keys that every recipe may have.

In the formulas s is what the student says and t the target, which gets no gradient; y is the label, T the temperature,
B the batch, K the classes, C, H and W those of a map, D the embedding, E the signals that one is made of. A loss that
has a value for each image is averaged over the batch. W s is a layer that is trained along, where `adapt` asks for one.
"""

KEYS = """\
# The keys of a recipe

Made by `python docs/make_methods.py` from `sdcli/recipe/schema.py`: change that, not this file.
[methods.md](methods.md) has the recipes that come with sdcli and the names that they use.

A recipe is a TOML file. `extends` names another, by name or path, whose tables this one refines key by key. On the
command line several `--recipe` refine each other from left to right, and `--set losses.soft.weight=0.5` refines them
all; `--set phases.1.rounds=3` means the second of a list of tables. `sdcli recipes show` prints what comes out, and who
brought each value.

`on` and `of` name points: `exit1`, `exit2`, … (shallowest first), `final`, `exits` (all but final) or `all`. A `target`
is `label`, `next` (the next deeper point), `final` or one exit, or a list with one of these for each of `on`.
`peer.final` is a point of `[networks.peer]`, `ema.final` one of the average that `[ema]` makes, `teacher.final` one of
a phase's teacher, `final@view` what `final` says of `[batch.views.view]`. A signal is named as it is called. A target
gets no gradient.

Times below 1 are shares of the run, or of the phase; from 1 on they are epochs. A recipe keeps its shape when
`--epochs` changes.
"""


def methods() -> str:
    """The whole document."""
    recipes = [overview(name) for name in recipe_names()]
    kinds = losses()
    parts = [OPENING, "## Recipes\n", _index(recipes), *(_recipe(recipe, kinds) for recipe in recipes)]
    parts += ["## Losses\n", _kinds(kinds), *(_loss(item, recipes) for item in kinds)]
    parts += [
        "## Signals\n",
        "Predictions that are made from others, for `on` and `target` to name: `[signals.NAME]`.\n",
    ]
    parts += [_signal(item, recipes) for item in signals()]
    parts += ["## Heads\n", "Values of `networks.NAME.head`.\n", *map(_named, heads())]
    return "\n".join(parts)


def keys() -> str:
    """Every key of every table, with its type, its default and its meaning."""
    places = {"": Recipe, **TABLES}
    at = list(places).index("losses.NAME") + 1
    tables = [*list(places.items())[:at], ("losses.NAME.weight", WeightSchedule), *list(places.items())[at:]]
    return "\n".join([KEYS, *(_table(place, model) for place, model in tables)])


def _table(place: str, model: type[BaseModel]) -> str:
    title = {"": "The recipe itself", "phases": "`[[phases]]`", "losses.NAME.weight": "A weight over time"}
    words = " ".join((inspect.getdoc(model) or "").split()).removeprefix(f"{title.get(place, f'`[{place}]`')}: ")
    lines = [
        f"## {title.get(place, f'`[{place}]`')}\n",
        (words if words.startswith("timm") else words[:1].upper() + words[1:]) + "\n",
    ]
    lines += ["| key | type | default | |", "| --- | --- | --- | --- |"]
    said = _attributes(model)
    for name, field in model.model_fields.items():
        # A table's own tables and what is left out say so in words.
        plain = not field.is_required() and isinstance(field.default, (str, int, float, list))
        default = f"`{write_value(field.default)}`" if plain and field.default not in ("", []) else ""
        kind = _type(field.annotation, field.metadata)
        lines.append(f"| `{name}` | {_markdown(kind)} | {default} | {_markdown(said.get(name, ''))} |")
    return "\n".join([*lines, ""])


def _type(annotation: object, metadata: list[object]) -> str:
    words = type_words(Annotated[annotation, *metadata] if metadata else annotation).replace(" or nothing", "")
    for model in TABLES.values():
        words = words.replace(f"list of {model.__name__}", "list of tables").replace(model.__name__, "table")
    return words.replace("WeightSchedule", "weight over time")


def _attributes(model: type[BaseModel]) -> dict[str, str]:
    """The strings below a class's attributes, which Python itself forgets."""
    tree = ast.parse(inspect.getsource(language))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == model.__name__)
    found = {}
    for one, below in pairwise(body):
        told = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and told:
            found[one.target.id] = " ".join(str(below.value.value).split())
    return found


def _index(recipes: list[Overview]) -> str:
    rows = [
        f"| [`{r.name}`](#{r.name}) | {_markdown(r.recipe.title)} | {_paper(r.recipe.paper)} | "
        f"{_markdown(r.header.measured) or 'not yet'} |"
        for r in recipes
    ]
    return "\n".join(["| recipe | title | paper | measured |", "| --- | --- | --- | --- |", *rows, ""])


def _paper(link: str) -> str:
    short = link.removeprefix("https://").removeprefix("arxiv.org/abs/").removeprefix("doi.org/")
    return f"[{short}]({link})" if link else ""


def _recipe(this: Overview, kinds: list[Item]) -> str:
    header, used = this.header, {loss.kind for loss in this.recipe.losses.values()}
    named = ", ".join(f"[`{item.name}`](#loss-{item.name})" for item in kinds if item.name in used)
    told = {
        "Paper": _paper(this.recipe.paper),
        "Needs": "; ".join(needs(this.recipe)),
        "Losses": named,
        **{name.capitalize(): _markdown(text) for name, text in header.sections.items()},
    }
    lines = [f"### {this.name}\n", f"{_markdown(header.idea)}\n"]
    lines += [*(f"    {command}" for command in header.commands), "", "What is minimised:\n", "```"]
    lines += [formula(this.recipe), "```\n"]
    lines += [f"- {name}: {text}" for name, text in told.items() if text]
    return "\n".join([*lines, "\nIts file:\n", "```toml", this.body.rstrip(), "```\n"])


def _kinds(kinds: list[Item]) -> str:
    rows = []
    for item in kinds:
        keys = ", ".join(f"`{key.name}`" for key in item.keys)
        rows.append(f"| [`{item.name}`](#loss-{item.name}) | {item.reads} | {item.against} | {keys} |")
    return "\n".join(["| loss | compares | with the | keys |", "| --- | --- | --- | --- |", *rows, ""])


def _loss(item: Item, recipes: list[Overview]) -> str:
    used = [f"[`{r.name}`](#{r.name})" for r in recipes if item.name in {x.kind for x in r.recipe.losses.values()}]
    links = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in item.papers)
    said = [
        f"Compares the {item.reads} of two points."
        if item.against == "target"
        else f"Compares {item.reads} with the labels."
    ]
    lines = [f'### <a id="loss-{item.name}"></a>{item.name}\n', *_told(item)]
    if item.sees_batch:
        said.append("Couples the images of a batch: its value depends on the batch of one process.")
    if item.hard_labels:
        said.append("Needs one class per image: no mixup or cutmix.")
    lines += [f"- {text}" for text in said]
    lines += [f"- Papers: {links}"] * bool(links) + [f"- In the recipes {', '.join(used)}"] * bool(used)
    return "\n".join([*lines, ""])


def _signal(item: Item, recipes: list[Overview]) -> str:
    kinds = {r.name: {signal.kind for signal in r.recipe.signals.values()} for r in recipes}
    used = [f"[`{name}`](#{name})" for name in kinds if item.name in kinds[name]]
    lines = [_named(item)]
    if item.sees_batch:
        lines.append("- Couples the images of a batch: it depends on the batch of one process.")
    if item.hard_labels:
        lines.append("- Needs one class per image: no mixup or cutmix.")
    return "\n".join([*lines, *([f"- In the recipes {', '.join(used)}"] * bool(used)), ""])


def _named(item: Item) -> str:
    return "\n".join([f"### {item.name}\n", *_told(item)])


def _told(item: Item) -> list[str]:
    """All that the code says of a name."""
    lines = [f"{_markdown(item.summary)}.\n"]
    if item.formula:
        lines += ["```text", item.formula, "```\n"]
    lines += [f"{_markdown(paragraph)}\n" for paragraph in item.details.split("\n\n") if paragraph]
    if item.keys:
        lines += ["| key | type | default |", "| --- | --- | --- |", *map(_key, item.keys), ""]
    return lines


def _key(key: Key) -> str:
    return f"| `{key.name}` | {_markdown(key.type)} | {'' if key.required else f'`{write_value(key.default)}`'} |"


def _markdown(text: str) -> str:
    """Signs that Markdown would take for its own."""
    parts = text.split("`")
    # What stands between backticks is code already.
    marks = str.maketrans({"|": "\\|", "<": "\\<", "*": "\\*", "[": "\\[", "_": "\\_"})
    return "`".join(part if number % 2 else part.translate(marks) for number, part in enumerate(parts))


if __name__ == "__main__":
    (FOLDER / "methods.md").write_text(methods(), encoding="utf-8")
    (FOLDER / "recipes.md").write_text(keys(), encoding="utf-8")
