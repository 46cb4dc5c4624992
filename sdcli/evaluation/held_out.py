"""A checkpoint calibrated: held-out images found, the network run on them, and what was found written beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sdcli.data.folders import unlabelled_images
from sdcli.devices import accelerator_for
from sdcli.errors import UserError
from sdcli.evaluation.calibrate import Calibrated, Goal, calibrate
from sdcli.evaluation.latency import measure_latencies
from sdcli.evaluation.opened import Opened, open_checkpoint
from sdcli.evaluation.outputs import collect
from sdcli.files import check_writable
from sdcli.network.checkpoint import describe_again
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
    _check_writable(output)
    unlabelled = unlabelled_images(Path(dataset)) if dataset and goal.loss == "change" else None
    if unlabelled is not None:
        network, about = rebuild(path)
        opened = Opened(path, network, about, unlabelled, dict(unlabelled.splits), own=False, notes=())
        split = "validation"
    else:
        opened = open_checkpoint(path, dataset=dataset, image_key=image_key, label_key=label_key)
        network, about, split = opened.network, opened.about, opened.held_out
    exits = [point for point in network.classifiers[:-1] if not network.why_not[point]]
    if not exits:
        reasons = {reason for reason in network.why_not.values() if reason}
        raise UserError(
            f"images cannot leave {network.plan.model} early: " + ("; ".join(sorted(reasons)) or "it has no exits"),
            "an exit after which the rest of the network needs only the images that are left",
        )
    accelerator = accelerator_for(device)
    chosen, loader, notes = opened.batches(split, limit, batch_size, workers, accelerator.device)
    network.to(accelerator.device)
    points = [*exits, FINAL]
    outputs = collect(network, loader, points, accelerator.device, lambda done: progress(done, len(chosen)))
    latencies = measure_latencies(network, exits, accelerator.device) if goal.latency_ms is not None else None
    found = calibrate(
        outputs,
        about.blueprint,
        exits,
        goal,
        data=f"{opened.name} ({split})",
        kind=kind,
        agreement=agreement,
        latencies=latencies,
    )
    describe_again(path, replace(about, early_exit=found.calibration), output)
    left_out = [f"{point} is not used: {reason}" for point, reason in network.why_not.items() if reason]
    if opened.own and path.name == "best.safetensors":
        left_out.append("the epoch was chosen by its score on these images: the promise is slightly optimistic")
    return replace(found, notes=(*opened.notes, *notes, *left_out, *found.notes))


def _check_writable(output: Path) -> None:
    """Raises UserError for a file that cannot be written, before anything is computed."""
    try:
        check_writable(output)
    except OSError as error:
        raise UserError(f"'{output}' cannot be written: {error.strerror}", "a file in a folder that exists") from None
