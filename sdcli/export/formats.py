"""The formats of `sdcli export`, and what each needs. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

from sdcli.errors import UserError, unknown
from sdcli.recipe.address import FINAL

ALL, STAGED = "all", "staged"
"""What `--exit` can say besides the name of an exit: one graph with the logits of every exit; one graph per section."""

Kind = Literal["one", "all", "staged"]


def kind_of(exit: str) -> Kind:
    """What `--exit` asks for."""
    return "all" if exit == ALL else "staged" if exit == STAGED else "one"


@dataclass(frozen=True)
class Format:
    """One format: what it is, which exits it can hold, and the packages that write and check it."""

    what: str
    module: str
    """Of this package; it has `write(job, path)` and `read(job, path)`."""
    kinds: tuple[Kind, ...]
    suffix: str = ""
    """Of its files; "" where it is always a folder."""
    folders: tuple[Kind, ...] = ()
    """What is written as a folder."""
    needs: tuple[str, ...] = ()
    """Packages that are not among sdcli's own dependencies; the extra that installs them has the format's name."""

    def is_folder(self, exit: str) -> bool:
        """Whether `--output` names a folder."""
        return not self.suffix or kind_of(exit) in self.folders

    def load(self) -> ModuleType:
        """The module that writes and reads it."""
        return import_module(f"sdcli.export.{self.module}")


EVERY: tuple[Kind, ...] = ("one", "all", "staged")

FORMATS = {
    "timm": Format("a folder that timm.create_model('local-dir:PATH') loads", "timm_folder", ("one",)),
    "safetensors": Format("the weights of one exit, which sdcli loads", "one_exit", ("one",), ".safetensors"),
    "pt2": Format("torch.export", "programs", EVERY, ".pt2", ("staged",)),
    "onnx": Format(
        "ONNX, checked with onnxruntime",
        "onnx_files",
        EVERY,
        ".onnx",
        ("staged",),
        ("onnx", "onnxscript", "onnxruntime"),
    ),
    "openvino": Format("OpenVINO IR", "openvino_files", EVERY, needs=("openvino", "onnx", "onnxscript")),
    "executorch": Format("ExecuTorch, with XNNPACK", "executorch_file", EVERY, ".pte", needs=("executorch",)),
}


def find_format(name: str) -> Format:
    """The format called `name`; raises UserError for an unknown one, and where a package is missing."""
    if name not in FORMATS:
        raise unknown("format", name, FORMATS).within("--to", key="--to")
    found = FORMATS[name]
    if missing := [package for package in found.needs if find_spec(package) is None]:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"--to {name}: {', '.join(missing)} {verb} not installed",
            f"the extra '{name}'",
            f"pip install 'sdcli[{name}]'",
        )
    return found


def check_exit(name: str, exit: str) -> None:
    """Raises UserError where a format cannot hold what `--exit` asks for, whatever the network."""
    found = FORMATS[name]
    if kind_of(exit) not in found.kinds:
        able = [other for other, format in FORMATS.items() if kind_of(exit) in format.kinds]
        raise UserError(f"--exit {exit}: --to {name} holds one exit", "the name of an exit", f"--to {able[0]}")
    if name == "timm" and exit != FINAL:
        raise UserError(
            f"--exit {exit}: timm's format holds a timm model, whose end is '{FINAL}'",
            f"--exit {FINAL}",
            f"--to onnx --exit {exit}, or --to safetensors",
        )
