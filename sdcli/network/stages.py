"""The stages of a model: where exits can read, with the layout and cost of each map.

B batch, C channels, H W map, N tokens, P prefix tokens
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """The end of one stage: a module whose output an exit can read."""

    module: str
    """Path inside the timm model. A forward hook there fires exactly once per forward."""
    tensor: int | None
    """The index in the returned tuple; None if the module returns the tensor itself."""
    num_chs: int
    size: tuple[int, int]
    """H and W of its map, or of the grid of its tokens."""
    reduction: int
    output_fmt: str
    """"NCHW", "NHWC" or "NLC" (tokens)."""
    num_prefix_tokens: int
    clean: bool
    """Whether everything later depends on this tensor only."""
    params: int
    """Parameters of everything up to and including the stage."""
    macs: int
    """MACs up to and including the stage, for one image."""
    inner: tuple[str, ...] = ()
    """Modules inside it that return the same tensor, outermost first. See `tap_modules`."""
    windows: int = 0
    """How many times the tokens are nested in windows (Hiera's `Unroll`); 0 for tokens in rows."""


@dataclass(frozen=True)
class StagePlan:
    """Every stage of one model at one input size."""

    model: str
    input_size: tuple[int, int, int]
    stages: tuple[Stage, ...]
    """Shallowest first; the last one is the model's own end, unless the user named a module after it."""
    found_by: str
    notes: tuple[str, ...]
    """One sentence for each unusual property."""
    params: int
    """Parameters of the whole model, including those that the forward pass does not use."""
    macs: int
    unused: tuple[str, ...]
    """Parameters that never affect the output: they get no gradient and must not be trained."""
    classifier: str | None
    """The module that turns the embedding ([B, D] or [B, D, 1, 1]) into the logits; None if no single module does."""
    embedding_dim: int
    """D; the channels of the last stage if no single module is the classifier."""

    encoder: bool = False
    """Whether the model has no classifier: its output is a map or tokens, or their mean."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` restores an equal plan."""
        return {
            name: [_plain(asdict(stage)) for stage in self.stages] if name == "stages" else value
            for name, value in _plain(asdict(self)).items()
        }

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> StagePlan:
        """The plan that `to_dict` described."""
        stages = tuple(Stage(**_frozen(stage)) for stage in table["stages"])
        return cls(**{**_frozen(table), "stages": stages})


def _plain(table: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in table.items()}


def _frozen(table: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def to_map(tensor: Tensor, stage: Stage) -> Tensor:
    """Converts a stage's tensor from the model's own layout to a map [B, C, H, W].

    If the number of tokens differs from the traced one, they are taken as a grid of the same proportions.
    """
    if stage.output_fmt == "NCHW":
        return tensor
    if stage.output_fmt == "NHWC":
        return tensor.permute(0, 3, 1, 2)
    tokens = tensor[:, stage.num_prefix_tokens :]
    batch, length, num_chs = tokens.shape
    height, width = stage.size
    if length != height * width:
        height = round(math.sqrt(length * height / width))
        width = length // height
    for _ in range(stage.windows):
        # [B, 2*2 positions in a window, windows, C], where the windows are nested again: the outermost pair first.
        height, width = height // 2, width // 2
    grid = tokens.reshape(batch, *(2, 2) * stage.windows, height, width, num_chs)
    if stage.windows:
        last = 2 * stage.windows + 1
        rows, columns = [*range(1, last, 2)], [*range(2, last, 2)]
        grid = grid.permute(0, last, *reversed(rows), last + 1, *reversed(columns), last + 2)
        grid = grid.reshape(batch, height << stage.windows, width << stage.windows, num_chs)
    return grid.permute(0, 3, 1, 2)


def prefix_tokens(tensor: Tensor, stage: Stage) -> Tensor:
    """The class and register tokens of a stage's tensor [B, P, C]; P is 0 if it has none."""
    if stage.output_fmt != "NLC":
        return tensor.new_empty(tensor.shape[0], 0, stage.num_chs)
    return tensor[:, : stage.num_prefix_tokens]


def tap_modules(stage: Stage) -> list[str]:
    """The stage's module and the modules inside it that return the same tensor, outermost first.

    With timm's gradient checkpointing, 47 of 98 families run the blocks of a stage one by one and never call the stage
    itself, but always one of these modules: tap all of them and read the one that fires.
    """
    return [stage.module, *stage.inner]
