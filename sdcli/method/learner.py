"""All networks of a run and their objective as one module: batch in, loss out.

DistributedDataParallel, torch.compile and state dicts all expect a single module.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdcli.data.augment import key
from sdcli.data.batch import Batch
from sdcli.errors import UserError
from sdcli.method.addresses import Addresses
from sdcli.method.objective import Objective
from sdcli.method.pruning import Masks
from sdcli.method.rules import rule_of
from sdcli.method.signals import SIGNALS, SignalContext
from sdcli.network.foreign import Translated, Translation
from sdcli.network.multi_exit import PARTS, MultiExit, PointSpec
from sdcli.network.signals import Signal
from sdcli.recipe.address import FINAL, STUDENT, Address
from sdcli.recipe.schema import Derived, Recipe, Rule, Trains
from sdcli.registry import Entry


class DerivedSignal(nn.Module):
    """One prediction made from others."""

    def __init__(self, of: Sequence[str], entry: Entry, setting: SignalContext, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.of = list(of)
        self.reads_one = entry.reads_one
        self.reads_densely = entry.reads == "dense"
        self.sees_batch = bool(entry.sees_batch)
        built = isinstance(entry.call, type)
        self._build = partial(entry.call, *([setting] if built else []), **options)
        self.make: Callable[..., Tensor] = self._build() if built else self._build

    def renew(self) -> None:
        """Forgets everything that it has learned or remembered."""
        if isinstance(self.make, nn.Module):
            self.make.load_state_dict(self._build().state_dict())

    def forward(self, signals: Mapping[str, Signal], batch: Batch) -> Signal:
        """Computed in float32 or better; the map and the embedding are those of its first source."""
        sources = [signals[point].at_least_float() for point in self.of]
        with torch.autocast(batch.images.device.type, enabled=False):
            logits = self.make(sources[0] if self.reads_one else sources, batch)
        return Signal(sources[0].features, sources[0].embedding, logits, sources=tuple(sources))


def check_signals(tables: Mapping[str, Derived], mixes: bool) -> None:
    """Raises UserError for an unknown kind, key, type or range, and for a kind that needs one class per image where
    classes are mixed: everything that shows without a network."""
    for name, table in tables.items():
        where = f"signals.{name}"
        entry = SIGNALS.find(table.kind, f"{where}.kind")
        entry.check(table.options, where)
        if mixes and entry.hard_labels:
            raise UserError(
                f"{where}: kind = '{table.kind}' needs one class per image, but batch.mixup or "
                "batch.cutmix mixes classes",
                "no mixup or cutmix, or another kind",
                "--set batch.mixup=0 --set batch.cutmix=0",
            )


def build_signals(
    tables: Mapping[str, Derived],
    specs: Mapping[str, PointSpec],
    num_classes: int,
    num_images: int,
    frozen: Collection[str] = (),
) -> tuple[dict[str, DerivedSignal], dict[str, PointSpec]]:
    """The signals that `[signals]` asks for, and the widths of each. `specs` are those of the networks' points;
    `frozen` names the networks that do not learn.

    Raises UserError for a point that does not exist or has no classifier.
    """
    made: dict[str, DerivedSignal] = {}
    known: dict[str, PointSpec] = {}
    addresses = Addresses(specs, {}, ())
    for name, table in tables.items():
        where = f"signals.{name}"
        entry = SIGNALS.find(table.kind, f"{where}.kind")
        options = entry.check(table.options, where)
        of = addresses.resolve(table.of, f"{where}.of")
        addresses.check_classifies(of, where)
        points = [Address.parse(point) for point in of]
        if entry.reads_one and len(of) != 1:
            raise UserError(
                f"{where}: kind = '{table.kind}' reads one point", "one point", 'of = "final"', key=f"{where}.of"
            )
        if entry.reads == "dense" and points[0].point != FINAL:
            raise UserError(
                f"{where}: kind = '{table.kind}' reads the last map: it works on final, not on {of[0]}",
                'of = "final"',
                key=f"{where}.of",
            )
        own = [addresses.spec(point) for point in of]
        context = SignalContext([spec.num_chs for spec in own], num_classes, num_images)
        made[name] = DerivedSignal(of, entry, context, options)
        taught = [point for point, spec in zip(points, own, strict=True) if "logits" in spec.learns]
        learns = not entry.constant and any(point.network not in frozen for point in taught)
        known[name] = replace(own[0], learns=PARTS if learns else frozenset(), sources=tuple(own))
    return made, known


def build_objectives(
    recipe: Recipe,
    specs: Mapping[str, PointSpec],
    num_classes: int,
    num_images: int,
    seed: int = 0,
    labels: Tensor | None = None,
) -> tuple[list[Objective], dict[str, DerivedSignal]]:
    """The objective of each phase, and the signals made from predictions; `specs` are those of the points, by address,
    random weights are drawn with `seed`, and `labels` are those of the training images, by index.

    Raises UserError for mistakes that only show with the networks: points that do not exist, widths that do not match,
    exits that nothing teaches.
    """
    never = [name for name, learns in recipe.taking_part.items() if not learns]
    making, made = build_signals(recipe.signals, specs, num_classes, num_images, never)
    objectives = []
    if labels is None:
        labels = torch.zeros(num_images, dtype=torch.long, device="cpu")
    for number, phase in enumerate(recipe.all_phases):
        frozen = [name for name in recipe.taking_part if name not in recipe.learning(number)]
        losses = {name: recipe.losses[name] for name in phase.losses or ()}
        trains = what_trains(recipe, number)
        own = {
            name: replace(spec, learns=spec.learns_alone) if trains[Address.parse(name).network] == "heads" else spec
            for name, spec in specs.items()
        }
        random = key(seed, "weights", number) if recipe.random_weights else None
        objectives.append(
            Objective(losses, own, frozen=frozen, derived=made, mixes=recipe.batch.mixes, seed=random, labels=labels)
        )
    check_taught(objectives, recipe, specs, never)
    for name, make in making.items():
        read = [objective.reads[name] for objective in objectives if name in objective.reads]
        if read and not any(read) and any(True for _ in make.parameters()):
            raise UserError(
                f"signals.{name}: kind = '{recipe.signals[name].kind}' has weights of its own that no loss teaches",
                f'a loss on it: on = ["all", "{name}"]',
            )
    return objectives, making


def what_trains(recipe: Recipe, phase: int) -> dict[str, Trains]:
    """What is trained of each network in a phase."""
    trains: dict[str, Trains] = {name: "all" for name in recipe.taking_part}
    trains |= {name: table.trains for name, table in recipe.others.items()}
    return trains | {STUDENT: recipe.all_phases[phase].trains or "all"}


def check_taught(
    objectives: Sequence[Objective], recipe: Recipe, specs: Mapping[str, PointSpec], frozen: Collection[str]
) -> None:
    """Raises UserError for a classifier that no phase teaches: it would be scored untrained. And for one that a phase
    leaves out while the backbone before it is trained: its last stages would get no gradient.

    Where only heads are trained, `final` is what it was.
    """
    trains = [what_trains(recipe, number) for number in range(len(objectives))]
    taught = {address for objective in objectives for address in objective.taught}
    for name, spec in specs.items():
        address = Address.parse(name)
        if address.network in frozen or not spec.classifies:
            continue
        if address.point != FINAL:
            if address not in taught:
                raise _untaught(address)
            continue
        trained = [
            number
            for number, own in enumerate(trains)
            if own[address.network] == "all" and address.network in recipe.learning(number)
        ]
        if trained and address not in taught:
            raise _untaught(address)
        for number in trained:
            teaches = objectives[number].taught
            if address not in teaches and any(other.network == address.network for other in teaches):
                raise _untaught(address, f"phases.{number}: ")


def _untaught(address: Address, where: str = "") -> UserError:
    fix = f'add a loss with on = "{address.at("all")}"'
    if address.point != FINAL:
        fix += f', or set networks.{address.network}.exits = "none"'
    return UserError(f"{where}no loss teaches the classifier of {address}", "a loss on the logits of every point", fix)


def read_densely(networks: Mapping[str, MultiExit], derived: Mapping[str, DerivedSignal]) -> None:
    """Makes every network whose places a signal reads return their logits; raises UserError if one cannot."""
    for name, made in derived.items():
        for point in made.of if made.reads_densely else ():
            try:
                networks[Address.parse(point).network].read_densely()
            except UserError as error:
                raise error.within(f"signals.{name}", key=f"signals.{name}") from None


def keep_statistics(network: nn.Module) -> None:
    """Batch norms in train mode use the statistics of the batch from now on, and leave their own as they are."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0


class Learner(nn.Module):
    """The networks of a run and the objective that teaches them."""

    def __init__(
        self,
        networks: Mapping[str, MultiExit],
        objective: Objective,
        frozen: Collection[str] = (),
        derived: Mapping[str, DerivedSignal] | None = None,
        *,
        translations: Mapping[str, Translation] | None = None,
        batch_mode: Collection[str] = (),
        rules: Iterable[Rule] = (),
        in_turn: bool = False,
        pruned: Collection[str] = (),
    ) -> None:
        """`frozen` names the networks that never learn: they run without gradients and in eval mode, but those of
        `batch_mode` in train mode. `translations` belong to networks that were trained elsewhere; `rules` let networks
        rest; `in_turn` says that every network that learns gets passes of its own, and `pruned` names those of which
        phases prune weights."""
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self.derived = nn.ModuleDict(derived or {})
        self.never = frozenset(frozen)
        self.frozen = self.never
        """The networks that do not learn now."""
        self.translations = nn.ModuleDict(translations or {})
        self.batch_mode = frozenset(batch_mode)
        self.rules = list(rules)
        self.in_turn = in_turn
        self.masks = nn.ModuleDict({name: Masks(networks[name]) for name in pruned})
        self.only: str | None = None
        """The network that alone learns from the next pass, where networks take turns."""
        self._may_learn: list[dict[str, Tensor]] = []
        for name in self.never:
            self.networks[name].requires_grad_(False)
        for name in self.batch_mode:
            keep_statistics(self.networks[name])
        read_densely(networks, derived or {})
        self.teach(objective)

    def teach(
        self,
        objective: Objective,
        trains: Mapping[str, Trains] | None = None,
        learning: Collection[str] | None = None,
    ) -> None:
        """Sets the objective, which networks learn (by default all that can) and what of each (by default all of it);
        finds out what the objective needs: which networks see which images, and with gradients or not."""
        self.objective = objective
        can = [name for name in self.networks if name not in self.never]
        self.frozen = self.never | {name for name in can if learning is not None and name not in learning}
        reads = dict(objective.reads)
        self.makes = [name for name in self.derived if name in reads]
        self.active = [rule for rule in self.rules if rule.network not in self.frozen]
        for rule in self.active:
            for point in self._compared(rule):
                reads.setdefault(point, False)
        for name in self.makes:
            learns = reads.pop(name)
            made = self.derived[name]
            assert isinstance(made, DerivedSignal)
            for point in made.of:
                reads[point] = reads.get(point, False) or learns
        self.owners = [self._owner(term.on) for term in objective.terms]
        self.passes: dict[tuple[str, str], dict[str, bool]] = {}
        for name, learns in reads.items():
            address = Address.parse(name)
            points = self.passes.setdefault((address.network, address.images), {})
            points[address.point] = learns and address.network not in self.frozen
        # What this phase does not train must not require a gradient: DistributedDataParallel would wait for it.
        for name in can:
            network = self.networks[name]
            assert isinstance(network, MultiExit)
            passes = [points for (shown, _), points in self.passes.items() if shown == name]
            # A network that rests has no point with a gradient.
            network.train_only(
                [point for points in passes for point, learns in points.items() if learns],
                trains[name] if trains else "all",
            )
        for name, made in self.derived.items():
            made.requires_grad_(name in self.makes and objective.reads[name])

    def _owner(self, name: str) -> str:
        """The network that a term on this point or signal teaches."""
        made = dict(self.derived.items()).get(name)
        return Address.parse(made.of[0] if isinstance(made, DerivedSignal) else name).network

    def _compared(self, rule: Rule) -> tuple[str, str]:
        """The points of which a rule reads the logits: the network's own and that of the one behind."""
        return str(Address(rule.network, FINAL)), str(Address.parse(rule.behind))

    def resting(self) -> set[str]:
        """The networks that rules have let rest in all passes since this was last asked. Waits for the device."""
        found, self._may_learn = self._may_learn, []
        names = {name for may in found for name in may}
        return {name for name in names if not any(bool(may[name]) for may in found if name in may)}

    @property
    def learning(self) -> list[str]:
        """The networks that learn now, the student first."""
        names = [name for name in self.networks if name not in self.frozen]
        return sorted(names, key=lambda name: name != STUDENT)

    def parts_of(self, name: str) -> list[nn.Module]:
        """What learns with a network: itself, and the signals and losses with weights that teach it; with the first
        that learns also those that teach none that does."""
        learning = self.learning
        made = [(self._owner(signal), module) for signal, module in self.derived.items()]
        made += [
            (owner, term.compare)
            for owner, term in zip(self.owners, self.objective.terms, strict=True)
            if isinstance(term.compare, nn.Module)
        ]
        taught = [module for owner, module in made if (owner if owner in learning else learning[0]) == name]
        return [self.networks[name], *taught]

    @property
    def student(self) -> MultiExit:
        """The network that the command line names."""
        student = self.networks[STUDENT]
        assert isinstance(student, MultiExit)
        return student

    @property
    def training_macs(self) -> int:
        """The MACs of an update for each image of its batch: every forward pass, and twice as many again for the
        gradients of what learns.

        A pass through a network counts up to its end, with the heads that are read. Losses are not counted.
        """
        total = 0
        for (name, _), points in self.passes.items():
            network = self.networks[name]
            assert isinstance(network, MultiExit)
            heads = network.blueprint.head_costs()
            end = heads.pop(FINAL).macs
            learns = [point for point in network.points if points.get(point)]
            forward = network.stages[FINAL].macs + end + sum(heads[point].macs for point in heads if point in points)
            backward = end * (FINAL in learns) + sum(heads[point].macs for point in heads if point in learns)
            if learns and network.trains == "all":
                backward += network.stages[learns[-1]].macs
            total += forward * (len(self.learning) if self.in_turn else 1) + 2 * backward
        return total

    def renew_signals(self) -> None:
        """Resets everything that the derived signals have learned or remembered."""
        for made in self.derived.values():
            assert isinstance(made, DerivedSignal)
            made.renew()

    def train(self, mode: bool = True) -> Learner:
        """Frozen networks stay in eval mode, unless the recipe says `mode = "train"`."""
        super().train(mode)
        for name in self.frozen:
            self.networks[name].train(mode and name in self.batch_mode)
        return self

    def mask(self, name: str, network: nn.Module) -> None:
        """Keeps what is pruned of a network at 0, in it or in an average of it."""
        masks = dict(self.masks.items()).get(name)
        if isinstance(masks, Masks) and isinstance(network, MultiExit):
            masks.apply_to(network)

    def answers(self, name: str) -> bool:
        """Whether a network tells the run's classes apart."""
        translation = dict(self.translations.items()).get(name)
        return not isinstance(translation, Translation) or translation.knows_classes

    def seen(self, name: str) -> nn.Module:
        """A network as the run sees it, whatever it was trained on."""
        network = self.networks[name]
        translation = dict(self.translations.items()).get(name)
        return Translated(network, translation) if isinstance(translation, Translation) else network

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Runs every network on the batch, with those exits that a loss reads, and every loss on their outputs; returns
        the loss (a scalar) and its parts by name.

        The parts keep their graphs too, so that the gradient of each can be computed on its own.
        """
        signals: dict[str, Signal] = {}
        # torch.compile cannot look up a module by a name that varies.
        translations = dict(self.translations.items())
        for (name, images), points in self.passes.items():
            shown = batch.views[images] if images else batch.images
            translation = translations.get(name)
            learns = any(points.values()) and self.only in (None, name)
            with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
                if translation is None:
                    said = self.networks[name](shown, points)
                else:
                    assert isinstance(translation, Translation)
                    said = translation.signals(self.networks[name](translation.images(shown), points))
            signals |= {str(Address(name, point, images)): signal for point, signal in said.items()}
        for name in self.makes:
            signals[name] = self.derived[name](signals, batch)
        total, parts = self.objective(signals, batch, self._scales(signals, batch))
        return total, parts

    def _scales(self, signals: Mapping[str, Signal], batch: Batch) -> list[Tensor | None] | None:
        """A factor for each term, 0 where a rule lets the network that it teaches rest, and None for terms of networks
        whose turn it is not; None where all count in full."""
        if not self.active and self.only is None:
            return None
        may = {}
        for rule in self.active:
            own, behind = (signals[point].logits for point in self._compared(rule))
            assert own is not None and behind is not None
            may[rule.network] = rule_of(rule)(own.detach(), behind.detach(), batch.labels)
        if may and self.training:
            self._may_learn.append(may)
        one = torch.ones((), device=batch.images.device)
        return [
            None if self.only not in (None, owner) else may[owner].to(one) if owner in may else one
            for owner in self.owners
        ]
