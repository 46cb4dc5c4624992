"""Stems for small images, so that ImageNet networks do not shrink 32 pixels to one.

There are three ways: the stem of the CIFAR ResNets (He et al. 2016, arXiv:1512.03385, section 4.2), removing the first
strides of any other network, and smaller patches for transformers.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from sdcli.errors import UserError
from sdcli.network.cuts import find_stages

STEMS = ("imagenet", "cifar", "unstrided", "patch")
"""The kinds that a checkpoint can store: timm's own stem · a 3x3 stem without stride and pooling, with new weights ·
the first strides removed, every weight keeps its name and shape · smaller patches, by arguments of `create_model`."""

SMALLEST_MAP = 4
"""The smallest side of a useful last map: exits see no shapes on smaller ones, so the stem is changed."""
GRID = 8
"""The side of the grid that a single-resolution transformer should get: 64 tokens."""
FACTOR = 4
"""A network for small images shrinks them less by this factor: the reduction of the ImageNet stems."""

Build = Callable[[Mapping[str, Any]], nn.Module]


def smallest_map(input_size: tuple[int, int, int]) -> int:
    """The smallest side of the last map that a network for small images should have.

    CIFAR networks shrink by 8, from 32 pixels to 4: for smaller images it is less in proportion.
    """
    return max(1, min(SMALLEST_MAP, min(input_size[1:]) // 8))


def last_map(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """The shorter side of the last map; 0 if the model does not run at this size or has no stages there."""
    return _sides(model, input_size)[-1]


def _sides(model: nn.Module, input_size: tuple[int, int, int]) -> list[int]:
    """The shorter side of each stage's map, shallowest first; [0] if the model does not run or has no stages."""
    try:
        return [min(stage.size) for stage in find_stages(model, input_size).stages]
    except UserError:
        return [0]


def has_cifar_stem(model: nn.Module) -> bool:
    """Whether `model` has the structure of timm's ResNet, whose stem the CIFAR papers replace."""
    return all(hasattr(model, name) for name in ("conv1", "bn1", "maxpool", "layer4"))


def apply_stem(model: nn.Module, kind: str, input_size: tuple[int, int, int]) -> tuple[str, ...]:
    """Gives `model` the stem of a resolved `kind`, in place; returns one sentence per change.

    The same model, kind and size always give the same result, so that a checkpoint needs to store nothing else. Raises
    UserError if no stride of the model can be removed.
    """
    if kind in ("imagenet", "patch"):
        return ()
    done = []
    papers = kind == "cifar" and has_cifar_stem(model)
    if papers:
        _replace_stem(model)
        done.append("The stem is a 3x3 convolution with stride 1 and no pooling, as in the CIFAR papers.")
    undone, after = _undo_strides(model, input_size, FACTOR if papers else 1)
    if undone:
        done.append(f"Strides removed, weights unchanged: {', '.join(undone)}.")
    if not done:
        raise UserError(
            f"{type(model).__name__} has no stride that can be removed for small images",
            "a network that shrinks its input by strided convolutions or poolings",
            "--stem imagenet",
        )
    if not after:
        raise UserError(
            f"{type(model).__name__} does not run on images of {input_size[1]} pixels without the strides of {undone}"
        )
    return (*done, f"The last map is {after}x{after}.")


def _replace_stem(model: nn.Module) -> None:
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    norm: Any = model.bn1
    width = int(norm.weight.numel())
    conv = nn.Conv2d(
        first.in_channels, width, 3, padding=1, bias=False, device=first.weight.device, dtype=first.weight.dtype
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = conv
    model.maxpool = nn.Identity()


def _undo_strides(model: nn.Module, input_size: tuple[int, int, int], factor: int) -> tuple[list[str], int]:
    """Removes strides from the front until the maps are four times larger and the last one is not too small.

    `factor` is by how much the maps have already grown. All modules that take the map from one size to the next are
    changed together. A change that does not enlarge the maps is reverted (the modules are in a separate branch, or the
    model no longer runs), and the next step is tried. Returns the paths of the changed modules, and the side of the
    last map.
    """
    changed: list[str] = []
    tried: set[str] = set()
    sides, steps = _survey(model, input_size)
    goal = smallest_map(input_size)
    while factor < FACTOR or sides[-1] < goal:
        step = next((step for step in steps if not tried.issuperset(step.paths)), None)
        if step is None:
            break
        tried.update(step.paths)
        wanted = max(math.ceil(FACTOR / factor), math.ceil(goal / sides[-1]) if sides[-1] else 1)
        stride = max(1, step.ratio // wanted)
        former = {path: model.get_submodule(path) for path in step.paths}
        for path, module in former.items():
            model.set_submodule(path, _with_stride(module, stride))
        now, remaining = _survey(model, input_size)
        # The last map may be rounded up to one position and not grow: then the earlier maps show the difference.
        grown = (now[-1], sum(now)) > (sides[-1], sum(sides))
        # Some models do not run at all until their second stride is removed.
        if grown or (now == sides == [0] and factor < FACTOR):
            sides, steps, changed = now, remaining, [*changed, *step.paths]
            factor *= step.ratio // stride
        else:
            for path, module in former.items():
                model.set_submodule(path, module)
    return changed, sides[-1]


@dataclass(frozen=True)
class _Step:
    """The modules that take the map from one size to the next, and by how much it shrinks."""

    paths: tuple[str, ...]
    ratio: int


def _survey(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[list[int], list[_Step]]:
    """The sides of the stages' maps, and the steps at which the map shrinks, in the order of the forward pass; if that
    fails, the steps before the failure."""
    found: dict[tuple[int, int], list[str]] = {}
    hooks = []

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and args[0].ndim == output.ndim == 4:
                before, after = args[0].shape[-1], output.shape[-1]
                if after < before and path not in found.setdefault((before, after), []):
                    found[before, after].append(path)

        return hook

    for path, module in model.named_modules():
        if _can_be_undone(module):
            hooks.append(module.register_forward_hook(watch(path)))
    sides = _sides(model, input_size)
    for registered in hooks:
        registered.remove()
    steps = [_Step(tuple(paths), round(before / after)) for (before, after), paths in found.items() if paths]
    return sides, [step for step in steps if step.ratio > 1]


def _can_be_undone(module: nn.Module) -> bool:
    """Whether it is a convolution with a stride, or a pooling without weights."""
    if isinstance(module, nn.Conv2d):
        return max(module.stride) > 1
    return "Pool2d" in type(module).__name__ and not module.state_dict() and not any(True for _ in module.children())


def _with_stride(module: nn.Module, stride: int) -> nn.Module:
    """The same module with another stride, the same weights and the same names; an identity for a pooling."""
    if not isinstance(module, nn.Conv2d):
        return nn.Identity()
    if module.kernel_size != module.stride:
        changed = copy.copy(module)
        changed.stride = (stride, stride)
        return changed
    # Patches now overlap, and an even kernel needs more padding on one side than on the other.
    from timm.layers import Conv2dSame

    same = Conv2dSame(
        module.in_channels, module.out_channels, module.kernel_size, stride, groups=module.groups, device="meta"
    )
    same.weight, same.bias = module.weight, module.bias
    return cast(nn.Module, same)


@dataclass(frozen=True)
class Patches:
    """Arguments for `create_model` that fit a transformer to a small image, and a note for the user."""

    model_args: dict[str, Any]
    note: str


def smaller_patches(build: Build, model: nn.Module, input_size: tuple[int, int, int]) -> Patches:
    """The `patch_size` that suits this image, for a model that has one and is built by `build(model_args)`.

    A single-resolution trunk gets a grid as near to 8x8 as the image allows; a pyramid gets the patches that bring its
    last map nearest to 4x4. Raises UserError if no patch works, or if that leaves the last map smaller than 4x4.
    """
    takes, patch = parameters_of(model), patch_size(model)
    assert patch is not None, "check patch_size first"
    image = min(input_size[1:])
    best: tuple[tuple[float, float], Patches] | None = None
    reason = f"no patch smaller than {patch} divides {image}"
    for size in range(min(patch, image), 0, -1):
        if image % size:
            continue
        for windows in ({}, {"window_size": SMALLEST_MAP}) if "window_size" in takes else ({},):
            arguments = {"img_size": image, "patch_size": size, **windows}
            try:
                stages = find_stages(build(arguments), input_size).stages
            except UserError as error:
                reason = error.wrong
                continue
            break
        else:
            continue
        first, last = min(stages[0].size), min(stages[-1].size)
        goal = GRID if first == last else SMALLEST_MAP
        if last > 3 * goal:
            reason = f"patches of {size}x{size} would leave {last * last} tokens"
            break
        # As near to the goal as possible; of two equally near ones, that with fewer tokens.
        rank = (abs(math.log2(last / goal)), float(last))
        if best is None or rank < best[0]:
            note = f"Patches of {size}x{size} instead of {patch}x{patch}: the last map is {last}x{last}."
            best = (rank, Patches(arguments, note))
    if best is None:
        multiple = max(1, round(image / patch)) * patch
        raise UserError(
            f"no patch size fits an image of {image} pixels: {reason}",
            f"an image size divisible by a patch of 2 to {patch} pixels",
            f"--image-size {multiple}",
        )
    if best[0][1] < SMALLEST_MAP:
        raise UserError(f"even with smaller patches the last map is only {best[0][1]:g}x{best[0][1]:g}")
    return best[1]


def parameters_of(model: nn.Module) -> frozenset[str]:
    """The names of the arguments of the model's class."""
    return frozenset(inspect.signature(type(model).__init__).parameters)


def patch_size(model: nn.Module) -> int | None:
    """The side of the patches, if `create_model` can change it; None otherwise."""
    if not {"img_size", "patch_size"} <= parameters_of(model):
        return None
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if isinstance(size, (tuple, list)):
        return int(size[0])
    if isinstance(size, int):
        return size
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    return int(first.stride[0])
