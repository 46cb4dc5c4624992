"""What `head = "auto"` stands for: heads that fit their stages and cost little.

C channels, K classes
"""

from __future__ import annotations

from bisect import bisect_right

from sdcli.network.heads import WIDTH, head_cost
from sdcli.network.stages import Stage, StagePlan

EACH = 0.05
"""The most that one head may cost, as a share of the model's MACs."""
TOGETHER = 0.15
"""The most that all heads may cost together."""
WIDTHS = range(8, WIDTH + 1, 8)


def suitable_heads(plan: StagePlan, num_classes: int) -> list[str]:
    """The kind of head for each stage but the last, shallowest first.

    `tokens` where tokens never shrink (ViTs), otherwise `patch` with as many channels as the budget allows; where that
    is too dear, `linear`. Each head costs at most a twentieth of the model's MACs and all together at most 15 %, and
    each exit deployed alone costs less than the next. Only a linear head may exceed this: none is cheaper.
    """
    stages = plan.stages[:-1]
    each = min(EACH, TOGETHER / max(1, len(stages))) * plan.macs
    next_exit, kinds = plan.macs, list[str]()
    for stage in reversed(stages):
        kind = _widest(plan, stage, num_classes, min(each, next_exit - stage.macs - 1))
        next_exit = stage.macs + head_cost(kind, plan, stage, num_classes)[1]
        kinds.append(kind)
    return kinds[::-1]


def _widest(plan: StagePlan, stage: Stage, num_classes: int, most: float) -> str:
    """The head with the most channels that costs at most so many MACs."""

    def cost(kind: str) -> int:
        return head_cost(kind, plan, stage, num_classes)[1]

    shrinks = plan.stages[0].size != plan.stages[-1].size
    if stage.output_fmt == "NLC" and not shrinks:
        return "tokens" if cost("tokens") <= most else "linear"
    fitting = bisect_right(WIDTHS, most, key=lambda width: cost(f"patch/{width}"))
    return f"patch/{WIDTHS[fitting - 1]}" if fitting else "linear"
