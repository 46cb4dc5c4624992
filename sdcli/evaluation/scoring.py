"""A checkpoint's exits, scored on a data set that is opened for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sdcli.data import transforms
from sdcli.data.dataset import short_name
from sdcli.data.loaders import EpochBatches
from sdcli.data.open import open_dataset
from sdcli.data.resident import suitable_loader
from sdcli.data.splits import limited, training_splits
from sdcli.devices import accelerator_for, short_of_memory
from sdcli.errors import UserError, unknown
from sdcli.evaluation.evaluate import Report, evaluate
from sdcli.network.blueprint import rebuild
from sdcli.network.multi_exit import all_costs


def score_checkpoint(
    path: Path,
    *,
    points: list[str] | None = None,
    dataset: str | None = None,
    split: str = "test",
    image_key: str | None = None,
    label_key: str | None = None,
    limit: int | None = None,
    batch_size: int = 256,
    device: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Report, list[str]]:
    """Scores `points` (all where None) of a checkpoint, on the data set it was trained on or on another one.

    Returns the report and what is to be said about it. Raises UserError for a point that the checkpoint does not
    have, a split that the data set does not have, and classes that do not match.
    """
    network, about = rebuild(path)
    if points is not None:
        for point in points:
            if point not in network.classifiers:
                raise unknown("exit", point, network.classifiers)
        points = [point for point in network.classifiers if point in points]
    trained_on = about.dataset
    own = dataset is None
    opened = open_dataset(
        trained_on["source"] if dataset is None else dataset,
        image_key=image_key or (trained_on["image_key"] if own else None),
        label_key=label_key or (trained_on["label_key"] if own else None),
    )
    notes = [*opened.notes, *_compare_classes(about.classes, list(opened.classes), path)]
    splits = dict(opened.splits)
    if own:
        # What was held out of training is the validation split here too.
        train_split, val_split = training_splits(opened, trained_on["val_fraction"], trained_on["seed"])
        splits |= {"train": train_split} | ({"validation": val_split} if val_split else {})
    if split not in splits:
        raise UserError(f"{opened.name} has no split '{split}'", "one of " + ", ".join(splits))
    chosen = splits[split]
    chosen = limited(chosen, limit, trained_on["seed"])
    preprocess = transforms.Preprocess.from_dict(about.preprocess)
    accelerator = accelerator_for(device)
    loader, loader_notes = suitable_loader(
        chosen,
        preprocess,
        None,
        EpochBatches(chosen, batch_size),
        seed=0,
        workers=workers,
        device=accelerator.device,
    )
    notes += loader_notes
    points = points or network.classifiers
    total = len(chosen)
    at_once = min(batch_size, total)
    doing, smaller = f"on {accelerator.device} with {at_once} images at a time", f"--batch-size {at_once // 2}"
    with short_of_memory(doing, "a network and a batch that fit", smaller if at_once > 1 else "another --device"):
        report = evaluate(
            network.to(accelerator.device),
            loader,
            points=points,
            costs=all_costs(about.plan, about.heads, len(about.classes), points),
            device=accelerator.device,
            model=about.architecture.model,
            dataset=trained_on["name"] if own else short_name(opened),
            split=split,
            progress=lambda done: progress(done, total),
        )
    return report, notes


def _compare_classes(ours: list[str], theirs: list[str], path: Path) -> list[str]:
    """Raises UserError where the numbers of classes differ; tells where only the names do."""
    if len(ours) != len(theirs):
        raise UserError(
            f"'{path}' knows {len(ours)} classes, the data set has {len(theirs)}",
            "a data set with the classes that the checkpoint was trained on",
            "choose another --dataset, or another column with --label-key",
        )
    if ours != theirs:
        number = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        return [
            f"class {number} is '{ours[number]}' in the checkpoint and '{theirs[number]}' in the data set: "
            "scores mean something only if both are the same thing"
        ]
    return []
