"""Images of a split for a page: which are worth a look, and their thumbnails.

N images
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from sdcli.evaluation.answers import Answers
from sdcli.report.findings import Findings

SIDE = 96
"""Pixels of a thumbnail's longer side, at most."""
QUALITY = 80
"""Of JPEG, in Pillow's scale."""


@dataclass(frozen=True)
class Answer:
    """What one exit says about an image."""

    point: str
    label: str
    confidence: float
    right: bool


@dataclass(frozen=True)
class Picture:
    """An image, its class, and what the exits say."""

    uri: str
    """The thumbnail as a `data:` address."""
    width: int
    height: int
    label: str
    answers: tuple[Answer, ...]


def pictures(found: Findings, places: Sequence[int]) -> list[Picture]:
    """The images at these places of the answers. Raises UserError for one that cannot be read."""
    return [_picture(found, place) for place in places]


def _picture(found: Findings, place: int) -> Picture:
    answers, classes = found.answers, found.classes
    image = found.split.images.read(int(answers.index[place]))
    said = []
    for point in found.points:
        own = answers.points[point]
        predicted = int(own.predicted[place])
        right = predicted == int(answers.labels[place])
        said.append(Answer(point, classes[predicted], float(own.confidence[place]), right))
    return Picture(*thumbnail(image), classes[int(answers.labels[place])], tuple(said))


def thumbnail(image: Image.Image) -> tuple[str, int, int]:
    """The image as a small `data:` address, its width and its height: a JPEG, or a PNG where it is small already."""
    small = image.convert("RGB")
    lossless = max(small.size) <= SIDE // 2
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if lossless:
        small.save(buffer, "png", optimize=True)
    else:
        small.save(buffer, "jpeg", quality=QUALITY, optimize=True)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", *small.size


def disagreeing(answers: Answers, points: Sequence[str], count: int) -> tuple[list[int], int]:
    """Images to which the exits give different classes, the surest first, at most `count`; and how many there are."""
    predicted = torch.stack([answers.points[point].predicted for point in points])
    differ = (predicted != predicted[-1]).any(dim=0)
    sureness = torch.stack([answers.points[point].confidence for point in points]).mean(dim=0)
    return varied(sureness, differ, answers.labels, count), int(differ.sum())


def varied(score: Tensor, among: Tensor, labels: Tensor, count: int) -> list[int]:
    """Of the images `among` [N] those with the highest score [N], every class once before any comes twice."""
    chosen, numbers = among.tolist(), labels.tolist()
    order = [place for place in score.argsort(descending=True, stable=True).tolist() if chosen[place]]
    seen: Counter[int] = Counter()
    ranked = []
    for rank, place in enumerate(order):
        label = numbers[place]
        ranked.append((seen[label], rank, place))
        seen[label] += 1
    return [place for _, _, place in sorted(ranked)[:count]]
