"""Losses between two features.

B images, D embedding
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sdcli.errors import UserError
from sdcli.losses import LOSSES
from sdcli.signals import Batch


@LOSSES.register("hint", reads="embedding")
class Hint(nn.Module):
    """L2 distance of the embeddings: BYOT's hint (Zhang et al. 2019, arXiv:1905.08094; after FitNets, arXiv:1412.6550).

    `norm` "squared" sums the squares, as the authors' SCAN code does; "l2" takes the root of that sum, as their journal
    code does. Either way the sum runs over the whole batch, so the term grows with the batch size: a scalar. `adapt`
    "linear" first sends the student's embedding through a linear layer that is trained along and thrown away.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        *,
        norm: Literal["squared", "l2"] = "squared",
        adapt: Literal["none", "linear"] = "none",
    ) -> None:
        super().__init__()
        if adapt == "none" and student_width != teacher_width:
            raise UserError(
                f"a hint compares embeddings of {student_width} and {teacher_width} values",
                "two of the same width",
                'adapt = "linear", or a head whose embedding has the target\'s width, such as head = "bottleneck"',
            )
        self.norm = norm
        self.adapt = nn.Linear(student_width, teacher_width) if adapt == "linear" else nn.Identity()

    def forward(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        difference: Tensor = self.adapt(student) - teacher
        # vector_norm has a zero, not a nan, as its gradient where both are equal.
        return difference.square().sum() if self.norm == "squared" else torch.linalg.vector_norm(difference)
