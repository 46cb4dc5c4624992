"""How much the logits of two implementations of one network may differ.

B batch, K classes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sdcli.errors import UserError
from sdcli.network.multi_exit import MultiExit

BATCHES = (1, 2, 5)
"""Batch sizes that are tried, besides all images at once."""
LARGEST_KL = 1e-6

Reader: TypeAlias = Callable[[Tensor], Mapping[str, Tensor]]
"""A file that was read back: images [B, 3, H, W] to the logits [B, K] of its exits."""


@dataclass(frozen=True)
class Figures:
    """How one exit of a file compares with the network that it was made from."""

    exit: str
    images: str
    """Which images: in words."""
    num_images: int
    difference: float
    """Largest absolute difference of two logits, over all batch sizes."""
    largest: float
    """Largest absolute logit of the network."""
    agree: int
    """Images with the same class."""
    kl: float
    """Mean KL divergence, in nats; the largest over the batch sizes."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@torch.no_grad()
def logits_of(network: MultiExit, images: Tensor) -> dict[str, Tensor]:
    """The logits [B, K] of every exit in one full pass."""
    signals = network(images)
    found = {}
    for point in network.classifiers:
        logits = signals[point].logits
        assert logits is not None
        found[point] = logits
    return found


def allowed(wanted: Tensor) -> float:
    """The largest difference that rounding explains, in single precision."""
    return 1e-4 * float(wanted.abs().max()) + 1e-5


def kl(wanted: Tensor, found: Tensor) -> float:
    """Mean KL divergence of two predictions [B, K], in nats."""
    ours, theirs = (torch.log_softmax(logits.double(), dim=1) for logits in (wanted, found))
    return float((ours.exp() * (ours - theirs)).sum(dim=1).mean())


def problem(wanted: Tensor, found: Tensor) -> str:
    """Why `found` [B, K] is not what the network says, in words; "" if it is."""
    if found.shape != wanted.shape:
        return f"its shape is {list(found.shape)} instead of {list(wanted.shape)}"
    difference = float((found - wanted).abs().max())
    if not difference <= allowed(wanted):  # also where it is NaN
        return f"logits differ by {difference:.2g}, and rounding explains {allowed(wanted):.2g}"
    first, second = wanted.topk(2, dim=1).values.unbind(dim=1)
    wrong = (wanted.argmax(dim=1) != found.argmax(dim=1)) & (first - second > 2 * difference)
    if bool(wrong.any()):
        return f"{int(wrong.sum())} of {len(wanted)} images have another class"
    divergence = kl(wanted, found)
    if not divergence <= LARGEST_KL:
        return f"the mean KL divergence is {divergence:.2g}, more than {LARGEST_KL:g}"
    return ""


def compare(network: MultiExit, read: Reader, points: Sequence[str], images: Mapping[str, Tensor]) -> list[Figures]:
    """The file behind `read` against the network, on each set of images and in batches of several sizes.

    Raises UserError that names the first exit that differs by more than rounding explains.
    """
    figures = []
    for what, batch in images.items():
        reference = logits_of(network, batch)
        found = {
            count: _checked(read, batch[:count], points, what)
            for count in sorted({min(count, len(batch)) for count in (*BATCHES, len(batch))})
        }
        for point in points:
            wanted = reference[point]
            for count, logits in found.items():
                if reason := problem(wanted[:count], logits[point]):
                    raise _refused(point, what, count, reason)
            figures.append(_figures(point, what, wanted, {count: logits[point] for count, logits in found.items()}))
    return figures


def _checked(read: Reader, images: Tensor, points: Sequence[str], what: str) -> Mapping[str, Tensor]:
    try:
        found = read(images)
    except Exception as error:  # a runtime raises what it likes
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"the exported file does not run ({what}, batch of {len(images)}): {reason}",
            "a file that runs; it was removed",
            "another format or another --exit",
        ) from error
    assert found.keys() >= set(points)
    return found


def _figures(point: str, what: str, wanted: Tensor, found: Mapping[int, Tensor]) -> Figures:
    return Figures(
        point,
        what,
        len(wanted),
        max(float((logits - wanted[:count]).abs().max()) for count, logits in found.items()),
        float(wanted.abs().max()),
        int((found[len(wanted)].argmax(dim=1) == wanted.argmax(dim=1)).sum()),
        max(max(kl(wanted[:count], logits), 0.0) for count, logits in found.items()),
    )


def _refused(point: str, what: str, count: int, reason: str) -> UserError:
    return UserError(
        f"{point} of the exported file is not that of the checkpoint ({what}, batch of {count}): {reason}",
        "the same logits up to rounding; the file was removed",
        "another format or another --exit",
    )
