"""The rest of a network after a stage: traced in one forward pass, copied as a branch, or applied to each position of a
map.

B batch, K classes, C channels, D embedding, N positions of the last map, P prefix tokens
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdcli.errors import UserError
from sdcli.network.stages import Stage, StagePlan
from sdcli.network.taps import InputTap, Store

HEAD = "forward_head"
"""The method of timm's models that turns the last map into the logits."""


@dataclass(frozen=True)
class Tail:
    """The modules of a network after a stage."""

    modules: tuple[str, ...]
    """Paths of the modules that the stage's tensor passes through in sequence, up to timm's `forward_head`."""
    head: tuple[str, ...]
    """Paths of the modules that `forward_head` calls."""


def tail_after(backbone: nn.Module, plan: StagePlan, stage: Stage) -> Tail:
    """The modules that `backbone` runs after `stage`, found in one forward pass, which may be on the meta device.

    Raises UserError if that is not a plain sequence of modules and `forward_head`: if something is computed between
    them, a module takes further arguments, or a later one also reads an earlier tensor.
    """
    watch = _Watch(stage)
    training = [(module, module.training) for module in backbone.modules()]
    hooks: list[Any] = []
    head = getattr(backbone, HEAD, None)
    backbone.eval()
    try:
        for path, module in backbone.named_modules():
            hooks.append(module.register_forward_pre_hook(watch.entered(path), with_kwargs=True))
            hooks.append(module.register_forward_hook(watch.left(path)))
        if callable(head):
            setattr(backbone, HEAD, watch.head(head))
        parameter = next(backbone.parameters())
        with torch.no_grad():
            backbone(torch.zeros(1, *plan.input_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        backbone.__dict__.pop(HEAD, None)
        for hook in hooks:
            hook.remove()
        for module, flag in training:
            module.training = flag
    if not watch.reached_head:
        raise UserError(
            f"{plan.model} does more after {stage.module} than call modules in sequence",
            "a model whose last part can be called alone, such as resnet18, convnext_tiny or vit_small_patch16_224",
        )
    return Tail(tuple(watch.modules), tuple(watch.in_head))


class _Watch:
    """Follows a stage's tensor through the module calls of one forward pass."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.modules: list[str] = []
        self.in_head: list[str] = []
        self.reached_head = False
        self._tensor: Any = None
        self._inside: str | None = None
        self._lost = False

    def entered(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.reached_head:
                self.in_head.append(path)
            elif self._tensor is not None and self._inside is None:
                if len(args) == 1 and args[0] is self._tensor and not kwargs:
                    self._inside = path
                else:
                    self._lost = True

        return hook

    def left(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._tensor is None and path == self.stage.module:
                self._tensor = output if self.stage.tensor is None else output[self.stage.tensor]
            elif self._inside == path:
                self.modules.append(path)
                self._tensor, self._inside = output, None

        return hook

    def head(self, head: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            self.reached_head = len(args) == 1 and not kwargs and args[0] is self._tensor and not self._lost
            return head(*args, **kwargs)

        return called


class Branch(nn.Module):
    """ONE's branch (arXiv:1806.04606): a second network's modules after a stage, attached to the first network's stage.

    `network` has the same architecture with its own weights; everything up to the stage is dropped from it.
    """

    def __init__(self, network: nn.Module, plan: StagePlan, stage: Stage) -> None:
        super().__init__()
        if plan.classifier is None:
            raise UserError(f"{plan.model} has no single classifier", "a model with one, because a branch copies it")
        self.tail = tail_after(network, plan, stage)
        for name, parameter in network.named_parameters():
            if name in plan.unused:
                parameter.requires_grad_(False)
        # Read now, because some models look at modules here that are dropped below.
        self._undecayed = {f"rest.{name}" for name in getattr(network, "no_weight_decay", set)()}
        _keep(network, self.tail)
        self.rest = network
        self._store = Store()
        network.get_submodule(plan.classifier).register_forward_pre_hook(InputTap(self._store))

    def no_weight_decay(self) -> set[str]:
        """The parameters that the copied network exempts from weight decay, as in timm's models."""
        return self._undecayed

    def forward(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Turns the stage's tensor, in the model's own layout, into the embedding [B, D] and the logits [B, K]."""
        for path in self.tail.modules:
            tensor = self.rest.get_submodule(path)(tensor)
        self._store.open = True
        logits = getattr(self.rest, HEAD)(tensor)
        self._store.open = False
        return self._store.tensors.pop("embedding").flatten(1), logits


def _keep(network: nn.Module, tail: Tail) -> None:
    """Drops everything from `network` that is not part of `tail`."""
    kept = {*tail.modules, *tail.head}

    def keep(module: nn.Module, at: str) -> None:
        for name, _ in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, None)
        for name, _ in list(module.named_buffers(recurse=False)):
            setattr(module, name, None)
        for name, child in list(module.named_children()):
            path = f"{at}.{name}" if at else name
            if path in kept:
                continue
            if any(other.startswith(f"{path}.") for other in kept):
                keep(child, path)
            else:
                setattr(module, name, nn.Identity())

    keep(network, "")


class DenseClassifier:
    """A network's classifier applied to each position of its last map, as if that were a map of its own: these dense
    predictions vote in Zipf's label smoothing (arXiv:2207.12980)."""

    def __init__(self, backbone: nn.Module, plan: StagePlan) -> None:
        """Raises UserError for a model without a classifier, or whose `forward_head` cannot be called separately."""
        if plan.encoder:
            raise UserError(f"{plan.model} has no classifier of its own", "a model with a classifier")
        self.stage = plan.stages[-1]
        self.tail = tail_after(backbone, plan, self.stage)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def logits(self, backbone: nn.Module, tensor: Tensor) -> Tensor:
        """Logits [B, K, N] without gradients, with norms and dropout in eval mode; `tensor` is the input of
        `forward_head`."""
        num_prefix = self.stage.num_prefix_tokens
        if tensor.ndim == 3:
            places = tensor[:, num_prefix:].flatten(0, 1).unsqueeze(1)
            if num_prefix and getattr(backbone, "global_pool", "") != "token":
                # Placeholders for the class and register tokens, which the pooling drops again.
                places = torch.cat([places.new_zeros(len(places), num_prefix, places.shape[2]), places], dim=1)
        elif self.stage.output_fmt == "NHWC":
            places = tensor.flatten(0, 2)[:, None, None]
        else:
            places = tensor.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None]
        head = [backbone, *(backbone.get_submodule(path) for path in self.tail.head)]
        with torch.no_grad(), _evaluating(head):
            logits: Tensor = getattr(backbone, HEAD)(places)
        return logits.reshape(len(tensor), -1, logits.shape[-1]).mT


@contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Puts these modules, but not their submodules, into eval mode."""
    flags = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
