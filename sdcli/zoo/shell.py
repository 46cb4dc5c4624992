"""What all networks of the zoo share: a stem, stages, a tail, pooling and a classifier, with timm's interface.

B batch, C channels, H W map, K classes
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
"""Of CIFAR-100's training images."""


@dataclass(frozen=True)
class Stage:
    """Blocks on maps of one size; the first of them shrinks the map."""

    blocks: Sequence[nn.Module]
    num_chs: int
    """Channels after the last block."""
    reduction: int
    """How much smaller than the image the map is."""
    middle_chs: int = 0
    """Channels after the middle block, if a section ends there too: a network of three stages has four sections, as in
    the papers. 0 if none does."""


@dataclass(frozen=True)
class Parts:
    """The layers of a network without its classifier."""

    stem: nn.Module
    stages: Sequence[Stage]
    tail: nn.Module | None = None
    """What follows the last stage, such as the norm behind blocks of pre-activations."""
    tail_chs: int = 0
    """Channels after the tail; 0 if they are the last stage's."""


Family = Callable[..., Parts]
"""Makes the parts of a network from `in_chans` and arguments of its own."""


class CifarNet(nn.Module):
    """A network for small images: `stem`, `stages`, `tail` and `head`.

    `cfg` makes all but the head. `arguments` are those of the family, such as `shortcut`.
    """

    def __init__(
        self,
        cfg: Family,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        **arguments: Any,
    ) -> None:
        super().__init__()
        parts = cfg(in_chans=in_chans, **arguments)
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self.stem = parts.stem
        self.stages = nn.Sequential(*(nn.Sequential(*stage.blocks) for stage in parts.stages))
        self.tail = parts.tail or nn.Identity()
        self.num_features = parts.tail_chs or parts.stages[-1].num_chs
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head_hidden_size = self.head.num_features
        self.feature_info = list(_sections(parts.stages))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which layer, for learning rates that decay with depth."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None), (r"^tail", (99999,))]
        return {"stem": r"^stem", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Blocks are computed again in the backward pass, which saves memory."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The linear layer; an identity without classes."""
        layer: nn.Module = self.head.fc
        return layer

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for other classes; none for 0."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self.head.num_features

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map [B, C, H, W]."""
        x = self.stem(x)
        for stage in self.stages:
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
        x = self.tail(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The logits [B, K] of a map; with `pre_logits` the pooled map."""
        x = self.head(x, pre_logits=pre_logits)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """The logits [B, K]."""
        return self.forward_head(self.forward_features(x))


def _sections(stages: Sequence[Stage]) -> Iterator[dict[str, Any]]:
    """timm's `feature_info`: where each section ends."""
    for number, stage in enumerate(stages):
        if stage.middle_chs and len(stage.blocks) > 1:
            middle = ceil(len(stage.blocks) / 2) - 1
            yield {"module": f"stages.{number}.{middle}", "num_chs": stage.middle_chs, "reduction": stage.reduction}
        yield {"module": f"stages.{number}", "num_chs": stage.num_chs, "reduction": stage.reduction}


def register(module: str, networks: Mapping[str, Family]) -> None:
    """Makes networks known to timm by their names, as if `module` had a function for each."""
    home: Any = sys.modules[module]
    config = {
        "input_size": (3, 32, 32),
        "num_classes": 100,
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "classifier": "head.fc",
    }
    home.default_cfgs = generate_default_cfgs(dict.fromkeys(networks, config))
    for name, family in networks.items():
        entry = partial(_create, name, family)
        entry.__name__, entry.__module__ = name, module  # type: ignore[attr-defined]
        register_model(entry)


def _create(name: str, family: Family, pretrained: bool = False, **options: Any) -> CifarNet:
    """What timm calls for `create_model(name)`."""
    built: CifarNet = build_model_with_cfg(
        CifarNet,
        name,
        pretrained,
        model_cfg=family,
        feature_cfg={"feature_cls": "hook", "no_rewrite": True, "out_indices": (0, 1, 2)},
        **options,
    )
    return built
