"""Writes docs/methods.md: every recipe and every loss, from the recipe files and the code.

python docs/make_methods.py
"""

from __future__ import annotations

from pathlib import Path

from sdcli.about import Overview, formula, needs, overview
from sdcli.catalogue import Item, losses
from sdcli.recipe import recipe_names
from sdcli.toml import write_value

FILE = Path(__file__).with_name("methods.md")

OPENING = """\
# Methods

Made by `python docs/make_methods.py` from the recipes' headers and the losses' docstrings: change those, not this file.
`sdcli recipes show NAME` prints a recipe with all that it extends, `sdcli recipes losses NAME` what is known of a loss.
"""


def methods() -> str:
    """The whole document."""
    recipes = [overview(name) for name in recipe_names()]
    kinds = losses()
    parts = [OPENING, "## Recipes\n", _index(recipes), *(_recipe(recipe, kinds) for recipe in recipes)]
    parts += ["## Losses\n", _kinds(kinds), *(_loss(item, recipes) for item in kinds)]
    return "\n".join(parts)


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
    lines = [f'### <a id="loss-{item.name}"></a>{item.name}\n', f"{_markdown(item.summary)}.\n"]
    lines += [f"{_markdown(paragraph)}\n" for paragraph in item.details.split("\n\n") if paragraph]
    if item.keys:
        lines += ["| key | type | default |", "| --- | --- | --- |"]
        lines += [
            f"| `{key.name}` | {_markdown(key.type)} | {'' if key.required else f'`{write_value(key.default)}`'} |"
            for key in item.keys
        ]
        lines += [""]
    if item.sees_batch:
        said.append("Couples the images of a batch: its value depends on the batch of one process.")
    if item.hard_labels:
        said.append("Needs one class per image: no mixup or cutmix.")
    lines += [f"- {text}" for text in said]
    lines += [f"- Papers: {links}"] * bool(links) + [f"- In the recipes {', '.join(used)}"] * bool(used)
    return "\n".join([*lines, ""])


def _markdown(text: str) -> str:
    """Signs that Markdown would take for its own."""
    parts = text.split("`")
    # What stands between backticks is code already.
    marks = str.maketrans({"|": "\\|", "<": "\\<", "*": "\\*", "[": "\\[", "_": "\\_"})
    return "`".join(part if number % 2 else part.translate(marks) for number, part in enumerate(parts))


if __name__ == "__main__":
    FILE.write_text(methods(), encoding="utf-8")
