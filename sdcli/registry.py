"""Registries: the names that a recipe can use, and the functions behind them.

The keyword-only arguments of a registered function or class are its recipe keys: their annotations are the types and
ranges that a recipe is checked against, their defaults apply if a recipe leaves a key out. Nothing is written twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NotRequired, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from sdcli.errors import UserError, invalid, unknown


@dataclass(frozen=True)
class Entry:
    """One registered name: its function or class, the part of a signal that it reads, and its keys."""

    name: str
    call: Callable[..., Any]
    reads: str = ""
    sees_batch: bool | str = False
    """Whether its value couples the images of a batch, so that splitting the batch changes it; or the name of the key
    that decides this."""
    hard_labels: bool = False
    """Whether it needs one class per image: no mixup or cutmix."""
    constant: bool = False
    """Whether no gradient flows through its output."""
    reads_one: bool = False
    """Whether it is called with a single signal, not with a list."""

    def couples(self, options: Mapping[str, Any]) -> bool:
        """Whether its value couples the images of a batch with these options."""
        return bool(options[self.sees_batch] if isinstance(self.sees_batch, str) else self.sees_batch)

    @cached_property
    def parameters(self) -> tuple[inspect.Parameter, ...]:
        return tuple(inspect.signature(self.call).parameters.values())

    @cached_property
    def takes(self) -> frozenset[str]:
        """The names of the positional arguments, which the caller passes."""
        return frozenset(p.name for p in self.parameters if p.kind is not p.KEYWORD_ONLY)

    @cached_property
    def options(self) -> dict[str, Any]:
        """The recipe keys and their defaults; `inspect.Parameter.empty` marks one that must be given."""
        return {p.name: p.default for p in self.parameters if p.kind is p.KEYWORD_ONLY}

    @cached_property
    def hints(self) -> dict[str, Any]:
        """The annotations of all arguments, ranges included."""
        return get_type_hints(self.call.__init__ if inspect.isclass(self.call) else self.call, include_extras=True)

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        required = inspect.Parameter.empty
        hints = {
            name: self.hints.get(name, Any) if default is required else NotRequired[self.hints.get(name, Any)]
            for name, default in self.options.items()
        }
        # A typed dictionary, not a model: a key can have any name that a function's argument can have.
        make: Any = TypedDict
        table = make("Options", hints)
        table.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)
        return TypeAdapter(table)

    def check(self, options: Mapping[str, Any], where: str) -> dict[str, Any]:
        """`options` with the defaults filled in; raises UserError for an unknown key, a wrong type or range."""
        try:
            checked = self._adapter.validate_python(dict(options))
        except ValidationError as error:
            raise invalid(error.errors(include_url=False), where, self.options) from None
        return {name: checked.get(name, default) for name, default in self.options.items()}


@dataclass
class Registry:
    """Names of one kind (losses, heads, …) in order of registration."""

    what: str
    entries: dict[str, Entry] = field(default_factory=dict)

    def register(
        self,
        name: str,
        *,
        reads: str = "",
        sees_batch: bool | str = False,
        hard_labels: bool = False,
        constant: bool = False,
        reads_one: bool = False,
    ) -> Callable[[Any], Any]:
        """Decorator: registers a function or class as `name`; the other arguments as in `Entry`. Raises UserError for a
        name that is already taken."""

        def add(call: Any) -> Any:
            if name in self.entries:
                raise UserError(
                    f"{self.what} '{name}' is registered twice",
                    "a name that is not taken",
                    f'@….register("my_{name}")',
                )
            self.entries[name] = Entry(name, call, reads, sees_batch, hard_labels, constant, reads_one)
            return call

        return add

    def find(self, name: str, where: str = "") -> Entry:
        """The entry called `name`; raises UserError with the nearest name if there is none."""
        if name not in self.entries:
            plural = self.what + ("es" if self.what.endswith("s") else "s")
            error = unknown(self.what, name, self.entries, lists=f"sdcli recipes {plural}")
            raise error.within(where, key=where) if where else error
        return self.entries[name]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())
