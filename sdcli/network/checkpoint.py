"""The checkpoint: one `.safetensors` file that needs nothing else to be evaluated, shipped or trained further.

Tensors are `backbone.*` under timm's own names and `heads.*`. The metadata holds `format="pt"`, as safetensors' readers
expect, and one JSON text `sdcli` that describes the rest. No pickle is ever read, and what the JSON says is believed
only as far as it has been checked.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdcli import __version__
from sdcli.data.dataset import listed
from sdcli.data.transforms import Preprocess
from sdcli.errors import UserError, counted
from sdcli.files import replacing
from sdcli.network.backbones import SOURCES, Architecture
from sdcli.network.blueprint import Blueprint
from sdcli.network.calibration import Calibration, problems
from sdcli.network.policies import check_policy
from sdcli.network.stages import StagePlan
from sdcli.network.stem import STEMS
from sdcli.recipe.address import FINAL
from sdcli.recipe.schema import MOST_ENDS, MOST_EPOCHS

VERSION = 1
"""Of the metadata's layout. A reader refuses what is newer than itself."""
CODE_ARGS = ("checkpoint_path", "pretrained", "cache_dir", "features_only", "scriptable", "exportable", "no_jit")
"""Arguments of `timm.create_model` that read files, or return something else than a classifier; with all whose names
begin with "pretrained"."""
LARGEST_SIZE, LARGEST_ARG, LONGEST_NAME, MOST_MACS = 16_384, 100_000, 300, 10**18
CROP_PCT = (0.1, 2.0)
"""The smallest and the largest share of an image that evaluation shows: a tiny one would be resized to a huge image."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""The filters that timm and Pillow know."""
EXIT = "sdcli_exit"
"""The further metadata of a file that holds one exit: its name."""


@dataclass(frozen=True)
class TrainedOn:
    """The data that a network was trained on, and how its training split was divided."""

    name: str
    """As tables show it."""
    source: str
    """What opens it again: a short name or a hub id; "" for a local folder, whose path stays on its machine."""
    val_fraction: float
    seed: int
    """Of the split."""
    image_key: str | None = None
    label_key: str | None = None
    fingerprint: str = ""
    """Of all images that training and validation were drawn from (`splits.fingerprint`); "" where it was not kept."""


@dataclass(frozen=True)
class Description:
    """All that a checkpoint says about its tensors."""

    blueprint: Blueprint
    dataset: TrainedOn
    recipe: dict[str, Any]
    epoch: int
    """After how many epochs it was saved."""
    scores: dict[str, Any] = field(default_factory=dict)
    """The report on the validation split, where there is one."""
    early_exit: Calibration | None = None
    """What `sdcli calibrate` has found."""


def save_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], description: Description, more: Mapping[str, str] | None = None
) -> None:
    """Writes the file beside `path` and renames it: readers find the old file or the new one, whole.

    The same tensors and description always give the same bytes, and the file gets the permissions of any new file.
    `more` is further metadata, of a file that is not a whole checkpoint.
    """
    # The format allows no two tensors that share memory, which tied weights do.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "sdcli": _written(description), **(more or {})}
    with replacing(path) as beside:
        beside.touch()
        mode = beside.stat().st_mode
        save_file(copies, beside, metadata)
        _sort_metadata(beside)
        os.chmod(beside, mode)


def _written(description: Description) -> str:
    """The description as JSON."""
    about = {
        "version": VERSION,
        "sdcli": __version__,
        **description.blueprint.to_dict(),
        "dataset": asdict(description.dataset),
        "recipe": description.recipe,
        "epoch": description.epoch,
        "scores": description.scores,
    }
    if description.early_exit is not None:
        about["early_exit"] = description.early_exit.to_dict()
    return json.dumps(about)


def describe_again(path: Path, description: Description, output: Path) -> None:
    """Writes the checkpoint at `path` with another description to `output`, which may be the same file.

    The tensors are copied byte for byte, and the new file appears whole or not at all.
    """
    with path.open("rb") as old, replacing(output) as beside:
        (length,) = struct.unpack("<Q", old.read(8))
        header = json.loads(old.read(length))
        header["__metadata__"] = {**header["__metadata__"], "sdcli": _written(description)}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # safetensors aligns the tensors
        with beside.open("wb") as new:
            new.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(old, new)


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two files hold the same tensors, byte for byte, whatever they say about them."""
    if not other.is_file():
        return False
    try:
        if one.samefile(other):
            return True
        with one.open("rb") as first, other.open("rb") as second:
            headers = [json.loads(file.read(struct.unpack("<Q", file.read(8))[0])) for file in (first, second)]
            for header in headers:
                header.pop("__metadata__", None)
            return headers[0] == headers[1] and all(
                part == second.read(len(part)) for part in iter(lambda: first.read(1 << 20), b"")
            )
    except (OSError, ValueError, MemoryError, OverflowError, AttributeError, struct.error):
        return False


def _sort_metadata(path: Path) -> None:
    """Puts the metadata of a safetensors file in alphabetical order: the library writes them in a random one."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length, "the same header in another order"
        file.seek(8)
        file.write(text.ljust(length))


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Any safetensors file, opened; raises UserError for one that is missing, truncated or another format."""
    if not path.exists():
        raise UserError(f"checkpoint '{path}' does not exist", "a run folder, or a file such as RUN/best.safetensors")
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.safetensors"))
        fix = f"did you mean '{path / inside[0]}'?" if inside else ""
        raise UserError(f"'{path}' is a folder", "a .safetensors file", fix)
    if not path.is_file():
        raise UserError(f"'{path}' is not a regular file", "a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(
            f"'{path}' cannot be read as safetensors: {error}",
            "a whole .safetensors file",
            _converted(path) or "copy it again if it was cut short",
        ) from None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint itself; for a run folder, that of the best epoch or else of the last one.

    Raises UserError for a folder without a checkpoint.
    """
    if not path.is_dir():
        return path
    for name in ("best.safetensors", "last.safetensors"):
        if (path / name).is_file():
            return path / name
    run = (path / "run.json").is_file()
    inside = [] if run else sorted(folder.name for folder in path.iterdir() if _is_run(folder))
    if inside:
        raise UserError(
            f"'{path}' is no run folder: it holds {counted(len(inside), 'run')}",
            f"one of them: {listed(inside)}",
            f"name one, such as {path / inside[0]}",
        )
    raise UserError(
        f"'{path}' has no checkpoint" + (" yet: no epoch has finished" if run else ""),
        "a run folder with best.safetensors or last.safetensors, or a checkpoint file",
        f"sdcli train --resume {path}" if run else "",
    )


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("best.safetensors", "last.safetensors"))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of any safetensors file; raises UserError as `open_tensors` does."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def _converted(path: Path) -> str:
    """How a file of another format is converted; "" for what looks like safetensors."""
    if path.suffix not in (".pth", ".pt", ".th", ".bin", ".ckpt"):
        return ""
    return (
        "convert it in Python: "
        f'tensors = torch.load({str(path)!r}, map_location="cpu", weights_only=True); '
        f"safetensors.torch.save_file(tensors, {str(path.with_suffix('.safetensors'))!r})"
    )


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], Description]:
    """Tensors and description of a checkpoint of sdcli; raises UserError for one that is foreign, damaged, or newer
    than this sdcli."""
    tensors, metadata = read_tensors(path)
    description = _described(metadata, path)
    if description is None:
        raise UserError(
            f"'{path}' was not written by sdcli: its metadata has no 'sdcli' entry",
            "a checkpoint of sdcli train",
            f"to start training from its weights: sdcli train MODEL --weights {path}",
        )
    return tensors, description


def read_description(path: Path) -> Description | None:
    """The description of a checkpoint of sdcli, without its tensors; None for any other safetensors file. Raises
    UserError as `load_checkpoint` does."""
    with open_tensors(path) as file:
        metadata = dict(file.metadata() or {})
    return _described(metadata, path)


def _described(metadata: Mapping[str, str], path: Path) -> Description | None:
    if "sdcli" not in metadata:
        return None
    _check_version(metadata["sdcli"], path)
    try:
        table = _METADATA.validate_json(metadata["sdcli"], strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise _unreadable(path, f"{key}: {first['msg']}" if key else first["msg"]) from None
    blueprint = Blueprint(table.architecture, table.plan, table.heads, table.classes, table.preprocess)
    for problem in _problems(blueprint, table):
        raise _unreadable(path, problem)
    return Description(blueprint, table.dataset, table.recipe, table.epoch, table.scores, table.early_exit)


@dataclass(frozen=True)
class _Metadata:
    """The JSON text in a checkpoint."""

    architecture: Architecture
    plan: StagePlan
    heads: dict[str, str]
    classes: tuple[str, ...]
    preprocess: Preprocess
    dataset: TrainedOn
    recipe: dict[str, Any]
    epoch: int
    scores: dict[str, Any]
    early_exit: Calibration | None = None


_METADATA = TypeAdapter(_Metadata)


def _check_version(text: str, path: Path) -> None:
    try:
        about = json.loads(text)
        version, written_by = about["version"], str(about["sdcli"])[:40]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {str(error)[:100]}") from None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _unreadable(path, f"version = {version!r}"[:100])
    if version > VERSION:
        raise UserError(
            f"'{path}' has format {version}, written by sdcli {written_by}",
            f"format {VERSION} or older, which is what sdcli {__version__} reads",
            "pip install --upgrade sdcli",
        )


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(f"'{path}' has metadata that cannot be used: {reason}", "a checkpoint as sdcli train wrote it")


def _problems(blueprint: Blueprint, table: _Metadata) -> Iterator[str]:
    """What is not plausible about metadata of the right types, before anything is built from them."""
    architecture, plan, preprocess = blueprint.architecture, blueprint.plan, blueprint.preprocess
    names = [architecture.model, plan.model, *blueprint.heads, *blueprint.heads.values()]
    names += [path for stage in plan.stages for path in (stage.module, *stage.inner)]
    if max(map(len, names)) > LONGEST_NAME:
        yield "a name is too long"
        return
    if architecture.model.startswith(SOURCES):
        yield f"model = '{architecture.model[:100]}' would have to be fetched from elsewhere"
    if architecture.stem not in STEMS:
        yield f"stem = {architecture.stem!r}"
    for name, value in architecture.model_args.items():
        if name in CODE_ARGS or name.startswith("pretrained"):
            yield f"model_args.{name} is not an argument of a network"
        if not _is_plain(value):
            yield f"model_args.{name} is not a plain value"
    sizes = (architecture.input_size, plan.input_size, preprocess.input_size)
    if len(set(sizes)) > 1 or not all(1 <= side <= LARGEST_SIZE for side in sizes[0]) or sizes[0][0] != 3:
        yield f"input sizes {', '.join(map(str, dict.fromkeys(sizes)))}"
    numbers = [*preprocess.mean, *preprocess.std, preprocess.crop_pct, table.dataset.val_fraction]
    if not all(map(math.isfinite, numbers)) or min(*preprocess.std, preprocess.crop_pct) <= 0:
        yield "preprocess has numbers that are no mean, standard deviation or share"
    if preprocess.interpolation not in INTERPOLATIONS:
        yield f"preprocess.interpolation = {preprocess.interpolation[:100]!r}"
    if (
        not CROP_PCT[0] <= preprocess.crop_pct <= CROP_PCT[1]
        or not 0 <= table.dataset.val_fraction < 1
        or not 0 <= table.epoch <= MOST_EPOCHS
    ):
        yield "a share or an epoch is out of range"
    if not blueprint.classes or architecture.num_classes not in (0, len(blueprint.classes)):
        yield f"{len(blueprint.classes)} classes of a network of {architecture.num_classes}"
    if not 1 <= len(plan.stages) <= MOST_ENDS or not 1 <= plan.embedding_dim <= LARGEST_ARG:
        yield f"{len(plan.stages)} stages, an embedding of {plan.embedding_dim}"
    if not 1 <= plan.macs <= MOST_MACS or not 0 <= plan.params <= MOST_MACS:
        yield f"a network of {plan.params} parameters and {plan.macs} MACs"[:100]
    for stage in plan.stages:
        counts = (stage.num_chs, *stage.size, stage.reduction)
        if not all(1 <= count <= LARGEST_ARG for count in counts) or not 0 <= stage.windows <= 8:
            yield f"stage '{stage.module[:100]}' has a map of {stage.num_chs}x{'x'.join(map(str, stage.size))}"
        if stage.output_fmt not in ("NCHW", "NHWC", "NLC") or not 0 <= stage.num_prefix_tokens <= LARGEST_ARG:
            yield f"stage '{stage.module[:100]}' has layout {stage.output_fmt[:20]!r}"
        if not 0 <= stage.params <= plan.params or not 0 <= stage.macs <= plan.macs:
            yield f"stage '{stage.module[:100]}' has costs that are negative or above the network's"
    if table.early_exit is not None:
        yield from problems(table.early_exit)
        classifiers = [point for point in blueprint.points if point in blueprint.heads or point == FINAL]
        policy = table.early_exit.policy
        for thresholds in (policy.thresholds, *(point.thresholds for point in table.early_exit.curve)):
            try:
                check_policy(policy.at(thresholds), classifiers)
            except UserError as error:
                yield f"early_exit: {error.wrong}"
    if stray := sorted(blueprint.heads.keys() - set(blueprint.points)):
        yield f"a head at '{stray[0][:100]}', which is no point"


def _is_plain(value: Any) -> bool:
    """Whether `value` is a number, a word or a list of them, none of them huge."""
    if isinstance(value, list):
        return len(value) <= 1000 and all(map(_is_plain, value))
    if isinstance(value, str):
        return len(value) <= 200
    return value is None or (isinstance(value, (bool, int, float)) and abs(value) <= LARGEST_ARG)
