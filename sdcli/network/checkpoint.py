"""The checkpoint: one `.safetensors` file that needs nothing else to be evaluated, shipped or trained further.

Tensors are `backbone.*` under timm's own names and `heads.*`. The metadata holds `format="pt"`, as safetensors' readers
expect, and one JSON `sdcli` that describes the rest. No pickle is ever read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdcli import __version__
from sdcli.errors import UserError
from sdcli.files import replacing
from sdcli.network.backbones import Architecture
from sdcli.network.stages import StagePlan

VERSION = 1
"""Of the metadata's layout. A reader refuses what is newer than itself."""


@dataclass(frozen=True)
class Description:
    """All that a checkpoint says about its tensors."""

    architecture: Architecture
    plan: StagePlan
    heads: dict[str, str]
    """Which head each exit has, shallowest first."""
    classes: list[str]
    preprocess: dict[str, Any]
    """Input size, mean, std and how images are brought to them (`transforms.Preprocess`)."""
    dataset: dict[str, Any]
    """What to open to get the same data again, and how its training split was shared out."""
    recipe: dict[str, Any]
    epoch: int
    """After how many epochs it was saved."""
    scores: dict[str, Any] = field(default_factory=dict)
    """The report on the validation split, where there is one."""


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], description: Description) -> None:
    """Writes beside the place and renames: whoever looks finds the old file or the new one, whole."""
    about = {
        "version": VERSION,
        "sdcli": __version__,
        "architecture": description.architecture.to_dict(),
        "plan": description.plan.to_dict(),
        "heads": description.heads,
        "classes": description.classes,
        "preprocess": description.preprocess,
        "dataset": description.dataset,
        "recipe": description.recipe,
        "epoch": description.epoch,
        "scores": description.scores,
    }
    # The format allows no two tensors that share memory, which tied weights do.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as beside:
        save_file(copies, beside, {"format": "pt", "sdcli": json.dumps(about)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of any safetensors file; raises UserError for one that is missing, truncated or another
    format."""
    if not path.exists():
        raise UserError(f"checkpoint '{path}' does not exist", "a .safetensors file, such as RUN/best.safetensors")
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.safetensors"))
        fix = f"did you mean '{path / inside[0]}'?" if inside else ""
        raise UserError(f"'{path}' is a folder", "a .safetensors file", fix)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"'{path}' cannot be read as safetensors: {error}",
            "a whole .safetensors file",
            "copy it again if it was cut short; a .pth or .pt file has to be converted first",
        ) from None


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], Description]:
    """Tensors and description of a checkpoint of ours; raises UserError for one that is foreign or newer than this
    sdcli."""
    tensors, metadata = read_tensors(path)
    if "sdcli" not in metadata:
        raise UserError(
            f"'{path}' was not written by sdcli: its metadata has no 'sdcli' entry",
            "a checkpoint of sdcli train",
            f"to start training from its weights: sdcli train MODEL --weights {path}",
        )
    try:
        about = json.loads(metadata["sdcli"])
        version = about["version"]
        if isinstance(version, int) and version > VERSION:
            raise UserError(
                f"'{path}' has format {version}, written by sdcli {about['sdcli']}",
                f"format {VERSION} or older, which is what sdcli {__version__} reads",
                "pip install --upgrade sdcli",
            )
        description = Description(
            architecture=Architecture.from_dict(about["architecture"]),
            plan=StagePlan.from_dict(about["plan"]),
            **{key: about[key] for key in ("heads", "classes", "preprocess", "dataset", "recipe", "epoch", "scores")},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{path}' has metadata that cannot be read: {type(error).__name__}: {error}", "a checkpoint of sdcli train"
        ) from None
    return tensors, description
