"""A checkpoint written in another format, read back, compared, and only then put in place."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli.errors import UserError
from sdcli.export.compare import Figures, compare
from sdcli.export.formats import FORMATS, check_exit, find_format
from sdcli.export.job import Job
from sdcli.export.placing import check_output, placing
from sdcli.export.samples import samples
from sdcli.network.weights import rebuild

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares with the network."""

    output: Path
    format: str
    exit: str
    files: dict[str, int]
    """Their bytes, by path inside the output; "" for a single file."""
    figures: list[Figures]
    routed: list[Any]
    """`routed.Routed`, of a folder with a runner."""
    notes: list[str]
    usage: str
    """How to load it; "" where the format's own documentation says it."""

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "output": str(self.output),
            "format": self.format,
            "exit": self.exit,
            "files": self.files,
            "checks": [figures.to_dict() for figures in self.figures],
            "routed": [routed.to_dict() for routed in self.routed],
            "notes": self.notes,
        }


def check(checkpoint: Path, name: str, exit: str, output: Path, *, force: bool) -> None:
    """Raises UserError for what can be known to fail before anything is loaded."""
    format = find_format(name)
    check_exit(name, exit)
    if (
        checkpoint.exists()
        and output.exists()
        and (output.samefile(checkpoint) or output.resolve() in checkpoint.resolve().parents)
    ):
        raise UserError(f"--output {output} is the checkpoint's own place", "a new name", "choose another --output")
    check_output(output, format, exit, force=force)


def export(
    checkpoint: Path,
    name: str,
    exit: str,
    output: Path,
    *,
    dataset: str | None = None,
    license: str = "",
    force: bool = False,
) -> Exported:
    """Writes a checkpoint's network, or one exit of it, in the format called `name`.

    The files are read back and compared with the network on images of its data and on noise, and moved to `output`
    only if all exits are the same up to rounding. Raises UserError, and leaves nothing behind, where they are not.
    """
    check(checkpoint, name, exit, output, force=force)
    format = FORMATS[name].load()
    network, about = rebuild(checkpoint)
    job = Job(checkpoint, network, about, exit, license)
    if hasattr(format, "check"):
        format.check(job)
    images, notes, job.small = samples(checkpoint, about, dataset)
    with placing(output) as path:
        _LOG.info("writing %s", output)
        with _refusing(name):
            format.write(job, path)
        _LOG.info("comparing %s with the checkpoint", output)
        with _refusing(name):
            read = format.read(path, job)
        figures = compare(network, read, job.points, images)
        routed: list[Any] = []
        if (path / "run.py").exists():
            from sdcli.export.routed import compare_routes

            routed = compare_routes(job, path, images, figures)
        files = (
            {"": path}
            if path.is_file()
            else {str(p.relative_to(path)): p for p in sorted(path.rglob("*")) if p.is_file()}
        )
        sizes = {inside: file.stat().st_size for inside, file in files.items()}
    usage = format.usage(output, job) if hasattr(format, "usage") else ""
    return Exported(output, name, exit, sizes, figures, routed, [*job.notes, *notes], usage)


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Whatever a converter or a runtime raises becomes one message."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:  # each library has errors of its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"this network cannot be written as {name}: {reason}",
            f"operations that {name} has",
            "another format: --to safetensors holds any network",
        ) from error
