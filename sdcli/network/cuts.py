"""Finds where a timm model can be cut, from one traced forward pass without weights or data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sdcli.errors import UserError, shown
from sdcli.network.boundaries import natural_boundaries
from sdcli.network.describe import describe
from sdcli.network.named import named_boundaries
from sdcli.network.stages import StagePlan
from sdcli.network.tap_points import TapPoint, TracedModel, trace_model
from sdcli.network.work import NUM_STAGES, merged, split


def find_stages(
    model: nn.Module,
    input_size: tuple[int, int, int] | None = None,
    *,
    exits: int | Sequence[str] | None = None,
    name: str = "",
) -> StagePlan:
    """Finds where to attach exits to a timm model, and what each stage costs.

    `model` runs once, in eval mode, on one image of `input_size` (C, H, W), and is left unchanged. The default is the
    size that timm states for the model. On the meta device this needs neither weights nor memory:

        >>> import timm, torch
        >>> from sdcli import find_stages
        >>> with torch.device("meta"):
        ...     model = timm.create_model("resnet18")
        >>> plan = find_stages(model)
        >>> for stage in plan.stages:
        ...     print(stage.module, stage.num_chs, stage.size, f"{stage.macs / plan.macs:.0%}")
        layer1 64 (56, 56) 32%
        layer2 128 (28, 28) 55%
        layer3 256 (14, 14) 77%
        layer4 512 (7, 7) 100%

    `exits` is the number of stages, including the deepest, or the names of the modules whose output to read (the
    deepest stage is added unless one of them comes at or after it). The default is four stages, or three if the model
    has only three of its own. `name` is the model's name in the plan and in messages; the default is its class.

    If timm's `feature_info` describes a pyramid and each entry is a clean cut, its boundaries are used. A trunk of
    equal blocks is cut into equal shares of the work. Any other model is cut after the last outermost module of each
    resolution. If more stages are wanted, the heaviest stage is halved.

    Raises UserError for an `input_size` or `exits` of another kind, if the model refuses the size or states none, if a
    named module cannot be tapped, or if the model cannot be cut into that many stages.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model = {shown(model)[:100]}", "a timm model", 'timm.create_model("resnet18"), for example')
    name = name or type(model).__name__
    if input_size is not None and not _is_size(input_size):
        raise UserError(
            f"input_size = {shown(input_size)[:100]}",
            "channels, height and width: three whole numbers, 1 or more",
            "find_stages(model, (3, 224, 224))",
        )
    if not isinstance(exits, (int, str, Sequence, type(None))):
        raise UserError(f"exits = {shown(exits)[:100]}", "a number of stages, or the names of modules")
    traced = trace_model(model, input_size or _own_size(model, name), name)
    if exits is None or isinstance(exits, int):
        points, found_by = _numbered(traced, exits)
    else:
        names = [exits] if isinstance(exits, str) else exits
        points, found_by = named_boundaries(traced, names), "named"
    return describe(traced, points, found_by)


def _is_size(size: object) -> bool:
    """Whether these are the channels, height and width of an image."""
    return isinstance(size, Sequence) and len(size) == 3 and all(isinstance(side, int) and side >= 1 for side in size)


def _own_size(model: nn.Module, name: str) -> tuple[int, int, int]:
    """The input size that timm states for the model: a patch embedding knows the one that it was built for."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = config.get("input_size")
    if size is None:
        raise UserError(
            f"{name} does not state the size of its images",
            "a timm model, or a size",
            "find_stages(model, (3, 224, 224))",
        )
    channels, height, width = size
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = built_for or (height, width)
    return channels, height, width


def _numbered(traced: TracedModel, exits: int | None) -> tuple[list[TapPoint], str]:
    """The requested number of boundaries, and how they were found."""
    natural, found_by = natural_boundaries(traced)
    points, macs = traced.points, traced.macs
    if not natural:
        behind = 1 - points[-1].macs / macs if points and macs else 0.0
        if behind > 0.5:
            raise UserError(
                f"{behind:.0%} of the MACs of {traced.name} at {traced.input_size[-1]} pixels come after its last map, "
                "in the classifier",
                "a network with most of its MACs in its stages",
                "fewer classes, a larger image, or name the modules to attach exits to: --exits MODULE,MODULE",
            )
        raise UserError(
            f"{traced.name} has no stages of its own: no modules whose maps divide the work into stages",
            "a network of stages or blocks",
            "name the modules to attach exits to with --exits",
        )
    if exits is None:
        return split(merged(natural, NUM_STAGES, macs), NUM_STAGES, points, macs, lopsided_only=True), found_by
    chosen = split(merged(natural, max(1, exits), macs), exits, points, macs)
    if len(chosen) != exits:
        most = len(split(natural, len(points), points, macs))
        raise UserError(
            f"{traced.name} cannot be cut into {exits} stages",
            f"between 1 and {most}",
            f"--exits {min(NUM_STAGES, most) if exits < 1 else most}",
        )
    return chosen, found_by
