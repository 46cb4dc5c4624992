"""The terms of a `[losses]` table, checked as far as possible without a network.

B batch
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from sdcli.errors import UserError
from sdcli.method.addresses import Addresses
from sdcli.method.losses import LOSSES
from sdcli.network.multi_exit import PointSpec
from sdcli.recipe.address import FINAL, OTHER_TARGETS, Address
from sdcli.recipe.schema import Loss, Recipe, WeightSchedule, as_list
from sdcli.registry import Entry

SIGNAL = "signal"
"""What a loss reads that is given whole signals."""


@dataclass(frozen=True)
class Term:
    """One comparison at one point: the recipe's loss `name`, computed at `on`."""

    name: str
    on: str
    target: str | None
    """The point or signal to compare with; None for the labels."""
    reads: str
    """`logits`, `embedding`, `features`, or all of a `signal`."""
    weight: WeightSchedule
    compare: Callable[..., Tensor]
    """The loss with its recipe keys filled in; a module if it has weights of its own."""
    sees_batch: bool = False
    """Whether its value depends on which images are in a batch together."""


def check_losses(losses: Mapping[str, Loss]) -> None:
    """Raises UserError for an unknown loss, key, type or range, and for a target that is missing or has no effect."""
    for name, loss in losses.items():
        entry = LOSSES.find(loss.kind, f"losses.{name}.kind")
        _check_form(entry)
        try:
            entry.check(loss.options, f"losses.{name}")
        except UserError as error:
            stray = next((key for key in loss.options if key not in entry.options), "")
            having = [other.name for other in LOSSES if stray in other.options]
            fix = error.fix or (f"kinds that have {stray}: {', '.join(having)}" if having else "")
            raise error.but(fix=fix) from None
        needs_target(loss, f"losses.{name}")


def _check_form(entry: Entry) -> None:
    """Raises UserError for a loss (usually a user's own) that cannot be called as losses are."""
    # Not `dense`, which has no gradient.
    readable = ["features", "embedding", "logits", SIGNAL]
    if entry.reads not in readable:
        raise UserError(
            f"loss '{entry.name}' is registered with reads={entry.reads!r}",
            "one of " + ", ".join(readable),
            f'@LOSSES.register("{entry.name}", reads="logits")',
        )
    takes = [p.name for p in entry.parameters if p.kind is not p.KEYWORD_ONLY]
    if not isinstance(entry.call, type) and takes not in (["student", "batch"], ["student", "teacher", "batch"]):
        raise UserError(
            f"loss '{entry.name}' takes ({', '.join(takes)})",
            "(student, batch) or (student, teacher, batch), with these names; recipe keys follow a *",
            f"def {entry.call.__name__}(student, teacher, batch, *, …)",
        )


def check_mixing(losses: Mapping[str, Loss], mixes: bool) -> None:
    """Raises UserError for a loss that needs one class per image where classes are mixed."""
    for name, loss in losses.items():
        if mixes and LOSSES.find(loss.kind, f"losses.{name}.kind").hard_labels:
            raise UserError(
                f"losses.{name}: kind = '{loss.kind}' needs one class per image, but batch.mixup or "
                "batch.cutmix mixes classes",
                "no mixup or cutmix, or another loss",
                "--set batch.mixup=0 --set batch.cutmix=0",
                key=f"losses.{name}.kind",
            )


def check_networks(recipe: Recipe) -> None:
    """Raises UserError for a point of an unknown network, and for a loss that would teach a network that does not
    learn."""
    networks = recipe.taking_part
    addresses = Addresses(
        {str(Address(network, FINAL)): PointSpec(0, 0) for network in networks},
        {},
        [name for name, learns in networks.items() if not learns],
    )
    named = [(f"signals.{name}.of", signal.of) for name, signal in recipe.signals.items()]
    for name, loss in recipe.losses.items():
        named += [(f"losses.{name}.on", loss.on), (f"losses.{name}.target", loss.target)]
    for key, given in named:
        for name in as_list(given):
            if name in recipe.signals or name in OTHER_TARGETS:
                continue
            if Address.parse(name).network not in networks:
                raise addresses.missing(name, key)
            if key.endswith(".on"):
                addresses.check_learns(name, key)


def needs_target(loss: Loss, table: str) -> bool:
    """Whether the loss compares with another point; raises UserError if its `target` does not fit."""
    entry = LOSSES.find(loss.kind, f"{table}.kind")
    needs = isinstance(entry.call, type) or "teacher" in entry.takes
    if needs and loss.target == "label":
        raise UserError(
            f"{table}: kind = '{loss.kind}' compares with another point, but no target is set",
            "target = 'final', 'next' or an exit",
            f'add target = "final" to [{table}]',
            key=f"{table}.kind",
        )
    if not needs and loss.target != "label":
        raise UserError(
            f"{table}.target = {loss.target!r}: kind = '{loss.kind}' compares only with the labels",
            "no target",
            f"remove target from [{table}], or choose a kind that has one, such as kl",
            key=f"{table}.target",
        )
    return needs
