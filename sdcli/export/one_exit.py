"""`--to safetensors`: the weights of a network that ends at one exit, with all it takes to build it again."""

from __future__ import annotations

from pathlib import Path

from sdcli.errors import UserError
from sdcli.export.compare import Reader
from sdcli.export.job import Job
from sdcli.network.checkpoint import EXIT, load_checkpoint, read_tensors, save_checkpoint
from sdcli.network.multi_exit import build
from sdcli.network.truncated import Truncated


def write(job: Job, path: Path) -> None:
    """The tensors of `MultiExit.upto(exit)`, under timm's names in `backbone.` and ours in `head.`."""
    save_checkpoint(path, job.network.upto(job.exit).state_dict(), job.about, more={EXIT: job.exit})


def load_exit(path: str | Path) -> Truncated:
    """The network in such a file, in eval mode: images [B, 3, H, W] to logits [B, K].

    Raises UserError for another file, and where its tensors do not fit the installed timm.
    """
    path = Path(path)
    exit = read_tensors(path)[1].get(EXIT)
    if exit is None:
        raise UserError(
            f"'{path}' is not one exit", "a file of sdcli export --to safetensors", "sdcli.load reads checkpoints"
        )
    tensors, about = load_checkpoint(path)
    try:
        alone = build(about.blueprint).upto(exit)
        alone.load_state_dict(tensors)
    except UserError:
        raise
    except Exception as error:  # timm raises anything for arguments that do not fit
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"'{path}' does not fit {about.blueprint.architecture.model}: {reason}",
            "the timm version that it was written with",
        ) from None
    return alone.eval()


def read(path: Path, job: Job) -> Reader:
    """The file loaded as its snippet loads it."""
    alone = load_exit(path)
    return lambda images: {job.exit: alone(images).detach()}


def usage(path: Path, job: Job) -> str:
    """How to load it."""
    return (
        "from sdcli.export.one_exit import load_exit\n"
        f"network = load_exit({str(path)!r})  # {job.exit}: images [B, 3, H, W] to logits [B, K]"
    )
