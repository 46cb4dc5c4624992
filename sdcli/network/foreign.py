"""Networks that were trained elsewhere, in a run: the run's images as they expect them, their answers in its classes.

B batch, K classes
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdcli.data.dataset import listed
from sdcli.data.transforms import Preprocess
from sdcli.errors import UserError
from sdcli.network.backbones import SOURCES, check_pretrained
from sdcli.network.blueprint import Blueprint, choose_heads, plan_network
from sdcli.network.checkpoint import open_tensors, read_description
from sdcli.network.signals import Signal
from sdcli.network.weights import file_of, read_weights_file
from sdcli.recipe.address import FINAL, GROUPS
from sdcli.recipe.schema import Network
from sdcli.zoo.public import renamed

TRAIN_IT = "train it on these data: sdcli train MODEL --recipe finetune, then name its run"


def draft_foreign(table: Network, name: str, points: Collection[str]) -> Blueprint:
    """Plans a network that is finished before the run begins.

    A checkpoint of sdcli says itself what it is; what the table names besides must agree, but for `exits` and `head`,
    which may put other taps on it. Other weights are those of the table's `model`, at its own size. `points` are those
    that somebody reads, groups as they are written: exits that nobody reads are left out, and where there are none,
    the stages are tapped. Raises UserError for a file that cannot be read and a model that is another one.
    """
    described = read_description(file_of(table)) if table.from_file else None
    taps = (table.exits, table.head, table.branches) != ("auto", "auto", None)
    if described is not None:
        own = described.blueprint
        if table.model not in (None, own.architecture.model):
            raise UserError(
                f"networks.{name}: the checkpoint has the weights of {own.architecture.model}, not of {table.model}",
                "one of them: a checkpoint of sdcli names its model itself",
                f"leave networks.{name}.model out",
                key=f"networks.{name}.model",
            )
        exits = {point for point in points if point != FINAL}
        has_them = exits <= {*own.points, *(GROUPS if own.points[1:] else ())}
        if not taps and exits and has_them:
            return own
        if not taps:
            table = table.model_copy(update={"head": "none"} if exits else {"exits": "none"})
        plan = plan_network(table, own.architecture)
        return replace(own, plan=plan, heads=choose_heads(plan, table, len(own.classes)))
    if table.model is None:
        raise UserError(
            f"networks.{name}: '{file_of(table)}' does not say of which model its weights are",
            "a checkpoint of sdcli, or the model beside the file",
            f"--set networks.{name}.model=MODEL",
            key=f"networks.{name}.weights",
        )
    model = table.model
    if table.weights == "pretrained":
        check_pretrained(model, f"networks.{name}.model")
    if not taps:
        # The exits of a model that came without them: their maps can be compared, and nothing else.
        table = table.model_copy(update={"head": "none"} if {*points} - {FINAL} else {"exits": "none"})
    file = read_weights_file(table, model)
    stored = classifier_rows(table, model) if table.from_file else None
    classes = [str(number) for number in range(stored)] if stored else None
    drafted = Blueprint.draft(table, model, classes, file=file)
    return replace(drafted, classes=known_classes(model, len(drafted.classes), drafted.classes))


def classifier_rows(table: Network, model: str) -> int | None:
    """How many classes a file of timm's format tells apart; None where its classifier is not found."""
    from timm.models import get_pretrained_cfg, split_model_name_tag

    known = get_pretrained_cfg(split_model_name_tag(model)[0])
    names = (known.classifier if known else None) or ()
    with open_tensors(file_of(table)) as file:
        # By the names here, those in the file.
        own_names = list(file.keys())
        stored = dict(zip(own_names, own_names, strict=True))
        stored |= renamed(stored)
        for classifier in (names,) if isinstance(names, str) else names:
            for name in (f"{classifier}.weight", f"backbone.{classifier}.weight"):
                if name in stored:
                    return int(file.get_slice(stored[name]).get_shape()[0])
    return None


def names_classes(table: Network, blueprint: Blueprint) -> bool:
    """Whether a network's classes have names: those of timm's format are counted, unless ImageNet is known to be
    theirs. A data set's own names may be numbers."""
    if list(blueprint.classes) != [str(number) for number in range(len(blueprint.classes))]:
        return True
    return table.from_file and read_description(file_of(table)) is not None


def known_classes(model: str, count: int, otherwise: Sequence[str]) -> tuple[str, ...]:
    """The names of the classes of timm's weights, where they are those of ImageNet: WordNet's ids."""
    from timm.data import ImageNetInfo, infer_imagenet_subset
    from timm.models import get_pretrained_cfg

    known = None if model.startswith(SOURCES) else get_pretrained_cfg(model)
    if known is None or known.num_classes != count:
        return tuple(otherwise)
    subset = infer_imagenet_subset(known.to_dict())
    return tuple(ImageNetInfo(subset).label_names()) if subset else tuple(otherwise)


def columns_of(ours: Sequence[str], theirs: Sequence[str], where: str, *, named: bool = True) -> list[int] | None:
    """Where the run's classes stand among those of another network; None where they are the same, in the same order.

    Compared by name; with `named` false, theirs are only numbers, and as many classes are taken to be the same. Raises
    UserError, with the key `where` of the weights, if a class of the run is missing, or two are called like it.
    """
    if list(ours) == list(theirs):
        return None
    if not named:
        if len(ours) == len(theirs):
            return None
        raise UserError(
            f"{where}: the network tells {len(theirs)} classes apart, whose names are not known, and the data have "
            f"{len(ours)}",
            "weights of a network with the data set's classes",
            TRAIN_IT,
            key=where,
        )
    places: dict[str, set[int]] = {}
    for place, name in enumerate(theirs):
        for word in (name, *_words(name)):
            places.setdefault(_plain(word), set()).add(place)
    missing = [name for name in ours if _plain(name) not in places]
    if missing:
        raise UserError(
            f"{where}: the network does not know {len(missing)} of the {len(ours)} classes: {listed(missing)}",
            f"weights of a network with the data set's classes; it knows {listed(list(theirs))}",
            TRAIN_IT,
            key=where,
        )
    for name in ours:
        if len(found := places[_plain(name)]) > 1:
            several = [theirs[place] for place in sorted(found)]
            raise UserError(
                f"{where}: {len(several)} classes of the network are called '{name}': {', '.join(several)}",
                "names that say which class is meant",
                f"rename the data set's class {name} to {' or '.join(several)}",
                key=where,
            )
    return [min(places[_plain(name)]) for name in ours]


def _words(name: str) -> list[str]:
    """What WordNet calls the class with this id ("n01443537": goldfish, Carassius auratus); none for another name."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    known = re.fullmatch(r"n\d{8}", name) is not None and name in info.label_names()
    return info.label_name_to_description(name).split(", ") if known else []


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").strip()


class Translation(nn.Module):
    """Between a run and a network that was trained elsewhere. It has no weights and nothing that a state would hold."""

    def __init__(
        self, ours: Preprocess, theirs: Preprocess, columns: Sequence[int] | None, knows_classes: bool = True
    ) -> None:
        """`ours` is how the run prepares images, `theirs` how the network expects them; `columns` as `columns_of`
        gives them, where the network knows the run's classes at all."""
        super().__init__()
        self.knows_classes = knows_classes
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float32)[:, None, None]
            for values in (ours.mean, ours.std, theirs.mean, theirs.std)
        )
        self.same_colours = (ours.mean, ours.std) == (theirs.mean, theirs.std)
        self.size = None if ours.size == theirs.size else theirs.size
        self.mode = "bicubic" if theirs.interpolation == "bicubic" else "bilinear"
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)
        self.register_buffer("columns", None if columns is None else torch.tensor(columns), persistent=False)

    scale: Tensor
    shift: Tensor
    columns: Tensor | None

    @property
    def notes(self) -> list[str]:
        """What is translated, in words."""
        found = [] if self.same_colours else ["images normalised as for its own weights"]
        found += [] if self.size is None else [f"images resized to {self.size[0]}x{self.size[1]}"]
        return found + ([] if self.columns is None else ["classes found by name"])

    def images(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] of the run as the network expects them: the same crops, in its size and colours."""
        if self.size is not None:
            images = F.interpolate(images, self.size, mode=self.mode, antialias=True, align_corners=False)
        return images if self.same_colours else images * self.scale + self.shift

    def signals(self, signals: dict[str, Signal]) -> dict[str, Signal]:
        """The network's signals with logits of the run's classes [B, K], in its order."""
        if self.columns is None:
            return signals
        return {
            point: replace(
                signal,
                logits=None if signal.logits is None else signal.logits[:, self.columns],
                dense=None if signal.dense is None else signal.dense[:, self.columns],
                classify=self._classifying(signal.classify),
            )
            for point, signal in signals.items()
        }

    def _classifying(self, classify: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor] | None:
        if classify is None:
            return None
        return lambda embedding: classify(embedding)[:, self.columns]


class Translated(nn.Module):
    """A network as a run sees it: images of the run in, signals of the run's classes out."""

    def __init__(self, network: nn.Module, translation: Translation) -> None:
        super().__init__()
        self.network, self.translation = network, translation
        self.training = network.training

    def forward(self, images: Tensor, points: Mapping[str, bool] | None = None) -> dict[str, Signal]:
        """As `MultiExit.forward`."""
        return self.translation.signals(self.network(self.translation.images(images), points))
