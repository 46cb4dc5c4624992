"""`sdcli predict`."""

from __future__ import annotations

from collections import Counter, deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdcli.cli.options import BatchSize, Device, Import, MeanCost, Run, Threshold, Workers
from sdcli.cli.usage import Command
from sdcli.errors import UserError, counted
from sdcli.extensions import load_imports

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor

    from sdcli.cli.predictions import Write

EPILOG = """
Example:  sdcli predict runs/first photo.jpg photos/

Example:  find photos -name '*.jpg' | sdcli predict runs/first - --json
"""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("predict", cls=Command, epilog=EPILOG)(predict)


def predict(
    checkpoint: Run,
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Image files, folders with images at any depth, patterns, or - for a list on standard input.",
        ),
    ],
    exit_: Annotated[
        str | None, typer.Option("--exit", metavar="NAME", help="Only this exit answers: exit1, … or final.")
    ] = None,
    ensemble: Annotated[
        bool, typer.Option("--ensemble", metavar="", help="The mean of all exits' logits answers.")
    ] = False,
    budget: MeanCost = None,
    threshold: Threshold = None,
    no_early_exit: Annotated[
        bool, typer.Option("--no-early-exit", metavar="", help="The final exit answers, also of a calibrated network.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="How many of the likeliest classes are listed.")] = 5,
    batch_size: BatchSize = 64,
    device: Device = None,
    workers: Workers = None,
    strict: Annotated[
        bool, typer.Option("--strict", metavar="", help="Stop at the first image that cannot be read.")
    ] = False,
    import_: Import = None,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object per line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", metavar="", help="Print CSV.")] = False,
    parquet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a Parquet file in place of the table.")
    ] = None,
) -> None:
    """Classify images: label, confidence, the exit that answered, and the likeliest classes.

    Images leave early as `sdcli calibrate` has found for the checkpoint; without that the final exit answers. An image
    that cannot be read is named, the others are done, and the exit code is 2.
    """
    _refuse_both({"--json": as_json, "--csv": as_csv, "--parquet": parquet is not None})
    _refuse_both(
        {
            "--exit": exit_ is not None,
            "--ensemble": ensemble,
            "--budget": budget is not None,
            "--threshold": threshold is not None,
            "--no-early-exit": no_early_exit,
        }
    )

    from sdcli.cli.talk import end_stage, message, note, only_results, stages

    with stages(), only_results():
        from sdcli.cli import predictions
        from sdcli.cli.progress import scoring
        from sdcli.data.photos import find_photos, read_photos
        from sdcli.devices import accelerator_for, keep_freed_memory, short_of_memory
        from sdcli.network.checkpoint import find_checkpoint
        from sdcli.network.predict import predictions as read_answers
        from sdcli.network.weights import load

        if parquet is not None:
            predictions.check_parquet(parquet)
        path = find_checkpoint(checkpoint)
        load_imports(import_ or [])
        found = find_photos(_listed(paths))
        files, problems = found.files, len(found.problems)
        if found.problems and (strict or not files):
            raise found.problems[0]
        place = accelerator_for(device).device
        keep_freed_memory(place)
        network = load(path)
        strategy = network.strategy(
            exit=exit_, ensemble=ensemble, budget=budget, threshold=threshold, early_exit=not no_early_exit
        )
        network = network.to(place)
        end_stage()
    for text in [*found.notes, *filter(None, [strategy.note])]:
        note(text)
    for problem in found.problems:
        message(problem.wrong)
    exits: Counter[str] = Counter()
    at_once = min(batch_size, len(files))
    batches = read_photos(files, network.transform, batch_size=batch_size, workers=workers, pin=place.type == "cuda")
    done = 0
    read: deque[list[str]] = deque()

    def images() -> Iterator[Tensor]:
        """The batches that could be read; their files go to `read`."""
        nonlocal problems, done
        for batch in batches:
            for error in batch.errors:
                if strict:
                    raise error
                message(error.wrong)
            problems += len(batch.errors)
            done += len(batch.errors)
            if batch.images is not None:
                read.append(batch.files)
                yield batch.images.to(place, non_blocking=True)

    with (
        short_of_memory(
            f"on {place} with {at_once} images at a time",
            "a network and a batch that fit",
            f"--batch-size {at_once // 2}" if at_once > 1 else "another --device",
        ),
        scoring("predicting", quiet=len(files) <= batch_size or _prints_along(as_json, as_csv)) as progress,
        _output(as_json, as_csv, parquet, min(top, len(network.classes))) as write,
    ):
        for decided in network.answers(images(), strategy):
            answers = read_answers(decided, network.classes, top)
            exits.update(answer.exit for answer in answers)
            write(list(zip(read.popleft(), answers, strict=True)))
            done += len(answers)
            progress(done, len(files))
    if parquet is not None:
        count = exits.total()
        message(f"{parquet}: {counted(count, 'image')}" if count else f"{parquet} not written: no image was classified")
    if exits and strategy.policy is not None and not strategy.alone:
        note(predictions.leaving(exits, strategy.policy, network.blueprint))
    if problems:
        total = len(files) + len(found.problems)
        done_too = "; the others are done" if problems < total else ""
        raise UserError(
            f"{problems:,} of {counted(total, 'path')} could not be read{done_too}",
            "images that can be read, as named above",
        )


def _listed(paths: list[str]) -> list[str]:
    """The paths, with those on standard input, one a line, in the place of `-`."""
    import os
    import sys

    listed: list[str] = []
    for path in paths:
        if path != "-":
            listed.append(path)
            continue
        lines = getattr(sys.stdin, "buffer", sys.stdin).read().splitlines() if sys.stdin else []
        names = [os.fsdecode(name) for name in lines if name.strip()]
        if not names:
            raise UserError("standard input lists no path", "one path a line", "find photos | sdcli predict RUN -")
        listed += names
    return listed


def _refuse_both(asked: dict[str, bool]) -> None:
    """Raises UserError where more than one of the options was used."""
    used = [name for name, is_used in asked.items() if is_used]
    if len(used) > 1:
        raise UserError(f"{' and '.join(used)} exclude each other", f"one of {', '.join(asked)}")


def _prints_along(as_json: bool, as_csv: bool) -> bool:
    """Whether results appear on the terminal while images are classified: a bar would be among them."""
    import sys

    return (as_json or as_csv) and sys.stdout.isatty()


def _output(as_json: bool, as_csv: bool, parquet: Path | None, num_top: int) -> AbstractContextManager[Write]:
    from sdcli.cli import predictions

    if parquet is not None:
        return predictions.as_parquet(parquet)
    if as_json:
        return predictions.as_json_lines()
    return predictions.as_csv(num_top) if as_csv else predictions.as_table()
