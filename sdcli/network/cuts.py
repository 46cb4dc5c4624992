"""Where a timm model can be cut: one traced forward pass, no weights and no data needed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sdcli.errors import UserError
from sdcli.network.boundaries import natural_boundaries
from sdcli.network.describe import describe
from sdcli.network.named import named_boundaries
from sdcli.network.stages import StagePlan
from sdcli.network.tap_points import TapPoint, TracedModel, trace_model
from sdcli.network.work import NUM_STAGES, merged, split


def find_stages(
    model: nn.Module,
    input_size: tuple[int, int, int],
    *,
    exits: int | Sequence[str] | None = None,
    name: str = "",
) -> StagePlan:
    """Where to put exits in a timm model, and what each stage costs.

    `model` runs once, in eval mode, on one image of `input_size` (C, H, W), and is left as it was. On the meta device
    that needs neither weights nor memory:

        >>> import timm, torch
        >>> from sdcli import find_stages
        >>> with torch.device("meta"):
        ...     model = timm.create_model("resnet18")
        >>> plan = find_stages(model, (3, 224, 224))
        >>> for stage in plan.stages:
        ...     print(stage.module, stage.num_chs, stage.size, f"{stage.macs / plan.macs:.0%}")
        layer1 64 (56, 56) 32%
        layer2 128 (28, 28) 55%
        layer3 256 (14, 14) 77%
        layer4 512 (7, 7) 100%

    `exits` sets the number of stages, the deepest included, or names the modules to read after (the deepest stage is
    added unless one of them lies behind it). The default is four stages, or three where the model has only three of
    its own. `name` is the model's name in the plan and in messages; the default is its class.

    The boundaries are those that timm announces in `feature_info` where it describes a pyramid and each entry is a
    clean cut. A trunk of equal blocks is cut into equal shares of the work. What remains is cut after the last
    outermost module of each resolution. Stages beyond these come from halving the heaviest one.

    Raises UserError where the model refuses the input size, where a named module cannot be tapped and where the model
    has fewer places than asked for.
    """
    traced = trace_model(model, input_size, name or type(model).__name__)
    if exits is None or isinstance(exits, int):
        points, found_by = _numbered(traced, exits)
    else:
        names = [exits] if isinstance(exits, str) else exits
        points, found_by = named_boundaries(traced, names), "named"
    return describe(traced, points, found_by)


def _numbered(traced: TracedModel, exits: int | None) -> tuple[list[TapPoint], str]:
    """As many boundaries as asked for, and how they were found."""
    natural, found_by = natural_boundaries(traced)
    points, macs = traced.points, traced.macs
    if not natural:
        behind = 1 - points[-1].macs / macs if points and macs else 0.0
        if behind > 0.5:
            raise UserError(
                f"{behind:.0%} of the MACs of {traced.name} come after its last map, in the classifier",
                "a network that does most of its work in its stages",
                "fewer classes, a larger image, or modules to read after: --exits MODULE,MODULE",
            )
        raise UserError(
            f"{traced.name} has no stages of its own: no modules return maps between which the work is shared",
            "a network of stages or blocks",
            "name the modules to read after with --exits",
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
