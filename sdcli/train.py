"""A run: from settings and a recipe to a trained network in its run folder.

`prepare` checks and builds everything; `fit` goes through epochs and steps, the same for every recipe.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from sdcli import data, loaders, transforms
from sdcli.backbones import pretrained_transform, resolve
from sdcli.checkpoint import Description
from sdcli.devices import accelerator_for
from sdcli.errors import UserError
from sdcli.evaluate import Report, evaluate
from sdcli.exits import MultiExit, all_costs, choose_heads
from sdcli.networks import build_network, create_optimizer, create_schedule, plan_network
from sdcli.objective import Objective, check_losses
from sdcli.recipe import Recipe, to_toml
from sdcli.runs import Run, check_output
from sdcli.signals import Batch

LOG_EVERY_S = 0.25
"""How often the device is asked for the losses: asking waits for it."""


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


@dataclass
class Training:
    """Everything that a run needs, checked and ready to go."""

    accelerator: Accelerator
    network: MultiExit
    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: Any
    loader: Any
    """Training batches; `set_epoch` gives the next epoch its own order and augmentation."""
    scored_loader: Any
    """Batches of the split that is scored: validation, or test where nothing is held out."""
    scored_split: str
    description: Description
    run: Run
    epochs: int
    updates_per_epoch: int
    num_train: int
    num_val: int
    clip_grad: float | None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """Where training is: told every now and then."""

    epoch: int
    step: int
    steps: int
    images_per_s: float
    lr: float
    losses: dict[str, float]


@dataclass(frozen=True)
class Epoch:
    """An epoch that is done."""

    epoch: int
    lr: float
    losses: dict[str, float]
    """What each loss of the recipe added to the sum, on average over the images."""
    num_images: int
    seconds: float
    validation: Report | None = None

    @property
    def images_per_s(self) -> float:
        """Training images per second, scoring aside."""
        return self.num_images / max(self.seconds, 1e-9)

    def to_log(self) -> dict[str, Any]:
        """A line of `log.jsonl`."""
        return {
            "epoch": self.epoch,
            "lr": self.lr,
            "loss": sum(self.losses.values()),
            "losses": self.losses,
            "num_images": self.num_images,
            "validation": self.validation.to_dict() if self.validation else None,
            "seconds": round(self.seconds, 3),
            "images_per_s": round(self.images_per_s, 1),
        }


@dataclass(frozen=True)
class Finished:
    """The run is done: which checkpoint to take, of which epoch, and how it scores."""

    checkpoint: Path
    epoch: int
    report: Report


def prepare(settings: Settings, recipe: Recipe, output: Path) -> Training:
    """Checks everything and builds it; the run folder is made last. Raises UserError before any image is read for what
    is wrong with recipe, model or folder, and before the first batch for the rest.
    """
    check_output(output)
    check_losses(recipe.losses)
    student, augment = recipe.student, recipe.batch.augment
    pretrained = student.weights == "pretrained"
    resolve(settings.model, num_classes=None, image_size=None)
    transforms.check_policy(augment.policy)
    accelerator = accelerator_for(settings.device)

    dataset = data.open_dataset(settings.dataset, image_key=settings.image_key, label_key=settings.label_key)
    train_split, val_split = data.training_splits(dataset, settings.val_fraction, settings.seed)
    train_split = data.limit(train_split, settings.limit_train, settings.seed)
    val_split = data.limit(val_split, settings.limit_val, settings.seed) if val_split else None
    size, mean, std = data.measure(dataset)
    architecture = resolve(
        settings.model,
        num_classes=len(dataset.classes),
        image_size=settings.image_size or (None if pretrained else data.natural_size(size)),
        stem=student.stem,
        pretrained=pretrained,
        model_args=student.model_args,
    )
    plan = plan_network(student, architecture)
    heads = choose_heads(plan, student.head)
    preprocess = transforms.Preprocess(architecture.input_size, mean, std)
    set_seed(settings.seed)
    network, notes = build_network(student, architecture, plan, heads, len(dataset.classes))
    if pretrained:
        preprocess = replace(preprocess, **pretrained_transform(network.backbone))
    objective = Objective(recipe.losses, network.widths)

    workers = settings.workers
    if workers is None:
        workers = loaders.suitable_workers(accelerator.device, preprocess)
    batch_size = min(recipe.batch.size, len(train_split))
    if batch_size < recipe.batch.size:
        notes.append(f"batch size {batch_size}: there are no more training images")
    mirror = augment.mirror
    if mirror and not dataset.mirror:
        mirror = 0.0
        notes.append(f"{dataset.name}: images are not mirrored, since a mirrored one would mean something else")
    transform = transforms.train_transform(preprocess, **{**augment.model_dump(), "mirror": mirror})
    loader = loaders.make_loader(
        train_split, transform, batch_size=batch_size, train=True, seed=settings.seed, workers=workers
    )
    scored = val_split or dataset.splits["test"]
    scored_loader = loaders.make_loader(
        scored,
        transforms.eval_transform(preprocess),
        batch_size=batch_size,
        train=False,
        seed=0,
        workers=workers,
    )
    optimizer = create_optimizer([network, objective], recipe.optimizer)
    updates_per_epoch = len(loader)
    schedule = create_schedule(optimizer, recipe.schedule, recipe.epochs, updates_per_epoch)
    network, objective, optimizer = accelerator.prepare(network, objective, optimizer)

    description = Description(
        architecture=architecture,
        plan=plan,
        heads=heads,
        classes=list(dataset.classes),
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
    run = Run(output)
    run.write_recipe(to_toml(recipe))
    run.write_settings(asdict(settings))
    return Training(
        accelerator=accelerator,
        network=network,
        objective=objective,
        optimizer=optimizer,
        schedule=schedule,
        loader=loader,
        scored_loader=scored_loader,
        scored_split="validation" if val_split else "test",
        description=description,
        run=run,
        epochs=recipe.epochs,
        updates_per_epoch=updates_per_epoch,
        num_train=len(train_split),
        num_val=len(val_split) if val_split else 0,
        clip_grad=recipe.optimizer.clip_grad,
        notes=[*dataset.notes, *architecture.notes, *plan.notes, *notes],
    )


def fit(training: Training) -> Iterator[Step | Epoch | Finished]:
    """Trains to the end, writing the run folder on the way; tells where it is now and then.

    `best` is the epoch with the highest top-1 of the ensemble (of the final exit where there are no others) on the
    validation split, as BYOT's authors choose, only that they do so on the test split. Without a validation split
    nothing is chosen: the last epoch is scored on the test split, once.
    """
    best: Epoch | None = None
    for number in range(1, training.epochs + 1):
        for event in train_epoch(training, number):
            if isinstance(event, Step):
                yield event
                continue
            if training.num_val:
                event = replace(event, validation=score(training))
            training.run.log_epoch(event.to_log())
            _save(training, "last", event)
            if event.validation and (best is None or _beats(event.validation, best.validation)):
                best = event
                _save(training, "best", event)
            yield event
    if best is not None and best.validation is not None:
        name, epoch, report = "best", best.epoch, best.validation
    else:
        name, epoch, report = "last", training.epochs, score(training)
    training.run.write_report(report, f"{name}.safetensors")
    yield Finished(training.run.folder / f"{name}.safetensors", epoch, report)


def score(training: Training) -> Report:
    """All points of the network as it is now, on the split that is scored."""
    about = training.description
    return evaluate(
        training.network,
        training.scored_loader,
        points=training.network.points,
        costs=all_costs(about.plan, about.heads, len(about.classes)),
        device=training.accelerator.device,
        model=about.architecture.model,
        dataset=about.dataset["name"],
        split=training.scored_split,
    )


def _beats(report: Report, other: Report | None) -> bool:
    """More accurate, or as accurate and surer of the right class."""
    assert other is not None
    return (report.best.top1, -report.best.nll) > (other.best.top1, -other.best.nll)


def _save(training: Training, name: str, epoch: Epoch) -> None:
    scores = epoch.validation.to_dict() if epoch.validation else {}
    description = replace(training.description, epoch=epoch.epoch, scores=scores)
    training.run.save(name, training.network.state_dict(), description)


def train_step(training: Training, batch: Batch) -> dict[str, torch.Tensor]:
    """The network sees the batch, every loss compares what it says, and it takes a step. Returns the losses' parts."""
    signals = training.network(batch.images)
    total, parts = training.objective(signals, batch)
    training.accelerator.backward(total)
    if training.clip_grad is not None:
        training.accelerator.clip_grad_norm_(training.network.parameters(), training.clip_grad)
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    return dict(parts)


def train_epoch(training: Training, epoch: int) -> Iterator[Step | Epoch]:
    """One epoch, counted from 1: yields a `Step` now and then, and the `Epoch` at its end.

    Raises UserError where a loss is not finite, naming it.
    """
    training.network.train()
    training.objective.train()
    start = told = time.monotonic()
    sums: dict[str, torch.Tensor] = {}
    num_images = step = 0
    lr = 0.0
    training.loader.set_epoch(epoch)
    for step, batch in enumerate(training.loader, start=1):
        batch = batch.to(training.accelerator.device)
        lr = training.optimizer.param_groups[0]["lr"]
        parts = train_step(training, batch)
        training.schedule.step((epoch - 1) * training.updates_per_epoch + step)
        num_images += len(batch.labels)
        for name, part in parts.items():
            weighted = part * len(batch.labels)
            sums[name] = sums[name] + weighted if name in sums else weighted
        now = time.monotonic()
        if now - told >= LOG_EVERY_S or step == 1:
            told = now
            losses = _read(parts, epoch, step, lr)
            yield Step(epoch, step, training.updates_per_epoch, num_images / (now - start), lr, losses)
    losses = _read({name: value / num_images for name, value in sums.items()}, epoch, step, lr)
    yield Epoch(epoch, lr, losses, num_images, time.monotonic() - start)


def _read(parts: dict[str, torch.Tensor], epoch: int, step: int, lr: float) -> dict[str, float]:
    """The losses as numbers, which waits for the device; raises UserError for one that is not finite."""
    losses = dict(zip(parts, torch.stack(list(parts.values())).tolist(), strict=True))
    for name, value in losses.items():
        if not math.isfinite(value):
            raise UserError(
                f"losses.{name} became {value} in epoch {epoch}, step {step}, at learning rate {lr:g}",
                "a finite number",
                f"a lower --lr, a smaller losses.{name}.weight, or --set optimizer.clip_grad=1.0",
            )
    return losses
