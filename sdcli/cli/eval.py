"""`sdcli eval`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdcli.cli.options import BatchSize, Device, ImageKey, Import, Json, LabelKey, Workers
from sdcli.cli.usage import Command
from sdcli.errors import UserError
from sdcli.extensions import load_imports

if TYPE_CHECKING:
    from sdcli.evaluation.opened import Opened
    from sdcli.evaluation.scoring import Scored

EPILOG = """
Example:  sdcli eval runs/first

Example:  sdcli eval runs/first --dynamic --plot scores.png

Example:  sdcli eval runs/first --against runs/teacher --per-class --json

Example:  sdcli eval resnet18 --weights FILE.safetensors --dataset photos
"""

MORE, FILES = "More scores", "Files"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("eval", cls=Command, epilog=EPILOG)(evaluate)


def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            help="A run folder (its best checkpoint, or the last one where none was chosen), a .safetensors file, or a "
            "timm model with --weights or --pretrained.",
            show_default=False,
        ),
    ],
    exits: Annotated[str, typer.Option(metavar="NAMES", help="all, final, or some of the exits: exit1,exit3.")] = "all",
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Another data set with the same classes. [default: the one it was trained on]"
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="test, validation (val) or train. [default: test, else validation]"),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of a timm model: a .safetensors file in timm's format."),
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", metavar="", help="Of a timm model: timm's pretrained weights.")
    ] = False,
    image_key: ImageKey = None,
    label_key: LabelKey = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="IMAGES", help="Score only this many images, the same share of each class."),
    ] = None,
    batch_size: BatchSize = 256,
    device: Device = None,
    workers: Workers = None,
    import_: Import = None,
    dynamic: Annotated[
        bool,
        typer.Option(
            "--dynamic",
            metavar="",
            help="Score early exit too, as sdcli calibrate has set it up.",
            rich_help_panel=MORE,
        ),
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SHARE",
            help="With --dynamic: mean MACs of at most this share of the plain model.",
            rich_help_panel=MORE,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="How closely every exit follows the final exit of another run or checkpoint: same class, KL.",
            rich_help_panel=MORE,
        ),
    ] = None,
    ensembles: Annotated[
        bool,
        typer.Option(
            "--ensembles",
            metavar="",
            help="Two more ensembles: the mean of probabilities, and weights fitted on the validation split.",
            rich_help_panel=MORE,
        ),
    ] = False,
    per_class: Annotated[
        bool,
        typer.Option(
            "--per-class",
            metavar="",
            help="The accuracy of every class, the worst first, and balanced accuracy.",
            rich_help_panel=MORE,
        ),
    ] = False,
    latency: Annotated[
        bool,
        typer.Option(
            "--latency",
            metavar="",
            help="The median time of one image to each exit, on this device.",
            rich_help_panel=MORE,
        ),
    ] = False,
    sharpness: Annotated[
        bool,
        typer.Option(
            "--sharpness",
            metavar="",
            help="Trace and largest eigenvalue of the Hessian of the final exit's loss. Takes minutes.",
            rich_help_panel=MORE,
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw accuracy against MACs, and accuracy by confidence.", rich_help_panel=FILES
        ),
    ] = None,
    confusion: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the confusion matrix of the final exit as .csv, or draw it (.png, .svg, .pdf).",
            rich_help_panel=FILES,
        ),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.parquet",
            help="Write a row for each image: its label, and the class and confidence of every exit.",
            rich_help_panel=FILES,
        ),
    ] = None,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", metavar="", help="Print CSV.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", metavar="", help="Print Markdown tables.")] = False,
    as_latex: Annotated[bool, typer.Option("--latex", metavar="", help="Print LaTeX tables.")] = False,
) -> None:
    """Score every exit and their ensemble, and early exit.

    A checkpoint holds all that is needed: model, exits, preprocessing and the name of its data set. The ensemble is
    the mean of the scored exits' logits. A speed-up compares the MACs of the plain model with those up to an exit. A
    timm model has one row, final, and is scored with the preprocessing of its weights.
    """
    if as_json + as_csv + as_markdown + as_latex > 1:
        raise UserError("--json, --csv, --markdown and --latex exclude each other", "one of them")
    if as_csv and per_class:
        raise UserError("--per-class and --csv exclude each other: CSV is one table, of exits", "--json or --markdown")
    if budget is not None and not dynamic:
        raise UserError("--budget needs --dynamic", "both, or neither", "--dynamic")
    if weights is not None and pretrained:
        raise UserError("--weights and --pretrained exclude each other", "one of them")
    points = parse_points(exits)
    if ensembles and points is not None and len(points) < 2:
        raise UserError("--ensembles: only one exit is scored", "two exits or more", "--exits all")
    _check_files({"--plot": plot, "--confusion": confusion, "--predictions": predictions})

    from sdcli.cli.talk import line, note, only_results, output, print_json, stages

    with stages(), only_results():
        from sdcli.cli import grids, scores
        from sdcli.cli.progress import scoring
        from sdcli.data.dataset import SPLITS
        from sdcli.devices import accelerator_for, keep_freed_memory
        from sdcli.evaluation.scoring import Wanted, fitted_there, score
        from sdcli.network.checkpoint import find_checkpoint, read_description

        load_imports(import_ or [])
        keep_freed_memory(accelerator_for(device).device)
        if ensembles and split is not None and split.lower() in SPLITS["validation"]:
            raise fitted_there("validation", "--split test")
        if against is not None:
            read_description(find_checkpoint(against))
        with scoring() as progress:
            opened = _open(checkpoint, weights, pretrained, dataset, image_key, label_key, dynamic or ensembles)
            scored = score(
                opened,
                Wanted(
                    dynamic=dynamic,
                    budget=budget,
                    curve=plot is not None,
                    against=against,
                    ensembles=ensembles,
                    latency=latency,
                    sharpness=sharpness,
                ),
                points=points,
                split=split,
                limit=limit,
                batch_size=batch_size,
                device=device,
                workers=workers,
                progress=progress,
            )
        written = _write(scored, plot=plot, confusion=confusion, predictions=predictions)
    asked = {"per_class": per_class, "with_confusion": confusion is not None}
    dropped: list[str] = []
    if as_json:
        print_json(scores.as_json(scored, **asked))
    elif as_csv:
        line(scores.as_csv(scored))
    elif as_markdown or as_latex:
        tables = scores.grids(scored, per_class=per_class)
        line("\n\n".join(map(grids.markdown if as_markdown else grids.latex, tables)))
    else:
        for grid in scores.grids(scored, per_class=per_class):
            table, without = grids.fitted(grid, output(), scores.DROPPABLE)
            dropped += without
            output().print(table)
        for text in scores.sentences(scored, **asked):
            output().print(text, soft_wrap=True)
    if as_csv or as_markdown or as_latex:
        for text in scores.sentences(scored, **asked):
            note(text)
    if scored.opened.about.epoch and str(opened.path) != checkpoint:
        note(f"checkpoint: {opened.path}, epoch {opened.about.epoch}")
    if dropped:
        note(f"columns without room here: {', '.join(dropped)}; --markdown, --csv and --json have them")
    for text in [*scores.notes_of(scored), *(f"wrote {file}" for file in written)]:
        note(text)


def _open(
    name: str,
    weights: Path | None,
    pretrained: bool,
    dataset: str | None,
    image_key: str | None,
    label_key: str | None,
    needs_exits: bool,
) -> Opened:
    """The network and its data; raises UserError for a timm model without weights or data."""
    from sdcli.evaluation.opened import is_model_name, open_checkpoint, open_timm
    from sdcli.network.checkpoint import find_checkpoint

    if not is_model_name(name):
        if weights is not None or pretrained:
            option = "--weights" if weights is not None else "--pretrained"
            raise UserError(
                f"{option} is for a timm model: '{name}' has weights of its own", "one of them", f"leave {option} out"
            )
        path = find_checkpoint(Path(name))
        return open_checkpoint(path, dataset=dataset, image_key=image_key, label_key=label_key)
    if weights is None and not pretrained:
        raise UserError(
            f"'{name}' is no run folder or checkpoint, and as a timm model it has random weights, which score nothing",
            "a run folder, a .safetensors file, or a timm model with trained weights",
            "--weights FILE.safetensors, or --pretrained for timm's own",
        )
    if dataset is None:
        raise UserError(
            f"--dataset is missing: '{name}' does not name one", "the data set to score on", "--dataset DATA"
        )
    if needs_exits:
        raise UserError(
            f"--dynamic and --ensembles need exits: '{name}' has none", "a run or a checkpoint of sdcli train"
        )
    return open_timm(name, weights=weights, dataset=dataset, image_key=image_key, label_key=label_key)


def _check_files(files: Mapping[str, Path | None]) -> None:
    """Raises UserError for files that cannot be written, before anything is loaded."""
    from sdcli.cli import plots
    from sdcli.cli.score_files import check_output

    asked = {option: file for option, file in files.items() if file is not None}
    endings = {"--plot": plots.FORMATS, "--confusion": (".csv", *plots.FORMATS), "--predictions": (".parquet",)}
    for option, file in asked.items():
        if option != "--predictions" and file.suffix.lower() in plots.FORMATS:
            plots.check(file)
        check_output(option, file, endings[option])
    for option, file in asked.items():
        same = [other for other, its in asked.items() if other != option and its.absolute() == file.absolute()]
        if same:
            raise UserError(f"{option} and {same[0]} name the same file, {file}", "a file each")


def _write(scored: Scored, *, plot: Path | None, confusion: Path | None, predictions: Path | None) -> list[Path]:
    """Writes the files that were asked for, and returns them."""
    from sdcli.cli import score_files, score_plots, scores

    if plot is not None:
        score_plots.save_scores(scored, plot)
    if confusion is not None:
        point = scores.shown_points(scored)[0]
        matrix = scores.confusion(scored, point)
        if confusion.suffix.lower() == ".csv":
            score_files.save_matrix(matrix, scored.classes, confusion)
        else:
            score_plots.save_confusion(matrix, scored.classes, point, confusion)
    if predictions is not None:
        score_files.save_predictions(scored, predictions)
    return [file for file in (plot, confusion, predictions) if file is not None]


def parse_points(text: str) -> list[str] | None:
    """`--exits` as a list of points; None for all."""
    points = [part.strip() for part in text.split(",") if part.strip()]
    if not points:
        raise UserError("--exits names no exit", "all, final, or some of them: exit1,exit3")
    if "all" in points and len(points) > 1:
        raise UserError(
            f"--exits {text}: 'all' is every exit already", "all, or some of them: exit1,exit3", "--exits all"
        )
    return None if points == ["all"] else points
