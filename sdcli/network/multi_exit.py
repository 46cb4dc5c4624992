"""A timm model with a tap and a head after each of its stages.

B batch, K classes, C channels, H W map, D embedding, P prefix tokens
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdcli.data.photos import Prepared
from sdcli.errors import UserError, unknown
from sdcli.network.backbones import create
from sdcli.network.blueprint import BRANCH, Blueprint
from sdcli.network.calibration import Calibration
from sdcli.network.gradients import Equilibrium
from sdcli.network.heads import build_head
from sdcli.network.policies import Decided, Policy, check_policy
from sdcli.network.predict import Photo, Prediction, Strategy, batches, check_count, choose, ensemble_of, predictions
from sdcli.network.routing import Router, averaged, reasons, visiting
from sdcli.network.signals import Signal, signal_at
from sdcli.network.stages import Stage, tap_modules, to_map
from sdcli.network.tail import Branch, DenseClassifier
from sdcli.network.taps import InputTap, Store, Tap
from sdcli.network.truncated import Truncated
from sdcli.recipe.address import FINAL
from sdcli.recipe.schema import Gradients, Trains

PARTS = frozenset({"features", "embedding", "logits"})
"""The parts of a signal that a loss may teach."""


@dataclass(frozen=True)
class PointSpec:
    """The widths of a point's signal, and what can be done with it: C of its map, D of its embedding."""

    num_chs: int
    embedding_dim: int
    classifies: bool = True
    """Whether it has logits; a tap without a head has none."""
    learns: frozenset[str] = PARTS
    """The parts through which gradients reach a weight; for some derived signals none."""
    learns_alone: frozenset[str] = PARTS - {"features"}
    """The same where only heads learn (`trains = "heads"`)."""
    sources: tuple[PointSpec, ...] = ()
    """Of what a derived signal is made from."""


class MultiExit(nn.Module):
    """An untouched timm model with a tap after each stage and one head per exit.

    Parameters of `backbone` keep timm's names. Those that never reach the output are frozen, so that every trained
    parameter has a gradient.
    """

    def __init__(self, blueprint: Blueprint, backbone: nn.Module, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        assert heads.keys() == blueprint.heads.keys(), "the heads of the blueprint"
        self.blueprint = blueprint
        self.plan = plan = blueprint.plan
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        self._store = Store()
        self._dense: DenseClassifier | None = None
        self._hooks: list[Any] = []
        self._why_not: dict[str, str] | None = None
        self._ejected = False
        self.gradients: Gradients = "sum"
        """What of the exits' gradients passes on to the stages before them."""
        self.trains: Trains = "all"
        self.calibration: Calibration | None = None
        """When images leave early, if `sdcli calibrate` has found that out for the checkpoint it was loaded from."""
        for point, stage in self.stages.items():
            # Gradient checkpointing calls blocks but not the stage around them: the tap that fires is read.
            for path in tap_modules(stage):
                tap = Tap(self._store, point, stage.tensor)
                self._hooks.append(backbone.get_submodule(path).register_forward_hook(tap))
        if plan.classifier is not None:
            classifier = backbone.get_submodule(plan.classifier)
            self._hooks.append(classifier.register_forward_pre_hook(InputTap(self._store)))
        for name, parameter in backbone.named_parameters():
            if name in set(plan.unused):
                parameter.requires_grad_(False)
        self._can_learn = {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def train_only(self, points: Collection[str], trains: Trains) -> None:
        """From now on only the heads of `points` learn, and the backbone where `trains` is "all".

        With "heads" the backbone is frozen and stays in eval mode, but its classifier learns if `final` is among
        `points`. What did not learn when this object was made never does.
        """
        self.trains = trains
        classifier = f"backbone.{self.plan.classifier}."
        for name, parameter in self.named_parameters():
            if name.startswith("heads."):
                learns = name.split(".")[1] in points
            else:
                learns = bool(points) if trains == "all" else FINAL in points and name.startswith(classifier)
            parameter.requires_grad_(learns and name in self._can_learn)
        self.train(self.training)

    def train(self, mode: bool = True) -> MultiExit:
        """A frozen backbone stays in eval mode: its batch norms keep their statistics."""
        super().train(mode)
        if self.trains == "heads":
            self.backbone.eval()
        return self

    @property
    def stages(self) -> dict[str, Stage]:
        """The stage behind every point, shallowest first."""
        return self.blueprint.stages

    @property
    def points(self) -> list[str]:
        """The points that `forward` returns, shallowest first; `final` comes last."""
        return self.blueprint.points

    @property
    def classifiers(self) -> list[str]:
        """The points that have logits: all except taps without a head."""
        return [point for point in self.points if point in self.heads or point == FINAL]

    @property
    def specs(self) -> dict[str, PointSpec]:
        """The widths of each point's signal, and which parts of it can be taught."""
        specs = {}
        for point in self.points:
            stage = self.stages[point]
            dim = self.plan.embedding_dim
            alone = PARTS - {"features"}
            if point == FINAL:
                alone = frozenset({"logits"} if point in self.heads or self.plan.classifier else ())
            elif point not in self.heads:
                alone = frozenset()
            if point in self.heads and not isinstance(self.heads[point], Branch):
                classifier = self.heads[point].classifier
                assert isinstance(classifier, nn.Linear)
                dim = classifier.in_features
            elif point not in self.classifiers:
                dim = stage.num_chs
            learns = alone if self.gradients == "detached" and point != FINAL else PARTS
            specs[point] = PointSpec(stage.num_chs, dim, point in self.classifiers, learns, alone)
        return specs

    @property
    def exits(self) -> list[str]:
        """The points that can answer, shallowest first; `final`, the network's own end, comes last."""
        return self.classifiers

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return self.blueprint.classes

    @property
    def transform(self) -> Prepared:
        """Its own preprocessing: a PIL image to a normalised tensor [3, H, W]."""
        return Prepared.of(self.blueprint.preprocess)

    def forward(self, images: Tensor, points: Mapping[str, bool] | None = None) -> dict[str, Signal]:
        """One forward pass: images [B, 3, H, W] to the signal of every point.

        `points` are those that are wanted, by default all, and whether each of them teaches; other exits' heads are
        not run.
        """
        self._check_whole()
        wanted = dict.fromkeys(self.points, True) if points is None else points
        trunk = Equilibrium([point for point in self.points if wanted.get(point)])
        shared = self.gradients == "equilibrium" and torch.is_grad_enabled()
        self._store.visit = trunk.visit if shared else None
        self._store.open = True
        logits = averaged(self.backbone(images))
        self._store.open, self._store.visit = False, None
        # Tensors that stay here would keep their graphs alive, and cannot be deep-copied.
        store, self._store.tensors = self._store.tensors, {}
        store |= trunk.read
        # One by one from `items`: torch.compile cannot look up a module by a name that varies.
        heads = dict(self.heads.items())
        signals = {}
        for point in self.points[:-1]:
            if point in wanted:
                tensor = store[point].detach() if self.gradients == "detached" else store[point]
                signals[point] = signal_at(self.stages[point], heads.get(point), tensor)
        signals[FINAL] = self._final(store, logits)
        if self._dense is not None:
            signals[FINAL].dense = self._dense.logits(self.backbone, store["places"])
        return signals

    def _final(self, store: Mapping[str, Tensor], logits: Tensor) -> Signal:
        """The signal of the network's own end; `logits` is what an encoder returns in their place."""
        features = to_map(store[FINAL], self.stages[FINAL])
        if FINAL in self.heads:
            return Signal(features, *self.heads[FINAL](logits))
        embedding = store["embedding"].flatten(1) if "embedding" in store else features.mean(dim=(2, 3))
        classifier = self.backbone.get_submodule(self.plan.classifier) if self.plan.classifier else None
        return Signal(features, embedding, logits, classify=classifier)

    def tensors(self, images: Tensor) -> dict[str, Tensor]:
        """What each point's stage returns, in the model's own layout; no head is run."""
        self._check_whole()
        with visiting(self._store, lambda _, tensor: tensor):
            self.backbone(images)
            return dict(self._store.tensors)

    def plain(self, images: Tensor) -> Tensor:
        """The logits [B, K] of the network without its exits; their heads are not run."""
        output = averaged(self.backbone(images))
        return self.heads[FINAL](output)[1] if FINAL in self.heads else output

    @torch.no_grad()
    def route(self, images: Tensor, policy: Policy) -> Decided:
        """Early exit: each image [B, 3, H, W] leaves at the first exit that is sure, and only the others go on.

        In eval mode and without gradients. The first call of a policy that uses an exit checks that images can leave
        there. Raises UserError where they cannot, and for a policy that does not fit the network.
        """
        self.check(policy)
        return self._routed(images, policy)

    @torch.no_grad()
    def stream(self, batches: Iterable[Tensor], policy: Policy) -> Iterator[Decided]:
        """Early exit over many batches [B, 3, H, W]: the answers of each, in order, as `route` gives them.

        Few images wait for others, so that the network seldom runs for a handful. On a CPU batches of fewer than 128
        images of 32x32 pixels enter together, and after each exit fewer than 32 wait, of larger images fewer than 16.
        docs/early-exit.md has what that gains. An answer may come some batches after its images were read; they have to
        stay as they are until then.
        """
        self.check(policy)
        router = self.router(policy)
        for images in batches:
            yield from router.take(images)
        yield from router.rest()

    def router(self, policy: Policy, together: bool = True) -> Router:
        """What `stream` uses; the policy has to be checked. Images of later batches go on with those that wait if
        `together`."""
        return Router(policy, self._visited, self._logits_at, len(self.classes), together)

    def _visited(self, images: Tensor, visit: Callable[[str, Tensor], Tensor]) -> Tensor:
        """The final logits [B, K] of a pass whose taps are visited."""
        self._check_whole()
        with self._evaluating(), visiting(self._store, visit):
            return self.plain(images)

    def _routed(self, images: Tensor, policy: Policy) -> Decided:
        return self.router(policy, together=False).take(images)[0]

    def check(self, policy: Policy) -> None:
        """Raises UserError for a policy that names other exits, or one that images cannot leave at."""
        check_policy(policy, self.classifiers)
        for point in policy.exits:
            if reason := self.why_not[point]:
                possible = [other for other in self.classifiers[:-1] if not self.why_not[other]]
                raise UserError(
                    f"images cannot leave {self.plan.model} at {point}: {reason}",
                    "an exit after which the rest of the network needs only the images that are left"
                    + (": " + ", ".join(possible) if possible else "; this model has none"),
                )

    @property
    def why_not(self) -> dict[str, str]:
        """For every exit, why images cannot leave there, in words; "" where they can. Found by running the network."""
        self._check_whole()
        if self._why_not is None:
            with self._evaluating():
                self._why_not = reasons(self.backbone, self._store, self.stages, self.plan.input_size)
        return self._why_not

    def upto(self, point: str) -> Truncated:
        """A copy that ends at `point`: images [B, 3, H, W] to logits [B, K]. What is deeper is physically gone.

        Raises UserError for a point that has no head.
        """
        if point not in self.classifiers:
            raise unknown("exit", point, self.classifiers)
        self._check_whole()
        own = copy.deepcopy(self)
        head = dict(own.heads.items()).get(point)
        return Truncated(own.backbone, head, own._store, point, self.stages[point], self.plan.input_size)

    def predict(
        self,
        images: Photo | Iterable[Photo] | Tensor,
        *,
        exit: str | None = None,
        ensemble: bool = False,
        budget: float | None = None,
        threshold: float | None = None,
        early_exit: bool = True,
        top: int = 5,
        batch_size: int = 64,
    ) -> list[Prediction]:
        """Classifies PIL images, image files, any iterable of them, or a batch [B, 3, H, W] that `transform` has made.

        By default images leave early, as `sdcli calibrate` has found for the checkpoint; without that the final exit
        answers, as with `early_exit=False`. Or, one of them: `exit` names the one that answers; `ensemble` takes the
        mean of all exits' logits; `budget` is the mean cost as a share of the plain network's MACs, of a calibrated
        checkpoint; with `threshold` an image leaves at the first exit that is as sure as this. `top` is how many
        classes are listed.

        Raises UserError for options that contradict each other or cannot be met, and an image that cannot be read.
        """
        self._check_whole()
        check_count("top", top)
        check_count("batch_size", batch_size)
        strategy = self.strategy(
            exit=exit, ensemble=ensemble, budget=budget, threshold=threshold, early_exit=early_exit
        )
        like = next(self.parameters())
        found: list[Prediction] = []
        read = batches(images, self.transform, self.blueprint.preprocess.input_size, batch_size)
        for decided in self.answers((batch.to(like) for batch in read), strategy):
            found += predictions(decided, self.classes, top)
        return found

    def strategy(
        self,
        *,
        exit: str | None = None,
        ensemble: bool = False,
        budget: float | None = None,
        threshold: float | None = None,
        early_exit: bool = True,
    ) -> Strategy:
        """Which exits answer: the arguments are those of `predict`. Raises UserError for what cannot be."""
        chosen = choose(
            self.calibration,
            self.exits,
            lambda: self.why_not,
            exit=exit,
            ensemble=ensemble,
            budget=budget,
            threshold=threshold,
            early_exit=early_exit,
        )
        if chosen.policy is not None and not chosen.alone:
            self.check(chosen.policy)
        return chosen

    def answers(self, batches: Iterable[Tensor], strategy: Strategy) -> Iterator[Decided]:
        """`answer` for each of many batches, in order; with early exit as `stream` does it."""
        if strategy.policy is not None and not strategy.alone:
            yield from self.stream(batches, strategy.policy)
        else:
            for images in batches:
                yield self.answer(images, strategy)

    @torch.no_grad()
    def answer(self, images: Tensor, strategy: Strategy) -> Decided:
        """What the exits that `strategy` names make of images [B, 3, H, W]; what is deeper is not run.

        In eval mode and without gradients.
        """
        if strategy.policy is None:
            with self._evaluating():
                signals = self(images)
            return ensemble_of(logits for point in self.exits if (logits := signals[point].logits) is not None)
        # Where all images leave together, nothing has to go on without some of them.
        return self._routed(images, strategy.policy) if strategy.alone else self.route(images, strategy.policy)

    def _logits_at(self, point: str, tensor: Tensor) -> Tensor:
        logits = signal_at(self.stages[point], self.heads[point], tensor).logits
        assert logits is not None
        return logits

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """In eval mode, and afterwards each module as it was."""
        training = [module for module in self.modules() if module.training]
        if training:
            # It takes longer than some networks do.
            self.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def read_densely(self) -> None:
        """From now on `final` also has the classifier's logits at every position of the last map (`Signal.dense`).

        Raises UserError for a model whose classifier cannot be applied to one position.
        """
        if self._dense is not None:
            return
        places = DenseClassifier(self.backbone, self.plan)
        # Without a module between the last stage and the classifier the stage's own tap would do; a second is simpler.
        entry = places.stage.tensor if not places.tail.modules else None
        for path in places.tail.modules[-1:] or tap_modules(places.stage):
            tap = Tap(self._store, "places", entry)
            self._hooks.append(self.backbone.get_submodule(path).register_forward_hook(tap))
        self._dense = places
        parameter = next(self.backbone.parameters())
        try:
            with torch.no_grad(), self._evaluating():
                dense = self(parameter.new_zeros(1, *self.plan.input_size))[FINAL].dense
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError):
            raise UserError(
                f"{self.plan.model}: its classifier cannot be applied to one position of the last map",
                "a model that pools its last map, such as resnet18, convnext_tiny or vit_small_patch16_224",
            ) from None
        assert dense is not None

    def eject(self) -> nn.Module:
        """The untouched timm model without taps. This object answers nothing afterwards: it raises UserError."""
        for hook in self._hooks:
            hook.remove()
        self._ejected = True
        return self.backbone

    def _check_whole(self) -> None:
        """Raises UserError where `eject` has taken the taps away, without which no exit has anything to read."""
        if self._ejected:
            raise UserError(
                "this network has no taps any more: eject() took its timm model out",
                "a network from which nothing was taken out",
                "use the model that eject() returned, or load the checkpoint again",
            )


def attach(backbone: nn.Module, blueprint: Blueprint, another: Callable[[], nn.Module] | None = None) -> MultiExit:
    """`backbone` with the exits of its blueprint.

    `another` builds a network of the same kind, whose end becomes a branch; by default it is a copy, weights included.
    Raises UserError for a model whose end cannot be copied.
    """
    plan = blueprint.plan
    built: dict[str, nn.Module] = {}
    for point, kind in blueprint.heads.items():
        stage = blueprint.stages[point]
        if kind == BRANCH:
            try:
                built[point] = Branch(another() if another else copy.deepcopy(backbone), plan, stage)
            except UserError as error:
                raise error.within("branches", key="networks.student.branches") from None
        else:
            built[point] = build_head(kind, plan, stage, len(blueprint.classes))
    return MultiExit(blueprint, backbone, built)


def build(blueprint: Blueprint, *, device: str = "cpu", pretrained: bool = False) -> MultiExit:
    """A fresh network: random weights, or timm's pretrained ones where they fit; on "meta" without weights or memory.

    Raises UserError where pretrained weights are not available.
    """
    another = partial(create, blueprint.architecture, device=device, pretrained=pretrained)
    with torch.device(device):
        return attach(another(), blueprint, another)
