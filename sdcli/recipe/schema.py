"""The tables of a recipe file: their keys, types and ranges.

What a table's own keys mean is told where they are used; here they are named and held in range.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sdcli.recipe import ramps
from sdcli.recipe.address import AVERAGE, STUDENT, TEACHER, Address

Word = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=64)]
"""The name of a network or a view, which addresses are made of."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=64)]
"""The name of a loss or a signal."""
MEAN = "mean"
MOST_EPOCHS = 1_000_000
MOST_IMAGES = 1_000_000
"""Of an update."""
MOST_ENDS = 64
"""Exits or branches of a network."""


class Table(BaseModel):
    """One table of a recipe: unknown keys and wrong types are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Network(Table):
    """`[networks.NAME]`: who takes part. The command line names `student`'s model, `model` that of any other."""

    model: str | None = None
    """A timm model; not the student's."""
    learns: bool = True
    """Whether it is trained; one that is not is run as it will be used, in eval mode and without gradients."""
    weights: str = "random"
    """`random`, `pretrained` (timm's), or the path of a checkpoint."""
    exits: Literal["auto", "none"] | Annotated[int, Field(ge=1)] | Annotated[list[str], Field(min_length=1)] = "auto"
    """`auto` (one per stage), `none` (the plain model), how many in all with the final one, or the modules to tap."""
    head: str = "auto"
    """The exits' heads: `auto` (what suits the stage), `none` (taps without classifiers), or a name of
    `sdcli recipes heads`."""
    branches: Annotated[int, Field(ge=2, le=MOST_ENDS)] | None = None
    """Instead of exits: how many ends the network has, all grown on its last stage but one (ONE's branches). The last
    is its own, `final`; the others are copies with weights of their own, `exit1`, `exit2`, …"""
    stem: Literal["auto", "imagenet", "cifar"] = "auto"
    """`cifar` keeps the resolution that an ImageNet stem throws away; `auto` takes it where images are small."""
    model_args: dict[str, Any] = {}
    """More arguments for `timm.create_model`."""


class Augment(Table):
    """`[batch.augment]`: how training images are varied."""

    crop: Literal["auto", "pad", "resized", "none"] = "auto"
    """`pad` shifts by up to an eighth, `resized` takes a part of any size, `auto` what suits the image's size."""
    hflip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """How often left and right are swapped; never where a data set says that it would change the class."""
    aa: str = "none"
    """`cifar10` (AutoAugment's), `trivial`, or one of timm's, such as `rand-m9-mstd0.5-inc1`."""
    cutout: Annotated[int, Field(ge=0, le=10_000)] = 0
    """The side in pixels of a square that is taken out; 0: none."""
    reprob: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How often a rectangle is replaced by noise (random erasing)."""
    fill: Annotated[int, Field(ge=0, le=255)] = 0
    """The grey of borders."""


class BatchTable(Table):
    """`[batch]`: what the networks are shown."""

    size: Annotated[int, Field(ge=1, le=MOST_IMAGES)] = 128
    """Images of an update, over all processes."""
    augment: Augment = Augment()
    """The table `[batch.augment]`."""
    mixup: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Images blended with others: alpha of the Beta distribution that says how much of one stays; 0: none are."""
    cutmix: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Images with a rectangle of another; alpha as above. Where both are used, each takes half of the images."""
    mates: Annotated[int, Field(ge=0, le=MOST_IMAGES)] = 0
    """Images of the same class that follow each drawn one in a batch: BAKE's sampler."""
    views: dict[Word, View] = {}
    """The tables `[batch.views.NAME]`."""
    mixup_prob: Annotated[float, Field(gt=0, le=1)] = 1.0
    """How often an image is mixed at all."""

    @property
    def mixes(self) -> bool:
        """Whether labels are shares of several classes."""
        return bool(self.mixup or self.cutmix)


Share = Annotated[float, Field(ge=0)]
"""A time: below 1 a share of the run, from 1 on epochs."""


class WeightSchedule(Table):
    """A weight over time: `{ value = 1.0, sigmoid = 0.25 }`. Its shapes multiply."""

    value: Annotated[float, Field(ge=0)] = 1.0
    """What it is, or where it begins."""
    to: Annotated[float, Field(ge=0)] | None = None
    """Where the value goes in a straight line over the run."""
    warmup: Share | None = None
    """How long the weight rises in a straight line from 0."""
    sigmoid: Share | None = None
    """How long it rises along exp(-5 (1 - t)^2), as ONE's does."""
    start: Share | None = None
    """When it begins: 0 before."""
    stop: Share | None = None
    """When it ends: 0 from then on."""
    decay: Share | None = None
    """When it begins to fall in a straight line, to 0 at the end of the run."""

    @property
    def varies(self) -> bool:
        """Whether it is not the same all the time."""
        return any(getattr(self, name) is not None for name in ("to", *RAMPS))

    def at(self, epoch: float, epochs: float) -> float:
        """The weight after `epoch` of `epochs`."""
        weight = self.value if self.to is None else ramps.between(epoch, epochs, self.value, self.to)
        for name, ramp in RAMPS.items():
            if (time := getattr(self, name)) is not None:
                weight *= ramp(epoch, epochs, time)
        return weight


RAMPS = {
    "warmup": ramps.linear_warmup,
    "sigmoid": ramps.sigmoid_ramp,
    "start": ramps.on_from,
    "stop": ramps.off_from,
    "decay": ramps.linear_decay,
}

Weight = Annotated[float, Field(ge=0)] | WeightSchedule


class Loss(BaseModel):
    """`[losses.NAME]`: one comparison. Further keys are the loss's own and are checked against its function."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    kind: str
    """A name of `sdcli recipes losses`."""
    on: str | list[str]
    """What it teaches: points, or a signal that lets gradients pass."""
    target: str | list[str] = "label"
    """`label`, `next` (the next deeper point), a point, a signal; or one for each of `on`."""
    weight: Weight | list[Weight] = 1.0
    """A number, a weight over time, or one of these for each of `on`."""

    @property
    def options(self) -> dict[str, Any]:
        """The loss's own keys."""
        return dict(self.model_extra or {})

    @property
    def weights(self) -> list[WeightSchedule]:
        """One for all points, or one for each."""
        given = self.weight if isinstance(self.weight, list) else [self.weight]
        return [weight if isinstance(weight, WeightSchedule) else WeightSchedule(value=weight) for weight in given]


class Derived(BaseModel):
    """`[signals.NAME]`: a prediction made from others. Further keys are the kind's own."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    kind: str
    """A name of `sdcli recipes signals`."""
    of: str | list[str]
    """The points that it is made of."""

    @property
    def options(self) -> dict[str, Any]:
        """The kind's own keys."""
        return dict(self.model_extra or {})


class View(Table):
    """`[batch.views.NAME]`: images that are shown beside the batch's own, read as `final@NAME`."""

    of: Literal["itself", "class"]
    """`itself`: the same image, varied anew; `class`: one of its class, drawn anew in each epoch, perhaps itself."""


class Optimizer(Table):
    """`[optimizer]`: timm's optimizers by timm's names."""

    opt: str = "momentum"
    """`momentum` is SGD with plain momentum, `sgd` adds Nesterov's: timm's names, not ours."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """The learning rate after the warm-up."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """For optimizers that have one."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """As the optimizer has it: into the gradient with SGD, decoupled with AdamW."""
    decay_norm_and_bias: bool = True
    """Whether weight decay also applies to norms, biases and what the model itself exempts (position embeddings), as in
    the papers' code; timm's default is that it does not."""
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """The largest norm of the gradient."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What happens where a loss or the gradient is not finite: the run stops, or the update is skipped."""


class Schedule(Table):
    """`[schedule]`: timm's learning-rate schedules by timm's names.

    Times below 1 are shares of the run, from 1 on epochs: a recipe keeps its shape when `--epochs` changes.
    """

    sched: Literal["cosine", "multistep", "step", "poly", "tanh", "none"] = "cosine"
    """How the rate falls."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """How long it first rises."""
    warmup_lr: Annotated[float, Field(ge=0)] = 1e-5
    """Where it begins to."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Where it ends."""
    decay_milestones: list[Annotated[float, Field(gt=0)]] = []
    """When `multistep` multiplies the rate by `decay_rate`."""
    decay_epochs: Annotated[float, Field(gt=0)] = 0.3
    """How long `step` waits between two such drops."""
    decay_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """What a drop multiplies the rate by."""


class Ema(Table):
    """`[ema]`: an average of the student's weights over time, which is then what is scored and saved.

    timm's `ModelEmaV3` (Polyak averaging; as a teacher: Tarvainen and Valpola 2017, arXiv:1703.01780).
    """

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """How much of the average stays at each update."""
    warmup: bool = True
    """Whether the decay begins low, so that the first weights are soon forgotten."""


class Phase(Table):
    """`[[phases]]`: a part of the run, with a schedule and an optimizer of its own."""

    name: str
    """What the log calls it."""
    epochs: Annotated[int, Field(ge=1)] | None = None
    """Where it is not given: the recipe's."""
    losses: Annotated[list[str], Field(min_length=1)] | None = None
    """Those that teach in it; where none are given: all."""
    teacher: bool = False
    """Whether the student as it is when the phase begins (with `[ema]`, its average) teaches from then on, frozen, as
    `teacher.final`."""
    fresh: bool = False
    """Whether the student begins anew, from its `weights`, and with it whatever the losses and signals have learnt or
    remembered. Otherwise the losses go on from what those of the phase before have learnt."""
    rounds: Annotated[int, Field(ge=1, le=1000)] = 1
    """How many times in a row."""


class Recipe(Table):
    """The recipe itself: all tables, checked."""

    title: str = ""
    """What lists call it."""
    paper: str = ""
    """A link."""
    epochs: Annotated[int, Field(ge=1, le=MOST_EPOCHS)] = 200
    """Of each phase, where there are several."""
    best: Annotated[str, Field(pattern=r"^(mean|ensemble|final|exit[1-9][0-9]*)$")] = MEAN
    """What the best epoch is chosen by on the validation split: the top-1 of the `ensemble`, of `final` or an exit, or
    the `mean` of all of these classifiers but the ensemble."""
    networks: dict[Word, Network] = {}
    """The tables `[networks.NAME]`."""
    batch: BatchTable = BatchTable()
    """The table `[batch]`."""
    signals: dict[Name, Derived] = {}
    """The tables `[signals.NAME]`."""
    losses: dict[Name, Loss]
    """The tables `[losses.NAME]`, one at least."""
    optimizer: Optimizer = Optimizer()
    """The table `[optimizer]`."""
    schedule: Schedule = Schedule()
    """The table `[schedule]`."""
    ema: Ema | None = None
    """The table `[ema]`, where there is to be an average."""
    phases: list[Phase] = []
    """The tables `[[phases]]`, one after the other; none: one phase with all losses."""

    @property
    def student(self) -> Network:
        """The network that the command line names."""
        return self.networks.get(STUDENT, Network())

    @property
    def others(self) -> dict[str, Network]:
        """All networks but the student, by name."""
        return {name: network for name, network in self.networks.items() if name != STUDENT}

    @property
    def all_phases(self) -> list[Phase]:
        """Its phases one after the other, rounds and all, each with its epochs and losses; one where none are named."""
        phases = self.phases or [Phase(name="")]
        return [
            phase.model_copy(
                update={"epochs": phase.epochs or self.epochs, "losses": phase.losses or list(self.losses)}
            )
            for phase in phases
            for _ in range(phase.rounds)
        ]

    @property
    def phase_epochs(self) -> list[int]:
        """How many epochs each of `all_phases` takes."""
        return [phase.epochs or self.epochs for phase in self.all_phases]

    @property
    def taking_part(self) -> dict[str, bool]:
        """Every network by name, those without a table included, and whether it learns."""
        networks = {STUDENT: True} | {name: table.learns for name, table in self.others.items()}
        if self.ema is not None:
            networks[AVERAGE] = False
        if any(phase.teacher for phase in self.phases):
            networks[TEACHER] = False
        return networks

    def named(self, losses: Iterable[str] | None = None) -> list[str]:
        """All points, signals and words that these losses name, and what the signals among them are made of; without
        `losses`, what all losses and all signals name. Each as it is written."""
        named: list[str] = []
        for name in self.losses if losses is None else losses:
            named += [*as_list(self.losses[name].on), *as_list(self.losses[name].target)]
        signals = [signal for name, signal in self.signals.items() if losses is None or name in named]
        return [*named, *(name for signal in signals for name in as_list(signal.of))]

    def addresses(self, losses: Iterable[str] | None = None) -> list[Address]:
        """The points among what `named` returns."""
        found = [Address.find(name) for name in self.named(losses) if name not in self.signals]
        return [address for address in found if address is not None]

    def reads(self, network: str, losses: Iterable[str] | None = None) -> bool:
        """Whether one of these losses, or a signal that it reads, names a point of this network."""
        return any(address.network == network for address in self.addresses(losses))


def as_list(value: str | list[str]) -> list[str]:
    """What is written alone or as a list, as a list."""
    return [value] if isinstance(value, str) else value


# By their places; the first that has a key is the one that a misplaced key is sent to.
TABLES: dict[str, type[BaseModel]] = {
    "losses.NAME": Loss, "batch.augment": Augment, "batch": BatchTable, "optimizer": Optimizer, "schedule": Schedule,
    "networks.NAME": Network, "ema": Ema, "signals.NAME": Derived, "batch.views.NAME": View, "phases": Phase,
}  # fmt: skip

RENAMED = {
    ("batch", "also"): "views",
    ("batch", "mix_prob"): "mixup_prob",
    ("batch.augment", "mirror"): "hflip",
    ("batch.augment", "erase"): "reprob",
    ("batch.augment", "policy"): "aa",
    ("schedule", "warmup"): "warmup_epochs",
    ("schedule", "milestones"): "decay_milestones",
    ("schedule", "decay_time"): "decay_epochs",
    ("losses.NAME.weight", "on"): "start",
    ("losses.NAME.weight", "off"): "stop",
}
"""Keys that had another name, by their table: what they are called now."""
