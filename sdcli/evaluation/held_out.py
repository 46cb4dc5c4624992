"""A checkpoint calibrated: held-out images found, the network run on them, and what was found written beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from sdcli.data.batch import Batch
from sdcli.data.dataset import printable
from sdcli.data.folders import unlabelled_images
from sdcli.data.photos import PhotoBatch, read_photos
from sdcli.devices import accelerator_for
from sdcli.errors import UserError, counted
from sdcli.evaluation.calibrate import LEAST_IMAGES, Calibrated, Goal, calibrate, check_enough
from sdcli.evaluation.latency import measure_latencies
from sdcli.evaluation.opened import open_checkpoint
from sdcli.evaluation.outputs import collect
from sdcli.files import check_writable
from sdcli.network.checkpoint import describe_again, same_tensors
from sdcli.network.predict import without_exits
from sdcli.network.weights import rebuild
from sdcli.recipe.address import FINAL


def calibrate_checkpoint(
    path: Path,
    goal: Goal,
    *,
    output: Path,
    kind: str | None = None,
    agreement: bool | None = None,
    dataset: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    limit: int | None = None,
    batch_size: int = 256,
    device: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibrated:
    """Calibrates the checkpoint at `path` on validation images and writes the result to `output`, tensors unchanged.

    The validation images are the data set's own, or those that were held out of training. For a `change` loss `dataset`
    may be a folder of images without classes. Raises UserError where there are none, and as `calibrate` does.
    """
    _check_output(path, output)
    if limit is not None:
        check_enough(limit, f"--limit {LEAST_IMAGES} or more, or leave it out")
    photos = unlabelled_images(Path(dataset)) if dataset else []
    opened = None
    if not photos:
        opened = open_checkpoint(path, dataset=dataset, image_key=image_key, label_key=label_key)
    elif goal.loss == "drop":
        raise UserError(
            f"'{dataset}' has no class folders, and right answers cannot be counted without labels",
            "images sorted into val/CLASS/",
            "--consistency, which limits the share of answers that change and needs no labels",
        )
    network, about = (opened.network, opened.about) if opened else rebuild(path)
    split = opened.held_out if opened else "validation"
    exits = [point for point in network.classifiers[:-1] if not network.why_not[point]]
    if not exits:
        reasons = {reason for reason in network.why_not.values() if reason}
        if not reasons:
            raise without_exits(path)
        raise UserError(
            f"images cannot leave {network.plan.model} early: " + "; ".join(sorted(reasons)),
            "an exit after which the rest of the network needs only the images that are left",
            "another model, or other exits when training (--exits)",
        )
    place = accelerator_for(device).device
    errors: list[UserError] = []
    batches: Iterable[Batch]
    if opened:
        chosen, batches, notes = opened.batches(split, limit, batch_size, workers, place)
        num, name, notes = len(chosen), opened.name, [*opened.notes, *notes]
    else:
        photos = _spread(photos, limit)
        num, name, notes = len(photos), printable(Path(str(dataset)).expanduser().resolve().name), []
        batches = _unlabelled(
            read_photos(photos, network.transform, batch_size=batch_size, workers=workers, pin=place.type == "cuda"),
            errors,
        )
    network.to(place)
    points = [*exits, FINAL]
    outputs = collect(network, batches, points, place, lambda done: progress(done, num))
    if errors:
        notes += [f"left out {counted(len(errors), 'image')} that cannot be read", *(error.wrong for error in errors)]
    if not (opened and opened.own):
        check_enough(len(outputs), f"add images to '{dataset}'" if dataset else "more images")
    latencies = measure_latencies(network, exits, place, routed=True) if goal.latency_ms is not None else None
    found = calibrate(
        outputs,
        about.blueprint,
        exits,
        goal,
        data=f"{name} ({split})",
        kind=kind,
        agreement=agreement,
        latencies=latencies,
    )
    describe_again(path, replace(about, early_exit=found.calibration), output)
    left_out = [f"{point} is not used: {reason}" for point, reason in network.why_not.items() if reason]
    if opened and opened.own and path.name == "best.safetensors":
        what = "the promise is" if found.calibration.promise else "scores on them are"
        left_out.append(f"the epoch was chosen by its score on these images: {what} slightly optimistic")
    return replace(found, notes=(*notes, *left_out, *found.notes))


def _spread(files: list[str], limit: int | None) -> list[str]:
    """At most `limit` of the files, from all over the list."""
    if limit is None or limit >= len(files):
        return files
    return [files[place * len(files) // limit] for place in range(limit)]


def _unlabelled(parts: Iterable[PhotoBatch], errors: list[UserError]) -> Iterator[Batch]:
    """Photos as batches whose labels are all 0; what cannot be read is added to `errors`, and raised if nothing can."""
    done = 0
    for part in parts:
        errors += part.errors
        if part.images is not None:
            index = torch.arange(done, done + len(part.images))
            yield Batch(part.images, torch.zeros_like(index), index)
            done += len(index)
    if done == 0:
        raise errors[0]


def _check_output(path: Path, output: Path) -> None:
    """Raises UserError for a file that cannot be written or has another network, before anything is computed."""
    if output != path and output.suffix != ".safetensors":
        raise UserError(
            f"'{output}' does not end in .safetensors", "a checkpoint's name", f"--output {output}.safetensors"
        )
    if output.exists() and not same_tensors(path, output):
        raise UserError(
            f"'{output}' exists and is not an earlier result for '{path}'",
            "a new file, or one with the same weights",
            "choose another --output",
        )
    try:
        check_writable(output)
    except OSError as error:
        raise UserError(f"'{output}' cannot be written: {error.strerror}", "a file in a folder that exists") from None
