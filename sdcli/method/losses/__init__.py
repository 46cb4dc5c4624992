"""Losses: functions of tensors, by the name that a recipe gives them.

A loss takes the student's tensor, the target's where it has one, and the batch; its keyword-only arguments are its
recipe keys. It returns one value per image [B], whose mean is taken by the objective, or a scalar where its source
sums over the batch (its docstring says so). One with weights of its own is an `nn.Module` that is given the widths of
both sides.
"""

from sdcli.registry import Registry

LOSSES = Registry("loss")

from sdcli.method.losses import features, labels, logits, relations  # noqa: E402, F401
