"""The settings of a run that are not in the recipe."""

from __future__ import annotations

import os
from dataclasses import asdict, field
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from sdcli.data.dataset import NAMED
from sdcli.devices import Precision
from sdcli.network.blueprint import WeightsFile
from sdcli.network.memory_format import MemoryFormat
from sdcli.recipe.schema import Recipe

FREE = {"title", "paper", "epochs"}
"""Recipe keys that may change when a run is resumed."""

MAY_CHANGE = ("device", "workers", "compile", "grad_accum_steps", "save_every", "keep_every", "track", "imports")
"""Settings that may change when a run is resumed: they change how it is computed, not what is computed. (The exception:
batch norms, and losses that compare images, see one micro-batch of one process at a time.)"""


def _from_json(value: Any) -> Any:
    """A table of `run.json` as what it stands for: JSON has no tuples."""
    return TypeAdapter(WeightsFile).validate_python(value) if isinstance(value, dict) else value


@dataclass(frozen=True, config=ConfigDict(strict=True))
class Settings:
    """The settings that vary from run to run, from the command line. Raises pydantic's ValidationError for a value of
    the wrong type."""

    model: str
    dataset: str
    image_key: str | None = None
    label_key: str | None = None
    image_size: int | None = None
    val_fraction: float = 0.1
    limit_train: int | None = None
    limit_val: int | None = None
    seed: int = 42
    """Of the weights, the order of the images and their augmentation."""
    split_seed: int = 42
    """Of the choice of images: apart from `seed`, so that runs that differ in it have the same images."""
    device: str | None = None
    workers: int | None = None
    """None: chosen automatically."""
    precision: Precision = "fp32"
    compile: bool = False
    memory_format: MemoryFormat = "auto"
    """`auto` is replaced by one of the others when the run is built, so that a resumed run computes as before."""
    grad_checkpointing: bool = False
    grad_accum_steps: int = 1
    """The number of micro-batches that each batch is split into, to save memory."""
    save_every: int | None = None
    """Save the state within an epoch every this many updates; it is always saved after an epoch."""
    keep_every: int | None = None
    """Keep the checkpoint of every so many epochs besides the best and the last."""
    track: str | None = None
    """One of accelerate's trackers."""
    weights_file: Annotated[WeightsFile | None, BeforeValidator(_from_json)] = None
    """What the file that the student starts from asks of images: a resumed run does not need the file for it."""
    label: str = ""
    """What tables call the recipe: the names and options that it was asked for by."""
    imports: list[str] = field(default_factory=list)
    """Absolute paths of the user's own Python files, which register losses and heads. `--resume` needs them again."""

    def __post_init__(self) -> None:
        # A run can be resumed from any working directory.
        path = os.path.expanduser(self.dataset)
        if self.dataset not in NAMED and os.path.isdir(path):
            object.__setattr__(self, "dataset", os.path.realpath(path))


def unchanging(settings: Settings, recipe: Recipe) -> dict[str, Any]:
    """The part of both that must not change; the state stores it, and a resumed run compares its files with it."""
    chosen = {name: value for name, value in asdict(settings).items() if name not in (*MAY_CHANGE, "label")}
    return {"settings": chosen, "recipe": recipe.model_dump(exclude=FREE, exclude_none=True)}
