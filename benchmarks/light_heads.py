"""Heads that were compared with `patch` before it became the default: each as wide as 5 % of the model's MACs allow.

    sdcli train resnet18 --dataset ../shared/data/cifar100 --image-size 16 --epochs 8 \
        --set "networks.student.model_args.channels=[16,32,64,128]" --import benchmarks/light_heads.py --head narrow

`narrow` is the bottleneck with fewer channels; `depthwise` mixes channels first, at the map's own resolution, and then
shrinks the map by depthwise patches. docs/teaching.md has what they reached.
"""

from collections.abc import Callable

import torch
from torch import nn

from sdcli import HEADS
from sdcli.network.head_choice import EACH, WIDTHS
from sdcli.network.heads import ConvHead, ConvNormAct, bottleneck, shrinks_by
from sdcli.network.stages import Stage, StagePlan
from sdcli.network.trace import count

Head = Callable[[StagePlan, Stage, int], nn.Module]


def narrow(plan: StagePlan, stage: Stage, num_classes: int, *, width: int) -> nn.Module:
    return bottleneck(plan, stage, num_classes, width=width)


def depthwise(plan: StagePlan, stage: Stage, num_classes: int, *, width: int) -> nn.Module:
    stride = shrinks_by(plan, stage)
    body = nn.Sequential(
        ConvNormAct(stage.num_chs, width, 1),
        nn.Conv2d(width, width, stride, stride, groups=width, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        ConvNormAct(width, plan.embedding_dim, 1),
    )
    return ConvHead(body, plan.embedding_dim, num_classes)


def as_wide_as_fits(head: Callable[..., nn.Module]) -> Head:
    def widest(plan: StagePlan, stage: Stage, num_classes: int) -> nn.Module:
        def cost(width: int) -> int:
            with torch.device("meta"):
                maps = torch.empty(1, stage.num_chs, *stage.size), torch.empty(1, 0, stage.num_chs)
                return count(head(plan, stage, num_classes, width=width).eval(), *maps)[1]

        width = max([width for width in WIDTHS if cost(width) <= EACH * plan.macs], default=WIDTHS[0])
        return head(plan, stage, num_classes, width=width)

    return widest


for head in (narrow, depthwise):
    HEADS.register(head.__name__)(as_wide_as_fits(head))
