"""What `[networks]` asks for: networks planned, made and loaded."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from sdcli.errors import UserError
from sdcli.network.backbones import Architecture, create
from sdcli.network.checkpoint import Description, load_checkpoint, read_tensors
from sdcli.network.cuts import find_stages
from sdcli.network.heads import HEADS, POOLED
from sdcli.network.multi_exit import BRANCH, MultiExit, attach
from sdcli.network.stages import StagePlan
from sdcli.recipe.schema import Network


def plan_network(network: Network, architecture: Architecture) -> StagePlan:
    """Where the network will be cut, found on the meta device: no weights, no data."""
    backbone = create(architecture, device="meta")
    exits: int | list[str] | None = None
    if isinstance(network.exits, (int, list)):
        exits = network.exits
    elif network.exits == "none":
        exits = 1
    plan = find_stages(backbone, architecture.input_size, exits=exits, name=architecture.model)
    if network.branches is not None:
        if len(plan.stages) < 2:
            raise UserError(
                f"branches: {architecture.model} has one stage", "two or more: branches are copies of the last"
            )
        # One and the same stage is the exits' beginning, as often as there are branches beside the last stage itself.
        plan = replace(plan, stages=(*plan.stages[-2:-1] * (network.branches - 1), plan.stages[-1]))
    return plan


def head_kind(network: Network) -> str:
    """What `choose_heads` is to give the network's exits."""
    return network.head if network.branches is None else BRANCH


def build_network(
    network: Network, architecture: Architecture, plan: StagePlan, heads: dict[str, str], num_classes: int
) -> tuple[MultiExit, list[str]]:
    """A network with the weights that its table asks for, and what is to be said about them."""
    another = partial(create, architecture, device="cpu", pretrained=network.weights == "pretrained")
    model = attach(another(), plan, heads, num_classes, another)
    notes: list[str] = []
    if network.weights not in ("random", "pretrained"):
        notes = load_weights(model, Path(network.weights).expanduser())
    return model, notes


def rebuild(path: Path) -> tuple[MultiExit, Description]:
    """The network that a checkpoint holds; raises UserError where tensors and description do not belong together."""
    tensors, description = load_checkpoint(path)
    architecture = description.architecture
    for point, kind in description.heads.items():
        if kind not in (POOLED, BRANCH) and kind not in HEADS.entries:
            raise UserError(
                f"'{path}': the head of {point} is '{kind}', which this sdcli does not have",
                "the file that registers it, which it was trained with",
                f"sdcli eval {path} --import FILE.py",
            )
    model = attach(create(architecture, device="cpu"), description.plan, description.heads, len(description.classes))
    own = model.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    other = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    for names, what in ((missing, "lacks"), (extra, "has a stray"), (sorted(other), "has another shape for")):
        if names:
            raise UserError(
                f"'{path}' {what} tensor '{names[0]}'" + (f" and {len(names) - 1} more" if names[1:] else ""),
                f"the tensors of {architecture.model} as timm {_timm_version()} builds it",
                "use the timm version that the checkpoint was trained with",
            )
    model.load_state_dict(tensors)
    return model, description


def load_weights(model: MultiExit, path: Path) -> list[str]:
    """Starts `model` from a safetensors file: a checkpoint of ours or timm's own format.

    Only classifiers and heads may differ (other classes, other exits): they stay fresh, and the notes say so. Raises
    UserError where the backbone does not fit.
    """
    tensors, _ = read_tensors(path)
    if not any(name.startswith("backbone.") for name in tensors):
        tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    own = model.state_dict()
    fits = {name: tensor for name, tensor in tensors.items() if name in own and own[name].shape == tensor.shape}
    left = [name for name in own if name not in fits]
    free = ("heads.", *(f"backbone.{name}." for name in _classifier_names(model.backbone)))
    for name in left:
        if not name.startswith(free):
            found = f"of shape {list(tensors[name].shape)}" if name in tensors else "missing"
            raise UserError(
                f"'{path}' does not fit {model.plan.model}: tensor '{name.removeprefix('backbone.')}' is {found}",
                f"shape {list(own[name].shape)}",
                "use a file of the same model; a stem changed by --stem has weights of another shape",
            )
    model.load_state_dict(fits, strict=False)
    # "heads.exit1.classifier.weight" is said as "heads.exit1", "backbone.fc.weight" as "fc".
    fresh = dict.fromkeys(
        ".".join(name.removeprefix("backbone.").split(".")[: 2 if "heads." in name else 1]) for name in left
    )
    return [f"weights from {path}" + (f"; {', '.join(fresh)} stay fresh" if fresh else "")]


def _classifier_names(backbone: nn.Module) -> list[str]:
    """Where timm's classifier lies in its own names."""
    names: str | tuple[str, ...] = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    return [names] if isinstance(names, str) else list(names)


def _timm_version() -> str:
    import timm

    return str(timm.__version__)
