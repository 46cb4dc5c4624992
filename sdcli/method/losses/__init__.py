"""Losses: functions of tensors, registered under the names that recipes use.

A loss takes the student's tensor, the target's tensor if it has a target, and the batch; its keyword-only arguments are
its recipe keys. It returns one value per image [B], which the objective averages, or a scalar where its source sums
over the batch (its docstring notes this). A loss with weights of its own is an `nn.Module` whose constructor gets the
widths of both sides.
"""

from sdcli.registry import Registry

LOSSES = Registry("loss")

from sdcli.method.losses import contrast, features, labels, logits, relations  # noqa: E402, F401
