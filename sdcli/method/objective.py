"""The `[losses]` tables of a recipe as terms, and their sum: one number and its named parts.

B batch, C channels, D embedding
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn

from sdcli.data.batch import Batch
from sdcli.errors import UserError, did_you_mean
from sdcli.method.losses import LOSSES
from sdcli.network.multi_exit import FINAL, PointSpec
from sdcli.network.signals import Signal
from sdcli.recipe.schema import AVERAGE, STUDENT, TEACHER, Loss, WeightSchedule
from sdcli.registry import Entry


def address(network: str, point: str, images: str = "") -> str:
    """How recipes and terms call a network's point: the student's by its own name, others' as `peer.exit1`.

    `images` names those of the batch that it was shown, where they are not its own: `final@view`.
    """
    place = point if network == STUDENT else f"{network}.{point}"
    return f"{place}@{images}" if images else place


def parsed(place: str) -> tuple[str, str, str]:
    """Network, point and images of an address."""
    rest, _, images = place.partition("@")
    network, _, point = rest.rpartition(".")
    return network or STUDENT, point, images


@dataclass(frozen=True)
class Term:
    """One comparison at one point: what `name` of the recipe asks of `on`."""

    name: str
    on: str
    target: str | None
    """The point or signal that is compared with, or None where the labels are."""
    reads: str
    """`logits`, `embedding` or `features`."""
    weight: WeightSchedule
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
    # Not `dense`, which has no gradient.
    readable = [field.name for field in fields(Signal) if field.name != "dense"]
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


def check_networks(losses: Mapping[str, Loss], networks: Mapping[str, bool], signals: Collection[str]) -> None:
    """Raises UserError for a point of a network that there is not, and one that would teach a network that does not
    learn. `networks` tells of each whether it does; `signals` are no points."""
    places = Addresses(
        {address(network, FINAL): PointSpec(0, 0) for network in networks},
        {},
        [name for name, learns in networks.items() if not learns],
    )
    for name, loss in losses.items():
        for key, given in (("on", loss.on), ("target", loss.target)):
            for place in [given] if isinstance(given, str) else given:
                if place in signals or place in ("label", "next"):
                    continue
                if parsed(place)[0] not in networks:
                    raise places.missing(place, f"losses.{name}.{key}")
                if key == "on":
                    places.check_learns(place, f"losses.{name}")


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
            f"{where}.target = {loss.target!r}: kind = '{loss.kind}' compares with the labels alone",
            "no target",
            f"take target out of [{where}], or choose a kind that has one, such as kl",
        )
    return needs


class Objective(nn.Module):
    """All terms of a recipe. Its parameters are those of the losses that have weights of their own (`trained`)."""

    now: Tensor

    def __init__(
        self,
        losses: Mapping[str, Loss],
        widths: Mapping[str, PointSpec],
        *,
        frozen: Collection[str] = (),
        derived: Mapping[str, PointSpec] | None = None,
        mixes: bool = False,
    ) -> None:
        """Builds the terms for networks with the points of `widths`, by address, each network's shallowest first.

        `frozen` names the networks that do not learn, `derived` the predictions that are made from others; `mixes` says
        whether labels are shares of several classes. Raises UserError for an unknown loss or key, a point that is not
        there, does not learn or has no classifier, weights or targets that do not match the points, exits that no term
        teaches, and a loss that needs one class per image where they are mixed.
        """
        super().__init__()
        self.terms: list[Term] = []
        self.trained = nn.ModuleList()
        self._addresses = Addresses(widths, derived or {}, frozen)
        check_mixing(losses, mixes)
        for name, loss in losses.items():
            self._add(name, loss)
        self._check_all_taught()
        # Of terms whose weight changes: a tensor, so that a compiled objective need not be compiled again.
        self.register_buffer("now", torch.ones(len(self.terms)), persistent=False)
        self.set_time(0.0, 1.0)

    def set_time(self, epoch: float, epochs: float) -> None:
        """Sets the weights to what they are after `epoch` of `epochs`."""
        if any(term.weight.varies for term in self.terms):
            weights = torch.tensor([term.weight.at(epoch, epochs) for term in self.terms])
            # From memory that is pinned a GPU fetches them without anyone waiting.
            self.now.copy_(weights.pin_memory() if self.now.is_cuda else weights, non_blocking=True)

    def go_on_from(self, other: Objective) -> None:
        """Takes over what the same terms of another objective have learnt."""
        learnt = {(term.name, term.on, term.target): term.compare for term in other.terms}
        for term in self.terms:
            former = learnt.get((term.name, term.on, term.target))
            if isinstance(term.compare, nn.Module) and isinstance(former, nn.Module):
                term.compare.load_state_dict(former.state_dict())

    @property
    def names(self) -> list[str]:
        """The recipe's losses that have a term, in order."""
        return list(dict.fromkeys(term.name for term in self.terms))

    @property
    def reads(self) -> dict[str, bool]:
        """The points and signals that terms read, and whether a gradient is to reach them."""
        read: dict[str, bool] = {}
        for term in self.terms:
            read[term.on] = True
            if term.target is not None:
                read.setdefault(term.target, False)
        return read

    def _add(self, name: str, loss: Loss) -> None:
        where = f"losses.{name}"
        entry = LOSSES.find(loss.kind, f"{where}.kind")
        options = entry.check(loss.options, where)
        needs_target = _needs_target(loss, where)
        points = self._addresses.on(loss.on, where)
        weights = loss.weights * len(points) if not isinstance(loss.weight, list) else loss.weights
        if len(weights) != len(points):
            raise UserError(
                f"{where}.weight has {len(weights)} values",
                f"one number, or one for each of {', '.join(points) or 'no points'}",
            )
        targets = loss.target if isinstance(loss.target, list) else [loss.target] * len(points)
        if len(targets) != len(points):
            raise UserError(
                f"{where}.target has {len(targets)} entries",
                f"one, or one for each of {', '.join(points) or 'no points'}",
            )
        for point, named, weight in zip(points, targets, weights, strict=True):
            target = self._addresses.target(named, point, where) if needs_target else None
            if not weight.varies and weight.value == 0:
                continue
            if entry.reads == "logits":
                self._addresses.check_classifies([point, *([target] if target else [])], where)
            compare = self._built(entry, options, point, target, where)
            if isinstance(compare, nn.Module):
                self.trained.append(compare)
            sees_batch = bool(getattr(compare, "sees_batch", entry.couples(options)))
            self.terms.append(Term(name, point, target, entry.reads, weight, compare, sees_batch))

    def _built(
        self, entry: Entry, options: dict[str, object], point: str, target: str | None, where: str
    ) -> Callable[..., Tensor]:
        if not isinstance(entry.call, type) or target is None:
            return partial(entry.call, **options)
        side = "embedding_dim" if entry.reads == "embedding" else "num_chs"
        widths = [getattr(self._addresses.width(place), side) for place in (point, target)]
        try:
            built: nn.Module = entry.call(*widths, **options)
        except UserError as error:
            error.wrong = f"{where} at {point}: {error.wrong}"
            raise
        return built

    def _check_all_taught(self) -> None:
        """An exit whose classifier no term reads would be trained by nothing and still be scored."""
        taught = {parsed(term.on)[:2] for term in self.terms if term.reads == "logits"}
        for place, width in self._addresses.widths.items():
            network, point, _ = parsed(place)
            if width.classifies and (network, point) not in taught and network not in self._addresses.frozen:
                fix = f'add a loss with on = "{address(network, "all")}"'
                if point != FINAL:
                    fix += f', or set networks.{network}.exits = "none"'
                raise UserError(
                    f"no loss teaches the classifier of {place}", "a loss on the logits of every point", fix
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
        for number, term in enumerate(self.terms):
            student = getattr(signals[term.on], term.reads)
            if term.target is None:
                value = term.compare(student, batch)
            else:
                value = term.compare(student, getattr(signals[term.target], term.reads).detach(), batch)
            _check_value(term, student, value)
            value = value.mean() * (self.now[number] if term.weight.varies else term.weight.value)
            parts[term.name] = parts[term.name] + value if term.name in parts else value
        return parts


def _check_value(term: Term, student: Tensor, value: object) -> None:
    """Raises UserError for a loss, usually a user's own, that returns nothing to learn from, or something whose mean
    over the batch would be another loss."""
    if not isinstance(value, Tensor):
        raise UserError(
            f"losses.{term.name} returned {type(value).__name__} at {term.on}",
            "a tensor: one value, or one for each image",
            "a sum or mean of the student's tensor, without .item()",
        )
    if value.shape not in ((), student.shape[:1]):
        fix = "one value for each of the batch's images"
        if value.shape[:1] == student.shape[:1]:
            fix = "a mean or sum over all dimensions but the first"
        raise UserError(
            f"losses.{term.name} returned a tensor of shape {list(value.shape)} at {term.on}",
            f"one value [], or one for each image [{len(student)}]",
            fix,
        )
    if student.requires_grad and torch.is_grad_enabled() and not value.requires_grad:
        raise UserError(
            f"losses.{term.name} returned a value without a gradient at {term.on}",
            "a function of the student's tensor",
            "no .detach() and no torch.no_grad() on the student's side",
        )


class Addresses:
    """What an `on` and a `target` may name."""

    def __init__(
        self, widths: Mapping[str, PointSpec], derived: Mapping[str, PointSpec], frozen: Collection[str]
    ) -> None:
        self.widths, self.derived, self.frozen = dict(widths), dict(derived), frozenset(frozen)

    def width(self, place: str) -> PointSpec:
        return self.derived[place] if place in self.derived else self.widths[place.partition("@")[0]]

    def on(self, on: str | list[str], where: str, key: str = "on") -> list[str]:
        """The points that an `on` stands for; `exits` of a network without any stands for none."""
        chosen: list[str] = []
        for name in [on] if isinstance(on, str) else on:
            if name in self.derived:
                chosen.append(name)
                continue
            chosen += self._points(name, f"{where}.{key}")
        for place in chosen:
            if chosen.count(place) > 1:
                raise UserError(f"{where}.{key} names {place} twice", "every point once")
            if key == "on":
                self.check_learns(place, where)
        return chosen

    def check_learns(self, place: str, where: str) -> None:
        """Raises UserError for a point of a network that does not."""
        if place in self.derived:
            if not self.derived[place].learns:
                raise UserError(
                    f"{where}.on = '{place}': no gradient passes signals.{place}",
                    "a point, or a signal that is made with gradients, such as a mean",
                    f'target = "{place}" compares with it',
                )
            return
        network = parsed(place)[0]
        if network in self.frozen:
            raise UserError(
                f"{where}.on = '{place}': networks.{network} does not learn",
                "a point of a network that learns",
                f"--set networks.{network}.learns=true",
            )

    def _points(self, name: str, where: str) -> list[str]:
        network, point, images = parsed(name)
        own = [place for place in self.widths if parsed(place)[0] == network]
        if point == "all" and own:
            bare = own
        elif point == "exits" and own:
            bare = own[:-1]
        elif address(network, point) in self.widths:
            bare = [address(network, point)]
        else:
            raise self.missing(name, where)
        return [f"{place}@{images}" if images else place for place in bare]

    def target(self, name: str, point: str, where: str) -> str:
        """The place that `target` means for one point of `on`."""
        if name == "next":
            network, own, images = parsed(point)
            if own == FINAL or point in self.derived:
                raise UserError(f"{where}: '{point}' has no next deeper point", 'on = "exits" with target = "next"')
            places = list(self.widths)
            deeper = places[places.index(address(network, own)) + 1]
            return f"{deeper}@{images}" if images else deeper
        if name not in self.derived and name.partition("@")[0] not in self.widths:
            raise self.missing(name, f"{where}.target")
        if name == point:
            raise UserError(f"{where}: {point} is compared with itself", "a target other than the point it teaches")
        return name

    def check_classifies(self, places: Iterable[str], where: str) -> None:
        """Raises UserError for a point without logits."""
        for place in places:
            if not self.width(place).classifies:
                network = parsed(place)[0]
                raise UserError(
                    f"{where} compares predictions, and {place} has no classifier",
                    "a point with a head",
                    f"--set networks.{network}.head=auto",
                )

    def missing(self, name: str, where: str) -> UserError:
        """The error for a point that is not there."""
        network = parsed(name)[0]
        if all(parsed(place)[0] != network for place in self.widths):
            known = dict.fromkeys(parsed(place)[0] for place in self.widths)
            add = {
                AVERAGE: "add an [ema] table: the average of the student's weights",
                TEACHER: f"add a [networks.{TEACHER}] table, or a phase with teacher = true",
            }
            return UserError(
                f"{where} = '{name}': there is no networks.{network}",
                "one of " + ", ".join(known),
                did_you_mean(network, known) or add.get(network, f"add a [networks.{network}] table"),
            )
        known_places = [*self.widths, *self.derived]
        return UserError(
            f"{where} = '{name}', a point that this network does not have",
            "one of " + ", ".join(known_places),
            did_you_mean(name, known_places),
        )
