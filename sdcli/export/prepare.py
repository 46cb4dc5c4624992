"""A network made ready for export: in eval mode, without gradients, its branches fused where timm can."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from sdcli.export.compare import logits_of, problem
from sdcli.network.multi_exit import MultiExit

FUSES = ("fuse", "reparameterize", "switch_to_deploy")
"""What timm's blocks call the method that makes one convolution of several branches."""


def prepare(network: MultiExit) -> tuple[MultiExit, list[str]]:
    """A copy that can be traced, and notes about it.

    Blocks of parallel branches (RepVGG, MobileOne, FastViT) become single convolutions: smaller and faster, and the
    same up to rounding, which is checked here; where it does not hold they stay as they were trained.
    """
    plain = copy.deepcopy(network).eval().requires_grad_(False)
    if not any(hasattr(module, name) for module in network.modules() for name in FUSES):
        return plain, []
    fused = copy.deepcopy(plain)
    images = torch.randn(3, *network.plan.input_size, generator=torch.Generator().manual_seed(0))
    reason = _fuse(fused, images, logits_of(plain, images))
    if reason:
        return plain, [f"blocks are not fused: {reason}"]
    before, after = (sum(p.numel() for p in one.parameters()) for one in (plain, fused))
    return fused.requires_grad_(False), [f"blocks fused by timm: {before:,} parameters became {after:,}"]


def _fuse(network: MultiExit, images: Tensor, wanted: dict[str, Tensor]) -> str:
    """Fuses in place; returns why the result cannot be used, or ""."""
    from timm.models import reparameterize_model

    try:
        reparameterize_model(network.backbone, inplace=True)
        for head in network.heads.values():
            reparameterize_model(head, inplace=True)
        found = logits_of(network, images)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    for point, logits in wanted.items():
        if reason := problem(logits, found[point]):
            return f"{point} would differ ({reason})"
    return ""


def without_fused_attention(network: MultiExit) -> MultiExit:
    """A copy whose attention is written out as matrix products, for converters that lack torch's fused operator."""
    own = copy.deepcopy(network)
    for module in own.modules():
        if getattr(module, "fused_attn", False):
            setattr(module, "fused_attn", False)  # noqa: B010 - an attribute of timm's modules
    return own
