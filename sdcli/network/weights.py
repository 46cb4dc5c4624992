"""Weights: read from files and put into networks.

B batch
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from sdcli.data.transforms import Preprocess
from sdcli.errors import UserError
from sdcli.network.backbones import create, pretrained_transform, resolve
from sdcli.network.blueprint import BRANCH, Blueprint, WeightsFile
from sdcli.network.checkpoint import (
    EXIT,
    Description,
    find_checkpoint,
    load_checkpoint,
    open_tensors,
    read_description,
    read_tensors,
)
from sdcli.network.heads import POOLED, find_head
from sdcli.network.multi_exit import MultiExit, build
from sdcli.recipe.schema import Network

_LOG = logging.getLogger(__name__)

MOST_PARAMETERS = 20_000
"""Tensors that a model may register beyond four times those of its checkpoint before it is given up."""


def build_network(table: Network, blueprint: Blueprint, *, begins: bool = True) -> tuple[MultiExit, Loaded]:
    """The network of a blueprint with the weights that its table asks for, and what is left fresh.

    Where a run does not begin, its state has all weights, and none are loaded.
    """
    _LOG.info("building %s", blueprint.architecture.model)
    network = build(blueprint, pretrained=begins and table.weights == "pretrained")
    network.gradients = table.gradients
    if not begins or table.weights == "random":
        return network, Loaded()
    if table.weights == "pretrained":
        return network, Loaded(fresh=_fresh_classifier(network))
    return network, load_weights(network, file_of(table))


def file_of(table: Network) -> Path:
    """The file that `weights` names: of a run folder its best checkpoint, else the last."""
    return find_checkpoint(Path(os.path.expanduser(table.weights)))


@dataclass(frozen=True)
class Loaded:
    """What a network has got from a file of weights."""

    source: str = ""
    """"" for random weights and for timm's own."""
    fresh: tuple[str, ...] = ()
    """Modules that keep their random weights, since the file has none of their shape: classifiers and heads."""

    @property
    def notes(self) -> list[str]:
        """What a user should know about it."""
        if not self.source:
            return []
        return [f"weights from {self.source}" + (f"; {', '.join(self.fresh)} start fresh" if self.fresh else "")]


def read_weights_file(table: Network, model: str) -> WeightsFile | None:
    """What the file that a `[networks]` table starts from asks of images; None if it starts from no file.

    A checkpoint of sdcli says it itself; for a file of timm's format it is what timm says about the model's pretrained
    weights. Reads no tensors. Raises UserError for a file that cannot be read, and for a model that does not exist.
    """
    if not table.from_file:
        return None
    described = read_description(file_of(table))
    if described is not None:
        return WeightsFile(described.blueprint.preprocess, of_timm=False)
    own = resolve(model, num_classes=None, image_size=None, stem="imagenet", model_args=table.model_args)
    return WeightsFile(Preprocess(own.input_size, **pretrained_transform(create(own))), of_timm=True)


def load(path: str | Path) -> MultiExit:
    """The network in a checkpoint of `sdcli train`, in eval mode; of a run folder its best one, else the last.

    The state of torch's random numbers stays as it is. Raises UserError for a file that does not exist, is no such
    checkpoint, or does not fit the installed timm.
    """
    # A network is made with random weights before it gets its own.
    with torch.random.fork_rng(devices=[]):
        return rebuild(find_checkpoint(Path(path)))[0].eval()


def rebuild(path: Path) -> tuple[MultiExit, Description]:
    """The network in a checkpoint and what the checkpoint says about it.

    It is built on the meta device first, and its tensors are compared by name, shape and type, so that a damaged file
    costs no memory. Raises UserError where tensors and description do not belong together.
    """
    _refuse_one_exit(path)
    tensors, description = load_checkpoint(path)
    blueprint = description.blueprint
    for point, kind in blueprint.heads.items():
        try:
            if kind not in (POOLED, BRANCH):
                find_head(kind)
        except UserError:
            raise UserError(
                f"'{path}': the head of {point} is '{kind}', which this sdcli does not have",
                "the file that registers it, which it was trained with",
                "add --import FILE.py to the command; in Python, import that file first",
            ) from None
    _compare(_draft(path, blueprint, 4 * len(tensors) + MOST_PARAMETERS), tensors, blueprint, path)
    _LOG.info("building %s", blueprint.architecture.model)
    network = build(blueprint)
    network.load_state_dict(tensors)
    network.calibration = description.early_exit
    return network, description


def _refuse_one_exit(path: Path) -> None:
    """Raises UserError for a file of `sdcli export --to safetensors`."""
    with open_tensors(path) as file:
        exit = (file.metadata() or {}).get(EXIT)
    if exit is not None:
        raise UserError(
            f"'{path}' holds only {exit[:100]} of a network: sdcli export --to safetensors wrote it",
            "a checkpoint of sdcli train, which holds the whole network",
            f"in Python: from sdcli.export.one_exit import load_exit; network = load_exit({str(path)!r})",
        )


def _draft(path: Path, blueprint: Blueprint, most: int) -> MultiExit:
    """The network on the meta device; raises UserError where its description cannot be built."""
    count = 0

    def registered(module: nn.Module, name: str, parameter: object) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise UserError(f"'{path}' describes a network of over {most} parameters", "the network of its tensors")

    hook = register_module_parameter_registration_hook(registered)
    try:
        draft = build(blueprint, device="meta").eval()
        with torch.no_grad():
            signals = draft(torch.zeros(1, *blueprint.plan.input_size, device="meta"))
        for point in draft.classifiers:
            logits = signals[point].logits
            assert logits is not None and logits.shape == (1, len(blueprint.classes)), f"logits at {point}"
        return draft
    except UserError as error:
        raise error.within(f"'{path}'") from None
    except Exception as error:  # heads and timm raise anything on numbers that do not fit
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, (ImportError, OSError, MemoryError)):
            raise UserError(
                f"'{path}' cannot be built here: {type(error).__name__}: {reason}",
                "installed packages, and a machine with memory and threads to spare",
                "look at what the error names: the checkpoint is not the cause",
            ) from error
        raise UserError(
            f"'{path}' describes a network that cannot be built: {reason}", "a checkpoint as sdcli train wrote it"
        ) from None
    finally:
        hook.remove()


def _compare(draft: MultiExit, tensors: dict[str, Tensor], blueprint: Blueprint, path: Path) -> None:
    own = draft.state_dict()
    common = own.keys() & tensors.keys()
    problems = {
        "lacks": own.keys() - tensors.keys(),
        "has a stray": tensors.keys() - own.keys(),
        "has another shape for": {name for name in common if own[name].shape != tensors[name].shape},
        "has another type for": {name for name in common if own[name].dtype != tensors[name].dtype},
    }
    for what, names in problems.items():
        if names:
            raise UserError(
                f"'{path}' {what} tensor '{min(names)}'" + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
                f"the tensors of {blueprint.architecture.model} as timm {_timm_version()} builds it",
                "use the timm version that the checkpoint was trained with",
            )


def load_weights(network: MultiExit, path: Path) -> Loaded:
    """Starts `network` from a safetensors file: a checkpoint of sdcli or timm's own format.

    Only classifiers and heads may differ (other classes, other exits): they stay fresh. Raises UserError where the
    backbone does not fit.
    """
    tensors, metadata = read_tensors(path)
    if not any(name.startswith("backbone.") for name in tensors):
        tensors = _named_as_here(tensors, network.backbone, path)
        tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    own = network.state_dict()
    fits = {name: tensor for name, tensor in tensors.items() if name in own and own[name].shape == tensor.shape}
    left = [name for name in own if name not in fits]
    free = ("heads.", *(f"backbone.{name}." for name in _classifier_names(network.backbone)))
    for name in left:
        if not name.startswith(free):
            found = f"of shape {list(tensors[name].shape)}" if name in tensors else "missing"
            written_for = _model_in(metadata)
            if written_for not in ("", network.plan.model):
                raise UserError(
                    f"'{path}' has the weights of {written_for}, not of {network.plan.model}",
                    f"weights of {network.plan.model}",
                    f"use {written_for}, or another file",
                )
            raise UserError(
                f"'{path}' does not fit {network.plan.model}: tensor '{name.removeprefix('backbone.')}' is {found}",
                f"shape {list(own[name].shape)}",
                "use a file of the same model; a stem changed by --stem has weights of another shape",
            )
    network.load_state_dict(fits, strict=False)
    return Loaded(str(path), tuple(dict.fromkeys(_module_of(name) for name in left)))


def _named_as_here(tensors: dict[str, Tensor], backbone: nn.Module, path: Path) -> dict[str, Tensor]:
    """The tensors of a public repository's ResNet for CIFAR under the names of the zoo's; any others as they are.

    Raises UserError where one has layers in its shortcuts and the other has none: only names tell these apart.
    """
    from sdcli.zoo.public import renamed

    own = backbone.state_dict()
    if "stem.conv1.weight" not in own or not (found := renamed(tensors)):
        return tensors
    projects = {name for name in found if ".downsample." in name}
    if bool(projects) != any(".downsample." in name for name in own):
        has, other = ("1x1 convolutions", "project") if projects else ("no layers", "pad")
        raise UserError(
            f"'{path}' has {has} in the shortcuts between stages, the network has others",
            f'a network with shortcut = "{other}"',
            f"--set networks.student.model_args.shortcut={other}",
        )
    # Files of old versions of torch do not count batches.
    counts = {name: tensor for name, tensor in own.items() if name.endswith(".num_batches_tracked")}
    return counts | found


def _model_in(metadata: dict[str, str]) -> str:
    """The model that a checkpoint of sdcli was written for; "" if the metadata does not say."""
    try:
        return str(json.loads(metadata["sdcli"])["architecture"]["model"])[:100]
    except (KeyError, ValueError, TypeError, RecursionError):
        return ""


def _module_of(name: str) -> str:
    """The module that a tensor's name is shown as: "heads.exit1" for "heads.exit1.classifier.weight"."""
    parts = name.removeprefix("backbone.").split(".")
    return ".".join(parts[: 2 if parts[0] == "heads" else 1])


def _fresh_classifier(network: MultiExit) -> tuple[str, ...]:
    """The classifier of a pretrained model that was replaced, since it had other classes."""
    backbone = network.backbone
    pretrained = getattr(backbone, "pretrained_cfg", {}) or {}
    heads = tuple(f"heads.{point}" for point in network.heads)
    same = pretrained.get("num_classes") == len(network.blueprint.classes)
    return heads if same else (*_classifier_names(backbone), *heads)


def classes_of(backbone: nn.Module, path: Path | None) -> int:
    """The classes of the classifier in a file of timm's format, or in timm's pretrained weights; 0 without one."""
    if path is None:
        return int((getattr(backbone, "pretrained_cfg", {}) or {}).get("num_classes") or 0)
    with open_tensors(path) as file:
        held = set(file.keys())
        for name in _classifier_names(backbone):
            if f"{name}.weight" in held:
                return int(file.get_slice(f"{name}.weight").get_shape()[0])
    return 0


def _classifier_names(backbone: nn.Module) -> list[str]:
    """Where timm's classifier lies in its own names."""
    names: str | tuple[str, ...] = (getattr(backbone, "pretrained_cfg", {}) or {}).get("classifier") or ()
    return [names] if isinstance(names, str) else list(names)


def _timm_version() -> str:
    import timm

    return str(timm.__version__)
