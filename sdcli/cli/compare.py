"""`sdcli compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sdcli.cli.options import BatchSize, Device, Import, Json, Workers
from sdcli.cli.usage import Command
from sdcli.errors import UserError
from sdcli.extensions import load_imports

EPILOG = """
Example:  sdcli train resnet18 --dataset cifar100 --recipe baseline --recipe schedules/cosine --seeds 3 -o runs/baseline

Example:  sdcli train resnet18 --dataset cifar100 --recipe default --seeds 3 -o runs/default

Example:  sdcli compare runs/baseline runs/default
"""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("compare", cls=Command, epilog=EPILOG)(compare)


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Run folders, folders of runs (sdcli train --seeds), checkpoints, or records (--save).",
            show_default=False,
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="What all others are compared with, as tables name it. [default: baseline, else the first]",
        ),
    ] = None,
    point: Annotated[
        str, typer.Option(metavar="NAME", help="The exit whose differences are shown: final, exit1, …, ensemble.")
    ] = "final",
    checkpoint: Annotated[
        Literal["best", "last"] | None,
        typer.Option(help="The checkpoint of each run folder. [default: best, else last]", show_default=False),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Score on these data. [default: those that each run was trained on]"),
    ] = None,
    batch_size: BatchSize = 256,
    device: Device = None,
    workers: Workers = None,
    import_: Import = None,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write a small JSON file for each run, which compare takes in place of the run."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw accuracy against MACs at use and in training.")
    ] = None,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", metavar="", help="Print CSV.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", metavar="", help="Print Markdown tables.")] = False,
    as_latex: Annotated[bool, typer.Option("--latex", metavar="", help="Print LaTeX tables.")] = False,
) -> None:
    """Compare recipes: means over seeds, paired differences, costs.

    Runs are grouped by model, data and recipe, and paired by seed. Each run is scored once on the test split; the
    scores stay in its folder. Shown are means and standard deviations, differences from the baseline with t intervals
    and p-values of a sign-flip test (corrected after Holm), what each recipe costs, and what is not comparable.
    """
    if as_json + as_csv + as_markdown + as_latex > 1:
        raise UserError("--json, --csv, --markdown and --latex exclude each other", "one of them")

    from sdcli.cli import plots
    from sdcli.cli.talk import line, note, only_results, output, print_json, stages

    if plot is not None:
        plots.check(plot)
    with stages(), only_results():
        from sdcli.cli import comparisons, grids
        from sdcli.cli.progress import scoring
        from sdcli.compare.compare import compare as compare_records
        from sdcli.compare.record import check_names, check_save, find_runs, record_of, save_record, unfinished
        from sdcli.devices import accelerator_for, keep_freed_memory

        paths = find_runs(runs)
        if save is not None:
            check_save(save)
        load_imports(import_ or [])
        keep_freed_memory(accelerator_for(device).device)
        records = []
        for number, path in enumerate(paths, start=1):
            with scoring(f"scoring run {number} of {len(paths)}") as progress:
                records.append(
                    record_of(
                        path,
                        which=checkpoint,
                        dataset=dataset,
                        batch_size=batch_size,
                        device=device,
                        workers=workers,
                        progress=progress,
                    )
                )
        if save is not None:
            check_names(records, save)
        found = compare_records(records, baseline)
        known = list(dict.fromkeys(p for task in found.tasks for group in task.groups for p in group.points))
        if point not in known:
            raise UserError(f"no run has a point '{point}'", "one of " + ", ".join(known))
    tables, dropped = list(comparisons.grids(found, point)), dict[str, None]()
    if as_json:
        print_json(found.to_dict())
    elif as_csv:
        line(comparisons.as_csv(found))
    elif as_markdown or as_latex:
        line("\n\n".join(map(grids.markdown if as_markdown else grids.latex, tables)))
    else:
        for grid in tables:
            table, without = grids.fitted(grid, output(), comparisons.DROPPABLE, comparisons.WIDEST)
            dropped |= dict.fromkeys(without)
            output().print(table)
    if dropped:
        note(f"columns without room here: {', '.join(dropped)}; --markdown and --json have them")
    early = [f"{run} ({'scored as it is' if run in paths else 'left out'})" for run in unfinished(runs)]
    unready = [f"not trained to the end: {', '.join(early)}"] if early else []
    for text in [*comparisons.remarks(found, point), *found.notes, *unready]:
        note(text)
    if plot is not None:
        plots.save_comparison(found, plot)
        note(f"wrote {plot}")
    if save is not None:
        for record in records:
            note(f"wrote {save_record(record, save)}")
