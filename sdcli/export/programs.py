"""`--to pt2`: graphs of torch.export, as torch saves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sdcli.export import manifest
from sdcli.export.compare import Reader
from sdcli.export.graphs import Part, Section, chain
from sdcli.export.job import Job

ABOUT = "sdcli.json"
"""The description inside each file."""


def write(job: Job, path: Path) -> None:
    """One file, or for sections a folder of files and a manifest."""
    parts = job.parts()
    if job.kind != "staged":
        _save(parts[0], path, job)
        return
    path.mkdir()
    files = [path / f"section{number}.pt2" for number in range(1, len(parts) + 1)]
    for part, file in zip(parts, files, strict=True):
        _save(part, file, job)
    sections = [part for part in parts if isinstance(part, Section)]
    manifest.write(manifest.of_sections(job, sections, files, ()), path)


def _save(part: Part, file: Path, job: Job) -> None:
    about = manifest.describe(job) | {"input": part.input, "outputs": part.outputs}
    torch.export.save(part.program, file, extra_files={ABOUT: json.dumps(about)})


def read(path: Path, job: Job) -> Reader:
    """The files loaded again."""
    files = [path / entry["file"] for entry in manifest.read_sections(path)] if job.kind == "staged" else [path]
    outputs, runs = [], []
    for file in files:
        extra = {ABOUT: ""}
        program = torch.export.load(file, extra_files=extra)
        outputs.append(json.loads(extra[ABOUT])["outputs"])
        runs.append(_run(program.module()))
    return chain(outputs, runs)


def _run(module: nn.Module) -> Callable[[Tensor], Sequence[Tensor]]:
    def run(tensor: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            found = module(tensor)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    return run
