"""A network that ends at one exit: what is deeper is physically gone.

B batch, K classes
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn

from sdcli.network.routing import averaged, visiting
from sdcli.network.signals import signal_at
from sdcli.network.stages import Stage
from sdcli.network.taps import Reached, Store
from sdcli.network.trace import reaching, record_forward
from sdcli.recipe.address import FINAL


class Truncated(nn.Module):
    """Images [B, 3, H, W] to the logits [B, K] of one exit, in eval mode.

    The backbone keeps timm's names, without the modules and parameters that the exit does not need.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module | None,
        store: Store,
        point: str,
        stage: Stage,
        input_size: tuple[int, int, int],
    ) -> None:
        """Takes over `backbone`, whose taps share `store`, and the head of `point`."""
        super().__init__()
        self.backbone, self.head = backbone, head
        self.point, self.stage = point, stage
        self._store = store
        self.eval()
        _remove_unused(self, input_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, K]"""
        if self.point == FINAL:
            output = averaged(self.backbone(images))
            return output if self.head is None else self.head(output)[1]
        kept: list[Tensor] = []

        def visit(point: str, tensor: Tensor) -> Tensor:
            if point != self.point:
                return tensor
            kept.append(tensor)
            raise Reached

        with suppress(Reached), visiting(self._store, visit):
            self.backbone(images)
        logits = signal_at(self.stage, self.head, kept[0]).logits
        assert logits is not None
        return logits


def _remove_unused(module: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Removes the modules that a forward pass does not call, and the parameters that do not reach its result."""
    parameter = next(module.parameters())
    image = torch.zeros(1, *input_size, dtype=parameter.dtype, device=parameter.device)
    called: set[str] = set()
    hooks = [
        part.register_forward_pre_hook(lambda part, args, path=path: called.add(path))
        for path, part in module.named_modules()
    ]
    try:
        record = record_forward(module, [image])
    finally:
        for hook in hooks:
            hook.remove()
    graph = record.graph
    used = {id(graph.values[node]) for node in reaching(graph.sources, record.outputs)}
    # A module can be used without being called: by its parameters.
    called |= {name.rpartition(".")[0] for name, value in module.named_parameters() if id(value) in used}
    needed = {".".join(path.split(".")[:depth]) for path in called for depth in range(path.count(".") + 2)}
    gone: list[str] = []
    for path, part in list(module.named_modules()):
        if path in needed:
            for name, value in list(part.named_parameters(recurse=False)):
                if id(value) not in used:
                    part.register_parameter(name, None)
        elif not any(path.startswith(f"{above}.") for above in gone):
            gone.append(path)
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, nn.Identity())
