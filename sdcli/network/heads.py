"""Exit heads: small classifiers that read one stage's map.

A head's widths follow from its stage and the plan, so the user never sets them. A head returns the embedding [B, D] and
the logits [B, K]. For all heads but `linear`, the embedding has the final exit's width, as the hint loss needs.

B batch, K classes, C channels, H W map, D embedding, P prefix tokens
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sdcli.errors import UserError
from sdcli.network.stages import Stage, StagePlan
from sdcli.network.trace import count
from sdcli.registry import Entry, Registry

HEADS = Registry("head")

POOLED = "pooled"
"""The head of an encoder's final exit. Not in the registry, because no recipe can choose it."""

WIDTH = 128
"""Channels inside a bottleneck or patch head, if nothing else is said; as in the BYOT authors' SCAN code."""

LONG_PATCH = 8192
"""Numbers of a patch, above which torch's convolution on a CPU is slow (`PatchConv`)."""

_KIND = re.compile(r"([^/]+)(?:/([1-9][0-9]{0,4}))?")


def find_head(kind: str, where: str = "") -> tuple[Entry, dict[str, int]]:
    """The registered head of a kind, and its arguments: `patch/40` is the head `patch` with `width=40`.

    Raises UserError for a head that does not exist, has no width, or is given something else. `where` is the key or
    option that names it.
    """
    match = _KIND.fullmatch(kind)
    name, width = match.groups() if match else (kind, None)
    entry = HEADS.find(name, where)
    if width is None:
        return entry, {}
    if "width" not in entry.options:
        having = [f"{other.name}/{width}" for other in HEADS if "width" in other.options]
        wrong = f"{where}: head '{kind}'" if where else f"head '{kind}'"
        raise UserError(f"{wrong}: {name} has no width", f"{name}, or one of {', '.join(having)}", key=where)
    return entry, {"width": int(width)}


def build_head(kind: str, plan: StagePlan, stage: Stage, num_classes: int) -> nn.Module:
    """A new head for one stage; raises UserError for an unknown kind and for a head that cannot be built."""
    if kind == POOLED:
        return PooledHead(plan.embedding_dim, num_classes)
    entry, options = find_head(kind)
    with _blaming(kind, stage, "cannot be built"):
        head = entry.call(plan, stage, num_classes, **options)
    if not isinstance(head, nn.Module) or not isinstance(getattr(head, "classifier", None), nn.Linear):
        raise UserError(
            f"head '{kind}' has no linear classifier",
            "a module whose classifier is an nn.Linear that reads the embedding",
            "self.classifier = nn.Linear(embedding_dim, num_classes)",
        )
    return head


def check_head(kind: str, head: nn.Module, stage: Stage, num_classes: int) -> None:
    """Runs a head on maps of its stage's size: in training mode on two images, in eval mode on one.

    Meant for the meta device, where that costs nothing. Raises UserError if the head raises, or if it does not return
    an embedding [B, D] and logits [B, K].
    """
    assert isinstance(head.classifier, nn.Linear)
    device = head.classifier.weight.device
    for batch, training in ((2, True), (1, False)):
        head.train(training)
        features = torch.empty(batch, stage.num_chs, *stage.size, device=device)
        prefix = torch.empty(batch, stage.num_prefix_tokens, stage.num_chs, device=device)
        with torch.no_grad(), _blaming(kind, stage, "does not run"):
            answer = head(features, prefix)
        wanted = [[batch, head.classifier.in_features], [batch, num_classes]]
        found = [list(part.shape) for part in tree_leaves(answer) if isinstance(part, Tensor)]
        if not isinstance(answer, tuple) or found != wanted:
            shapes = " and ".join(map(str, found)) or type(answer).__name__
            raise UserError(
                f"head '{kind}' after {stage.module} returns {shapes} for {batch} image{'s' * (batch > 1)}",
                f"a tuple: the embedding that its classifier reads {wanted[0]} and the logits {wanted[1]}",
                "return embedding, self.classifier(embedding)",
            )


@contextmanager
def _blaming(kind: str, stage: Stage, what: str) -> Iterator[None]:
    """Turns any error of a user's own head into a UserError that names head and stage."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # it is the user's own code
        shape = "x".join(map(str, (stage.num_chs, *stage.size)))
        reason = " ".join(str(error).split())
        raise UserError(
            f"head '{kind}' {what} after {stage.module}, whose map is {shape}: {type(error).__name__}: {reason}",
            "a head that fits every stage: HEAD(plan, stage, num_classes), called with (features, prefix)",
        ) from error


def head_cost(kind: str, plan: StagePlan, stage: Stage, num_classes: int) -> tuple[int, int]:
    """A head's parameters, and its MACs for one image, counted on the meta device."""
    with torch.device("meta"):
        head = build_head(kind, plan, stage, num_classes).eval()
        if kind == POOLED:
            return count(head, torch.empty(1, plan.embedding_dim))
        features = torch.empty(1, stage.num_chs, *stage.size)
        prefix = torch.empty(1, stage.num_prefix_tokens, stage.num_chs)
    return count(head, features, prefix)


class PatchConv(nn.Conv2d):
    """A convolution whose stride equals its kernel size, on a CPU computed as one matrix product over all patches where
    that is faster, in training and for patches of more than `LONG_PATCH` numbers, and in half precision.

    In bfloat16 torch's own convolution is wrong on CPUs with AMX, for patches of 4x4 and more with 4 to 24 channels: by
    as much as its answers (torch 2.14, oneDNN's `brg_conv_fwd`).

    With torch's own convolution, a training step of a head on a wide map takes 1.3 times as long there, and the first
    exit of a ResNet-50 1.5 to 1.8 times as long without gradients; shorter patches take 0.8 to 1.0 of the time, since
    they are not copied (benchmarks/heads.py).
    """

    def forward(self, features: Tensor) -> Tensor:
        half = features.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu")
        long = self.weight[0].numel() > LONG_PATCH
        if features.device.type != "cpu" or not (half or long or torch.is_grad_enabled()):
            return super().forward(features)
        side = self.stride[0]
        batch, num_chs, height, width = features.shape
        rows, columns = height // side, width // side
        pixels = features.permute(0, 2, 3, 1)
        if (height, width) != (rows * side, columns * side):
            # Only then: the gradient of a slice is a whole map of zeros first.
            pixels = pixels[:, : rows * side, : columns * side]
        patches = pixels.reshape(batch, rows, side, columns, side, num_chs).transpose(2, 3)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        mixed = F.linear(patches.reshape(batch, rows, columns, -1), weight)
        return mixed.permute(0, 3, 1, 2)


class ConvNormAct(nn.Sequential):
    """Convolution, batch norm, ReLU."""

    def __init__(self, num_in: int, num_out: int, kernel: int, stride: int = 1) -> None:
        assert stride in (1, kernel)
        conv = nn.Conv2d(num_in, num_out, kernel, padding=kernel // 2, bias=False)
        if stride > 1:
            conv = PatchConv(num_in, num_out, kernel, stride, bias=False)
        super().__init__(
            conv,
            nn.BatchNorm2d(num_out),
            nn.ReLU(inplace=True),
        )


class SepConv(nn.Sequential):
    """Two depthwise-separable convolutions, the first with a stride: the block of BYOT's journal code.

    As there, only the second of each pair is normalised and the channels change at the very end.
    """

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(num_in, num_in, 3, stride, 1, groups=num_in, bias=False),
            nn.Conv2d(num_in, num_in, 1, bias=False),
            nn.BatchNorm2d(num_in),
            nn.ReLU(inplace=True),
            nn.Conv2d(num_in, num_in, 3, 1, 1, groups=num_in, bias=False),
            nn.Conv2d(num_in, num_out, 1, bias=False),
            nn.BatchNorm2d(num_out),
            nn.ReLU(inplace=True),
        )


class Attention(nn.Module):
    """A mask in [0.5, 1) on the map, as in BYOT's journal code (Zhang, Bao and Ma 2022, TPAMI 44(8)).

    The sigmoid follows a ReLU, hence the range; this is as in the authors' code.
    """

    def __init__(self, num_chs: int) -> None:
        super().__init__()
        self.mask = nn.Sequential(SepConv(num_chs, num_chs, stride=2), nn.BatchNorm2d(num_chs), nn.ReLU(inplace=True))

    def forward(self, features: Tensor) -> Tensor:
        mask = F.interpolate(self.mask(features), size=features.shape[-2:], mode="bilinear", align_corners=False)
        return features * torch.sigmoid(mask)


class ConvHead(nn.Module):
    """Convolutions, global average pooling, a linear classifier."""

    def __init__(self, body: nn.Module, embedding_dim: int, num_classes: int) -> None:
        super().__init__()
        self.body = body
        self.classifier = nn.Linear(embedding_dim, num_classes)

    def forward(self, features: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        if features.device.type == "cpu":
            # In NCHW order, wide maps with few channels take 1.3 times as long on a CPU (benchmarks/heads.py).
            features = features.contiguous(memory_format=torch.channels_last)
        embedding = self.body(features).mean(dim=(2, 3))
        return embedding, self.classifier(embedding)


def shrinks_by(plan: StagePlan, stage: Stage) -> int:
    """How many times wider and higher a stage's map is than the last one's."""
    return max(1, min(round(height / end) for height, end in zip(stage.size, plan.stages[-1].size, strict=True)))


def _bottleneck(plan: StagePlan, stage: Stage, width: int) -> nn.Module:
    """1x1 to `width` channels, then k x k with stride k to the last stage's resolution, then 1x1 to the final width."""
    stride = shrinks_by(plan, stage)
    return nn.Sequential(
        ConvNormAct(stage.num_chs, width, 1),
        ConvNormAct(width, width, stride, stride),
        ConvNormAct(width, plan.embedding_dim, 1),
    )


def _sepconv(plan: StagePlan, stage: Stage) -> nn.Module:
    """One separable block for each stage after this one, with that stage's channels and resolution."""
    blocks: list[nn.Module] = []
    depth = plan.stages.index(stage)
    here = stage
    for deeper in plan.stages[depth + 1 :]:
        num_in = here.num_chs
        num_out = plan.embedding_dim if deeper is plan.stages[-1] else deeper.num_chs
        stride = max(1, round(here.size[0] / deeper.size[0]))
        # A stage that shrinks the map by more than two needs several halvings.
        halvings = max(1, round(math.log2(stride)))
        for step in range(halvings):
            last = step == halvings - 1
            blocks.append(SepConv(num_in, num_out if last else num_in, 2 if stride > 1 else 1))
        here = deeper
    return nn.Sequential(*blocks)


@HEADS.register("patch")
def patch(plan: StagePlan, stage: Stage, num_classes: int, *, width: int = WIDTH) -> nn.Module:
    """Patches of the map mixed to `width` channels at the last stage's resolution, then 1x1 to the final width.

    A bottleneck whose first two convolutions are one, so that no other operation sees the large map: at equal MACs, it
    is faster and at early exits more accurate than a bottleneck with fewer channels (docs/teaching.md).
    """
    stride = shrinks_by(plan, stage)
    body = nn.Sequential(ConvNormAct(stage.num_chs, width, stride, stride), ConvNormAct(width, plan.embedding_dim, 1))
    return ConvHead(body, plan.embedding_dim, num_classes)


@HEADS.register("bottleneck")
def bottleneck(plan: StagePlan, stage: Stage, num_classes: int, *, width: int = WIDTH) -> nn.Module:
    """BYOT's bottleneck (arXiv:1905.08094), in the shape of the authors' SCAN code."""
    return ConvHead(_bottleneck(plan, stage, width), plan.embedding_dim, num_classes)


@HEADS.register("bottleneck+attention")
def bottleneck_attention(plan: StagePlan, stage: Stage, num_classes: int, *, width: int = WIDTH) -> nn.Module:
    """The head of the BYOT authors' SCAN code (NeurIPS 2019): attention, then the bottleneck."""
    body = nn.Sequential(Attention(stage.num_chs), _bottleneck(plan, stage, width))
    return ConvHead(body, plan.embedding_dim, num_classes)


@HEADS.register("sepconv")
def sepconv(plan: StagePlan, stage: Stage, num_classes: int) -> nn.Module:
    """The separable convolutions of BYOT's journal version, without its attention."""
    return ConvHead(_sepconv(plan, stage), plan.embedding_dim, num_classes)


@HEADS.register("sepconv+attention")
def sepconv_attention(plan: StagePlan, stage: Stage, num_classes: int) -> nn.Module:
    """The head of BYOT's journal version (TPAMI 2022): attention, then separable convolutions."""
    return ConvHead(nn.Sequential(Attention(stage.num_chs), _sepconv(plan, stage)), plan.embedding_dim, num_classes)


@HEADS.register("linear")
class LinearHead(nn.Module):
    """Global average pooling, batch norm, a linear classifier: the cheapest exit.

    Its embedding is the pooled and normalised map [B, C], with the stage's own width.
    """

    def __init__(self, plan: StagePlan, stage: Stage, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(stage.num_chs)
        self.classifier = nn.Linear(stage.num_chs, num_classes)

    def forward(self, features: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.norm(features.mean(dim=(2, 3)))
        return embedding, self.classifier(embedding)


@HEADS.register("tokens")
class TokenHead(nn.Module):
    """Layer norm, the class token (if any) concatenated with the mean of the tokens, two linear layers, a classifier.

    In the middle of a ViT the class token has gathered little information so far, hence the mean and the extra layers,
    which also give the embedding the final exit's width. Other prefix tokens (registers) are not read.
    """

    def __init__(self, plan: StagePlan, stage: Stage, num_classes: int) -> None:
        super().__init__()
        self.has_class_token = stage.num_prefix_tokens > 0
        self.norm = nn.LayerNorm(stage.num_chs)
        self.project = nn.Sequential(
            nn.Linear(stage.num_chs * (2 if self.has_class_token else 1), plan.embedding_dim),
            nn.GELU(),
            nn.Linear(plan.embedding_dim, plan.embedding_dim),
        )
        self.classifier = nn.Linear(plan.embedding_dim, num_classes)

    def forward(self, features: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.norm(features.flatten(2).transpose(1, 2)).mean(dim=1)
        if self.has_class_token:
            pooled = torch.cat([self.norm(prefix[:, 0]), pooled], dim=1)
        embedding = self.project(pooled)
        return embedding, self.classifier(embedding)


class PooledHead(nn.Module):
    """The classifier for an encoder, which has none of its own: the mean of its output, a linear layer.

    Reads a map [B, D, H, W], tokens [B, N, D] or their mean [B, D].
    """

    def __init__(self, embedding_dim: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(embedding_dim, num_classes)

    def forward(self, output: Tensor) -> tuple[Tensor, Tensor]:
        embedding = output.mean(dim=(2, 3)) if output.ndim == 4 else output.mean(dim=1) if output.ndim == 3 else output
        return embedding, self.classifier(embedding)
