"""What keeps a tensor of a forward pass until someone has read it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Store:
    """What the taps keep of one forward pass. Closed in between: gradient checkpointing runs parts of the network again
    while it goes backward, and what is kept then would never be let go.
    """

    def __init__(self) -> None:
        self.open = False
        self.tensors: dict[str, Tensor] = {}


class Tap:
    """A forward hook that keeps what a stage returned until its head has read it.

    An object that shares its store with the wrapper, not a closure over it: deep copies and pickles of the whole keep
    working, since both then find the copied store.
    """

    def __init__(self, store: Store, point: str, tensor: int | None) -> None:
        self.store, self.point, self.tensor = store, point, tensor

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.store.open:
            self.store.tensors[self.point] = output if self.tensor is None else output[self.tensor]


class InputTap:
    """A forward pre-hook that keeps what the classifier is given: the final embedding."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.store.open:
            self.store.tensors["embedding"] = args[0]
