"""How closely a network's exits follow another network's answers to the same images.

B images, N images of a split, K classes
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sdcli.data.batch import Batch
from sdcli.errors import UserError
from sdcli.method.signals import ensemble
from sdcli.network.blueprint import ENSEMBLE
from sdcli.network.multi_exit import MultiExit


@dataclass(frozen=True)
class Fidelity:
    """How closely one point follows the other network."""

    point: str
    agreement: float
    """The share of images, in percent, with the other network's class."""
    kl: float
    """Mean KL(other network || this point), in nats."""


@dataclass(frozen=True)
class Against:
    """The fidelity of every point to another network's final exit (Stanton et al. 2021, arXiv:2106.05945)."""

    checkpoint: str
    """As the user named it."""
    model: str
    top1: float
    """Of the other network's final exit on these images, in percent."""
    points: tuple[Fidelity, ...]


class Follow:
    """Compares the logits of every batch with what another network answers to the same images.

    `batches` are the same images in the same order, prepared for the other network, which is run in eval mode.
    """

    def __init__(self, other: MultiExit, batches: Iterable[Batch], device: torch.device) -> None:
        self.other, self.batches, self.device = other.to(device).eval(), iter(batches), device
        self.same: dict[str, list[Tensor]] = {}
        self.kl: dict[str, list[Tensor]] = {}
        self.right: list[Tensor] = []

    def __call__(self, batch: Batch, logits: Mapping[str, Tensor]) -> None:
        own = next(self.batches).to(self.device)
        assert torch.equal(own.index, batch.index), "the same images"
        theirs = torch.log_softmax(self.other.plain(own.images).float(), dim=1)
        self.right.append(theirs.argmax(dim=1) == own.labels)
        together = {ENSEMBLE: ensemble(list(logits.values()))} if len(logits) > 1 else {}
        for point, ours in {**logits, **together}.items():
            self.same.setdefault(point, []).append(ours.argmax(dim=1) == theirs.argmax(dim=1))
            self.kl.setdefault(point, []).append(divergence(theirs, torch.log_softmax(ours, dim=1)))

    def against(self, checkpoint: str) -> Against:
        """What was seen."""
        rows = (
            Fidelity(point, _percent(same), float(torch.cat(self.kl[point]).double().mean()))
            for point, same in self.same.items()
        )
        return Against(checkpoint, self.other.plan.model, _percent(self.right), tuple(rows))


def divergence(theirs: Tensor, ours: Tensor) -> Tensor:
    """KL(theirs || ours) of log-probabilities [B, K] per image [B], in nats."""
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)


def _percent(parts: list[Tensor]) -> float:
    return 100 * float(torch.cat(parts).double().mean())


def check_same_classes(ours: tuple[str, ...], theirs: tuple[str, ...], path: object, against: object) -> None:
    """Raises UserError unless both networks have the same classes in the same order."""
    if ours == theirs:
        return
    if len(ours) != len(theirs):
        what = f"{len(theirs)} classes, but '{path}' has {len(ours)}"
    else:
        number = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        what = f"other classes than '{path}': class {number} is '{theirs[number]}' there and '{ours[number]}' here"
    raise UserError(
        f"--against: '{against}' has {what}",
        "a checkpoint with the same classes in the same order",
        "train both on the same data set",
    )
