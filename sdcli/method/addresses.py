"""Resolves the `on`, `target` and `of` of a recipe to points and signals, once the networks are known."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from sdcli.errors import UserError, did_you_mean
from sdcli.network.multi_exit import PointSpec
from sdcli.recipe.address import AVERAGE, FINAL, TEACHER, Address


class Addresses:
    """The points of all networks, by address, and the signals derived from them, by name."""

    def __init__(
        self, specs: Mapping[str, PointSpec], derived: Mapping[str, PointSpec], frozen: Collection[str]
    ) -> None:
        """`specs` has each network's points, shallowest first; `frozen` names the networks that do not learn."""
        self.specs = {Address.parse(text): spec for text, spec in specs.items()}
        self.derived, self.frozen = dict(derived), frozenset(frozen)

    def spec(self, name: str) -> PointSpec:
        """The widths of a point or signal."""
        return self.derived[name] if name in self.derived else self.specs[Address.parse(name).bare]

    def resolve(self, names: str | list[str], key: str) -> list[str]:
        """The points and signals that an `on` or `of` refers to; `exits` of a network without exits gives an empty
        list.

        Raises UserError for a point that does not exist, one that is named twice, and an `on` that does not learn.
        """
        chosen: list[str] = []
        for name in [names] if isinstance(names, str) else names:
            chosen += [name] if name in self.derived else map(str, self._points(name, key))
        for name in chosen:
            if chosen.count(name) > 1:
                raise UserError(f"{key} names {name} twice", "each point at most once", key=key)
            if key.endswith(".on"):
                self.check_learns(name, key)
        return chosen

    def _points(self, name: str, key: str) -> list[Address]:
        address = Address.parse(name)
        own = [point for point in self.specs if point.network == address.network]
        if address.is_group and own:
            points = own if address.point == "all" else own[:-1]
        elif address.bare in self.specs:
            points = [address.bare]
        else:
            raise self.missing(name, key)
        return [point.shown(address.images) for point in points]

    def target(self, name: str, on: str, key: str) -> str:
        """The point or signal that `target` means for one point of `on`; raises UserError if there is none."""
        if name == "next":
            address = Address.find(on)
            if address is None or address.point == FINAL:
                raise UserError(f"{key}: '{on}' has no next deeper point", 'on = "exits" with target = "next"', key=key)
            points = list(self.specs)
            return str(points[points.index(address.bare) + 1].shown(address.images))
        if name not in self.derived and Address.parse(name).bare not in self.specs:
            raise self.missing(name, key)
        if name == on:
            raise UserError(f"{key}: {on} is compared with itself", "a target other than the point it teaches", key=key)
        return name

    def check_learns(self, name: str, key: str) -> None:
        """Raises UserError for a signal without a gradient, and for a point of a network that does not learn."""
        if name in self.derived:
            if not self.derived[name].learns:
                raise UserError(
                    f"{key} = '{name}': signals.{name} has no gradient",
                    "a point, or a signal with a gradient, such as kind = 'mean'",
                    f'use it as a target: target = "{name}"',
                    key=key,
                )
            return
        network = Address.parse(name).network
        if network in self.frozen:
            raise UserError(
                f"{key} = '{name}': networks.{network} does not learn",
                "a point of a network that learns",
                f"--set networks.{network}.learns=true",
                key=key,
            )

    def check_taught(self, names: Iterable[str], part: str, key: str) -> None:
        """Raises UserError for a point at which no gradient of this part of its signal reaches a weight."""
        for name in names:
            if part not in self.spec(name).learns and name not in self.derived:
                address = Address.parse(name)
                network, what = address.network, {"logits": "predictions", "features": "map"}.get(part, part)
                if address.point == FINAL or part == "logits":
                    wrong = f'{key} is on the {what} of {name}, which trains = "heads" leaves as it is'
                else:
                    wrong = f"{key} is on the {what} of {name}, and no gradient passes on to the stages before it"
                raise UserError(
                    wrong,
                    'losses on the logits of exits, or a backbone that is trained: trains = "all", gradients = "sum"',
                    f'--set networks.{network}.trains="all" --set networks.{network}.gradients="sum"',
                    key=f"{key}.on",
                )

    def check_classifies(self, names: Iterable[str], key: str) -> None:
        """Raises UserError for a point without logits."""
        for name in names:
            if not self.spec(name).classifies:
                network = Address.parse(name).network
                raise UserError(
                    f"{key} compares predictions, but {name} has no classifier",
                    "a point with a head; a network that is trained already has those of its checkpoint",
                    f"--set networks.{network}.head=auto",
                    key=key,
                )

    def missing(self, name: str, key: str) -> UserError:
        """The error for a point that does not exist."""
        network = Address.parse(name).network
        networks = list(dict.fromkeys(point.network for point in self.specs))
        if network not in networks:
            add = {
                AVERAGE: "add an [ema] table: the average of the student's weights",
                TEACHER: f"add a [networks.{TEACHER}] table, or a phase with teacher = true",
            }
            fix = did_you_mean(network, networks) or add.get(network, f"add a [networks.{network}] table")
            return UserError(
                f"{key} = '{name}': there is no networks.{network}", "one of " + ", ".join(networks), fix, key=key
            )
        known = [*map(str, self.specs), *self.derived]
        return UserError(
            f"{key} = '{name}': the network has no such point",
            "one of " + ", ".join(known),
            did_you_mean(name, known),
            key=key,
        )
