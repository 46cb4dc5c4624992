"""The tables of a recipe file: their keys, types and ranges.

The strings below the keys become docs/recipes.md. The own keys of a loss or signal are the arguments of its function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from sdcli.recipe import ramps
from sdcli.recipe.address import AVERAGE, FINAL, STUDENT, TEACHER, Address

Word = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=64)]
"""The name of a network or a view; addresses are made of these."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=64)]
"""The name of a loss or a signal."""
Trains = Literal["all", "heads"]
Gradients = Literal["sum", "equilibrium", "detached"]
MEAN = "mean"
MOST_EPOCHS = 1_000_000
MOST_IMAGES = 1_000_000
"""Per update."""
MOST_ENDS = 64
"""Exits or branches of a network."""


class Table(BaseModel):
    """One table of a recipe: unknown keys and wrong types are errors, and instances are immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Network(Table):
    """`[networks.NAME]`: a network that takes part. The command line sets the model of `student`, `model` that of any
    other network."""

    model: str | None = None
    """A timm model; not for the student, and not needed for a checkpoint of sdcli, which names its own."""
    learns: bool = True
    """Whether the network is trained. If not, it runs without gradients, and its weights are loaded again when the run
    is resumed."""
    mode: Literal["eval", "train"] = "eval"
    """Of a network that does not learn: `eval`, or `train`, in which batch norms use the statistics of the batch and
    dropout is on, as in some authors' code. Its own statistics stay as they are in both."""
    weights: str = "random"
    """`random`, `pretrained` (timm's), or the path of a run, or of a checkpoint of sdcli or of timm's own format. A
    relative path starts at the working directory, not at the recipe. Unless they are random, the student's weights
    decide the input size, mean and standard deviation of the images; `--image-size` sets another size. A network that
    does not learn gets the same crops in its own size and colours, and its classes are found by name."""
    exits: Literal["auto", "none"] | Annotated[int, Field(ge=1)] | Annotated[list[str], Field(min_length=1)] = "auto"
    """`auto` (one per stage), `none` (the plain model), the number of exits including the final one, or a list of
    modules to tap."""
    head: str = "auto"
    """The heads of the exits: `auto` (chosen to fit the stage), `none` (taps without classifiers), or a name from
    `sdcli recipes heads`."""
    branches: Annotated[int, Field(ge=2, le=MOST_ENDS)] | None = None
    """Instead of exits: the number of branches that the network splits into after its last stage but one (ONE's
    branches). The last branch is the network's own, `final`; the others are copies with weights of their own, `exit1`,
    `exit2`, …"""
    stem: Literal["auto", "imagenet", "cifar"] = "auto"
    """`cifar` keeps the resolution that an ImageNet stem discards; `auto` uses it for small images."""
    model_args: dict[str, Any] = {}
    """Further arguments for `timm.create_model`."""
    trains: Trains = "all"
    """What is trained: `all`, or the `heads` of the exits on a finished network. The backbone is then frozen and runs
    in eval mode; only its own classifier is trained too if a loss is on the logits of `final`."""
    gradients: Gradients = "sum"
    """What the stages hear of the exits behind them: the `sum` of their gradients, the mean (`equilibrium`, Li et al.
    2019, arXiv:1908.06294), or nothing (`detached`: heads learn from the trunk, and the trunk only from `final`)."""

    optimizer: Optimizer | None = None
    """The table `[networks.NAME.optimizer]`: keys of `[optimizer]` that are different for this network; not for the
    student."""
    schedule: Schedule | None = None
    """The table `[networks.NAME.schedule]`: keys of `[schedule]` that are different for this network; not for the
    student."""

    @property
    def finished(self) -> bool:
        """Whether its backbone is what it was before the run: then a checkpoint decides what it is."""
        return (not self.learns or self.trains == "heads") and self.weights != "random"

    @property
    def awaited(self) -> bool:
        """Whether it is left open which network this is: another than the student, without model and weights."""
        return self.model is None and self.weights == "random"

    @property
    def from_file(self) -> bool:
        """Whether `weights` is the path of a file."""
        return self.weights not in ("random", "pretrained")


def weights_file(path: Path) -> str:
    """A file as `weights` names it: a plain word would be a keyword, such as pretrained."""
    return str(path) if set("./~") & set(str(path)) else f"./{path}"


class Augment(Table):
    """`[batch.augment]`: the augmentation of training images."""

    crop: Literal["auto", "pad", "resized", "none"] = "auto"
    """`pad` shifts the image by up to an eighth, `resized` crops a part of any size, `auto` chooses by image size,
    `none` does not crop."""
    hflip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The probability of a horizontal flip; disabled for data sets whose classes are not mirror-invariant."""
    aa: str = "none"
    """The augmentation policy: `none`, `cifar10` (AutoAugment's), `trivial`, or one of timm's, such as
    `rand-m9-mstd0.5-inc1`."""
    cutout: Annotated[int, Field(ge=0, le=10_000)] = 0
    """The side in pixels of the square that is cut out; 0 disables it."""
    reprob: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The probability that a rectangle is replaced by noise (random erasing)."""
    fill: Annotated[int, Field(ge=0, le=255)] = 0
    """The grey value of padding and of the borders that policies leave."""


class BatchTable(Table):
    """`[batch]`: the images that the networks see."""

    size: Annotated[int, Field(ge=1, le=MOST_IMAGES)] = 128
    """Images per update, over all processes."""
    augment: Augment = Augment()
    """The table `[batch.augment]`."""
    mixup: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Mixup: alpha of the Beta distribution from which each image's mixing ratio is drawn; 0 disables it."""
    cutmix: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """CutMix: alpha for the area of the pasted rectangle, as in `mixup`; 0 disables it. With both, each applies to half
    of the images."""
    mates: Annotated[int, Field(ge=0, le=MOST_IMAGES)] = 0
    """The number of images of the same class that follow each drawn image in a batch (BAKE's sampler)."""
    views: dict[Word, View] = {}
    """The tables `[batch.views.NAME]`."""
    mixup_prob: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The probability that an image is mixed at all."""

    @property
    def mixes(self) -> bool:
        """Whether labels are mixtures of several classes."""
        return bool(self.mixup or self.cutmix)


Share = Annotated[float, Field(ge=0)]
"""A time: below 1 a fraction of the run, from 1 on epochs."""


class WeightSchedule(Table):
    """A weight over time: `{ value = 1.0, sigmoid = 0.25 }`. If several of these keys are set, their effects
    multiply."""

    value: Annotated[float, Field(ge=0)] = 1.0
    """The weight, or its initial value if `to` is set."""
    to: Annotated[float, Field(ge=0)] | None = None
    """The final value: the weight moves to it linearly over the run."""
    warmup: Share | None = None
    """How long the weight rises linearly from 0."""
    sigmoid: Share | None = None
    """How long the weight rises along exp(-5 (1 - t)^2), as in ONE."""
    start: Share | None = None
    """When the loss starts; its weight is 0 before."""
    stop: Share | None = None
    """When the loss stops; its weight is 0 from then on."""
    decay: Share | None = None
    """When the weight begins to fall linearly, to 0 at the end of the run."""
    share: Annotated[float, Field(gt=0, le=1000)] | None = None
    """In place of `value`: the weight is found by itself, so that the loss pulls at the student's backbone this many
    times as much as the loss that `of` names. Measured now and then in the first half of each phase."""
    of: Name | None = None
    """The loss that `share` refers to."""

    @model_serializer(mode="wrap")
    def _without_value(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A weight that finds itself has no value."""
        table: dict[str, Any] = dump(self)
        return {key: value for key, value in table.items() if key != "value" or self.share is None}

    @property
    def varies(self) -> bool:
        """Whether the weight changes over the run."""
        return any(getattr(self, name) is not None for name in ("to", "share", *RAMPS))

    def at(self, epoch: float, epochs: float) -> float:
        """The weight after `epoch` of `epochs`; of one that finds itself, the factor that its ramps make."""
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
    """`[losses.NAME]`: one comparison. Further keys belong to the kind of loss and are checked against its function."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    kind: str
    """A name from `sdcli recipes losses`."""
    on: str | list[str]
    """The points that it teaches, or a signal with a gradient."""
    target: str | list[str] = "label"
    """`label`, `next` (the next deeper point), a point or a signal; or a list with one of these for each of `on`."""
    weight: Weight | list[Weight] = 1.0
    """A number or a weight over time; or a list with one of these for each of `on`."""

    @property
    def options(self) -> dict[str, Any]:
        """The loss's own keys."""
        return dict(self.model_extra or {})

    @property
    def share(self) -> WeightSchedule | None:
        """The weight, if it is one that finds itself."""
        return self.weight if isinstance(self.weight, WeightSchedule) and self.weight.share is not None else None

    @property
    def weights(self) -> list[WeightSchedule]:
        """One weight for all points, or one for each."""
        given = self.weight if isinstance(self.weight, list) else [self.weight]
        return [weight if isinstance(weight, WeightSchedule) else WeightSchedule(value=weight) for weight in given]


class Derived(BaseModel):
    """`[signals.NAME]`: a prediction made from others. Further keys belong to the kind of signal."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    kind: str
    """A name from `sdcli recipes signals`."""
    of: str | list[str]
    """The points that it is made from."""

    @property
    def options(self) -> dict[str, Any]:
        """The kind's own keys."""
        return dict(self.model_extra or {})


class View(Table):
    """`[batch.views.NAME]`: further images that are shown with each batch, addressed as `final@NAME`."""

    of: Literal["itself", "class"]
    """`itself`: the same image, augmented again; `class`: an image of the same class, drawn anew in each epoch
    (possibly the same image)."""


class Optimizer(Table):
    """`[optimizer]`: timm's optimizers, under timm's names."""

    opt: str = "momentum"
    """In timm's names, `momentum` is SGD with plain momentum and `sgd` is SGD with Nesterov momentum."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """The learning rate after the warm-up."""
    head_lr: Annotated[float, Field(gt=0)] = 1.0
    """A factor of the rate for what starts fresh on a pretrained network: the heads of exits, the final classifier, and
    losses and signals with weights of their own."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """A factor of the rate from each of timm's layers to the one before it, so that early layers change less (Bao et
    al. 2022, arXiv:2106.08254); 1 gives all layers the same rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """For optimizers with momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Applied as the optimizer defines it: through the gradient in SGD, decoupled in AdamW."""
    decay_norm_and_bias: bool = True
    """Whether weight decay also applies to norms, biases and parameters that the model exempts (position embeddings),
    as in the papers' code; timm's default is false."""
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """The maximum norm of the gradient; without it, gradients are not clipped."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """If a loss or the gradient is not finite: `stop` the run, or `skip` the update."""


class Schedule(Table):
    """`[schedule]`: timm's learning-rate schedules, under timm's names.

    Times below 1 are fractions of the run, from 1 on epochs: a recipe keeps its shape when `--epochs` changes.
    """

    sched: Literal["cosine", "multistep", "step", "poly", "tanh", "none"] = "cosine"
    """How the learning rate falls."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """How long the rate rises first."""
    warmup_lr: Annotated[float, Field(ge=0)] = 1e-5
    """The rate at the start of the warm-up."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """The rate that `cosine`, `poly` and `tanh` fall to."""
    decay_milestones: list[Annotated[float, Field(gt=0)]] = []
    """When `multistep` multiplies the rate by `decay_rate`."""
    decay_epochs: Annotated[float, Field(gt=0)] = 0.3
    """The time between two drops of `step`."""
    decay_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The factor that a drop multiplies the rate by; in `poly`, the power."""


class Ema(Table):
    """`[ema]`: an average of the student's weights over time, which is scored and saved in place of the student.

    timm's `ModelEmaV3` (Polyak averaging; as a teacher: Tarvainen and Valpola 2017, arXiv:1703.01780).
    """

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """The fraction of the average that each update keeps."""
    warmup: bool = True
    """Whether the decay starts low, so that the first weights are soon forgotten."""


class Rule(Table):
    """`[rules.NAME]`: whether a network learns from a batch."""

    kind: Literal["switokd"]
    """`switokd`: the network rests while it is too far ahead (SwitOKD, Qian et al. 2022, arXiv:2204.00793)."""
    network: Word
    """The network that rests."""
    behind: str = FINAL
    """The point that it must not leave too far behind."""
    condition: Literal["code", "paper"] = "code"
    """`paper`: it rests if G > s - exp(-t / (s + t)) t, with the batch's means of the L1 distances between the
    predictions of the two (G), and between either's and the labels (s of `behind`, t of the network's `final`);
    `code`: only if also t < s, as in all of the authors' code."""


class Prune(Table):
    """`[phases.prune]`: weights that are set to 0 at the start of the phase and stay 0 from then on."""

    amount: Annotated[float, Field(gt=0, lt=1)]
    """The share of the weights still there that goes, over all convolutions and linear layers together."""
    network: Word = STUDENT
    """The network that is pruned."""
    by: Literal["magnitude", "random", "prue"] = "magnitude"
    """What goes: the smallest weights, any, or those of convolutions without which predictions are less certain (PrUE,
    Wang et al. 2022)."""


class Phase(Table):
    """`[[phases]]`: a part of the run, with a schedule and an optimizer of its own."""

    name: str
    """The name of the phase in the log."""
    epochs: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None = None
    """The length of the phase; by default the recipe's `epochs`, and below 1 a fraction of those."""
    losses: Annotated[list[str], Field(min_length=1)] | None = None
    """The losses that apply in this phase; by default all."""
    learns: Annotated[list[Word], Field(min_length=1)] | None = None
    """The networks that learn in this phase; by default all that learn at all. The others are as they are, in eval
    mode. The student learns in the last phase at least."""
    trains: Trains | None = None
    """What is trained of the student in this phase; by default what `[networks.student]` says."""
    prune: Prune | None = None
    """The table `[phases.prune]`; with `rounds`, every round prunes again, and its schedule starts anew."""
    teacher: bool = False
    """Whether a frozen copy of the student at the start of this phase (with `[ema]`, of its average) teaches from then
    on, as `teacher.final`."""
    fresh: bool = False
    """Whether the student starts again from its `weights`, and the losses and signals forget what they have learned or
    remembered. Otherwise the losses keep what they learned in the phase before."""
    rounds: Annotated[int, Field(ge=1, le=1000)] = 1
    """How many times in a row the phase runs."""


class Recipe(Table):
    """The recipe itself: its top-level keys and tables."""

    title: str = ""
    """The name that lists show."""
    paper: str = ""
    """A link to the paper."""
    epochs: Annotated[int, Field(ge=1, le=MOST_EPOCHS)] = 200
    """The length of the run, or of each phase."""
    best: Annotated[str, Field(pattern=r"^(mean|ensemble|final|exit[1-9][0-9]*)$")] = MEAN
    """How the best epoch is chosen on the validation split: by the top-1 of `final`, an exit or the `ensemble`, or
    by the `mean` of `final` and all exits."""
    random_weights: bool = False
    """Whether the weights of the losses are replaced, at every update, by random ones that sum to 1: softmax of normal
    numbers, one for each loss at each point. The control for tuned weights (RLW, arXiv:2111.10603). A loss of weight 0
    stays off."""
    networks: dict[Word, Network] = {}
    """The tables `[networks.NAME]`."""
    batch: BatchTable = BatchTable()
    """The table `[batch]`."""
    signals: dict[Name, Derived] = {}
    """The tables `[signals.NAME]`."""
    losses: dict[Name, Loss]
    """The tables `[losses.NAME]`, at least one."""
    optimizer: Optimizer = Optimizer()
    """The table `[optimizer]`."""
    schedule: Schedule = Schedule()
    """The table `[schedule]`."""
    ema: Ema | None = None
    """The table `[ema]`; without it, no average is kept."""
    rules: dict[Word, Rule] = {}
    """The tables `[rules.NAME]`."""
    updates: Literal["simultaneous", "sequential"] = "simultaneous"
    """Whether the networks that learn all take a step after the same predictions, or one after the other, each after
    new predictions of all (DML, as in its paper)."""
    phases: list[Phase] = []
    """The tables `[[phases]]`, in the order in which they run; without any, the run is one phase with all losses."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, tables: Any) -> Any:
        """What a network's own optimizer and schedule leave out is that of the recipe."""
        networks = tables.get("networks") if isinstance(tables, dict) else None
        if not isinstance(networks, dict):
            return tables
        filled = {}
        for name, network in networks.items():
            filled[name] = network
            for part in ("optimizer", "schedule"):
                own = network.get(part) if isinstance(network, dict) else None
                if isinstance(own, dict) and isinstance(shared := tables.get(part, {}), dict):
                    filled[name] = {**filled[name], part: {**shared, **own}}
        return {**tables, "networks": filled}

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
        """The phases in order, with their rounds, each with its epochs, its losses and what it trains; a single phase
        if the recipe has none."""
        phases = self.phases or [Phase(name="")]
        return [
            phase.model_copy(
                update={
                    "epochs": self._length(phase),
                    "losses": phase.losses or list(self.losses),
                    "trains": phase.trains or self.student.trains,
                }
            )
            for phase in phases
            for _ in range(phase.rounds)
        ]

    def _length(self, phase: Phase) -> int:
        if phase.epochs is None:
            return self.epochs
        return max(1, round(phase.epochs * self.epochs)) if phase.epochs < 1 else int(phase.epochs)

    @property
    def phase_epochs(self) -> list[int]:
        """The number of epochs of each of `all_phases`."""
        return [self._length(phase) for phase in self.all_phases]

    @property
    def pruned(self) -> list[str]:
        """The networks that a phase prunes."""
        return list(dict.fromkeys(phase.prune.network for phase in self.phases if phase.prune))

    @property
    def awaited(self) -> list[str]:
        """The networks that the command line has yet to name."""
        return [name for name, network in self.others.items() if network.awaited]

    @property
    def taking_part(self) -> dict[str, bool]:
        """Every network by name, including those without a table, and whether it learns."""
        networks = {STUDENT: True} | {name: table.learns for name, table in self.others.items()}
        if self.ema is not None:
            networks[AVERAGE] = False
        if any(phase.teacher for phase in self.phases):
            networks[TEACHER] = False
        return networks

    def learning(self, phase: int) -> list[str]:
        """The networks that learn in a phase of `all_phases`."""
        able = [name for name, learns in self.taking_part.items() if learns]
        wanted = self.all_phases[phase].learns
        return [name for name in able if wanted is None or name in wanted]

    def optimizer_of(self, network: str) -> Optimizer:
        """A network's own optimizer, or else that of the recipe."""
        return (self.networks[network].optimizer if network in self.networks else None) or self.optimizer

    def schedule_of(self, network: str) -> Schedule:
        """A network's own schedule, or else that of the recipe."""
        return (self.networks[network].schedule if network in self.networks else None) or self.schedule

    def named(self, losses: Iterable[str] | None = None) -> list[str]:
        """All points, signals and keywords that these losses name, and those that the signals among them are made from;
        without `losses`, those of all losses and all signals. Each as it is written."""
        named: list[str] = []
        for name in self.losses if losses is None else losses:
            named += [*as_list(self.losses[name].on), *as_list(self.losses[name].target)]
        signals = [signal for name, signal in self.signals.items() if losses is None or name in named]
        return [*named, *(name for signal in signals for name in as_list(signal.of))]

    def addresses(self, losses: Iterable[str] | None = None) -> list[Address]:
        """The points among the names that `named` returns."""
        found = [Address.find(name) for name in self.named(losses) if name not in self.signals]
        return [address for address in found if address is not None]

    def addresses_on(self, loss: str) -> list[Address]:
        """The points that a loss teaches, signals left out."""
        found = [Address.find(name) for name in as_list(self.losses[loss].on) if name not in self.signals]
        return [address for address in found if address is not None]

    def only_on_exits(self, loss: str) -> bool:
        """Whether a loss teaches only exits of the student: neither its `final` nor a signal."""
        points = [Address.find(name) for name in as_list(self.losses[loss].on) if name not in self.signals]
        return len(points) == len(as_list(self.losses[loss].on)) and all(
            address is not None and address.network == STUDENT and address.point not in (FINAL, "all")
            for address in points
        )

    def reads(self, network: str, losses: Iterable[str] | None = None) -> bool:
        """Whether one of these losses, or a signal that it reads, names a point of this network."""
        return any(address.network == network for address in self.addresses(losses))

    def points_of(self, network: str) -> set[str]:
        """The points of this network that losses and signals name, as they are written."""
        return {address.point for address in self.addresses() if address.network == network}


def with_weights(recipe: Recipe, found: Mapping[str, float]) -> Recipe:
    """The recipe with the weights that were found as numbers, by loss, so that it can be repeated without searching."""
    losses = dict(recipe.losses)
    for name, weight in found.items():
        if (share := losses[name].share) is not None:
            number = share.model_copy(update={"share": None, "of": None, "value": weight})
            plain = weight if not number.varies else number
            losses[name] = losses[name].model_copy(update={"weight": plain})
    return recipe.model_copy(update={"losses": losses})


def as_list(value: str | list[str]) -> list[str]:
    """The value itself if it is a list, otherwise a list of it alone."""
    return [value] if isinstance(value, str) else value


# By path. An error about a misplaced key points to the first table that has it.
TABLES: dict[str, type[BaseModel]] = {
    "losses.NAME": Loss, "batch.augment": Augment, "batch": BatchTable, "optimizer": Optimizer, "schedule": Schedule,
    "networks.NAME": Network, "networks.NAME.optimizer": Optimizer, "networks.NAME.schedule": Schedule,
    "rules.NAME": Rule, "ema": Ema, "signals.NAME": Derived, "batch.views.NAME": View, "phases": Phase,
    "phases.prune": Prune,
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
"""Keys that were renamed, by their table and former name."""
