"""`sdcli bench`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdcli.cli.options import Device, Import, Json, MeanCost, Threshold
from sdcli.cli.usage import Command
from sdcli.errors import UserError, counted
from sdcli.extensions import load_imports

if TYPE_CHECKING:
    from sdcli.network.checkpoint import Description
    from sdcli.network.multi_exit import MultiExit

EPILOG = """
Example:  sdcli bench runs/first --batch-size 1,32

Example:  sdcli bench resnet18 --threads 1 --json
"""

LARGEST_BATCH = 65_536
THREADS_PER_CORE = 4
"""More threads only wait for each other, and some thousands crash the process."""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("bench", cls=Command, epilog=EPILOG)(bench)


def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            help="A run folder, a .safetensors file, or a timm model, which gets exits and random weights.",
        ),
    ],
    batch_size: Annotated[
        str, typer.Option("--batch-size", "-b", metavar="IMAGES", help="Batch sizes, separated by commas.")
    ] = "1,32,128",
    compile_: Annotated[
        bool, typer.Option("--compile", metavar="", help="Measure compiled networks too, beside eager ones.")
    ] = False,
    device: Device = None,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Threads on a CPU. [default: torch's, one per core]")
    ] = None,
    budget: MeanCost = None,
    threshold: Threshold = None,
    seconds: Annotated[
        float, typer.Option(min=0.0, metavar="S", help="How long each batch size is measured; at least five rounds.")
    ] = 10.0,
    import_: Import = None,
    as_json: Json = False,
) -> None:
    """Measure latency and throughput of every exit, the plain network and early exit.

    All take turns, and each is compared with the plain network in the same round: other programs on the machine disturb
    the times, and the ratios less. Early exit uses what `sdcli calibrate` has found, on images of the data set that the
    checkpoint was trained on. It runs eagerly also with --compile: how many images go on is known only when it runs.
    """
    sizes = parse_sizes(batch_size)
    if budget is not None and threshold is not None:
        raise UserError("--budget and --threshold exclude each other", "one of them")
    if threads is not None:
        check_threads(threads)

    from sdcli.cli.talk import end_stage, note, only_results, output, print_json, stages

    notes: list[str] = []
    with stages(), only_results():
        import logging

        import torch

        from sdcli.cli.tables import bench_tables
        from sdcli.devices import accelerator_for, keep_freed_memory, short_of_memory
        from sdcli.evaluation import bench as measuring

        log = logging.getLogger("sdcli.cli.bench")
        load = measuring.current_load()
        others = measuring.busiest() if load is not None and load > measuring.BUSY else []
        place = accelerator_for(device).device
        keep_freed_memory(place)
        if threads is not None:
            torch.set_num_threads(threads)
        if threads is not None and place.type != "cpu":
            notes.append(f"--threads {threads} without effect on {place}")
        load_imports(import_ or [])
        network, about, path = _open(model)
        strategy = None
        if network.calibration is not None or budget is not None or threshold is not None:
            strategy = network.strategy(budget=budget, threshold=threshold)
        elif about is not None and len(network.exits) == 1:
            notes.append("early exit is left out: the network has no exits; a recipe such as default trains them")
        elif about is not None:
            notes.append(f"early exit is left out: not calibrated (sdcli calibrate {model}); --threshold T measures it")
        images, name = measuring.random_images(network, max(sizes)), "random"
        if strategy is not None and about is not None:
            try:
                images, name = measuring.real_images(path, about, network, max(measuring.IMAGES, *sizes))
            except UserError as error:
                notes.append(f"the data set cannot be opened: {error.wrong}")
        if strategy is not None and name == "random":
            notes.append("random images cannot show how many images leave: early exit is measured on them all the same")
        with short_of_memory(f"on {place} with {max(sizes)} images at a time", "batches that fit", "--batch-size 1"):
            measured = measuring.bench(
                network,
                images,
                strategy,
                about_images=name,
                batch_sizes=sizes,
                device=place,
                compiled=compile_,
                seconds=seconds,
                load=load,
                progress=lambda doing: log.info("measuring: %s", doing),
            )
        end_stage()
    if as_json:
        print_json(measured.to_dict())
    else:
        for table in bench_tables(measured):
            output().print(table)
        on_threads = f", {counted(measured.threads, 'thread')}" if place.type == "cpu" else ""
        notes.insert(0, f"on {measured.device}{on_threads}, torch {measured.torch}")
    if measured.leaving:
        shares = ", ".join(f"{share:.1%} at {point}" for point, share in measured.leaving.items())
        notes.append(f"early exit on {measured.images}: answered {shares}")
    notes += [f"{subject} cannot be compiled: {reason}" for subject, reason in measured.left_out.items()]
    if load is not None and load > measuring.BUSY:
        with_what = f" ({', '.join(others)})" if others else ""
        notes.append(
            f"the machine was busy before: load {load:.1f}{with_what}; the ratios are more reliable than the times"
        )
    elif measured.load is not None and measured.load[1] > measuring.BUSY + measured.threads:
        notes.append(
            f"something else ran meanwhile: load {measured.load[1]:.1f}, with {counted(measured.threads, 'thread')} "
            "here; the ratios are more reliable than the times"
        )
    for text in notes:
        note(text)


def _open(model: str) -> tuple[MultiExit, Description | None, Path]:
    """The network, and of a checkpoint what it says and where it is; a timm model gets random weights."""
    from sdcli.evaluation.opened import is_model_name
    from sdcli.network.blueprint import Blueprint
    from sdcli.network.checkpoint import find_checkpoint
    from sdcli.network.multi_exit import build
    from sdcli.network.weights import rebuild
    from sdcli.recipe.schema import Network

    if is_model_name(model):
        return build(Blueprint.draft(Network(), model)), None, Path(model)
    path = find_checkpoint(Path(model))
    return *rebuild(path), path


def check_threads(threads: int) -> None:
    """Raises UserError for far more threads than the machine has cores."""
    cores = os.cpu_count() or 1
    if threads > THREADS_PER_CORE * cores:
        raise UserError(
            f"--threads {threads}: this machine has {counted(cores, 'core')}",
            f"a number from 1 to {THREADS_PER_CORE * cores}",
            f"--threads {cores}",
        )


def parse_sizes(text: str) -> list[int]:
    """`--batch-size` as numbers, smallest first."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and 1 <= int(part) <= LARGEST_BATCH for part in parts):
        raise UserError(f"invalid value: --batch-size {text}", f"numbers from 1 to {LARGEST_BATCH}: 1,32,128")
    return sorted({int(part) for part in parts})
