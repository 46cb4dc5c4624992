"""What reads a tensor in the middle of a forward pass: keeps it, replaces it, or ends the pass there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Reached(Exception):
    """Ends a forward pass at a tap: nothing after it is needed."""


class Store:
    """What the taps of one forward pass share.

    Closed in between: gradient checkpointing runs parts of the network again in the backward pass, and what is kept
    then would never be freed.
    """

    def __init__(self) -> None:
        self.open = False
        self.tensors: dict[str, Tensor] = {}
        self.visit: Callable[[str, Tensor], Tensor] | None = None
        """Called with each point and its tensor; the forward pass continues with the tensor that it returns. It may
        raise `Reached`. None: tensors are only kept."""


class Tap:
    """A forward hook at a point.

    An object that shares its store with the wrapper, not a closure over it: deep copies and pickles of the whole keep
    working, since both then find the copied store.
    """

    def __init__(self, store: Store, point: str, tensor: int | None) -> None:
        self.store, self.point, self.tensor = store, point, tensor

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.store.open:
            return None
        own = output if self.tensor is None else output[self.tensor]
        self.store.tensors[self.point] = own
        if self.store.visit is None:
            return None
        instead = self.store.visit(self.point, own)
        if instead is own:
            return None
        self.store.tensors[self.point] = instead
        if self.tensor is None:
            return instead
        entries = list(output)
        entries[self.tensor] = instead
        return type(output)(entries)


class InputTap:
    """A forward pre-hook that keeps what the classifier is given: the final embedding."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.store.open:
            self.store.tensors["embedding"] = args[0]
