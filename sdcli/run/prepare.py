"""Checks settings and recipe, and builds everything that a run needs."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from sdcli.data.augment import Mixing
from sdcli.data.dataset import NAMED, ImageData, Split, short_name
from sdcli.data.loaders import EpochBatches, Loader
from sdcli.data.measure import measure, natural_size
from sdcli.data.open import open_dataset
from sdcli.data.resident import ResidentLoader, suitable_loader
from sdcli.data.splits import fingerprint, limited, training_splits
from sdcli.data.transforms import Preprocess, Size
from sdcli.devices import accelerator_for, from_first, short_of_memory
from sdcli.errors import UserError, counted
from sdcli.extensions import digests, load_imports
from sdcli.method.catalogue import completed
from sdcli.method.check import check_files, check_named, check_names, check_with_model, idle_losses, remarks
from sdcli.method.learner import Learner, build_objectives, what_trains
from sdcli.method.losses import LOSSES
from sdcli.method.optimizer import create_optimizer, create_schedule
from sdcli.network.blueprint import Blueprint
from sdcli.network.checkpoint import Description, TrainedOn
from sdcli.network.foreign import Translation, columns_of, draft_foreign, names_classes
from sdcli.network.memory_format import suitable_format
from sdcli.network.multi_exit import MultiExit
from sdcli.network.weights import Loaded, build_network, file_of, read_weights_file
from sdcli.recipe.address import AVERAGE, FINAL, STUDENT, TEACHER, Address
from sdcli.recipe.load import to_toml
from sdcli.recipe.schema import Recipe, as_list
from sdcli.run.folder import Run, check_output
from sdcli.run.settings import Settings
from sdcli.run.state import digest_of
from sdcli.run.training import Training, enter_phase, save

_LOG = logging.getLogger(__name__)

BEFORE = "before the first batch"


def prepare(settings: Settings, recipe: Recipe, output: Path) -> Training:
    """Checks and builds everything; the run folder is created last.

    Raises UserError before any image is read if recipe, model, device or folder are wrong, and before the first batch
    for all other mistakes.
    """
    settings = check(settings, recipe, begins=True)
    accelerator = accelerator_of(settings, output)
    recipe = settled(recipe)
    run = Run(from_first(accelerator, output))
    if accelerator.is_main_process:
        check_output(run.folder, settings.dataset)
    with short_of_memory(f"on {accelerator.device} {BEFORE}", "networks that fit", "a smaller model, another --device"):
        training = build(settings, recipe, accelerator, run)
        enter_phase(training, 0)
    if training.is_first:
        run.begin()
        write_choices(training)
    save(training)
    start_tracker(training)
    return training


def write_choices(training: Training) -> None:
    """Writes settings and recipe, which `--resume` reads."""
    training.run.write_settings(asdict(training.settings))
    training.run.write_recipe(to_toml(training.recipe))


def start_tracker(training: Training) -> None:
    """Starts the tracker of `--track`, if there is one."""
    if training.settings.track is not None:
        chosen = asdict(training.settings) | {"imports": ", ".join(training.settings.imports), "weights_file": None}
        training.accelerator.init_trackers("sdcli", {k: v for k, v in chosen.items() if v is not None})


def settled(recipe: Recipe) -> Recipe:
    """The recipe as a run stores it: defaults of losses and signals filled in, paths of starting weights absolute."""
    networks = {
        name: network
        if not network.from_file
        else network.model_copy(update={"weights": os.path.realpath(file_of(network))})
        for name, network in recipe.networks.items()
    }
    return completed(recipe).model_copy(update={"networks": networks})


def check(settings: Settings, recipe: Recipe, begins: bool = False) -> Settings:
    """Checks what needs no data: recipe and models. Returns the settings of a run that `begins` with what its file of
    weights asks of images."""
    load_imports(settings.imports)
    check_names(recipe)
    _LOG.info("checking the recipe with %s", settings.model)
    check_named(recipe)
    if begins:
        check_files(recipe)
        settings = replace(settings, weights_file=read_weights_file(recipe.student, settings.model))
    # On the meta device: exits, widths and their teachers are checked before the data set is opened.
    _check_planned(settings, recipe, _known_size(settings))
    return settings


def _check_planned(settings: Settings, recipe: Recipe, size: Size | None) -> None:
    """Checks the recipe with its models, for a data set whose images have this size."""
    image_size = _input_size(settings, recipe, size)
    check_with_model(recipe, settings.model, image_size=image_size, file=settings.weights_file)


def accelerator_of(settings: Settings, folder: Path) -> Accelerator:
    """The accelerator of a run in this folder; raises UserError for a device or precision that does not exist."""
    return accelerator_for(settings.device, settings.precision, settings.track, folder)


def _known_size(settings: Settings) -> Size | None:
    """The size of the data set's images, if it is known before they are opened."""
    known = NAMED.get(settings.dataset)
    return known.measured[0] if known and known.measured else None


def _input_size(settings: Settings, recipe: Recipe, size: Size | None) -> int | None:
    """The input size of a run on images of this size; None stands for that of the weights, or else the model's own."""
    if settings.image_size is not None or recipe.student.weights == "pretrained" or settings.weights_file:
        return settings.image_size
    return natural_size(size)


@dataclass(frozen=True)
class Splits:
    """A run's data set and its training and validation split."""

    dataset: ImageData
    train: Split
    val: Split | None

    @property
    def scored(self) -> Split:
        """The split that is scored: validation after every epoch or, if nothing is held out, test once at the end."""
        return self.val or self.dataset.splits["test"]

    @property
    def by_name(self) -> dict[str, Split]:
        """The splits that exist, out of train, validation and test."""
        test = self.dataset.splits.get("test")
        return {"train": self.train} | ({"validation": self.val} if self.val else {}) | ({"test": test} if test else {})


def build(
    settings: Settings, recipe: Recipe, accelerator: Accelerator, run: Run, trained_on: Mapping[str, Any] | None = None
) -> Training:
    """Builds the run up to its first phase. A resumed run passes `trained_on`, the identity of its training images; its
    weights come from its state.

    Raises UserError for mistakes that only show with the data.
    """
    _check_many(recipe, accelerator)
    splits = _open_splits(settings, accelerator)
    about_data = _identity(splits.train)
    if trained_on is not None:
        _check_data(about_data, trained_on)
    classes = splits.dataset.classes
    set_seed(settings.seed)
    foreign = {
        name: draft_foreign(table, name, recipe.points_of(name))
        for name, table in recipe.others.items()
        if table.finished
    }
    named = {name: names_classes(recipe.others[name], blueprint) for name, blueprint in foreign.items()}
    answers = {
        name: _columns(name, blueprint.classes, classes, recipe, named=named[name])
        for name, blueprint in foreign.items()
    }
    networks, notes = _build_networks(settings, recipe, splits, foreign, begins=trained_on is None)
    student = networks[STUDENT]
    translations = {
        name: Translation(student.blueprint.preprocess, blueprint.preprocess, *answers[name])
        for name, blueprint in foreign.items()
    }
    notes += [f"{name}: {note}" for name, translation in translations.items() for note in translation.notes]
    notes += [
        f"{name}: its weights do not name their {len(classes)} classes, which are taken to be those of the data"
        for name, (_, knows) in answers.items()
        if knows and not named[name]
    ]
    loaded = {name: digest_of(networks[name].state_dict()) for name, t in recipe.others.items() if not t.learns}
    blueprint = student.blueprint
    ema = _average(student, recipe)
    if recipe.reads(AVERAGE) and ema is not None:
        networks[AVERAGE] = ema.module
    if TEACHER in recipe.taking_part and TEACHER not in networks:
        networks[TEACHER] = copy.deepcopy(student)
    frozen = [name for name in networks if not recipe.taking_part[name]]
    specs = {str(Address(name, p)): spec for name, network in networks.items() for p, spec in network.specs.items()}
    num_images = int(splits.train.index.max()) + 1
    labels = torch.full((num_images,), -1)
    labels[torch.from_numpy(splits.train.index)] = torch.from_numpy(splits.train.labels)
    objectives, making = build_objectives(recipe, specs, len(classes), num_images, settings.seed, labels)
    batch_mode = [name for name, table in recipe.others.items() if table.mode == "train"]
    learner = Learner(
        networks,
        objectives[0],
        frozen,
        making,
        translations=translations,
        batch_mode=batch_mode,
        rules=recipe.rules.values(),
        in_turn=recipe.updates == "sequential",
        pruned=recipe.pruned,
    )
    if settings.grad_checkpointing:
        _checkpoint_gradients(student, settings.model)

    order, loader, scored_loader, more = _build_loaders(settings, recipe, accelerator, splits, blueprint.preprocess)
    notes += [*more, *_idle_options(settings, recipe, splits, order.updates)]
    if settings.memory_format == "auto":
        settings = replace(settings, memory_format=suitable_format(networks.values(), accelerator.device))
        if settings.memory_format != "contiguous":
            notes.append(f"memory format: {settings.memory_format}, faster on a {accelerator.device.type.upper()}")
    if settings.memory_format == "channels-last":
        learner.to(memory_format=torch.channels_last)
    if settings.compile:
        learner.compile()
    learner.to(accelerator.device)
    if ema is not None:
        ema.to(accelerator.device)
    for number, epochs in enumerate(recipe.phase_epochs):
        # A schedule that does not fit a later phase is refused now.
        learner.teach(objectives[number], what_trains(recipe, number), recipe.learning(number))
        for name in learner.learning:
            optimizer = create_optimizer(learner.parts_of(name), recipe.optimizer_of(name))
            create_schedule(optimizer, recipe.schedule_of(name), epochs, order.updates)
    notes += idle_losses(objectives)
    coupled = [f"losses.{term.name}" for objective in objectives for term in objective.terms if term.sees_batch]
    coupled += [f"signals.{name}" for name, made in making.items() if made.sees_batch]
    notes += _shares(order, dict.fromkeys(coupled))
    if accelerator.num_processes > 1:
        # All processes have drawn the same initial weights; from now on each draws its own dropout.
        set_seed(settings.seed + accelerator.process_index)
    return Training(
        settings=settings,
        recipe=recipe,
        accelerator=accelerator,
        learner=learner,
        ema=ema,
        loader=loader,
        scored_loader=scored_loader,
        scored_split="validation" if splits.val else "test",
        description=_describe(settings, recipe, splits, blueprint),
        run=run,
        updates_per_epoch=order.updates,
        images_per_epoch=order.length,
        splits=splits.by_name,
        num_train=len(splits.train),
        num_val=len(splits.val) if splits.val else 0,
        mixing=_mixing(recipe, len(classes), settings.seed, accelerator.device),
        data=about_data,
        imports=digests(settings.imports),
        loaded=loaded,
        objectives=objectives,
        notes=[*splits.dataset.notes, *notes, *remarks(recipe, settings.model)],
    )


def _check_many(recipe: Recipe, accelerator: Accelerator) -> None:
    """Raises UserError for what several networks that learn cannot do."""
    learning = [name for name, learns in recipe.taking_part.items() if learns]
    if recipe.updates == "sequential" and accelerator.num_processes > 1:
        raise UserError(
            f'updates = "sequential" with {accelerator.num_processes} processes',
            "one process: networks that take turns leave the others without gradients to exchange",
            '--set updates="simultaneous"',
            key="updates",
        )
    if len(learning) > 1 and accelerator.scaler is not None:
        raise UserError(
            f"--precision fp16 with several networks that learn: {', '.join(learning)}",
            "a precision without a gradient scaler, which all of them would share",
            "--precision bf16",
        )


def _open_splits(settings: Settings, accelerator: Accelerator) -> Splits:
    with accelerator.main_process_first():
        dataset = open_dataset(settings.dataset, image_key=settings.image_key, label_key=settings.label_key)
    train, val = training_splits(dataset, settings.val_fraction, settings.split_seed)
    train = limited(train, settings.limit_train, settings.split_seed)
    return Splits(dataset, train, limited(val, settings.limit_val, settings.split_seed) if val else None)


def _build_networks(
    settings: Settings, recipe: Recipe, splits: Splits, foreign: Mapping[str, Blueprint], begins: bool
) -> tuple[dict[str, MultiExit], list[str]]:
    """The recipe's networks, and notes for the user about them; `foreign` are the plans of those that were trained
    elsewhere. Networks that learn load their weights only if the run `begins`; a resumed run has them in its state."""
    _LOG.info("measuring the images")
    size, *colours = measure(splits.dataset)
    mean, std = colours
    classes = splits.dataset.classes
    image_size = _input_size(settings, recipe, size)
    if image_size != _input_size(settings, recipe, _known_size(settings)):
        # `check` did not know the image size, on which stem and stages depend.
        _check_planned(settings, recipe, size)
    networks: dict[str, MultiExit] = {}
    notes: list[str] = []
    for name, table in {STUDENT: recipe.student, **recipe.others}.items():
        model = settings.model if name == STUDENT else str(table.model)
        file = settings.weights_file if name == STUDENT else None
        blueprint = foreign.get(name) or Blueprint.draft(
            table, model, classes, image_size=image_size, colours=(mean, std), file=file
        )
        # A run's state leaves out the weights of networks that do not learn: they are loaded again.
        networks[name], loaded = build_network(table, blueprint, begins=begins or not table.learns)
        if begins and name != STUDENT and not table.learns:
            _check_knows(name, recipe, loaded)
        if begins and name == STUDENT:
            _check_finished(recipe, networks[name], loaded)
        more = [*blueprint.notes, *loaded.notes] if name == STUDENT else loaded.notes
        if begins and name == STUDENT and table.from_file:
            more.append(_as_trained(blueprint.preprocess, settings.image_size is not None))
        notes += more if name == STUDENT else [f"{name}: {note}" for note in more]
        # All networks that learn see images of the student's size.
        image_size = networks[STUDENT].plan.input_size[1]
    return networks, notes


def _columns(
    name: str, theirs: Sequence[str], classes: Sequence[str], recipe: Recipe, *, named: bool
) -> tuple[list[int] | None, bool]:
    """Where the run's classes stand among those of a network that was trained elsewhere, and whether it knows them;
    raises UserError where a loss compares predictions about other classes."""
    compared = [loss for loss, table in recipe.losses.items() if LOSSES.find(table.kind).reads in ("logits", "signal")]
    try:
        return columns_of(classes, theirs, f"networks.{name}.weights", named=named), True
    except UserError:
        if any(address.network == name for address in recipe.addresses(compared)):
            raise
        return None, False


def _as_trained(preprocess: Preprocess, sized: bool) -> str:
    """A note on how images are prepared for weights from a file; `sized` is true if `--image-size` sets the size."""
    height, width = preprocess.size
    mean, std = (", ".join(f"{value:.3g}" for value in values) for values in (preprocess.mean, preprocess.std))
    colours = f"mean ({mean}) and standard deviation ({std})"
    if sized:
        return f"{colours} are those of the weights, the input size {height}x{width} is that of --image-size"
    return f"input size {height}x{width}, {colours} are those of the weights; --image-size sets another size"


def _check_knows(name: str, recipe: Recipe, loaded: Loaded) -> None:
    """Raises UserError if a loss reads a randomly initialised classifier of a network that does not learn."""
    kinds = {loss: LOSSES.find(table.kind).reads for loss, table in recipe.losses.items()}
    # Maps and the last embedding come from the backbone, whose weights are those of the file.
    read = {
        address.point
        for loss, kind in kinds.items()
        for address in recipe.addresses([loss])
        if address.network == name
        and (kind in ("logits", "signal") or (kind == "embedding" and address.point != FINAL))
    }
    for module in loaded.fresh:
        point = module.removeprefix("heads.") if module.startswith("heads.") else FINAL
        if point in read or "all" in read or (point != FINAL and "exits" in read):
            raise UserError(
                f"networks.{name} does not learn, but its classifier at {point} has random weights: the file has no "
                "weights for these classes",
                "weights of a network with the data set's classes",
                f"--set networks.{name}.weights=CHECKPOINT, or --set networks.{name}.learns=true",
                key=f"networks.{name}.weights",
            )


def _check_finished(recipe: Recipe, student: MultiExit, loaded: Loaded) -> None:
    """Raises UserError if a classifier of the student starts with random weights and nothing would train it."""
    on_final = any(
        address.point in (FINAL, "all") and address.network == STUDENT
        for loss in recipe.losses.values()
        for on in as_list(loss.on)
        if (address := Address.find(on)) is not None
    )
    fresh = any(not module.startswith("heads.") or module == f"heads.{FINAL}" for module in loaded.fresh)
    if fresh and not on_final:
        raise UserError(
            "no loss teaches the final classifier, which has random weights: there are none for these classes",
            "the weights of a network that was trained on these classes",
            f"train it first: sdcli train {student.plan.model} --recipe finetune, then --weights its checkpoint",
            key="networks.student.weights",
        )


def _describe(settings: Settings, recipe: Recipe, splits: Splits, blueprint: Blueprint) -> Description:
    """The description that the run's checkpoints carry."""
    dataset = splits.dataset
    # Checkpoints are shared: the path of a local folder is stored in run.json only.
    source = "" if Path(dataset.source).is_absolute() else dataset.source
    trained_on = TrainedOn(
        name=short_name(dataset),
        source=source,
        val_fraction=settings.val_fraction,
        seed=settings.split_seed,
        image_key=dataset.image_key,
        label_key=dataset.label_key,
        fingerprint=fingerprint(dataset.splits["train"]),
    )
    return Description(blueprint, trained_on, without_paths(recipe).model_dump(exclude_none=True), epoch=0)


def without_paths(recipe: Recipe) -> Recipe:
    """The recipe with the paths of weight files cut to their names."""
    networks = {
        name: table.model_copy(update={"weights": Path(table.weights).name}) for name, table in recipe.networks.items()
    }
    return recipe.model_copy(update={"networks": networks})


def _build_loaders(
    settings: Settings, recipe: Recipe, accelerator: Accelerator, splits: Splits, preprocess: Preprocess
) -> tuple[EpochBatches, Loader | ResidentLoader, Loader | ResidentLoader, list[str]]:
    """The order of the training images, the loaders for training and for scoring, and notes for the user."""
    notes: list[str] = []
    batch_size = min(recipe.batch.size, len(splits.train))
    if batch_size < recipe.batch.size:
        notes.append(f"batch size {batch_size}: the number of training images")
    augment = recipe.batch.augment
    if augment.hflip and not splits.dataset.hflip:
        augment = augment.model_copy(update={"hflip": 0.0})
        notes.append(f"{splits.dataset.name}: horizontal flip disabled, because its classes are not mirror-invariant")
    place = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    order = EpochBatches(
        splits.train,
        batch_size,
        seed=settings.seed,
        parts=settings.grad_accum_steps,
        mates=recipe.batch.mates,
        **place,
    )
    views = {name: table.of for name, table in recipe.batch.views.items()}
    seed, workers, device = settings.seed, settings.workers, accelerator.device
    # The first process decodes small images to a cache, which the others then read.
    with accelerator.main_process_first():
        loader, loader_notes = suitable_loader(
            splits.train, preprocess, augment, order, seed=seed, workers=workers, device=device, views=views
        )
        in_order = EpochBatches(splits.scored, batch_size, **place)
        scored_loader, scored_notes = suitable_loader(
            splits.scored, preprocess, None, in_order, seed=seed, workers=workers, device=device
        )
    # Both splits may have the same note.
    return order, loader, scored_loader, notes + list(dict.fromkeys([*loader_notes, *scored_notes]))


def _idle_options(settings: Settings, recipe: Recipe, splits: Splits, updates: int) -> Iterator[str]:
    """Options that change nothing in this run."""
    epochs = sum(recipe.phase_epochs)
    if (settings.keep_every or 0) > epochs:
        yield f"--keep-every {settings.keep_every} has no effect: the run has {counted(epochs, 'epoch')}"
    if (settings.save_every or 0) >= updates:
        yield (
            f"--save-every {settings.save_every} has no effect: the state is saved after every epoch, of "
            f"{counted(updates, 'update')}"
        )
    if settings.limit_val is not None and splits.val is None:
        yield "--limit-val has no effect: no images are held out of training"


def _shares(order: EpochBatches, coupled: Iterable[str]) -> list[str]:
    """Notes if a batch is split among processes or micro-batches; `coupled` are the losses and signals that compare
    the images of a batch with each other."""
    each, seen = order.batch_size // order.world, order.batch_size // (order.world * order.parts)
    notes = []
    if order.world > 1:
        notes.append(f"{order.world} processes: each sees {each} of the {order.batch_size} images of a batch")
    if seen < order.batch_size:
        notes += [
            f"{name} compares images with each other: {seen} at a time, not all {order.batch_size} of a batch"
            for name in coupled
        ]
    return notes


def _checkpoint_gradients(network: MultiExit, model: str) -> None:
    try:
        network.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError):
        raise UserError(
            f"--grad-checkpointing: timm does not support it for {model}",
            "a model family with gradient checkpointing",
            "--grad-accum-steps 2 also saves memory",
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
    return Mixing(num_classes, device, seed=seed, mixup=batch.mixup, cutmix=batch.cutmix, probability=batch.mixup_prob)


def _identity(split: Split) -> dict[str, Any]:
    """Counts and checksums that identify a training split."""
    labels = torch.from_numpy(split.labels)
    order = torch.arange(1, len(labels) + 1)
    return {
        "num_images": len(labels),
        "labels": int((labels * order % 1_000_003).sum()),
        "index": int((torch.from_numpy(split.index) * order % 1_000_003).sum()),
    }


def _check_data(found: Mapping[str, Any], trained_on: Mapping[str, Any]) -> None:
    if found != trained_on:
        raise UserError(
            f"the training data have changed since the run was started: {found['num_images']:,} images now, "
            f"{trained_on['num_images']:,} then"
            + (", with other labels or in another order" if found["num_images"] == trained_on["num_images"] else ""),
            "the same data",
            "restore the data, or start a new run",
        )
