"""Everything that a recipe can name, read from the code itself: registered names, their keys, types, ranges and
papers."""

from __future__ import annotations

import inspect
import re
import textwrap
import types
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from sdcli.recipe.schema import Derived, Loss, Recipe
from sdcli.registry import Entry, Registry

T = TypeVar("T", Loss, Derived)

ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
NAMES = {
    "Any": "anything",
    "bool": "true or false",
    "int": "integer",
    "float": "number",
    "str": "string",
    "NoneType": "nothing",
}
"""TOML's names for Python's types."""


@dataclass(frozen=True)
class Key:
    """One recipe key of a registered name."""

    name: str
    type: str
    """The type and its range: `number > 0`, `"mean" or "l2"`."""
    default: Any = None
    required: bool = False


@dataclass(frozen=True)
class Item:
    """One name that a recipe can use."""

    name: str
    summary: str
    """The first sentence of its docstring."""
    details: str
    """The rest of its docstring, in paragraphs."""
    formula: str
    """The formula from its docstring, where s is the student and t the target; "" if it has none."""
    papers: tuple[str, ...]
    """arXiv numbers, its own paper first."""
    reads: str = ""
    """The part of a point that it reads: `logits`, `embedding` or `features`."""
    against: str = ""
    """What a loss compares with: `target` or `labels`."""
    keys: tuple[Key, ...] = ()
    hard_labels: bool = False
    sees_batch: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def losses() -> list[Item]:
    """Kinds of `[losses.NAME]`."""
    from sdcli.method.losses import LOSSES

    def against(entry: Entry) -> str:
        return "target" if inspect.isclass(entry.call) or "teacher" in entry.takes else "labels"

    return _items(LOSSES, against)


def heads() -> list[Item]:
    """Values of `networks.NAME.head`."""
    from sdcli.network.heads import HEADS

    return _items(HEADS)


def signals() -> list[Item]:
    """Kinds of `[signals.NAME]`."""
    from sdcli.method.signals import SIGNALS

    return _items(SIGNALS)


def completed(recipe: Recipe, only: Collection[str] | None = None) -> Recipe:
    """`recipe` with the defaults of its losses' and signals' own keys filled in, so that later defaults do not change
    its meaning.

    `only` limits this to the losses and signals with these names. Unregistered kinds are left unchanged. Raises
    UserError for an unknown key, a wrong type or range.
    """
    from sdcli.method.losses import LOSSES
    from sdcli.method.signals import SIGNALS

    def filled(table: T, registry: Registry, where: str) -> T:
        entry = registry.entries.get(table.kind)
        options = entry.check(table.options, where) if entry else {}
        return table.model_copy(update={key: value for key, value in options.items() if value is not None})

    losses, signals = dict(recipe.losses), dict(recipe.signals)
    for name in losses.keys() if only is None else losses.keys() & only:
        losses[name] = filled(losses[name], LOSSES, f"losses.{name}")
    for name in signals.keys() if only is None else signals.keys() & only:
        signals[name] = filled(signals[name], SIGNALS, f"signals.{name}")
    return recipe.model_copy(update={"losses": losses, "signals": signals})


def policies() -> list[Item]:
    """Values of `batch.augment.aa`."""
    from sdcli.data.transforms import POLICIES, TIMM_POLICIES

    return [_item(name, words) for name, words in {**POLICIES, **TIMM_POLICIES}.items()]


@dataclass(frozen=True)
class Shelf:
    """One kind of name, with its command in `sdcli recipes`."""

    one: str
    """The singular: what one item is called."""
    help: str
    items: Callable[[], list[Item]]
    """Returns the items; their modules are imported only when it is called."""


SHELVES = {
    "losses": Shelf(
        "loss", "List the losses (kind in [losses.NAME]): what each compares, its keys, its paper.", losses
    ),
    "heads": Shelf("head", "List the heads that exits can have (networks.NAME.head).", heads),
    "signals": Shelf("signal", "List the signals (kind in [signals.NAME]): predictions made from others.", signals),
    "policies": Shelf("policy", "List the augmentation policies (batch.augment.aa).", policies),
}


def _items(registry: Registry, against: Callable[[Entry], str] = lambda entry: "") -> list[Item]:
    return [
        _item(
            entry.name,
            inspect.getdoc(entry.call) or "",
            reads=entry.reads,
            against=against(entry),
            keys=keys_of(entry),
            hard_labels=entry.hard_labels,
            sees_batch=entry.sees_batch is True,
        )
        for entry in registry
    ]


def _item(name: str, words: str, **more: Any) -> Item:
    formulas, words = indented(words)
    summary, details = first_sentence(words)
    return Item(name, summary, details, formulas, tuple(dict.fromkeys(ARXIV.findall(words))), **more)


def indented(words: str) -> tuple[str, str]:
    """A docstring's indented paragraphs, dedented, and its other paragraphs."""
    paragraphs = re.split(r"\n\s*\n", words)
    inside = [p for p in paragraphs if all(line.startswith("    ") for line in p.splitlines())]
    return "\n".join(textwrap.dedent(p) for p in inside), "\n\n".join(p for p in paragraphs if p not in inside)


def first_sentence(words: str) -> tuple[str, str]:
    """A docstring's first sentence, and the rest with each paragraph on one line."""
    first, *rest = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", words.strip())]
    # A sentence ends before a capital; "et al. 2019" and "cf. Table 2" do not end one.
    parts = re.split(r"(?<!\bal\.)(?<!\bcf\.)(?<=\.)\s+(?=[A-Z`])", first, maxsplit=1)
    return parts[0].removesuffix("."), "\n\n".join([*parts[1:], *rest])


def keys_of(entry: Entry) -> tuple[Key, ...]:
    """The recipe keys of a registered name, from its keyword-only arguments."""
    empty = inspect.Parameter.empty
    return tuple(
        Key(name, type_words(entry.hints.get(name, Any)), None if default is empty else default, default is empty)
        for name, default in entry.options.items()
    )


def type_words(hint: Any) -> str:
    """A type and its range in words: `number > 0`, `0 <= number < 1`, `"mean" or "l2"`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = [limit for item in arguments[1:] for limit in _limits(item)]
        return _ranged(type_words(arguments[0]), limits)
    if origin is Literal:
        return _either(f'"{value}"' if isinstance(value, str) else str(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return _either(type_words(argument) for argument in arguments)
    if origin in (list, tuple):
        return f"list of {type_words(arguments[0])}"
    if origin is dict:
        return "table"
    name = getattr(hint, "__name__", str(hint))
    return NAMES.get(name, name)


def _limits(item: Any) -> list[tuple[str, Any]]:
    """`("ge", 0)` and the like, from pydantic's Field or from annotated_types."""
    found = item.metadata if isinstance(item, FieldInfo) else [item]
    return [
        (name, getattr(limit, name)) for limit in found for name in ("gt", "ge", "lt", "le") if hasattr(limit, name)
    ]


def _ranged(what: str, limits: Iterable[tuple[str, Any]]) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    low = [(name, value) for name, value in limits if name in ("gt", "ge")]
    high = [(name, value) for name, value in limits if name in ("lt", "le")]
    after = "".join(f" {signs[name]} {value}" for name, value in high)
    if low and high:
        (name, value), *_ = low
        return f"{value} {'<' if name == 'gt' else '<='} {what}{after}"
    return what + "".join(f" {signs[name]} {value}" for name, value in low) + after


def _either(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last
