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
from sdcli.network.heads import ConvHead, ConvNormAct, shrinks_by
from sdcli.network.stages import Stage, StagePlan
from sdcli.network.trace import count

Body = Callable[[StagePlan, Stage, int], nn.Module]


def narrow(plan: StagePlan, stage: Stage, width: int) -> nn.Module:
    stride = shrinks_by(plan, stage)
    return nn.Sequential(
        ConvNormAct(stage.num_chs, width, 1),
        ConvNormAct(width, width, stride, stride),
        ConvNormAct(width, plan.embedding_dim, 1),
    )


def depthwise(plan: StagePlan, stage: Stage, width: int) -> nn.Module:
    stride = shrinks_by(plan, stage)
    return nn.Sequential(
        ConvNormAct(stage.num_chs, width, 1),
        nn.Conv2d(width, width, stride, stride, groups=width, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        ConvNormAct(width, plan.embedding_dim, 1),
    )


def as_wide_as_fits(body: Body) -> Callable[[StagePlan, Stage, int], nn.Module]:
    def head(plan: StagePlan, stage: Stage, num_classes: int) -> nn.Module:
        def built(width: int) -> ConvHead:
            return ConvHead(body(plan, stage, width), plan.embedding_dim, num_classes)

        def cost(width: int) -> int:
            with torch.device("meta"):
                images = torch.empty(1, stage.num_chs, *stage.size), torch.empty(1, 0, stage.num_chs)
                return count(built(width).eval(), *images)[1]

        return built(max([w for w in WIDTHS if cost(w) <= EACH * plan.macs], default=WIDTHS[0]))

    return head


for body in (narrow, depthwise):
    HEADS.register(body.__name__)(as_wide_as_fits(body))
