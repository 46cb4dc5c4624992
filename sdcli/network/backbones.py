"""timm models by name: chooses the arguments, stem and input size that build one, and stores what rebuilds it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from sdcli.errors import UserError, did_you_mean, unknown
from sdcli.hub import reach
from sdcli.network.cuts import find_stages
from sdcli.network.stem import (
    SMALLEST_MAP,
    apply_stem,
    has_cifar_stem,
    last_map,
    parameters_of,
    patch_size,
    smaller_patches,
    smallest_map,
)

SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")
DEFAULT_SIZE = (3, 224, 224)
SMALL_IMAGE = 32
"""The side of the images that the networks of `sdcli.zoo` are made for."""


@dataclass(frozen=True)
class Architecture:
    """Everything needed to rebuild a backbone; stored in checkpoints."""

    model: str
    """A timm name, with or without the tag of its weights ("resnet50.a1_in1k")."""
    num_classes: int
    input_size: tuple[int, int, int]
    """C, H, W."""
    stem: str
    """One of `STEMS`, never "auto"."""
    model_args: dict[str, Any]
    """Arguments of timm's `create_model` besides the number of classes."""
    notes: tuple[str, ...] = ()
    source: str = ""
    """The `hf-hub:` or `local-dir:` source of the pretrained weights, if the user named one."""

    @property
    def family(self) -> str:
        """The module that defines the model, such as "resnet"; "" for a name that timm does not know."""
        from timm.models import is_model, model_entrypoint, split_model_name_tag

        models()
        name, _ = split_model_name_tag(self.model)
        return model_entrypoint(name).__module__.rpartition(".")[2] if is_model(name) else ""

    @property
    def in_zoo(self) -> bool:
        """Whether timm knows the model only with `sdcli.zoo`."""
        from sdcli.zoo import NAMES

        return self.model in NAMES

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without `source`; `from_dict` restores the rest."""
        table = asdict(self) | {"input_size": list(self.input_size), "notes": list(self.notes)}
        # The source may be a local path; name and arguments are enough to rebuild the model.
        return table | {"source": ""}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Architecture:
        """The architecture that `to_dict` described."""
        return cls(**{**table, "input_size": tuple(table["input_size"]), "notes": tuple(table["notes"])})


def models() -> ModuleType:
    """timm, which also knows the networks of `sdcli.zoo`: whatever looks up a model's name asks here."""
    import timm

    import sdcli.zoo  # noqa: F401

    return cast(ModuleType, timm)


def resolve(
    model: str,
    *,
    num_classes: int | None,
    image_size: int | None,
    stem: str = "auto",
    pretrained: bool = False,
    model_args: dict[str, Any] | None = None,
) -> Architecture:
    """Decides how to build `model` for images of this size, without weights.

    `num_classes` and `image_size` default to the model's own. `stem` "auto" changes the stem only if the last map
    would be smaller than 4x4 (for the zoo's networks: than an eighth of the image), "cifar" always, "imagenet" never.
    With `pretrained`, the changed stem keeps its weights.

    Raises UserError for an unknown model, unknown arguments, and an image size that the model does not accept.
    """
    if stem not in ("auto", "imagenet", "cifar"):
        raise unknown("stem", stem, ("auto", "imagenet", "cifar"))
    _check_name(model)
    source = model if model.startswith(SOURCES) else ""
    given = dict(model_args or {})
    if source:
        model, own_args = _described(source)
        given = own_args | given
    probe = build(model, num_classes, given)
    own_size = _own_size(probe, given)
    input_size = own_size if image_size is None else (own_size[0], image_size, image_size)
    if input_size != own_size and "img_size" in parameters_of(probe):
        given["img_size"] = image_size
    no_notes: tuple[str, ...] = ()
    if stem == "imagenet" or (stem == "auto" and input_size == own_size):
        if input_size != own_size:
            _check_runs(model, num_classes, given, input_size, own_size)
        kind, notes = "imagenet", no_notes
    else:
        kind, given, notes = _choose_stem(model, num_classes, given, input_size, own_size, stem, pretrained)
    classes = getattr(probe, "num_classes", None) or 0
    return Architecture(model, int(classes), input_size, kind, given, notes, source)


def create(architecture: Architecture, *, device: str = "meta", pretrained: bool = False) -> nn.Module:
    """Builds the backbone; on "meta" it has no weights and needs no memory.

    Raises UserError if pretrained weights are not available.
    """
    model = build(
        (architecture.source if pretrained else "") or architecture.model,
        architecture.num_classes or None,
        architecture.model_args,
        device=device,
        pretrained=pretrained,
    )
    apply_stem(model, architecture.stem, architecture.input_size)
    return model


def pretrained_transform(model: nn.Module) -> dict[str, Any]:
    """The preprocessing of the pretrained weights: `mean`, `std`, `interpolation` and `crop_pct`.

    The image size is left out, because the architecture's may differ from that of the weights.
    """
    from timm.data import resolve_data_config

    config = resolve_data_config(model=model)
    return {
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
    }


def build(
    model: str,
    num_classes: int | None,
    model_args: Mapping[str, Any],
    *,
    device: str = "meta",
    pretrained: bool = False,
) -> nn.Module:
    """timm's `create_model`, with a UserError for whatever it raises. Waits seconds for the Hugging Face hub, then
    falls back to the local cache."""
    timm = models()
    repo = _repository(model) if pretrained else ""
    silence = ""
    try:
        with torch.device(device), reach(repo, "model") if repo else nullcontext("") as silence:
            # A `local-dir:` or `hf-hub:` source may have a number of classes among its arguments.
            given = {**model_args} if num_classes is None else {**model_args, "num_classes": num_classes}
            built = timm.create_model(model, pretrained=pretrained, **given)
    except Exception as error:  # timm and its models raise all kinds of errors: assertions, KeyError, errors of the hub
        reason = " ".join(str(error).split()) or type(error).__name__
        if silence and isinstance(error, OSError):
            raise UserError(
                f"pretrained weights of '{model}' are not in the cache, and {silence}",
                "a network connection, or a cache that holds them (HF_HOME)",
                f"on a machine with a network: hf download {repo}, then copy its cache; "
                "or --weights FILE.safetensors; or leave out --pretrained",
            ) from error
        if pretrained:
            raise UserError(
                f"pretrained weights of '{model}' cannot be loaded: {reason}",
                "weights that timm provides, and a network connection or a cache that holds them (HF_HOME)",
                "--weights FILE.safetensors, or leave out --pretrained to start from random weights",
            ) from error
        what = ", ".join(f"{name}={value!r}" for name, value in model_args.items())
        raise UserError(f"timm cannot build '{model}'" + (f" with {what}" if what else "") + f": {reason}") from error
    assert isinstance(built, nn.Module)
    return built


def _repository(model: str) -> str:
    """The repository of a model's weights on the Hugging Face hub; "" if they are elsewhere."""
    kind, _, name = model.partition(":")
    if name:
        return "" if kind == "local-dir" else name.partition("@")[0]
    known = models().get_pretrained_cfg(model)
    return (known.hf_hub_id or "") if known else ""


def check_pretrained(model: str, key: str) -> None:
    """Raises UserError, with the key that names the model, if nobody provides weights for it."""
    known = None if model.startswith(SOURCES) else models().get_pretrained_cfg(model)
    if known is not None and not known.has_weights:
        raise UserError(
            f"{key}: there are no pretrained weights of {model}",
            "a model that timm has weights of, or a run that has trained it",
            f"train it first: sdcli train {model} --recipe baseline --output RUN, then name RUN in its place",
            key=key,
        )


def names_weights(model: str) -> bool:
    """Whether a model's name specifies its pretrained weights, by timm's tag or by a source."""
    from timm.models import split_model_name_tag

    return model.startswith(SOURCES) or bool(split_model_name_tag(model)[1])


def _check_name(model: str) -> None:
    """Raises UserError for a name that timm does not know, and suggests the nearest one."""
    from timm.models import split_model_name_tag

    if model.startswith(SOURCES):
        return
    timm = models()
    name, tag = split_model_name_tag(model)
    if not timm.is_model(name):
        owner, _, repository = model.rpartition("/")
        if owner == "timm" and timm.is_model(split_model_name_tag(repository)[0]):
            # The user gave the hub's name of timm's own weights ("timm/resnet18.a1_in1k").
            fix = f"{repository} --pretrained"
        elif owner:
            fix = f"hf-hub:{model}, if this is a timm model on the Hugging Face hub"
        elif timm.is_model(f"cifar_{name}"):
            fix = f"did you mean 'cifar_{name}'?"
        else:
            fix = did_you_mean(name, timm.list_models()) or "sdcli inspect 'resnet*' lists a family"
        raise UserError(f"unknown model '{model}'", "a timm architecture, such as resnet18", fix)
    if tag and model not in (tagged := timm.list_pretrained(f"{name}.*")):
        raise unknown("weights", model, tagged, f"{name} without a tag")


def _described(source: str) -> tuple[str, dict[str, Any]]:
    """The timm architecture and arguments of an `hf-hub:` or `local-dir:` source.

    Raises UserError if the source is not available.
    """
    from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

    kind, _, name = source.partition(":")
    repo, silence = _repository(source), ""
    try:
        with reach(repo, "model") if repo else nullcontext("") as silence:
            load = load_model_config_from_path if kind == "local-dir" else load_model_config_from_hf
            _, model, arguments = load(Path(name) if kind == "local-dir" else name)
    except Exception as error:  # the hub's client raises all kinds of errors
        if silence and isinstance(error, OSError):
            raise UserError(
                f"'{source}' is not in the cache, and {silence}",
                "a network connection, or a cache that holds it (HF_HOME)",
                f"on a machine with a network: hf download {repo}, then copy its cache",
            ) from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"'{source}' is not available: {reason}",
            "a folder with config.json, or a model on the hub and a network connection or cached copy (HF_HOME)",
        ) from None
    return str(model), dict(arguments or {})


def _own_size(model: nn.Module, given: Mapping[str, Any]) -> tuple[int, int, int]:
    """The input size of a model: from its arguments, or else its default."""
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size") or DEFAULT_SIZE
    if "img_size" in given:
        size = given["img_size"]
        height, width = (size, size) if isinstance(size, int) else size
    return given.get("in_chans", channels), height, width


def _check_runs(
    model: str,
    num_classes: int | None,
    given: Mapping[str, Any],
    input_size: tuple[int, int, int],
    own_size: tuple[int, int, int],
) -> None:
    try:
        find_stages(build(model, num_classes, given), input_size, name=model)
    except UserError as error:
        raise _refused(error, own_size) from error


def _refused(error: UserError, own_size: tuple[int, int, int]) -> UserError:
    return UserError(error.wrong, "an image size that the model accepts", f"--image-size {own_size[1]}")


def _choose_stem(
    model: str,
    num_classes: int | None,
    given: dict[str, Any],
    input_size: tuple[int, int, int],
    own_size: tuple[int, int, int],
    stem: str,
    pretrained: bool,
) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """The chosen kind of stem, the arguments to build with, and a note for each change."""
    plain: nn.Module | None = None
    refusal = UserError("")
    try:
        plain = build(model, num_classes, given)
        find_stages(plain, input_size, name=model)
    except UserError as error:
        plain, refusal = None, _refused(error, own_size)
    # The strides of a network that is made for small images are meant for them.
    least = smallest_map(input_size) if min(own_size[1:]) <= SMALL_IMAGE else SMALLEST_MAP
    if stem == "auto" and plain is not None and last_map(plain, input_size) >= least:
        return "imagenet", given, ()
    try:
        return _small_stem(model, num_classes, given, input_size, stem, pretrained)
    except UserError as error:
        if plain is None:
            raise refusal from error
        if stem != "auto":
            raise
        side = last_map(plain, input_size)
        return "imagenet", given, (f"The last map is only {side}x{side}, and no smaller stem fits: {error.wrong}.",)


def _small_stem(
    model: str,
    num_classes: int | None,
    given: dict[str, Any],
    input_size: tuple[int, int, int],
    stem: str,
    pretrained: bool,
) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """A stem for small images that suits the model: smaller patches, the papers' 3x3 convolution, or removed strides.

    Pretrained weights fix the shapes of all kernels, so that only strides can be removed.
    """
    free = {name: value for name, value in given.items() if name != "img_size"}
    probe = build(model, num_classes, free)
    patch = patch_size(probe)
    no_patches: UserError | None = None
    if patch is not None and stem != "unstrided":
        if pretrained:
            raise UserError(f"pretrained weights need their patches of {patch}x{patch}")
        try:
            patches = smaller_patches(lambda more: build(model, num_classes, {**free, **more}), probe, input_size)
        except UserError as error:
            no_patches = error
        else:
            return "patch", {**free, **patches.model_args}, (patches.note,)
    built = build(model, num_classes, given)
    kind = "cifar" if has_cifar_stem(built) and stem != "unstrided" and not pretrained else "unstrided"
    try:
        return kind, given, apply_stem(built, kind, input_size)
    except UserError as error:
        raise no_patches or error from error
