"""How maps lie in memory: channel by channel (contiguous) or place by place (channels-last)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

import torch

from sdcli.network.multi_exit import MultiExit

MemoryFormat: TypeAlias = Literal["auto", "contiguous", "channels-last"]


LARGEST_KERNEL = 20_000_000
"""Weights. VGG's first fully connected layer is a convolution of 102 M weights, which takes 1.3 times as long in
channels-last."""


def suitable_format(networks: Iterable[MultiExit], device: torch.device) -> MemoryFormat:
    """What `auto` stands for: "channels-last" on a CPU if all networks are convolutional, contiguous otherwise.

    A rule, not a trial: it is the same on every machine. On a CPU it follows `benchmarks/memory_format.py`; other
    devices have not been measured.
    """
    fits = device.type == "cpu" and all(map(_is_convolutional, networks))
    return "channels-last" if fits else "contiguous"


def _is_convolutional(network: MultiExit) -> bool:
    """Whether all stages return maps, and no convolution is a fully connected layer in disguise."""
    kernels = [parameter.numel() for parameter in network.parameters() if parameter.ndim == 4]
    maps = all(stage.output_fmt == "NCHW" for stage in network.plan.stages)
    return maps and max(kernels, default=0) <= LARGEST_KERNEL
