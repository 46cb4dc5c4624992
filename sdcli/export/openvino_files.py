"""`--to openvino`: a folder of OpenVINO IR, converted from ONNX, in single precision."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from sdcli.export import manifest
from sdcli.export.compare import Reader
from sdcli.export.graphs import Section, chain
from sdcli.export.job import Job
from sdcli.export.onnx_files import convert

PACKAGES = ("openvino", "onnx", "onnxscript")


def write(job: Job, path: Path) -> None:
    """model.xml and model.bin, or those of each section, and manifest.json."""
    import openvino

    path.mkdir()
    with TemporaryDirectory(dir=path) as beside:
        staged = job.kind == "staged"
        parts, files = convert(job, Path(beside) if staged else Path(beside) / "model.onnx")
        made = []
        for file in files:
            made.append(path / f"{file.stem}.xml")
            # By default weights are written in half precision, which changes the answers.
            openvino.save_model(openvino.convert_model(file), made[-1], compress_to_fp16=False)
    if staged:
        sections = [part for part in parts if isinstance(part, Section)]
        about = manifest.of_sections(job, sections, made, PACKAGES)
    else:
        about = manifest.describe(job, PACKAGES) | {"file": made[0].name, "outputs": list(parts[0].outputs)}
    manifest.write(about, path)


def read(path: Path, job: Job) -> Reader:
    """The models compiled for the CPU, computing in single precision."""
    import openvino

    core = openvino.Core()
    if job.kind == "staged":
        entries = manifest.read_sections(path)
        files, outputs = [entry["file"] for entry in entries], [manifest.names_of(entry) for entry in entries]
    else:
        about = json.loads((path / manifest.MANIFEST).read_text(encoding="utf-8"))
        files, outputs = [about["file"]], [about["outputs"]]
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    return chain(outputs, [_run(core.compile_model(path / file, "CPU", exact)) for file in files])


def _run(compiled: Any) -> Callable[[Tensor], Sequence[Tensor]]:
    def run(tensor: Tensor) -> list[Tensor]:
        found = compiled([tensor.numpy()])
        return [torch.from_numpy(found[output].copy()) for output in compiled.outputs]

    return run
