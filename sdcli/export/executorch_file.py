"""`--to executorch`: one .pte file, with a method per section, for phones and microcontrollers; XNNPACK runs it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdcli.errors import UserError
from sdcli.export import manifest
from sdcli.export.compare import Reader
from sdcli.export.graphs import chain
from sdcli.export.job import Job

ABOUT = "sdcli"
"""A constant method of the file, which returns the description as JSON."""


def write(job: Job, path: Path) -> None:
    """One file: the method `forward`, or for sections `exit1`, `exit2`, …, `final`, to be run one after the other.

    They take one image at a time: of a batch of any size, ExecuTorch 1.5 plans too little memory with torch 2.14.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    parts = job.parts(fixed=True)
    methods = {part.outputs[0] if job.kind == "staged" else "forward": part for part in parts}
    about = manifest.describe(job, ("executorch",)) | {
        "methods": {name: list(part.outputs) for name, part in methods.items()},
    }
    try:
        lowered = to_edge_transform_and_lower(
            {name: part.program for name, part in methods.items()},
            partitioner=[XnnpackPartitioner()],
            constant_methods={ABOUT: json.dumps(about)},
        ).to_executorch()
    except Exception as error:  # its passes raise errors of many kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"ExecuTorch cannot lower this network: {reason}",
            "operations that ExecuTorch has",
            "--to onnx, or --to pt2",
        ) from error
    path.write_bytes(lowered.buffer)


def read(path: Path, job: Job) -> Reader:
    """The methods of the file in ExecuTorch's own runtime."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    about = json.loads(program.load_method(ABOUT).execute([])[0])
    return chain(list(about["methods"].values()), [_run(program.load_method(name)) for name in about["methods"]])


def _run(method: Any) -> Callable[[Tensor], Sequence[Tensor]]:
    def run(tensor: Tensor) -> list[Tensor]:
        # The runtime reads memory in order, and reuses what it returns.
        one_by_one = [
            [found.clone() for found in method.execute([image.contiguous()])] for image in tensor.chunk(len(tensor))
        ]
        return [torch.cat(found) for found in zip(*one_by_one, strict=True)]

    return run
