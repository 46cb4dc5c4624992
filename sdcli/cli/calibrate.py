"""`sdcli calibrate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sdcli.cli.options import BatchSize, Device, ImageKey, Import, Json, LabelKey, Run, Workers
from sdcli.cli.usage import Command
from sdcli.errors import UserError
from sdcli.extensions import load_imports

if TYPE_CHECKING:
    from sdcli.evaluation.calibrate import Calibrated

EPILOG = """
Example:  sdcli calibrate runs/first --max-drop 1

Example:  sdcli calibrate runs/first --budget 0.5 --output half.safetensors --plot half.png
"""

DEFAULT_DROP = 1.0
_LEGEND = (
    "MACs: shares of the plain model's, heads included. ≤: upper bound at {:.0%} confidence for this row alone, in "
    "points. exit1, …, final: where images leave."
)


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("calibrate", cls=Command, epilog=EPILOG)(calibrate)


def calibrate(
    checkpoint: Run,
    max_drop: Annotated[
        float | None,
        typer.Option(min=0.001, max=100, metavar="POINTS", help="Lose at most this much top-1 accuracy. [default: 1]"),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(min=0, metavar="SHARE", help="Mean MACs of at most this share of the plain model's."),
    ] = None,
    latency_ms: Annotated[
        float | None,
        typer.Option(min=0, metavar="MS", help="A mean of at most this many milliseconds per image, on this device."),
    ] = None,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.9999, metavar="P", help="How certain --max-drop has to be.")
    ] = 0.9,
    consistency: Annotated[
        bool,
        typer.Option(
            "--consistency",
            metavar="",
            help="Limit the share of answers that change, not the accuracy: needs no labels.",
        ),
    ] = False,
    test: Annotated[
        Literal["clopper-pearson", "betting"],
        typer.Option(help="How --max-drop is tested. Betting is sharper, and depends on the order of the images."),
    ] = "clopper-pearson",
    no_guarantee: Annotated[
        bool,
        typer.Option(
            "--no-guarantee", metavar="", help="The cheapest setting that kept --max-drop, without a promise."
        ),
    ] = False,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How sure an exit is: ensemble, confidence, margin or entropy. [default: the best of them]",
        ),
    ] = None,
    agreement: Annotated[
        bool | None,
        typer.Option(
            "--agreement/--no-agreement",
            help="Images leave only where an exit agrees with the one before. [default: what is better]",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write another checkpoint. [default: the same file]"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw accuracy against MACs into a .png, .svg or .pdf file.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Other data with a validation split; with --consistency also a folder of unlabelled images. "
            "[default: the data it was trained on]",
        ),
    ] = None,
    image_key: ImageKey = None,
    label_key: LabelKey = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="IMAGES", help="Use only this many images.")] = None,
    batch_size: BatchSize = 256,
    device: Device = None,
    workers: Workers = None,
    import_: Import = None,
    as_json: Json = False,
) -> None:
    """Find out when images may leave early, and what that costs.

    Half of the validation images choose temperatures, a policy and thresholds; the other half measures, and certifies
    --max-drop. The result is stored in the checkpoint: predict, bench, export and eval --dynamic use it. Test images
    play no part.
    """
    given = {"--max-drop": max_drop, "--budget": budget, "--latency-ms": latency_ms}
    goals = [flag for flag, value in given.items() if value is not None]
    if len(goals) > 1:
        raise UserError(f"{' and '.join(goals)} exclude each other", "one goal", f"leave out {goals[-1]}")
    if no_guarantee and max_drop is None and goals:
        raise UserError(f"--no-guarantee has no effect with {goals[0]}", "it goes with --max-drop", "leave it out")
    if test == "betting" and (no_guarantee or (max_drop is None and goals)):
        beside = "--no-guarantee" if no_guarantee else goals[0]
        raise UserError(
            f"--test has no effect with {beside}, which promises nothing", "--max-drop alone", "leave it out"
        )

    from sdcli.cli import plots, talk
    from sdcli.cli.talk import note, only_results, print_json, stages

    if plot is not None:
        plots.check(plot)
    with stages(), only_results():
        from sdcli.cli import tables
        from sdcli.cli.progress import scoring
        from sdcli.devices import accelerator_for, keep_freed_memory
        from sdcli.evaluation.calibrate import Goal
        from sdcli.evaluation.held_out import calibrate_checkpoint
        from sdcli.network.checkpoint import find_checkpoint
        from sdcli.network.policies import POLICIES

        if policy is not None:
            POLICIES.find(policy)
        path = find_checkpoint(checkpoint)
        load_imports(import_ or [])
        keep_freed_memory(accelerator_for(device).device)
        goal = Goal(
            max_drop=max_drop if goals else DEFAULT_DROP,
            budget=budget,
            latency_ms=latency_ms,
            confidence=confidence,
            loss="change" if consistency else "drop",
            test=test,
            guarantee=not no_guarantee,
        )
        with scoring() as progress:
            found = calibrate_checkpoint(
                path,
                goal,
                output=output or path,
                kind=policy,
                agreement=agreement,
                dataset=dataset,
                image_key=image_key,
                label_key=label_key,
                limit=limit,
                batch_size=batch_size,
                device=device,
                workers=workers,
                progress=progress,
            )
    if as_json:
        print_json({**asdict(found), "checkpoint": str(output or path)})
    else:
        talk.output().print(tables.exits_table(found, found.calibration.num_images // 2))
        talk.output().print(tables.trade_off_table(found, goal.confidence, change=consistency))
        talk.output().print(_LEGEND.format(goal.confidence), soft_wrap=True)
        talk.output().print(_tried(found), soft_wrap=True)
        talk.output().print(_summary(found), soft_wrap=True)
    if plot is not None:
        plots.save_trade_off(found, plot)
        note(f"wrote {plot}")
    for text in found.notes:
        note(text)
    note(f"stored in {output or path}")


def _tried(found: Calibrated) -> str:
    """Which policies were tried, the best first: that one was taken."""
    ordered = sorted(found.tried.items(), key=lambda pair: -pair[1])
    (taken, score), *others = ((name, f"{area:.2f}") for name, area in ordered)
    rest = "".join(f"; {name} {own}" for name, own in others)
    return (
        f"Policies tried, by mean accuracy over all budgets: {taken} {score} %, taken{rest} (on the half that chooses)."
    )


def _summary(found: Calibrated) -> str:
    """The setting that was chosen, and its promise, in words."""
    from sdcli.network.predict import promised

    calibration = found.calibration
    chosen = next(row for row in found.trade_offs if row.chosen)
    if not calibration.policy.exits:
        return "Nobody leaves early: the plain network is kept."
    limits = [f"{point} at {limit:.3f}" for point, limit in calibration.policy.thresholds.items() if limit is not None]
    agreeing = " and agrees with the exit before" if calibration.policy.agreement else ""
    text = (
        f"Images leave where the {calibration.policy.kind} score reaches its threshold{agreeing}: {', '.join(limits)}. "
        f"They cost {chosen.cost:.3f} of the plain model's MACs on average."
    )
    if promise := calibration.promise:
        text += (
            f"\nCertified: {promised(promise)}, for images like those of {calibration.data} "
            f"({promise.num_images:,} images; measured there: {promise.measured:.2f})."
        )
    return text
