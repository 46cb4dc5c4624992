"""From settings and a recipe to everything that a run needs, checked and built, or brought back from a run's state."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch import Tensor, nn

from sdcli import data, transforms
from sdcli.augment import Mixing
from sdcli.backbones import Architecture, pretrained_transform, resolve
from sdcli.catalogue import completed
from sdcli.checkpoint import Description
from sdcli.checks import check_names, check_with_model, remarks
from sdcli.devices import Precision, accelerator_for, from_first, interleaved
from sdcli.errors import UserError
from sdcli.exits import MultiExit, choose_heads
from sdcli.extensions import load_imports
from sdcli.learner import Learner, build_objectives
from sdcli.loaders import EpochBatches
from sdcli.networks import build_network, create_optimizer, create_schedule, head_kind, plan_network
from sdcli.objective import Objective, address
from sdcli.recipe import AVERAGE, STUDENT, TEACHER, Network, Recipe, check_recipe, load_recipe, to_toml
from sdcli.resident import suitable_loader
from sdcli.runs import Run, check_output, read_settings, state_file
from sdcli.stages import StagePlan
from sdcli.state import load_state, random_states, restore_random_states, save_state

FREE = {"title", "paper", "epochs"}
"""Keys of the recipe that a resumed run may be given anew."""

MAY_CHANGE = ("device", "workers", "compile", "grad_accum_steps", "save_every", "track", "imports")
"""Settings that a resumed run may be given anew: they change how it is worked out, not what is. (Batch norms and losses
that compare images see the images of one process and one part at a time.)"""


@dataclass(frozen=True)
class Settings:
    """What the command line chooses beside the recipe: what changes from run to run."""

    model: str
    dataset: str
    image_key: str | None = None
    label_key: str | None = None
    image_size: int | None = None
    val_fraction: float = 0.1
    limit_train: int | None = None
    limit_val: int | None = None
    seed: int = 42
    device: str | None = None
    workers: int | None = None
    """None: as many as suit."""
    precision: Precision = "fp32"
    compile: bool = False
    channels_last: bool = False
    grad_checkpointing: bool = False
    grad_accum_steps: int = 1
    """In how many parts the images of an update are worked off, to save memory."""
    save_every: int | None = None
    """Updates after which the state is saved within an epoch; it is always saved after one."""
    track: str | None = None
    """One of accelerate's trackers."""
    imports: list[str] = field(default_factory=list)
    """The user's own Python files, which register losses and heads; whole paths."""

    def __post_init__(self) -> None:
        # A run goes on from any folder.
        if self.dataset not in data.NAMED and Path(self.dataset).expanduser().is_dir():
            object.__setattr__(self, "dataset", str(Path(self.dataset).expanduser().resolve()))


@dataclass
class Position:
    """How far a run is."""

    epoch: int = 1
    """The epoch that is being trained, counted from 1."""
    update: int = 0
    """Updates done in it; all of them where only the scoring is left."""
    num_images: int = 0
    """Seen in it so far, by all processes."""
    lr: float = 0.0
    """Of the last update."""
    skipped: int = 0
    """Updates of it that were left out, since a loss was not finite (`optimizer.nonfinite`)."""
    skipped_images: int = 0
    """Those of them."""
    in_a_row: int = 0
    """Updates left out up to here without one between."""
    sums: Tensor | None = None
    """What each loss added, times the images that this process saw and that counted [losses]."""
    shares: dict[str, float] = field(default_factory=dict)
    """Each loss's share of the gradient's norm, when it was last measured in this epoch."""


@dataclass
class Training:
    """Everything that a run needs, checked and ready to go."""

    settings: Settings
    recipe: Recipe
    accelerator: Accelerator
    learner: Learner
    """The networks and their objective themselves: what is measured and saved."""
    module: nn.Module
    """The same as accelerate wraps it for training."""
    optimizer: Any
    schedule: Any
    ema: Any
    """timm's average of the student's weights, or None."""
    loader: Any
    """This process's training batches; `set_epoch` gives the next epoch its own order and augmentation."""
    scored_loader: Any
    """Batches of the split that is scored: validation, or test where nothing is held out."""
    scored_split: str
    description: Description
    run: Run
    updates_per_epoch: int
    num_train: int
    num_val: int
    mixing: Mixing | None
    data: dict[str, Any]
    """What tells the training split from another."""
    objectives: list[Objective]
    """One for each phase."""
    phase: int = -1
    """The phase that the run is in; none yet."""
    position: Position = field(default_factory=Position)
    notes: list[str] = field(default_factory=list)

    @property
    def network(self) -> MultiExit:
        """What is scored and saved: the student, or the average of its weights."""
        network = self.learner.student if self.ema is None else self.ema.module
        assert isinstance(network, MultiExit)
        return network

    @property
    def epochs(self) -> int:
        """Of the whole run."""
        return sum(phase.epochs or 0 for phase in self.recipe.stages)

    @property
    def phase_of(self) -> int:
        """The phase that the epoch at which the run stands belongs to."""
        ends = accumulate(phase.epochs or 0 for phase in self.recipe.stages)
        return next(number for number, end in enumerate(ends) if self.position.epoch <= end)

    @property
    def epoch_in_phase(self) -> int:
        """The epoch at which the run stands, counted from 1 within its phase."""
        return self.position.epoch - sum(phase.epochs or 0 for phase in self.recipe.stages[: self.phase])

    @property
    def updates_done(self) -> int:
        """Within the phase."""
        return (self.epoch_in_phase - 1) * self.updates_per_epoch + self.position.update

    @property
    def updates_averaged(self) -> int:
        """Since the student last began: what the average of its weights is made of."""
        stages = self.recipe.stages
        began = max((number for number in range(self.phase + 1) if stages[number].fresh), default=0)
        before = sum(phase.epochs or 0 for phase in stages[began : self.phase])
        return before * self.updates_per_epoch + self.updates_done

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes."""
        return bool(self.accelerator.is_main_process)


def prepare(settings: Settings, recipe: Recipe, output: Path) -> Training:
    """Checks everything and builds it; the run folder is made last. Raises UserError before any image is read for what
    is wrong with recipe, model or folder, and before the first batch for the rest.
    """
    accelerator = _check(settings, recipe, output)
    recipe = settled(recipe)
    output = from_first(accelerator, output)
    if accelerator.is_main_process:
        check_output(output)
    training = _build(settings, recipe, accelerator, None)
    enter_phase(training, 0)
    if training.is_first:
        training.run = Run(output)
        training.run.write_settings(asdict(settings))
        training.run.write_recipe(to_toml(recipe))
    else:
        training.run.folder = output
    save(training)
    _start_tracker(training)
    return training


def resume(folder: Path, settings: Settings, recipe: Recipe) -> Training:
    """The run in `folder` as it was when its state was saved; `resumed` tells what to pass on.

    On a CPU it ends with the bits of a run that was never stopped. Raises UserError where the data are not those that
    it was trained on.
    """
    accelerator = _check(settings, recipe, folder)
    state = load_state(state_file(folder))
    _check_same(folder, _unchanging(settings, recipe), state["made"])
    done = state["position"]["epoch"] - (0 if state["position"]["update"] else 1)
    if (epochs := sum(phase.epochs or 0 for phase in recipe.stages)) < done:
        raise UserError(
            f"epochs = {epochs}, and the run in '{folder}' has begun or done {done}",
            f"{done} or more",
            "leave --epochs out, or start a new run",
        )
    _check_weights_ahead(recipe, state["phase"])
    training = _build(settings, recipe, accelerator, state["data"])
    _restore(training, state)
    if training.is_first:
        training.run = Run.reopen(folder, training.position.epoch - 1)
        training.run.write_settings(asdict(settings))
        training.run.write_recipe(to_toml(recipe))
    else:
        training.run.folder = folder
    accelerator.wait_for_everyone()
    _start_tracker(training)
    return training


def resumed(
    folder: Path, given: Mapping[str, Any], recipe: Recipe | None, overrides: list[str]
) -> tuple[Settings, Recipe]:
    """Settings and recipe of a run that goes on, with what the command line gives anew.

    `given` are settings by name; `recipe` is a whole one, where one is named, and `overrides` refine the run's own
    where none is. Raises UserError for a change that would make it another run.
    """
    table = read_settings(folder)
    known = {f.name for f in fields(Settings)}
    former = Settings(**{name: value for name, value in table.items() if name in known})
    settings = replace(former, **given)
    for name in given:
        was, value = getattr(former, name), getattr(settings, name)
        if value != was and name not in MAY_CHANGE:
            raise UserError(
                f"the run in '{folder}' was started with {name} = {was!r}, not {value!r}",
                f"the same, or a change of epochs, {', '.join(MAY_CHANGE)}",
                f"leave --{name.replace('_', '-')} out, or start a new run",
            )
    load_imports(settings.imports)
    own = settled(load_recipe([str(folder / "recipe.toml")]))
    wanted = settled(recipe or load_recipe([str(folder / "recipe.toml")], overrides))
    if own.phases and own.epochs != wanted.epochs:
        raise UserError(
            f"the recipe of the run in '{folder}' has phases, and epochs = {own.epochs}, not {wanted.epochs}",
            "as many epochs as it was started with",
            "leave it out, or start a new run",
        )
    changed = _first_difference(own.model_dump(exclude=FREE), wanted.model_dump(exclude=FREE))
    if changed:
        key, was, now = changed
        raise UserError(
            f"the recipe of the run in '{folder}' has {key} = {was!r}, not {now!r}",
            "the recipe that it was started with; only epochs may change",
            "leave it out, or start a new run",
        )
    return settings, check_recipe({**own.model_dump(exclude_none=True), "epochs": wanted.epochs})


def settled(recipe: Recipe) -> Recipe:
    """`recipe` as a run keeps it: with the defaults of its losses and signals, and whole paths of starting weights."""
    networks = {
        name: network
        if network.weights in ("random", "pretrained")
        else network.model_copy(update={"weights": str(Path(network.weights).expanduser().resolve())})
        for name, network in recipe.networks.items()
    }
    return completed(recipe).model_copy(update={"networks": networks})


def _unchanging(settings: Settings, recipe: Recipe) -> dict[str, Any]:
    """What the state keeps of both, to be compared with what the run's own files say when it goes on."""
    chosen = {name: value for name, value in asdict(settings).items() if name not in MAY_CHANGE}
    return {"settings": chosen, "recipe": recipe.model_dump(exclude=FREE, exclude_none=True)}


def _check_same(folder: Path, now: dict[str, Any], made: dict[str, Any]) -> None:
    """Raises UserError where somebody has edited the files of a run."""
    for name, file in (("settings", "run.json"), ("recipe", "recipe.toml")):
        if changed := _first_difference(made[name], now[name]):
            key, was, value = changed
            raise UserError(
                f"'{folder / file}' has {key} = {value!r}, and the run was started with {was!r}",
                "the file as the run wrote it",
                "put it back, or start a new run",
            )


def _check_weights_ahead(recipe: Recipe, phase: int) -> None:
    """Raises UserError where a fresh phase that is still ahead begins from a file that is gone."""
    weights = recipe.student.weights
    ahead = any(stage.fresh for stage in recipe.stages[phase + 1 :])
    if ahead and weights not in ("random", "pretrained") and not Path(weights).is_file():
        raise UserError(
            f"networks.student.weights = '{weights}': there is no such file, and a fresh phase is to begin from it",
            "the file that the run was started from",
            "put it back",
        )


def _first_difference(one: Any, other: Any, at: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            found = _first_difference(one.get(key), other.get(key), f"{at}.{key}" if at else str(key))
            if found:
                return found
        return None
    return None if one == other else (at, one, other)


def _check(settings: Settings, recipe: Recipe, folder: Path) -> Accelerator:
    """What shows without data: the recipe, models, device."""
    load_imports(settings.imports)
    check_names(recipe)
    # On meta: exits, widths and what teaches them show before the data are looked for.
    check_with_model(recipe, settings.model, image_size=settings.image_size)
    return accelerator_for(settings.device, settings.precision, settings.track, folder)


def _build(
    settings: Settings, recipe: Recipe, accelerator: Accelerator, trained_on: Mapping[str, Any] | None
) -> Training:
    with accelerator.main_process_first():
        dataset = data.open_dataset(settings.dataset, image_key=settings.image_key, label_key=settings.label_key)
    train_split, val_split = data.training_splits(dataset, settings.val_fraction, settings.seed)
    train_split = data.limit(train_split, settings.limit_train, settings.seed)
    val_split = data.limit(val_split, settings.limit_val, settings.seed) if val_split else None
    _check_data(train_split, trained_on)
    size, mean, std = data.measure(dataset)
    pretrained = recipe.student.weights == "pretrained"
    image_size = settings.image_size or (None if pretrained else data.natural_size(size))
    classes = list(dataset.classes)

    set_seed(settings.seed)
    # A run that goes on has all weights in its state.
    begins = trained_on is None
    student, architecture, plan, heads, notes = _network(recipe.student, settings.model, classes, image_size, begins)
    preprocess = transforms.Preprocess(architecture.input_size, mean, std)
    if pretrained:
        preprocess = replace(preprocess, **pretrained_transform(student.backbone))
    networks = {STUDENT: student}
    for name, table in recipe.others.items():
        # All see the same images, the student's.
        networks[name], *_, more = _network(table, str(table.model), classes, architecture.input_size[1], begins)
        notes += [f"{name}: {note}" for note in more]
    ema = _average(student, recipe)
    if recipe.reads(AVERAGE) and ema is not None:
        networks[AVERAGE] = ema.module
    if TEACHER in recipe.taking_part and TEACHER not in networks:
        networks[TEACHER] = copy.deepcopy(student)
    frozen = [name for name in networks if not recipe.taking_part[name]]
    widths = {address(name, p): width for name, network in networks.items() for p, width in network.widths.items()}
    num_images = int(train_split.index.max()) + 1
    objectives, making = build_objectives(recipe, widths, len(classes), num_images)
    learner = Learner(networks, objectives[0], frozen, making)
    if settings.grad_checkpointing:
        _checkpoint_gradients(student, settings.model)

    batch_size = min(recipe.batch.size, len(train_split))
    if batch_size < recipe.batch.size:
        notes.append(f"batch size {batch_size}: there are no more training images")
    augment = recipe.batch.augment
    if augment.mirror and not dataset.mirror:
        augment = augment.model_copy(update={"mirror": 0.0})
        notes.append(f"{dataset.name}: images are not mirrored, since a mirrored one would mean something else")
    scored = val_split or dataset.splits["test"]
    rank, world = accelerator.process_index, accelerator.num_processes
    order = EpochBatches(
        train_split,
        batch_size,
        seed=settings.seed,
        parts=settings.grad_accum_steps,
        rank=rank,
        world=world,
        mates=recipe.batch.mates,
    )
    also = {name: table.of for name, table in recipe.batch.also.items()}
    how = {"seed": settings.seed, "workers": settings.workers, "device": accelerator.device}
    # The first process decodes small images, the others find them decoded.
    with accelerator.main_process_first():
        loader, loader_notes = suitable_loader(train_split, preprocess, augment, order, **how, also=also)
        in_order = EpochBatches(scored, batch_size, rank=rank, world=world)
        scored_loader, more_notes = suitable_loader(scored, preprocess, None, in_order, **how)
    # Both splits may have met the same trouble.
    notes += dict.fromkeys([*loader_notes, *more_notes])

    if settings.channels_last:
        learner.to(memory_format=torch.channels_last)
    if settings.compile:
        learner.compile()
    learner.to(accelerator.device)
    if ema is not None:
        ema.to(accelerator.device)
    for phase in recipe.stages:
        create_schedule(
            create_optimizer([learner], recipe.optimizer), recipe.schedule, phase.epochs or 0, order.updates
        )
    seen = batch_size // (accelerator.num_processes * settings.grad_accum_steps)
    if accelerator.num_processes > 1:
        notes.append(
            f"{accelerator.num_processes} processes: each sees {batch_size // accelerator.num_processes} of the "
            f"{batch_size} images of an update"
        )
    if seen < batch_size:
        coupled = [f"losses.{term.name}" for objective in objectives for term in objective.terms if term.sees_batch]
        coupled += [f"signals.{name}" for name, made in making.items() if made.sees_batch]
        notes += [
            f"{name} compares images with each other: {seen} at a time, not all {batch_size} of an update"
            for name in dict.fromkeys(coupled)
        ]
    if accelerator.num_processes > 1:
        # From here on each draws its own dropout; until here all have drawn the same weights.
        set_seed(settings.seed + accelerator.process_index)

    description = Description(
        architecture=architecture,
        plan=plan,
        heads=heads,
        classes=classes,
        preprocess=preprocess.to_dict(),
        dataset={
            "name": data.short_name(dataset),
            "source": dataset.source,
            "image_key": dataset.image_key,
            "label_key": dataset.label_key,
            "val_fraction": settings.val_fraction,
            "seed": settings.seed,
        },
        recipe=recipe.model_dump(exclude_none=True),
        epoch=0,
    )
    return Training(
        settings=settings,
        recipe=recipe,
        accelerator=accelerator,
        learner=learner,
        module=learner,
        optimizer=None,
        schedule=None,
        ema=ema,
        loader=loader,
        scored_loader=scored_loader,
        scored_split="validation" if val_split else "test",
        description=description,
        run=Run.__new__(Run),
        updates_per_epoch=order.updates,
        num_train=len(train_split),
        num_val=len(val_split) if val_split else 0,
        mixing=_mixing(recipe, len(classes), settings.seed, accelerator.device),
        data=_identity(train_split),
        objectives=objectives,
        notes=[*dataset.notes, *architecture.notes, *plan.notes, *notes, *remarks(recipe)],
    )


def enter_phase(training: Training, number: int, begins: bool = True) -> None:
    """Sets the run up for a phase: its losses, a new optimizer and schedule, and, where it `begins`, its networks."""
    phase = training.recipe.stages[number]
    learner, accelerator = training.learner, training.accelerator
    if begins and phase.teacher:
        learner.networks[TEACHER].load_state_dict(training.network.state_dict())
    if begins and phase.fresh:
        set_seed(training.settings.seed + number)
        about = training.description
        table = training.recipe.student
        new, _ = build_network(table, about.architecture, about.plan, about.heads, len(about.classes))
        learner.student.load_state_dict(new.state_dict())
        learner.renew_signals()
        if training.ema is not None:
            training.ema.module.load_state_dict(new.state_dict())
        set_seed(training.settings.seed + number + accelerator.process_index)
    objective = training.objectives[number].to(accelerator.device)
    if begins and number and not phase.fresh:
        objective.go_on_from(training.objectives[number - 1])
    learner.teach(objective)
    optimizer = create_optimizer([learner], training.recipe.optimizer)
    epochs = phase.epochs or 0
    training.schedule = create_schedule(optimizer, training.recipe.schedule, epochs, training.updates_per_epoch)
    accelerator.free_memory()
    with warnings.catch_warnings():
        # accelerate knows no other word for it yet, and says it in every process.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        training.module, training.optimizer = accelerator.prepare(learner, optimizer)
    training.phase = number


def _start_tracker(training: Training) -> None:
    if training.settings.track is not None:
        chosen = asdict(training.settings) | {"imports": ", ".join(training.settings.imports)}
        training.accelerator.init_trackers("sdcli", {k: v for k, v in chosen.items() if v is not None})


def _network(
    table: Network, model: str, classes: list[str], image_size: int | None, begins: bool
) -> tuple[MultiExit, Architecture, StagePlan, dict[str, str], list[str]]:
    """One network as its table asks for it, all that describes it, and what is to be said about its weights, which are
    only loaded where the run `begins`."""
    architecture = resolve(
        model,
        num_classes=len(classes),
        image_size=image_size,
        stem=table.stem,
        pretrained=table.weights == "pretrained",
        model_args=table.model_args,
    )
    plan = plan_network(table, architecture)
    heads = choose_heads(plan, head_kind(table))
    weights = table if begins else table.model_copy(update={"weights": "random"})
    network, notes = build_network(weights, architecture, plan, heads, len(classes))
    return network, architecture, plan, heads, notes


def _checkpoint_gradients(network: MultiExit, model: str) -> None:
    try:
        network.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError):
        raise UserError(
            f"--grad-checkpointing: timm has none for {model}",
            "a family that can work its activations out again",
            "--grad-accum-steps 2 saves memory too",
        ) from None


def _average(student: MultiExit, recipe: Recipe) -> Any:
    if recipe.ema is None:
        return None
    from timm.utils import ModelEmaV3

    ema = ModelEmaV3(student, decay=recipe.ema.decay, use_warmup=recipe.ema.warmup)
    return ema.requires_grad_(False)


def _mixing(recipe: Recipe, num_classes: int, seed: int, device: torch.device) -> Mixing | None:
    batch = recipe.batch
    if not batch.mixup and not batch.cutmix:
        return None
    return Mixing(num_classes, device, seed=seed, mixup=batch.mixup, cutmix=batch.cutmix, probability=batch.mix_prob)


# The state


def _identity(split: data.Split) -> dict[str, Any]:
    """What tells one training split from another."""
    labels = torch.from_numpy(split.labels)
    order = torch.arange(1, len(labels) + 1)
    return {
        "num_images": len(labels),
        "labels": int((labels * order % 1_000_003).sum()),
        "index": int((torch.from_numpy(split.index) * order % 1_000_003).sum()),
    }


def _check_data(split: data.Split, trained_on: Mapping[str, Any] | None) -> None:
    if trained_on is not None and (found := _identity(split)) != dict(trained_on):
        raise UserError(
            f"the training data are not those of the run: {found['num_images']:,} images, "
            f"{trained_on['num_images']:,} when it was started"
            + (", with other labels or in another order" if found["num_images"] == trained_on["num_images"] else ""),
            "the very same data",
            "put them back, or start a new run",
        )


def save(training: Training) -> None:
    """Saves where the run stands. All processes call it, the first one writes: its buffers are then everyone's, as they
    will be when the run goes on."""
    share_buffers(training)
    everyones = interleaved(training.accelerator, [random_states()])
    sums = training.position.sums
    if sums is not None:
        sums = training.accelerator.reduce(sums.clone())
    if not training.is_first:
        return
    scaler = training.accelerator.scaler
    save_state(
        training.run.state,
        {
            "position": {**asdict(training.position), "sums": sums},
            "learner": training.learner.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "ema": training.ema.module.state_dict() if training.ema else None,
            "scaler": scaler.state_dict() if scaler else None,
            "random": everyones,
            "data": training.data,
            "phase": training.phase,
            "made": _unchanging(training.settings, training.recipe),
        },
    )


def share_buffers(training: Training) -> None:
    """Gives all processes the first one's buffers: their batch norms see other images."""
    if training.accelerator.num_processes > 1:
        parts = [*training.learner.networks.children(), *([training.ema.module] if training.ema else [])]
        for part in parts:
            for buffer in part.buffers():
                broadcast(buffer)


def _restore(training: Training, state: Mapping[str, Any]) -> None:
    """Puts everything back to where the state found it."""
    enter_phase(training, state["phase"], begins=False)
    training.learner.load_state_dict(state["learner"])
    training.optimizer.load_state_dict(state["optimizer"])
    if training.ema:
        training.ema.module.load_state_dict(state["ema"])
    if state["scaler"] and training.accelerator.scaler:
        training.accelerator.scaler.load_state_dict(state["scaler"])
    training.position = Position(**state["position"])
    sums = training.position.sums
    if sums is not None:
        # Those of all processes: one of them goes on from them.
        sums = sums.to(training.accelerator.device)
        training.position.sums = sums if training.is_first else torch.zeros_like(sums)
    training.schedule.step(training.updates_done)
    everyones = state["random"]
    if len(everyones) == training.accelerator.num_processes:
        restore_random_states(everyones[training.accelerator.process_index])
    else:
        training.notes.append(
            f"{len(everyones)} processes before, {training.accelerator.num_processes} now: "
            "the run goes on with other random numbers"
        )
