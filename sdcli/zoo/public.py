"""The names that public repositories give to the tensors of ResNets for CIFAR, as those of the zoo.

akamaster/pytorch_resnet_cifar10: `module.conv1`, `module.layer1.0.conv1`, `module.linear`; its shortcuts have no
parameters. chenyaofo/pytorch-cifar-models: `conv1`, `layer1.0.conv1`, `layer2.0.downsample.0`, `fc`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

_BLOCK = r"layer([123])\.(\d+)\."
_RULES = {
    r"(conv1|bn1)\.(\w+)": r"stem.\1.\2",
    _BLOCK + r"(conv[12]|bn[12])\.(\w+)": r"stages.\1.\2.\3.\4",
    _BLOCK + r"(?:downsample|shortcut)\.([01])\.(\w+)": r"stages.\1.\2.downsample.\3.\4",
    r"(?:linear|fc)\.(weight|bias)": r"head.fc.\1",
}


def renamed(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors, or what stands for them, under the zoo's names; empty unless each of them has a name of one of
    these repositories."""
    found = {}
    for name, tensor in tensors.items():
        new = _renamed(name.removeprefix("module."))
        if not new:
            return {}
        found[new] = tensor
    return found


def _renamed(name: str) -> str:
    for pattern, replacement in _RULES.items():
        if match := re.fullmatch(pattern, name):
            new = match.expand(replacement)
            # Their stages are numbered from 1.
            return re.sub(r"^stages\.(\d)", lambda stage: f"stages.{int(stage[1]) - 1}", new)
    return ""
