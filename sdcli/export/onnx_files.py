"""`--to onnx`: ONNX files, and for early exit a folder of sections with a runner that needs no torch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdcli.errors import UserError
from sdcli.export import manifest
from sdcli.export.compare import Reader
from sdcli.export.graphs import Part, Section, chain
from sdcli.export.job import Job

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
"""ONNX's version of the operations, the one that torch's converters write: another would be converted once more."""
LARGEST = 1.8e9
"""Bytes: one ONNX file holds 2 GiB."""
RUNNER = "run.py"


def write(job: Job, path: Path) -> None:
    """One file, or for sections a folder of files, a manifest and the runner."""
    if job.kind == "staged":
        path.mkdir()
    parts, files_ = convert(job, path)
    if job.kind == "staged":
        sections = [part for part in parts if isinstance(part, Section)]
        manifest.write(manifest.of_sections(job, sections, files_, PACKAGES) | {"opset": OPSET}, path)
        (path / RUNNER).write_bytes(files("sdcli.export").joinpath("runner.py").read_bytes())


def convert(job: Job, path: Path) -> tuple[Sequence[Part], list[Path]]:
    """The graphs and their files: `path` itself, or section1.onnx and so on in it.

    Without a converter for fused attention (Hiera's has five dimensions) it is written out, once.
    """
    try:
        return _convert(job, path)
    except _NoConverter as error:
        if not error.is_attention:
            raise error.explained() from error
    job.write_out_attention()
    try:
        return _convert(job, path)
    except _NoConverter as error:
        raise error.explained() from error


class _NoConverter(Exception):
    """An operation without a conversion; its cause is what torch raised."""

    def __init__(self, error: BaseException | None) -> None:
        causes = []
        while error is not None:
            causes.append(error)
            error = error.__cause__
        self.is_attention = any("scaled_dot_product_attention" in str(cause) for cause in causes)
        reason = " ".join(str(causes[-1]).split())[:300]
        super().__init__(f"{type(causes[-1]).__name__}: {reason}")

    def explained(self) -> UserError:
        return UserError(
            f"the graph cannot be converted to ONNX: {self}",
            "operations that onnxscript has a conversion for",
            "--to pt2, or --to safetensors",
        )


def _convert(job: Job, path: Path) -> tuple[Sequence[Part], list[Path]]:
    parts = job.parts()
    if job.kind != "staged":
        to_onnx(parts[0], path, manifest.describe(job, PACKAGES))
        return parts, [path]
    names = [path / f"section{number}.onnx" for number in range(1, len(parts) + 1)]
    for part, file in zip(parts, names, strict=True):
        to_onnx(part, file, {})
    return parts, names


def to_onnx(part: Part, file: Path, about: dict[str, Any]) -> None:
    """Writes one graph, checked by ONNX's own checker; `about` becomes its metadata."""
    import onnx

    size = sum(tensor.nbytes for tensor in part.program.state_dict.values())
    if size > LARGEST:
        raise UserError(
            f"{' and '.join(part.outputs)} of {size / 1e9:.1f} GB do not fit into an ONNX file",
            f"less than {LARGEST / 1e9:g} GB",
            "--exit staged, which writes a file per section, or --to pt2",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the converters' own future
        try:
            converted = torch.onnx.export(
                part.program,
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=[part.input],
                output_names=list(part.outputs),
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # torch wraps whatever its converters raise
            raise _NoConverter(error) from error
    assert converted is not None
    model = converted.model_proto
    _name_batch(model.graph)
    _forget_sources(model.graph)
    for name, value in about.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, value if isinstance(value, str) else json.dumps(value)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)


def _name_batch(graph: Any) -> None:
    """Calls the batch "batch": torch numbers its symbols."""
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == symbol:
                dim.dim_param = "batch"


def _forget_sources(graph: Any) -> None:
    """Drops what torch notes beside each node, lines of source files of this machine included; the module stays."""
    for entry in (*graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        kept = [prop for prop in entry.metadata_props if prop.key == "pkg.torch.onnx.name_scopes"]
        del entry.metadata_props[:]
        entry.metadata_props.extend(kept)


def read(path: Path, job: Job) -> Reader:
    """The files in sessions of onnxruntime."""
    files_ = [path / entry["file"] for entry in manifest.read_sections(path)] if job.kind == "staged" else [path]
    sessions = [_session(file) for file in files_]
    outputs = [[output.name for output in session.get_outputs()] for session in sessions]
    return chain(outputs, [_run(session) for session in sessions])


def _session(file: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def _run(session: Any) -> Callable[[Tensor], Sequence[Tensor]]:
    name = session.get_inputs()[0].name

    def run(tensor: Tensor) -> list[Tensor]:
        return [torch.from_numpy(np.asarray(found)) for found in session.run(None, {name: tensor.numpy()})]

    return run


def usage(path: Path, job: Job) -> str:
    """How to run a staged export."""
    return f"python {path / RUNNER} IMAGE..." if job.kind == "staged" else ""
