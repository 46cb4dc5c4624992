"""From a model's name to a timm backbone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sdcli.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build a backbone again."""

    model: str
    num_classes: int
    input_size: tuple[int, int, int]
    stem: str
    model_args: dict[str, Any]
    notes: tuple[str, ...]


def resolve(
    model: str,
    *,
    num_classes: int | None,
    image_size: int | None,
    stem: str = "auto",
    pretrained: bool = False,
    model_args: dict[str, Any] | None = None,
) -> Architecture:
    import timm

    with torch.device("meta"):
        m = timm.create_model(model)
    size = tuple(getattr(m, "default_cfg", {}).get("input_size", (3, 224, 224)))
    return Architecture(model, m.num_classes, size, "imagenet", {}, ())


def create(architecture: Architecture, *, device: str = "meta", pretrained: bool = False) -> nn.Module:
    import timm

    with torch.device(device):
        return timm.create_model(architecture.model)
