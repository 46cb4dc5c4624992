"""What the command line chooses beside the recipe."""

from __future__ import annotations

import os
from dataclasses import asdict, field
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from sdcli.data.dataset import NAMED
from sdcli.devices import Precision
from sdcli.recipe.schema import Recipe

FREE = {"title", "paper", "epochs"}
"""Keys of the recipe that a resumed run may be given anew."""

MAY_CHANGE = ("device", "workers", "compile", "grad_accum_steps", "save_every", "track", "imports")
"""Settings that a resumed run may be given anew: they change how it is worked out, not what is. (Batch norms and losses
that compare images see the images of one process and one part at a time.)"""


@dataclass(frozen=True, config=ConfigDict(strict=True))
class Settings:
    """What the command line chooses beside the recipe: what changes from run to run. Raises pydantic's ValidationError
    for a value of another type."""

    model: str
    dataset: str
    image_key: str | None = None
    label_key: str | None = None
    image_size: int | None = None
    val_fraction: float = 0.1
    limit_train: int | None = None
    limit_val: int | None = None
    seed: int = 42
    device: str | None = None
    workers: int | None = None
    """None: as many as suit."""
    precision: Precision = "fp32"
    compile: bool = False
    channels_last: bool = False
    grad_checkpointing: bool = False
    grad_accum_steps: int = 1
    """In how many parts the images of an update are worked off, to save memory."""
    save_every: int | None = None
    """Updates after which the state is saved within an epoch; it is always saved after one."""
    track: str | None = None
    """One of accelerate's trackers."""
    imports: list[str] = field(default_factory=list)
    """The user's own Python files, which register losses and heads; whole paths. A resumed run is given them anew."""

    def __post_init__(self) -> None:
        # A run goes on from any folder.
        path = os.path.expanduser(self.dataset)
        if self.dataset not in NAMED and os.path.isdir(path):
            object.__setattr__(self, "dataset", os.path.realpath(path))


def unchanging(settings: Settings, recipe: Recipe) -> dict[str, Any]:
    """What the state keeps of both, to be compared with what the run's own files say when it goes on."""
    chosen = {name: value for name, value in asdict(settings).items() if name not in MAY_CHANGE}
    return {"settings": chosen, "recipe": recipe.model_dump(exclude=FREE, exclude_none=True)}
