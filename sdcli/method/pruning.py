"""Pruning: which weights of a network are 0 and stay so.

O outputs of a layer, K classes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sdcli.data.batch import Batch
from sdcli.network.blueprint import plan_network
from sdcli.network.multi_exit import MultiExit
from sdcli.network.stages import Stage
from sdcli.recipe.address import FINAL
from sdcli.recipe.schema import Network, Prune

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Masks(nn.Module):
    """Which weights of a network's backbone are kept: a mask for each layer, in the run's state."""

    def __init__(self, network: MultiExit) -> None:
        super().__init__()
        weights = weights_of(network)
        self.names = list(weights)
        for name, weight in weights.items():
            self.register_buffer(name.replace(".", "/"), torch.ones_like(weight, dtype=torch.bool))

    def of(self, name: str) -> Tensor:
        """The mask of a layer, in its weight's shape."""
        mask = getattr(self, name.replace(".", "/"))
        assert isinstance(mask, Tensor)
        return mask

    @torch.no_grad()
    def apply_to(self, network: MultiExit) -> None:
        """Sets the weights that are pruned to 0."""
        for name, weight in weights_of(network).items():
            weight.mul_(self.of(name))

    @torch.no_grad()
    def prune(self, network: MultiExit, table: Prune, scores: Mapping[str, Tensor] | None = None) -> None:
        """Prunes this share of what is left, over all layers together: the smallest weights, or by `scores` those with
        the smallest of them; with `by = "random"` any."""
        weights = weights_of(network, table.by)
        left = torch.cat([self.of(name).reshape(-1) for name in weights])
        values = torch.cat([(scores[name] if scores else weight).reshape(-1) for name, weight in weights.items()])[left]
        method = torch_prune.RandomUnstructured if table.by == "random" else torch_prune.L1Unstructured
        chosen = method(amount=int(table.amount * len(values))).compute_mask(  # type: ignore[no-untyped-call]
            values, torch.ones_like(values)
        )
        left[left.clone()] = chosen.bool()
        for (name, weight), own in zip(
            weights.items(), torch.split(left, [w.numel() for w in weights.values()]), strict=True
        ):
            self.of(name).copy_(own.reshape(weight.shape))
        self.apply_to(network)

    @property
    def density(self) -> dict[str, float]:
        """The share of weights that is left, by layer."""
        return {name: float(mask.float().mean()) for name, mask in self._by_name()}

    @property
    def kept(self) -> float:
        """The share of weights that is left in all layers together."""
        masks = [mask for _, mask in self._by_name()]
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def _by_name(self) -> list[tuple[str, Tensor]]:
        return [(name, self.of(name)) for name in self.names]


def weights_of(network: MultiExit, by: str = "") -> dict[str, Tensor]:
    """The weights of the backbone's convolutions and linear layers that are in use, by timm's names of the layers; for
    PrUE only those of convolutions, where there are any."""
    unused = set(network.plan.unused)
    layers = {
        name: module
        for name, module in network.backbone.named_modules()
        if isinstance(module, LAYERS) and f"{name}.weight" not in unused
    }
    convolutions = {name: module for name, module in layers.items() if isinstance(module, nn.Conv2d)}
    return {name: module.weight for name, module in (convolutions if by == "prue" and convolutions else layers).items()}


def by_stage(network: MultiExit, stages: Sequence[Stage]) -> list[list[str]]:
    """The layers of each stage, the last with those after it."""
    names, found = list(weights_of(network)), []
    order = [name for name, _ in network.backbone.named_modules()]
    done: set[str] = set()
    for stage in stages:
        inside = [name for name in order if name == stage.module or name.startswith(f"{stage.module}.")]
        end = max((order.index(name) for name in inside), default=-1)
        found.append([name for name in names if order.index(name) <= end and name not in done])
        done |= set(found[-1])
    found[-1] += [name for name in names if name not in done]
    return found


def left_in(network: MultiExit, masks: Masks) -> str:
    """How many weights are left, in words: in all, in each stage and, where a dense network can have as many in each
    stage, how wide that is."""
    # All stages, also of a network without exits.
    stages = plan_network(Network(), network.blueprint.architecture).stages
    own = [torch.cat([masks.of(name).reshape(-1) for name in names]) for names in by_stage(network, stages)]
    shares = ", ".join(f"{float(mask.float().mean()):.0%}" for mask in own)
    text = f"{masks.kept:.1%} of its weights are left, by stage {shares}"
    found = widths_for(network, masks)
    if found is None:
        return text
    argument, widths = found
    return f"{text}; a dense network with as many: model_args.{argument}=[{','.join(map(str, widths))}]"


def widths_for(network: MultiExit, masks: Masks) -> tuple[str, list[int]] | None:
    """The argument of the model, and its value, by which a dense network of the same kind has about as many weights,
    stage by stage from front to back (Park et al. 2022, arXiv:2109.14960); None for models without such an argument:
    others than ResNets, timm's and the zoo's.

    A stage with scale r of its channels, after one with scale r', has a r^2 + b r r' weights: b are those that read
    the stage before.
    """
    from timm.models.resnet import ResNet

    of_timm = isinstance(network.backbone, ResNet)
    if of_timm:
        modules = [f"layer{number}" for number in range(1, 5)]
    elif network.plan.model.startswith("cifar_resnet"):
        modules = [f"stages.{number}" for number in range(3)]
    else:
        return None
    before, scale, widths = 0, 1.0, []
    for module in modules:
        own = [name for name in masks.names if name.startswith(f"{module}.")]
        if not own:
            return None
        num_chs = max(masks.of(name).shape[0] for name in own)
        reading = [n for n in own if before != num_chs and masks.of(n).shape[1] == before]
        b = sum(masks.of(name).numel() for name in reading)
        a = sum(masks.of(name).numel() for name in own) - b
        kept = sum(int(masks.of(name).sum()) for name in own)
        if not a:
            return None
        scale = (math.sqrt((b * scale) ** 2 + 4 * a * kept) - b * scale) / (2 * a)
        widths.append(max(1, round(num_chs * scale / _expansion(network.backbone))))
        before = num_chs
    # The zoo's begin with the width of the stem, which is that of the first stage.
    return ("channels", widths) if of_timm else ("widths", [widths[0], *widths])


def _expansion(backbone: nn.Module) -> int:
    """How many times as many channels a stage has as its argument says: 4 with bottlenecks."""
    from timm.models.resnet import Bottleneck

    return Bottleneck.expansion if any(isinstance(module, Bottleneck) for module in backbone.modules()) else 1


def uncertainty_scores(
    network: MultiExit, batches: Iterable[Batch], whole: Callable[[Tensor], Tensor] = lambda own: own
) -> dict[str, Tensor]:
    """How much each weight matters to how far predictions are from those of their class: PrUE's saliency (Wang et al.
    2022, ECML-PKDD).

        |w du/dw|,  u = sum over images of |mean of p_y over the images of class y - p_y|

    p_y is the probability of an image's label; the means are constants. Without the weights that score lowest,
    predictions are less certain. Convolutions are scored (of a network without any, all layers), in eval mode; the
    batches are gone through twice. `whole` sums a tensor over all processes.
    """
    weights = weights_of(network, "prue")
    was_training, needed = network.training, {name: weight.requires_grad for name, weight in weights.items()}
    network.eval()
    try:
        sums = torch.zeros(2, len(network.classes), device=next(iter(weights.values())).device)
        with torch.no_grad():
            for batch in batches:
                said = _at_label(network, batch).to(sums)
                sums.index_add_(1, batch.labels, torch.stack([said, torch.ones_like(said)]))
        total, count = whole(sums)
        means = total / count.clamp_min(1)
        scores = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            distance = (means[batch.labels] - _at_label(network, batch)).abs().sum()
            gradients = torch.autograd.grad(distance, list(weights.values()))
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                scores[name] += weight.detach() * gradient
        return {name: whole(score).abs() for name, score in scores.items()}
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(needed[name])
        network.train(was_training)


def _at_label(network: MultiExit, batch: Batch) -> Tensor:
    signal = network(batch.images, {FINAL: True})[FINAL]
    assert signal.logits is not None
    return F.softmax(signal.logits.float(), dim=1).gather(1, batch.labels[:, None]).squeeze(1)
