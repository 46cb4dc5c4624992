"""The weighted sum of a recipe's losses: one number and its named parts.

B batch, C channels, D embedding
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdcli.data.batch import Batch
from sdcli.errors import UserError
from sdcli.method.addresses import Addresses
from sdcli.method.losses import LOSSES
from sdcli.method.random_weights import random_weights
from sdcli.method.shares import Shares
from sdcli.method.terms import SIGNAL, Term, check_mixing, needs_target
from sdcli.network.multi_exit import PointSpec
from sdcli.network.signals import Signal
from sdcli.recipe.address import Address
from sdcli.recipe.schema import Loss
from sdcli.registry import Entry


class Objective(nn.Module):
    """All terms of a recipe. Its parameters are those of the losses that have weights of their own (`trained`)."""

    now: Tensor

    def __init__(
        self,
        losses: Mapping[str, Loss],
        specs: Mapping[str, PointSpec],
        *,
        frozen: Collection[str] = (),
        derived: Mapping[str, PointSpec] | None = None,
        mixes: bool = False,
        seed: int | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """Builds the terms for networks with the points of `specs`, by address, each network's shallowest first.

        `frozen` names the networks that do not learn, `derived` holds the predictions that are made from others;
        `mixes` is true if labels are mixtures of several classes; `labels` are those of the training images, by index,
        for losses that remember images. With a `seed`, random weights replace those of the
        losses, except 0. Raises UserError for an unknown loss or key, a point that does not exist, does not learn or
        has no classifier, weights or targets that do not match the points, and a loss that needs one class per image
        where classes are mixed. `check_taught` finds points that nothing teaches.
        """
        super().__init__()
        self.terms: list[Term] = []
        self.trained = nn.ModuleList()
        self._seed = seed
        self._labels = torch.zeros(1, dtype=torch.long, device="cpu") if labels is None else labels
        self._addresses = Addresses(specs, derived or {}, frozen)
        check_mixing(losses, mixes)
        self._losses = [name for name, loss in losses.items() if any(w.varies or w.value for w in loss.weights)]
        for name, loss in losses.items():
            self._add(name, loss)
        self._check_embeddings()
        # The current weights of terms that vary: a tensor, so that a change does not recompile a compiled objective.
        self.register_buffer("now", torch.ones(len(self.terms)), persistent=False)
        shares = {name: loss.share for name, loss in losses.items() if name in self.names and loss.share is not None}
        self.shares = Shares(shares) if shares else None
        """The weights that find themselves."""
        self.set_time(0.0, 1.0)

    def set_time(self, epoch: float, epochs: float) -> None:
        """Sets the weights to their values after `epoch` of `epochs`."""
        self._time = (epoch, epochs)
        found = self.shares.found if self.shares else {}
        if self._seed is not None or any(term.weight.varies for term in self.terms):
            weights = torch.tensor(
                [term.weight.at(epoch, epochs) * found.get(term.name, 1.0) for term in self.terms]
                if self._seed is None
                else random_weights(self._seed, epoch, len(self.terms)),
                dtype=self.now.dtype,
            )
            # A GPU copies from pinned memory without making the CPU wait.
            self.now.copy_(weights.pin_memory() if self.now.is_cuda else weights, non_blocking=True)

    @property
    def resting(self) -> list[str]:
        """The losses whose weight is 0 at this time of the run."""
        return [name for name in self.names if not any(t.weight.at(*self._time) for t in self.terms if t.name == name)]

    @contextmanager
    def unweighted(self) -> Iterator[None]:
        """Inside, losses whose weight finds itself have the weight 1."""
        before = self.now.clone()
        for number, term in enumerate(self.terms):
            if term.weight.share is not None:
                self.now[number] = 1.0
        try:
            yield
        finally:
            self.now.copy_(before)

    def go_on_from(self, other: Objective) -> None:
        """Takes over what the same terms of another objective have learned."""
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
        """The points and signals that terms read, and whether a gradient has to reach each of them."""
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
        has_target = needs_target(loss, where)
        points = self._addresses.resolve(loss.on, f"{where}.on")
        weights = loss.weights * len(points) if not isinstance(loss.weight, list) else loss.weights
        if len(weights) != len(points):
            raise UserError(
                f"{where}.weight is a list of length {len(weights)}",
                f"one number, or one for each of {', '.join(points) or 'no points'}",
                key=f"{where}.weight",
            )
        targets = loss.target if isinstance(loss.target, list) else [loss.target] * len(points)
        if len(targets) != len(points):
            raise UserError(
                f"{where}.target is a list of length {len(targets)}",
                f"one, or one for each of {', '.join(points) or 'no points'}",
                key=f"{where}.target",
            )
        for point, named, weight in zip(points, targets, weights, strict=True):
            target = self._addresses.target(named, point, f"{where}.target") if has_target else None
            if not weight.varies and weight.value == 0:
                continue
            if entry.reads == "logits":
                self._addresses.check_classifies([point, *([target] if target else [])], where)
            self._addresses.check_taught([point], "features" if entry.reads == SIGNAL else entry.reads, where)
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
        own, other = (self._addresses.spec(name) for name in (point, target))
        given: dict[str, Any] = {
            "student_width": getattr(own, side),
            "teacher_width": getattr(other, side),
            "labels": self._labels,
            "sources": [(spec.num_chs, spec.embedding_dim) for spec in other.sources],
        }
        try:
            more = {name: given[name] for name in ("labels", "sources") if name in entry.takes}
            widths = [given["student_width"], *([] if "sources" in more else [given["teacher_width"]])]
            built: nn.Module = entry.call(*widths, **more, **options)
        except UserError as error:
            raise error.within(f"{where} at {point}", key=where) from None
        except Exception as error:  # it may be the user's own code
            raise UserError(
                f"{where} at {point}: kind = '{entry.name}' cannot be built: {type(error).__name__}: {error}",
                "a class that takes the widths of both points, then its recipe keys",
                key=where,
            ) from error
        return built

    @property
    def taught(self) -> list[Address]:
        """The points whose classifiers terms teach, those of views left out."""
        on = [Address.find(term.on) for term in self.terms if term.reads == "logits"]
        return list(dict.fromkeys(address.bare for address in on if address is not None))

    def _check_embeddings(self) -> None:
        """Raises UserError for an exit whose embedding is taught and whose classifier is not: a part of its head would
        get no gradient."""
        for term in self.terms:
            address = Address.find(term.on)
            if term.reads != "embedding" or address is None or address.bare in self.taught:
                continue
            if self._addresses.spec(term.on).classifies:
                raise UserError(
                    f"losses.{term.name} teaches the embedding of {term.on}, and no loss teaches its classifier",
                    "a loss on the logits of the same point",
                    f'add a loss with on = "{address.bare}"',
                    key=f"losses.{term.name}.on",
                )

    @property
    def idle(self) -> list[str]:
        """Losses that have no term although their weight is not 0: the networks have none of the points in their
        `on`."""
        return [name for name in self._losses if name not in self.names]

    def forward(
        self, signals: Mapping[str, Signal], batch: Batch, scales: Sequence[Tensor | None] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of all terms (a scalar), and what each loss of the recipe contributes to it.

        `scales` has a factor for each term, or None for one that is left out.
        """
        signals = {point: signal.at_least_float() for point, signal in signals.items()}
        # Autocast would compute products inside a loss in half precision.
        with torch.autocast(batch.images.device.type, enabled=False):
            parts = self._parts(signals, batch, scales or [])
        return torch.stack(list(parts.values())).sum(), parts

    def _parts(self, signals: Mapping[str, Signal], batch: Batch, scales: Sequence[Tensor | None]) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for number, term in enumerate(self.terms):
            if scales and scales[number] is None:
                parts.setdefault(term.name, batch.images.new_zeros(()))
                continue
            own = signals[term.on]
            student: Any = own if term.reads == SIGNAL else getattr(own, term.reads)
            if term.target is None:
                value = term.compare(student, batch)
            else:
                target = signals[term.target].detached()
                value = term.compare(student, target if term.reads == SIGNAL else getattr(target, term.reads), batch)
            _check_value(term, own.features if term.reads == SIGNAL else student, value)
            varies = term.weight.varies or self._seed is not None
            value = value.mean() * (self.now[number] if varies else term.weight.value)
            if scales and (scale := scales[number]) is not None:
                value = value * scale
            parts[term.name] = parts[term.name] + value if term.name in parts else value
        return parts


def _check_value(term: Term, student: Tensor, value: object) -> None:
    """Raises UserError for a loss (usually a user's own) that returns no tensor, no gradient, or a shape whose mean is
    not the loss that was meant."""
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
