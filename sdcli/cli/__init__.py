"""The command line. One file per command; each loads torch and timm only once it runs, so that `--help` is instant."""

from __future__ import annotations

import errno
import os
import sys
import time
from typing import Annotated

import typer

from sdcli import __version__
from sdcli.cli import bench as bench_command
from sdcli.cli import calibrate as calibrate_command
from sdcli.cli import compare as compare_command
from sdcli.cli import eval as eval_command
from sdcli.cli import export as export_command
from sdcli.cli import inspect as inspect_command
from sdcli.cli import plot as plot_command
from sdcli.cli import predict as predict_command
from sdcli.cli import recipes as recipes_command
from sdcli.cli import report as report_command
from sdcli.cli import train as train_command
from sdcli.cli import tune as tune_command
from sdcli.cli.streams import secure
from sdcli.cli.usage import Commands
from sdcli.errors import UserError

app = typer.Typer(
    name="sdcli",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sdcli {__version__}")
        raise typer.Exit


FIRST_STEPS = """
Start with:

sdcli inspect resnet18

sdcli train resnet18 --dataset digits --recipe quick --output runs/first

sdcli eval runs/first
"""


@app.callback(epilog=FIRST_STEPS)
def main_options(
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Self-distillation for timm models.

    Finds where a network can be cut, puts a small classifier (an *exit*) after each section, trains them together, and
    scores every exit and their ensemble.
    """


inspect_command.register(app)
train_command.register(app)
tune_command.register(app)
eval_command.register(app)
compare_command.register(app)
calibrate_command.register(app)
predict_command.register(app)
bench_command.register(app)
export_command.register(app)
plot_command.register(app)
report_command.register(app)
recipes_command.register(app)


def main() -> None:
    """The console script: turns what a user can mend into one message and exit code 2."""
    # Read when torch is loaded. By default its threads spin while they wait for each other, and beside any other busy
    # process an epoch then takes 1.5 times as long; alone, sleeping costs 3 % (benchmarks/threads.py, two cores).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    secure()
    try:
        try:
            app()
        finally:
            _flush_results()
    except BaseException as error:  # Ctrl-C may come as any error
        if _interrupted(error):
            # Also where a library, or typer, has made something else of it.
            print("stopped", file=sys.stderr)
            sys.exit(130)
        if isinstance(error, OSError):
            error = _refused_path(error) or error
        if not isinstance(error, UserError):
            raise
        if os.environ.get("RANK", "0") != "0":
            # Most errors are everyone's: the first process has said it, and its launcher ends the others.
            time.sleep(5)
        _print_error(error)
        sys.exit(2)


def _flush_results() -> None:
    """Writes what is left of the results while errors can still be reported; exits with 1 if their reader has left."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        sys.exit(1)


REFUSED_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS)
"""What a file system answers to a path that a user may give, wherever it is used first."""

LONGEST = 1000
"""Characters of a message's first line: a value of any length may be in it."""


def _refused_path(error: OSError) -> UserError | None:
    """The error for a path that the file system refuses; None for any other error."""
    if error.errno not in REFUSED_PATHS or not isinstance(error.filename, str):
        return None
    return UserError(
        f"'{error.filename}' cannot be used: {error.strerror}",
        "a path that exists or can be made, and may be read or written",
        "check the path and its permissions",
    )


def _interrupted(error: BaseException | None) -> bool:
    """Whether an error goes back to Ctrl-C."""
    # Errors may be each other's cause, where one is raised again from another that came of it.
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _print_error(error: UserError) -> None:
    from sdcli.cli.talk import message

    headline = error.headline
    if len(headline) > LONGEST:
        headline = f"{headline[: LONGEST // 2]} … {headline[-LONGEST // 4 :]}"
    parts: list[str | tuple[str, str]] = [("error: ", "bold red"), (headline, "bold")]
    for title, line in (("expected:", error.expected), ("fix:     ", error.fix)):
        parts += [(f"\n  {title} ", "dim"), line] if line else []
    message(*parts)
