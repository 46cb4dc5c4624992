"""The `[losses]` tables of a recipe as terms, and their sum: one number and its named parts.

B batch, C channels, D embedding
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn

from sdcli.errors import UserError, did_you_mean
from sdcli.exits import FINAL, Width
from sdcli.losses import LOSSES
from sdcli.recipe import STUDENT, Loss
from sdcli.registry import Entry
from sdcli.signals import Batch, Signal


def address(network: str, point: str) -> str:
    """How recipes and terms call a network's point: the student's by its own name, others' as `peer.exit1`."""
    return point if network == STUDENT else f"{network}.{point}"


def network_of(place: str) -> str:
    """Whose point an address means."""
    return place.rpartition(".")[0] or STUDENT


@dataclass(frozen=True)
class Term:
    """One comparison at one point: what `name` of the recipe asks of `on`."""

    name: str
    on: str
    target: str | None
    """The point that is compared with, or None where the labels are."""
    reads: str
    """`logits`, `embedding` or `features`."""
    weight: float
    compare: Callable[..., Tensor]
    """The loss with its recipe keys filled in; a module where it has weights of its own."""
    sees_batch: bool = False
    """Whether its value couples the images of a batch."""


def check_losses(losses: Mapping[str, Loss]) -> None:
    """Raises UserError for an unknown loss, key, type or range, and a target that is missing or has no effect: all that
    shows without a network."""
    for name, loss in losses.items():
        entry = LOSSES.find(loss.kind, f"losses.{name}.kind")
        _check_form(entry)
        try:
            entry.check(loss.options, f"losses.{name}")
        except UserError as error:
            stray = next((key for key in loss.options if key not in entry.options), "")
            having = [other.name for other in LOSSES if stray in other.options]
            if having and not error.fix:
                error.fix = f"kinds that have {stray}: {', '.join(having)}"
            raise
        _needs_target(loss, f"losses.{name}")


def _check_form(entry: Entry) -> None:
    """Raises UserError for a loss, of a user's own mostly, that cannot be called as losses are."""
    readable = [field.name for field in fields(Signal)]
    if entry.reads not in readable:
        raise UserError(
            f"loss '{entry.name}' reads {entry.reads!r}",
            ", ".join(readable),
            f'@LOSSES.register("{entry.name}", reads="logits")',
        )
    takes = [p.name for p in entry.parameters if p.kind is not p.KEYWORD_ONLY]
    if not isinstance(entry.call, type) and takes not in (["student", "batch"], ["student", "teacher", "batch"]):
        raise UserError(
            f"loss '{entry.name}' takes ({', '.join(takes)})",
            "(student, batch) or (student, teacher, batch), by these names; recipe keys stand behind a *",
            f"def {entry.call.__name__}(student, teacher, batch, *, …)",
        )


def check_mixing(losses: Mapping[str, Loss], mixes: bool) -> None:
    """Raises UserError for a loss that needs one class per image where they are mixed."""
    for name, loss in losses.items():
        if mixes and LOSSES.find(loss.kind, f"losses.{name}.kind").hard_labels:
            raise UserError(
                f"losses.{name}: kind = '{loss.kind}' needs one class per image, and batch.mixup and batch.cutmix "
                "mix them",
                "a recipe that mixes nothing, or another loss",
                "--set batch.mixup=0 --set batch.cutmix=0",
            )


def check_networks(losses: Mapping[str, Loss], networks: Mapping[str, bool]) -> None:
    """Raises UserError for a point of a network that there is not, and one that would teach a network that does not
    learn. `networks` tells of each whether it does."""
    points = [address(network, FINAL) for network in networks]
    for name, loss in losses.items():
        for point in [loss.on] if isinstance(loss.on, str) else loss.on:
            if network_of(point) not in networks:
                raise _no_such_point(point, points, f"losses.{name}.on")
            _check_learns(point, [other for other in networks if not networks[other]], f"losses.{name}")
        if network_of(loss.target) not in networks:
            raise _no_such_point(loss.target, points, f"losses.{name}.target")


def _check_learns(point: str, frozen: Collection[str], where: str) -> None:
    if network_of(point) in frozen:
        raise UserError(
            f"{where}.on = '{point}': networks.{network_of(point)} does not learn",
            "a point of a network that learns",
            f"--set networks.{network_of(point)}.learns=true",
        )


def _needs_target(loss: Loss, where: str) -> bool:
    """Whether the loss compares with another point; raises UserError where its table says otherwise."""
    entry = LOSSES.find(loss.kind, f"{where}.kind")
    needs = isinstance(entry.call, type) or "teacher" in entry.takes
    if needs and loss.target == "label":
        raise UserError(
            f"{where}: kind = '{loss.kind}' compares with another point, and no target is named",
            "target = 'final', 'next' or an exit",
            f'add target = "final" to [{where}]',
        )
    if not needs and loss.target != "label":
        raise UserError(
            f"{where}.target = '{loss.target}': kind = '{loss.kind}' compares with the labels alone",
            "no target",
            f"take target out of [{where}], or choose a kind that has one, such as kl",
        )
    return needs


class Objective(nn.Module):
    """All terms of a recipe. Its parameters are those of the losses that have weights of their own (`trained`)."""

    def __init__(
        self,
        losses: Mapping[str, Loss],
        widths: Mapping[str, Width],
        frozen: Collection[str] = (),
        mixes: bool = False,
    ) -> None:
        """Builds the terms for networks with the points of `widths`, by address, each network's shallowest first.

        `frozen` names the networks that do not learn; `mixes` says whether labels are shares of several classes. Raises
        UserError for an unknown loss or key, a point that is not there or does not learn, weights that do not match the
        points, exits that no term teaches, and a loss that needs one class per image where they are mixed.
        """
        super().__init__()
        self.terms: list[Term] = []
        self.trained = nn.ModuleList()
        check_mixing(losses, mixes)
        for name, loss in losses.items():
            self._add(name, loss, widths, frozen)
        self._check_all_taught(widths, frozen)

    def _add(self, name: str, loss: Loss, widths: Mapping[str, Width], frozen: Collection[str]) -> None:
        where = f"losses.{name}"
        entry = LOSSES.find(loss.kind, f"{where}.kind")
        options = entry.check(loss.options, where)
        is_module = isinstance(entry.call, type)
        needs_target = _needs_target(loss, where)
        points = _points(loss.on, list(widths), where)
        for point in points:
            _check_learns(point, frozen, where)
        weights = loss.weight if isinstance(loss.weight, list) else [loss.weight] * len(points)
        if len(weights) != len(points):
            raise UserError(
                f"{where}.weight has {len(weights)} values",
                f"one number, or one for each of {', '.join(points) or 'no points'}",
            )
        for point, weight in zip(points, weights, strict=True):
            target = _target(loss.target, point, list(widths), where) if needs_target else None
            if weight == 0:
                continue
            compare: Callable[..., Tensor] = partial(entry.call, **options)
            if is_module and target is not None:
                side = "embedding_dim" if entry.reads == "embedding" else "num_chs"
                try:
                    compare = entry.call(getattr(widths[point], side), getattr(widths[target], side), **options)
                except UserError as error:
                    error.wrong = f"{where} at {point}: {error.wrong}"
                    raise
                assert isinstance(compare, nn.Module)
                self.trained.append(compare)
            sees_batch = bool(getattr(compare, "sees_batch", entry.sees_batch))
            self.terms.append(Term(name, point, target, entry.reads, weight, compare, sees_batch))

    def _check_all_taught(self, widths: Mapping[str, Width], frozen: Collection[str]) -> None:
        """An exit whose classifier no term reads would be trained by nothing and still be scored."""
        taught = {term.on for term in self.terms if term.reads == "logits"}
        for point in widths:
            network = network_of(point)
            if point not in taught and network not in frozen:
                fix = f'add a loss with on = "{address(network, "all")}"'
                if not point.endswith(FINAL):
                    fix += f', or set networks.{network}.exits = "none"'
                raise UserError(
                    f"no loss teaches the classifier of {point}", "a loss on the logits of every point", fix
                )

    def forward(self, signals: Mapping[str, Signal], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of all terms (a scalar) and what each loss of the recipe adds to it."""
        signals = {point: signal.at_least_float() for point, signal in signals.items()}
        # Autocast would round products inside a loss.
        with torch.autocast(batch.images.device.type, enabled=False):
            parts = self._parts(signals, batch)
        return torch.stack(list(parts.values())).sum(), parts

    def _parts(self, signals: Mapping[str, Signal], batch: Batch) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for term in self.terms:
            student = getattr(signals[term.on], term.reads)
            if term.target is None:
                value = term.compare(student, batch)
            else:
                value = term.compare(student, getattr(signals[term.target], term.reads).detach(), batch)
            value = value.mean() * term.weight
            parts[term.name] = parts[term.name] + value if term.name in parts else value
        return parts


def _points(on: str | list[str], places: list[str], where: str) -> list[str]:
    """The points that an `on` stands for; `exits` of a network without any stands for none."""
    chosen: list[str] = []
    for name in [on] if isinstance(on, str) else on:
        network, point = network_of(name), name.rpartition(".")[2]
        own = [place for place in places if network_of(place) == network]
        if point == "all" and own:
            chosen += own
        elif point == "exits" and own:
            chosen += own[:-1]
        elif name in places:
            chosen.append(name)
        else:
            raise _no_such_point(name, places, f"{where}.on")
    return chosen


def _target(name: str, point: str, places: list[str], where: str) -> str:
    if name == "next":
        if point.rpartition(".")[2] == FINAL:
            raise UserError(f"{where}: '{point}' has no next deeper point", 'on = "exits" with target = "next"')
        return places[places.index(point) + 1]
    if name not in places:
        raise _no_such_point(name, places, f"{where}.target")
    if name == point:
        raise UserError(f"{where}: {point} is compared with itself", "a target other than the point it teaches")
    return name


def _no_such_point(name: str, places: list[str], where: str) -> UserError:
    network = network_of(name)
    if all(network_of(place) != network for place in places):
        known = dict.fromkeys(network_of(place) for place in places)
        return UserError(
            f"{where} = '{name}': there is no networks.{network}",
            "one of " + ", ".join(known),
            did_you_mean(network, known) or f"add a [networks.{network}] table",
        )
    return UserError(
        f"{where} = '{name}', a point that this network does not have",
        "one of " + ", ".join(places),
        did_you_mean(name, places),
    )
