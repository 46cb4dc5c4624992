"""The tables of a recipe file: read, extend, override, check. Knows nothing of torch, so that mistakes show at once.

A recipe is TOML. `extends` names another whose tables this one refines key by key; several recipes given together
refine each other from left to right; `--set losses.soft.weight=0.5` refines them all. What a table's own keys mean is
told where they are used; here their names, types and ranges are held.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdcli import ramps, toml
from sdcli.errors import UserError, default_of, did_you_mean, invalid, unknown

STUDENT = "student"
"""The network that the command line names; an address without a network means one of its points."""
_NETWORK, _IMAGES = r"(?:[A-Za-z]\w*\.)?", r"(?:@[A-Za-z]\w*)?"
POINTS = re.compile(_NETWORK + r"(?:final|exits|all|exit[1-9]\d*)" + _IMAGES)
POINT = re.compile(_NETWORK + r"(?:final|exit[1-9]\d*)" + _IMAGES)


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
    branches: Annotated[int, Field(ge=2)] | None = None
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
    mirror: Annotated[float, Field(ge=0, le=1)] = 0.5
    """How often left and right are swapped; never where a data set says that it would change the class."""
    policy: str = "none"
    """`cifar10` (AutoAugment's), `trivial`, or one of timm's, such as `rand-m9-mstd0.5-inc1`."""
    cutout: Annotated[int, Field(ge=0)] = 0
    """The side in pixels of a square that is taken out; 0: none."""
    erase: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How often a rectangle is replaced by noise (random erasing)."""
    fill: Annotated[int, Field(ge=0, le=255)] = 0
    """The grey of borders."""


class BatchTable(Table):
    """`[batch]`: what the networks are shown."""

    size: Annotated[int, Field(ge=1)] = 128
    """Images of an update, over all processes."""
    augment: Augment = Augment()
    """The table `[batch.augment]`."""
    mixup: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Images blended with others: alpha of the Beta distribution that says how much of one stays; 0: none are."""
    cutmix: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Images with a rectangle of another; alpha as above. Where both are used, each takes half of the images."""
    mates: Annotated[int, Field(ge=0)] = 0
    """Images of the same class that follow each drawn one in a batch: BAKE's sampler."""
    also: dict[str, Also] = {}
    """The tables `[batch.also.NAME]`."""
    mix_prob: Annotated[float, Field(gt=0, le=1)] = 1.0
    """How often an image is mixed at all."""

    @property
    def mixes(self) -> bool:
        """Whether labels are shares of several classes."""
        return bool(self.mixup or self.cutmix)


Share = Annotated[float, Field(ge=0)]
"""A time: below 1 a share of the run, from 1 on epochs."""


class Over(Table):
    """A weight over time: `{ value = 1.0, sigmoid = 0.25 }`. Its shapes multiply."""

    value: Annotated[float, Field(ge=0)] = 1.0
    """What it is, or where it begins."""
    to: Annotated[float, Field(ge=0)] | None = None
    """Where the value goes in a straight line over the run."""
    warmup: Share | None = None
    """How long the weight rises in a straight line from 0."""
    sigmoid: Share | None = None
    """How long it rises along exp(-5 (1 - t)^2), as ONE's does."""
    on: Share | None = None
    """When it begins: 0 before."""
    off: Share | None = None
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
    "on": ramps.on_from,
    "off": ramps.off_from,
    "decay": ramps.linear_decay,
}
Weight = Annotated[float, Field(ge=0)] | Over


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
    def weights(self) -> list[Over]:
        """One for all points, or one for each."""
        given = self.weight if isinstance(self.weight, list) else [self.weight]
        return [weight if isinstance(weight, Over) else Over(value=weight) for weight in given]


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


class Also(Table):
    """`[batch.also.NAME]`: images that are shown beside the batch's own, read as `final@NAME`."""

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
    """Whether weight decay reaches norms and biases too, as in the papers' code; timm's default is that it does not."""
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """The largest norm of the gradient."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What happens when a loss is infinite or not a number: the run stops, or the update is left out."""


class Schedule(Table):
    """`[schedule]`: timm's learning-rate schedules by timm's names.

    Times below 1 are shares of the run, from 1 on epochs: a recipe keeps its shape when `--epochs` changes.
    """

    sched: Literal["cosine", "multistep", "step", "poly", "tanh", "none"] = "cosine"
    """How the rate falls."""
    warmup: Annotated[float, Field(ge=0)] = 0.0
    """How long it first rises."""
    warmup_lr: Annotated[float, Field(ge=0)] = 1e-5
    """Where it begins to."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Where it ends."""
    milestones: list[Annotated[float, Field(gt=0)]] = []
    """When `multistep` multiplies the rate by `decay_rate`."""
    decay_time: Annotated[float, Field(gt=0)] = 0.3
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
    rounds: Annotated[int, Field(ge=1)] = 1
    """How many times in a row."""


TEACHER, AVERAGE = "teacher", "ema"
"""Networks that a recipe gets without a table: the student of the phase before, and its average over time."""


class Recipe(Table):
    """The recipe itself: all tables, checked."""

    title: str = ""
    """What lists call it."""
    paper: str = ""
    """A link."""
    epochs: Annotated[int, Field(ge=1)] = 200
    """Of each phase, where there are several."""
    networks: dict[str, Network] = {}
    """The tables `[networks.NAME]`."""
    batch: BatchTable = BatchTable()
    """The table `[batch]`."""
    signals: dict[str, Derived] = {}
    """The tables `[signals.NAME]`."""
    losses: dict[str, Loss]
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

    def places(self, losses: Iterable[str] | None = None) -> list[str]:
        """What these losses name, and what the signals among it are made of; what all losses and signals do, where none
        are given. Each as it is written."""
        named: list[str] = []
        for name in self.losses if losses is None else losses:
            named += [*_listed(self.losses[name].on), *_listed(self.losses[name].target)]
        signals = [signal for name, signal in self.signals.items() if losses is None or name in named]
        return [*named, *(place for signal in signals for place in _listed(signal.of))]

    def reads(self, network: str) -> bool:
        """Whether a loss or a signal names a point of this network."""
        return any(place.startswith(f"{network}.") for place in self.places())


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def recipe_folder() -> Path:
    """Where the recipes lie that come with sdcli: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """Names that `--recipe` takes, schedules and other parts aside."""
    return sorted(path.stem for path in recipe_folder().glob("*.toml"))


def load_recipe(names: Sequence[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that `names` (of recipes or files) and `KEY=VALUE` overrides make together.

    Raises UserError for a file that is not there or not TOML, and for any key, type or range that is wrong, saying
    which file brought the value.
    """
    return read_recipe(names, overrides)[0]


def read_recipe(names: Sequence[str], overrides: Sequence[str] = ()) -> tuple[Recipe, dict[str, str]]:
    """`load_recipe`, and which file or flag brought each dotted key; what is not among these is a default."""
    tables: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name in names:
        for source, part in _chain(name, Path()):
            _merge(tables, part, origins, source)
    for override in overrides:
        _merge(tables, _parse_override(override), origins, f"--set {override}")
    return check_recipe(tables, origins), origins


def check_recipe(tables: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> Recipe:
    """The checked recipe of plain tables. `origins` tells which file or flag brought a dotted key."""
    try:
        recipe = Recipe.model_validate(dict(tables))
    except ValidationError as error:
        raise _explain(error, origins or {}) from None
    if not recipe.losses:
        raise UserError("the recipe has no losses", "at least one [losses.NAME] table", 'add extends = "baseline"')
    with blaming(origins or {}):
        _check_phases(recipe)
        _check_batch(recipe)
    if recipe.student.model is not None:
        raise UserError(
            f"networks.student.model = {recipe.student.model!r}",
            "nothing: the command line names the student's model",
            f"sdcli train {recipe.student.model} …",
        )
    if not recipe.student.learns:
        raise UserError("networks.student.learns = false", "a student that learns")
    for name, images in recipe.batch.also.items():
        if images.of == "class" and recipe.batch.mixes:
            raise UserError(
                f"batch.also.{name} shows another image of the class, and batch.mixup and batch.cutmix mix classes",
                "a recipe that mixes nothing, or further images of = 'itself'",
                "--set batch.mixup=0 --set batch.cutmix=0",
            )
    _check_addresses(recipe, origins or {})
    for name, network in recipe.others.items():
        if network.model is None:
            raise UserError(
                f"networks.{name}.model is missing",
                "the name of a timm model; only the student's comes from the command line",
                f'add model = "resnet18" to [networks.{name}]',
            )
    return recipe


def _check_phases(recipe: Recipe) -> None:
    """Raises UserError for a phase that names a loss that there is not, or reads a teacher that there is not yet, and
    for a network that is called as one that phases or `[ema]` make."""
    taught = False
    for number, phase in enumerate(recipe.phases):
        for name in phase.losses or ():
            if name not in recipe.losses:
                refusal = unknown("loss", name, recipe.losses)
                raise UserError(f"phases.{number}.losses: {refusal.wrong}", refusal.expected, refusal.fix)
        if number == 0 and phase.teacher:
            raise UserError("phases.0.teacher = true: there is no student before the first phase", "a later phase")
        taught = taught or phase.teacher
        losses = phase.losses or list(recipe.losses)
        reading = [name for name in losses if any(p.startswith(f"{TEACHER}.") for p in recipe.places([name]))]
        if reading and not taught and TEACHER not in recipe.networks:
            others = [name for name in losses if name not in reading]
            raise UserError(
                f"phases.{number} has losses.{reading[0]}, which reads {TEACHER}.…, and there is no teacher yet",
                "losses without one, until a phase has teacher = true",
                f"losses = {toml.write_value(others)} in this phase" if others else "",
            )
    if taught and TEACHER in recipe.networks:
        raise UserError(f"[networks.{TEACHER}]: this is what a phase with teacher = true makes", "another name")
    if recipe.ema is not None and AVERAGE in recipe.networks:
        raise UserError(f"[networks.{AVERAGE}]: this is what [ema] makes", "another name")


def _check_batch(recipe: Recipe) -> None:
    """Raises UserError for a batch that its groups do not fill."""
    group = recipe.batch.mates + 1
    if recipe.batch.size % group:
        raise UserError(
            f"batch.size = {recipe.batch.size}: batch.mates = {recipe.batch.mates} makes groups of {group} images",
            f"a multiple of {group}",
            f"--batch-size {max(1, recipe.batch.size // group) * group}",
        )


def _check_addresses(recipe: Recipe, origins: Mapping[str, str]) -> None:
    """Raises UserError for an `on`, a `target` or an `of` that cannot be a point, whatever the model."""
    points = "'final', 'exits', 'all', 'exit1', 'exit2', … or a list of these"
    point = "'label', 'next' (the next deeper point), 'final', or one exit such as 'exit1'"
    for name, signal in recipe.signals.items():
        _check_places(f"signals.{name}.of", signal.of, POINTS, (), points, recipe, origins)
    for name, loss in recipe.losses.items():
        known = tuple(recipe.signals)
        _check_places(f"losses.{name}.on", loss.on, POINTS, known, points, recipe, origins)
        _check_places(f"losses.{name}.target", loss.target, POINT, ("label", "next", *known), point, recipe, origins)


def _check_places(
    where: str,
    given: str | list[str],
    pattern: re.Pattern[str],
    words: Sequence[str],
    expected: str,
    recipe: Recipe,
    origins: Mapping[str, str],
) -> None:
    source = next((f"{origins[o]}: " for o in (where, where.rpartition(".")[0]) if o in origins), "")
    signals = [word for word in words if word in recipe.signals]
    for place in _listed(given):
        if place in words:
            continue
        if not pattern.fullmatch(place):
            known = f", or a signal: {', '.join(signals)}" if signals else ""
            near = did_you_mean(place, [*signals, *re.findall(r"'([^']+)'", expected)])
            raise UserError(f"{source}{where} = {given!r}", expected + known, near)
        images = place.partition("@")[2]
        if images and images not in recipe.batch.also:
            raise UserError(
                f"{source}{where} = {given!r}: there are no images '{images}'",
                f"one of {', '.join(recipe.batch.also)}" if recipe.batch.also else "a [batch.also.NAME] table",
                did_you_mean(images, recipe.batch.also) or f"add a [batch.also.{images}] table",
            )


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as a file that `--recipe` takes again."""
    return toml.write(recipe.model_dump(exclude_none=True))


@contextmanager
def blaming(origins: Mapping[str, str]) -> Iterator[None]:
    """Says of each mistake that is found within who brought the value: the file or the flag, by the dotted key that the
    message begins with."""
    try:
        yield
    except UserError as error:
        found = re.match(r"([A-Za-z][\w-]*(?:\.[\w-]+)*)(?=:| = | at | has )(?:: unknown key '([\w-]+)')?", error.wrong)
        keys = [*found[1].split("."), *([found[2]] if found[2] else [])] if found else []
        while keys and ".".join(keys) not in origins:
            keys.pop()
        if keys:
            error.wrong = f"{origins['.'.join(keys)]}: {error.wrong}"
        raise


def recipe_file(name: str) -> Path:
    """The file of the recipe called `name`, or at that path; raises UserError where there is none."""
    return _find(name, Path())


def copy_recipe(name: str, to: Path) -> None:
    """Copies a recipe's file as it is, header included. What it extends by path stays found from the new place.

    Raises UserError for a place that is taken or cannot be written.
    """
    source = recipe_file(name)
    parent = _read(source).get("extends")
    text = source.read_bytes().decode("utf-8")
    # A path is relative to the file that has it; a name is the same from anywhere.
    if isinstance(parent, str) and _is_path(parent) and not Path(parent).expanduser().is_absolute():
        whole = str((source.parent / parent).resolve())
        text = re.sub(r"(?m)^extends\s*=[^\r\n]*", lambda _: f"extends = {toml.write_value(whole)}", text, count=1)
    try:
        with to.open("xb") as file:
            file.write(text.encode("utf-8"))
    except FileExistsError:
        raise UserError(
            f"'{to}' exists already", "a file that is not there yet: nothing is overwritten", "another name"
        ) from None
    except OSError as error:
        raise UserError(f"'{to}' cannot be written: {error.strerror}", "a file in a folder that is there") from None


def _chain(name: str, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The recipe called `name` and all that it extends, the farthest ancestor first."""
    links: list[tuple[str, dict[str, Any]]] = []
    seen: list[Path] = []
    while True:
        try:
            path = _find(name, folder)
        except UserError as error:
            if links:
                error.wrong = f"{links[-1][0]}: extends = {name!r}: {error.wrong}"
            raise
        if path in seen:
            loop = " -> ".join(p.name for p in [*seen, path])
            raise UserError(f"{path}: 'extends' goes round in a circle: {loop}", "a chain that ends")
        seen.append(path)
        tables = _read(path)
        parent = tables.pop("extends", None)
        links.append((_short(path), tables))
        if parent is None:
            return iter(reversed(links))
        if not isinstance(parent, str):
            raise UserError(f"{_short(path)}: extends = {parent!r}", "the name of one recipe, or its path")
        name, folder = parent, path.parent


def _find(name: str, folder: Path) -> Path:
    """The file of a recipe: a path (relative to the file that extends it), else one of our own."""
    if _is_path(name):
        path = folder / Path(name).expanduser()
        if path.is_dir():
            raise UserError(f"recipe '{name}' is a folder", "a .toml file")
        if not path.is_file():
            raise UserError(f"recipe file '{path}' does not exist", "a path, or one of " + ", ".join(recipe_names()))
        return path.resolve()
    path = recipe_folder() / f"{name}.toml"
    if not path.is_file():
        raise unknown("recipe", name, recipe_names(), f"for a file of your own write its path: ./{name}.toml")
    return path


def _is_path(name: str) -> bool:
    return name.endswith(".toml") or name.startswith((".", "/", "~"))


def _short(path: Path) -> str:
    """How messages call a recipe file: our own by name, others by path."""
    folder = recipe_folder().resolve()
    inside = path.resolve().is_relative_to(folder)
    return f"recipes/{path.resolve().relative_to(folder)}" if inside else str(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(
            f"{_short(path)} is not TOML: {error}", "[TABLE] and KEY = VALUE", _faulty(path, error)
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{_short(path)} cannot be read: {error}", "a recipe file") from None


def _faulty(path: Path, error: tomllib.TOMLDecodeError) -> str:
    """The line that is not TOML, and what is wrong with it where that is plain."""
    found = re.search(r"at line (\d+)", str(error))
    line = path.read_text(encoding="utf-8").split("\n")[int(found[1]) - 1].strip() if found else ""
    word = re.fullmatch(r"([\w.-]+)\s*=\s*([A-Za-z][\w/.+-]*)", line)
    if word:
        return f'text stands in quotes: {word[1]} = "{word[2]}"'
    return f"look at line {found[1]}: {line}" if found and line else ""


def _parse_override(text: str) -> dict[str, Any]:
    """`losses.soft.weight=0.5` as nested tables; a value that is not TOML is taken as a string."""
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(re.fullmatch(r"[\w-]+", part) for part in parts):
        raise UserError(f"--set {text!r}", "KEY=VALUE", "for example --set losses.soft.weight=0.5")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    for part in reversed(parts):
        parsed = {part: parsed}
    return dict(parsed)


def _merge(into: dict[str, Any], part: Mapping[str, Any], origins: dict[str, str], source: str, at: str = "") -> None:
    """Refines `into` by `part`, table by table; notes where each value comes from. Entries of a list of tables are
    refined by their numbers: `phases.1.rounds=3` is the second phase's."""
    for key, value in part.items():
        place = f"{at}.{key}" if at else key
        origins[place] = source
        if isinstance(value, Mapping):
            former = into.get(key)
            if place == "phases" and not former:
                raise UserError(f"{source}: the recipe has no phases", "a recipe with [[phases]], like born-again")
            if isinstance(former, list) and all(number.isdigit() for number in value):
                # Others may hold the same list.
                into[key] = [dict(entry) if isinstance(entry, dict) else entry for entry in former]
                for number, table in value.items():
                    if int(number) >= len(former) or not isinstance(table, Mapping):
                        raise UserError(
                            f"{source}: there is no {place}.{number} with keys",
                            f"{place}.0 to {place}.{len(former) - 1}",
                        )
                    _merge(into[key][int(number)], table, origins, source, f"{place}.{number}")
                continue
            if not isinstance(former, dict):
                into[key] = {}
            _merge(into[key], value, origins, source, place)
        else:
            into[key] = value


def _explain(error: ValidationError, origins: Mapping[str, str]) -> UserError:
    """Pydantic's complaint as one of ours, with the file or flag that brought the value."""
    problems = error.errors(include_url=False)
    # A union reports each of its branches: the branch's name is no part of the key.
    for problem in problems:
        problem["loc"] = tuple(
            p for p in problem["loc"] if isinstance(p, int) or (re.fullmatch(r"[\w-]+", p) and p not in _BRANCHES)
        )
    # Of a table that may stand for a number the mistake is inside.
    whole = {p["loc"] for p in problems if isinstance(p["input"], Mapping)}
    inside = [p for p in problems if any(p["loc"][: len(at)] == at and p["loc"] != at for at in whole)]
    first = min(inside or problems, key=lambda p: p["type"] != "extra_forbidden")
    path = [str(p) for p in first["loc"]]
    result = invalid([first], "", _keys_at(path[:-1]))
    same = [p for p in problems if p["loc"] == first["loc"]]
    if len(same) > 1:
        said = dict.fromkeys(
            "a table" if p["type"] == "model_type" else re.sub(r"^(Value error, |Input should be )+", "", str(p["msg"]))
            for p in same
        )
        result.expected = ", or ".join(said)
        if first["type"] not in ("int_type", "float_type"):
            # The first branch's idea of what was meant is not the others'.
            near = did_you_mean(first["input"], re.findall(r"'([^']+)'", result.expected))
            result.fix = near or default_of(path[-1], _keys_at(path[:-1]))
    if "." not in (key := ".".join(path)) and first["type"] == "missing":
        result.fix = f'add a [{key}.NAME] table, or extends = "baseline"'
    elif first["type"] in ("model_type", "dict_type") and path[:1] in (["losses"], ["networks"]) and path[2:] == []:
        result.fix = f"[{path[0]}.NAME], with a name of your own"
    elif first["type"] == "extra_forbidden" and not result.fix and (place := _table_of(path[-1])):
        result.fix = f"{path[-1]} belongs into [{place}]" if place.rpartition(".")[2] != path[-1] else f"[{place}]"
    while path and ".".join(path) not in origins:
        path.pop()
    if path:
        result.wrong = f"{origins['.'.join(path)]}: {result.wrong}"
    return result


def _table_of(key: str) -> str:
    """The table that has a key, or is called so; "" where there is none."""
    return next(
        (place for place, model in TABLES.items() if key in model.model_fields or place.endswith(f".{key}")), ""
    )


# By their places; the first that has a key is the one that a misplaced key is sent to.
TABLES: dict[str, type[BaseModel]] = {
    "losses.NAME": Loss, "batch.augment": Augment, "batch": BatchTable, "optimizer": Optimizer, "schedule": Schedule,
    "networks.NAME": Network, "ema": Ema, "signals.NAME": Derived, "batch.also.NAME": Also, "phases": Phase,
}  # fmt: skip
_BRANCHES = {"int", "float", "str", "constrained-int", "constrained-float", "Over"}


def _keys_at(path: Sequence[str]) -> dict[str, Any]:
    """The keys that the table at `path` may have, with their defaults."""
    model: type[BaseModel] | None = Recipe
    path = list(path)
    tables: dict[str, type[BaseModel]] = {
        "networks": Network, "losses": Loss, "batch": BatchTable, "augment": Augment,
        "optimizer": Optimizer, "schedule": Schedule, "ema": Ema,
        "signals": Derived, "also": Also, "phases": Phase, "weight": Over,
    }  # fmt: skip
    if path:
        model = tables.get(path[-1]) or tables.get(path[-2] if len(path) > 1 else "")
    keys = {name: field.default for name, field in sorted(model.model_fields.items())} if model else {}
    return keys if path else {**keys, "extends": None}
