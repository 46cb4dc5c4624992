"""Early exit inside a batch: every image leaves at the first exit that is sure, and only the others go on.

B images of a batch, R images that are left, K classes
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdcli.network.policies import Decided, Judge, Policy
from sdcli.network.stages import Stage
from sdcli.network.taps import Reached, Store
from sdcli.recipe.address import FINAL

ENOUGH = 32 * 32 * 32
"""Pixels of the images that go on together on a CPU without waiting for more, as of 32 images of 32x32: only smaller
batches are slow there."""
FEW = 16
"""Images that go on together on a CPU at least, however large they are: the last stage of a ResNet-18 takes a quarter
more time for each of 6 images of 224x224 than for each of 16, since its weights are many and its maps small."""
MANY = 128 * 32 * 32
"""Pixels of the images that enter together on a CPU without waiting for later batches, as of 128 images of 32x32: in
smaller batches it counts what a head and a decision take for any number of images."""
PATIENCE = 8
"""Passes after which an image that waits for company goes on without it, and batches that wait to enter at most: later
answers are held back until then."""


@dataclass(frozen=True)
class _Group:
    """Images that have passed the same exits."""

    tensor: Tensor
    """[R, ...], what the last stage has made of them."""
    home: NDArray[np.int64]
    """Where each of them belongs: its batch and its row there [R, 2]."""
    judge: Judge
    since: int
    """The pass that has brought them here."""

    def __len__(self) -> int:
        return len(self.home)

    def part(self, rows: NDArray[np.int64]) -> _Group:
        """Those at `rows`."""
        there = torch.from_numpy(rows).to(self.tensor.device, non_blocking=True)
        return replace(self, tensor=_rows(self.tensor, there), home=self.home[rows], judge=self.judge.part(there))

    @staticmethod
    def joined(groups: Sequence[_Group]) -> _Group:
        """All of them, the first group first."""
        if len(groups) == 1:
            return groups[0]
        return _Group(
            torch.cat([group.tensor for group in groups]),
            np.concatenate([group.home for group in groups]),
            Judge.joined([group.judge for group in groups]),
            groups[-1].since,
        )


class _Batch:
    """The answers to one batch, as far as they are known."""

    def __init__(self, images: Tensor, num_classes: int) -> None:
        self.missing = len(images)
        self.exits = np.empty(len(images), dtype=np.int64)
        self.answers = images.new_empty(len(images), num_classes, dtype=torch.float32)

    def add(self, rows: NDArray[np.int64], answers: Tensor, place: int) -> None:
        """The answers [R, K] to the images at `rows` [R], which have left at one exit."""
        self.answers.index_copy_(0, torch.from_numpy(rows).to(answers.device, non_blocking=True), answers)
        self.exits[rows] = place
        self.missing -= len(rows)


class Router:
    """Leads batches of images through a network: each image leaves at the first exit that is sure.

    If `together`, small batches on a CPU wait until they have `MANY` pixels and enter as one, and those that go on from
    an exit wait there until there are enough of them, from this pass and later ones: `FEW` of them and `ENOUGH` pixels
    on a CPU, elsewhere as many as a pass has, and never more than that. At most `patience` batches wait to enter, and
    an image waits at each exit for at most `patience` more passes. A pass begins when the next batch is taken: all who
    wait go on with the last one.
    """

    def __init__(
        self,
        policy: Policy,
        run: Callable[[Tensor, Callable[[str, Tensor], Tensor]], Tensor],
        logits_at: Callable[[str, Tensor], Tensor],
        num_classes: int,
        together: bool = False,
        patience: int = PATIENCE,
    ) -> None:
        """`run(images, visit)` is a forward pass to the final logits whose taps are visited, and `logits_at` turns a
        point and its tensor into the logits of its head. Unless `together`, nobody waits."""
        self.policy, self.run, self.logits_at, self.num_classes = policy, run, logits_at, num_classes
        self.points = (*policy.exits, FINAL)
        self.together, self.patience = together, patience
        self._enough = self._full = 0
        """How many go on without waiting, and how many at most."""
        self._entering: list[tuple[Tensor, NDArray[np.int64]]] = []
        """Batches that wait to enter, and the homes of their images."""
        self._next_in: tuple[Tensor, NDArray[np.int64]] | None = None
        """Those who enter together once another batch has come: if none does, all who wait go on with them."""
        self._taken = self._passes = 0
        self._batches: dict[int, _Batch] = {}
        """Those that are not answered yet, in order."""
        self._waiting: dict[str, list[_Group]] = {}
        self._passenger: Tensor | None = None
        """An image [1, 3, H, W] that leads those that wait on when there are no more images."""
        # Of the pass that runs.
        self._home = _NOBODY
        self._judge = Judge(policy)
        self._visited: set[str] = set()

    def take(self, images: Tensor) -> list[Decided]:
        """Reads a batch [B, 3, H, W]; returns the batches, in order, all of whose images are answered by now."""
        number, self._taken = self._taken, self._taken + 1
        self._batches[number] = _Batch(images, self.num_classes)
        if not len(images):
            return self._answered()
        self._enter()
        rows = np.arange(len(images))
        self._entering.append((images, np.stack([np.full_like(rows, number), rows], axis=1)))
        many = _number(images, MANY) if self.together and images.device.type == "cpu" else 0
        if sum(len(own) for own, _ in self._entering) >= many or len(self._entering) > self.patience:
            self._gather()
        if not self.together:
            self._enter()
        return self._answered()

    def _gather(self) -> None:
        """All who wait to enter are next."""
        batches, homes = zip(*self._entering, strict=True)
        self._next_in = (batches[0], homes[0]) if len(batches) == 1 else (torch.cat(batches), np.concatenate(homes))
        self._entering = []

    def _enter(self) -> None:
        """A pass of those who are next, if there are any."""
        if self._next_in is None:
            return
        (images, home), self._next_in = self._next_in, None
        if self.together:
            self._full = max(self._full, len(images))
            few = max(FEW, _number(images, ENOUGH)) if images.device.type == "cpu" else self._full
            self._enough = min(self._full, few)
            self._passenger = images[:1]
        self._pass(images, home)

    def rest(self) -> list[Decided]:
        """The batches that are left, after the last image has been read."""
        if self._entering:
            self._enter()
            self._gather()
        # All who wait go on with the last pass.
        patience, self.patience = self.patience, 0
        self._enter()
        while self._waiting:
            assert self._passenger is not None
            self._pass(self._passenger, _NOBODY)
        self.patience = patience
        return self._answered()

    def _answered(self) -> list[Decided]:
        found = []
        for number, batch in list(self._batches.items()):
            if batch.missing:
                break
            found.append(Decided(batch.answers, torch.from_numpy(batch.exits).to(batch.answers.device), self.points))
            del self._batches[number]
        return found

    def _pass(self, images: Tensor, home: NDArray[np.int64]) -> None:
        self._home, self._judge, self._visited = home, Judge(self.policy), set()
        with suppress(Reached):
            logits = self.run(images, self._visit)
            self._leave(self._judge.read(FINAL, logits).answer, self._home, len(self.points) - 1)
        self._passes += 1

    def _visit(self, point: str, tensor: Tensor) -> Tensor:
        """The images that go on; raises `Reached` where there are none."""
        # A stage's module and those inside it return the same tensor: the first one to return it is visited.
        if point not in self.points[:-1] or point in self._visited:
            return tensor
        self._visited.add(point)
        place = self.points.index(point)
        verdict = self._judge.read(point, self.logits_at(point, tensor))
        # The one question to the device.
        leaving = self.policy.lets_go(point, verdict).cpu().numpy()
        here = _Group(tensor, self._home, self._judge, self._passes)
        if leaving.any() or self._home is _NOBODY:
            gone = leaving.nonzero()[0]
            there = torch.from_numpy(gone).to(tensor.device, non_blocking=True)
            self._leave(verdict.answer[there], self._home[gone], place)
            company = here.part((~leaving & (self._home[:, 0] >= 0)).nonzero()[0])
        else:
            company = here
        going = self._next(point, place, company)
        if going is None:
            going = replace(here.part(np.array([0])), home=_NOBODY)
        self._home, self._judge = going.home, going.judge
        return going.tensor

    def _next(self, point: str, place: int, company: _Group) -> _Group | None:
        """Those who go on from an exit that `company` has come to; None if only deeper ones do, whom a passenger leads.

        Raises `Reached` if nobody goes on.
        """
        waiting = [*self._waiting.pop(point, []), *([company] if len(company) else [])]
        count = sum(map(len, waiting))
        if waiting:
            self._waiting[point] = waiting
        if count < self._enough or not count:
            deeper = [groups for other, groups in self._waiting.items() if self.points.index(other) >= place]
            if not any(self._passes - groups[0].since >= self.patience for groups in deeper):
                raise Reached
        if not count:
            return None
        del self._waiting[point]
        going = _Group.joined(waiting)
        # With the last batch all go on, on a CPU: fewer than twice as many as a pass has, and behind its first stage.
        if count > self._full > 0 and (self.patience or company.tensor.device.type != "cpu"):
            self._waiting[point] = [going.part(np.arange(self._full, count))]
            going = going.part(np.arange(self._full))
        return going

    def _leave(self, answers: Tensor, home: NDArray[np.int64], place: int) -> None:
        """Keeps the answers [R, K] to images that leave."""
        numbers = sorted(set(home[:, 0].tolist()))
        for number in numbers:
            if number not in self._batches:
                continue
            if len(numbers) == 1:
                self._batches[number].add(home[:, 1], answers, place)
            else:
                mine = (home[:, 0] == number).nonzero()[0]
                self._batches[number].add(home[mine, 1], answers[torch.from_numpy(mine).to(answers.device)], place)


_NOBODY = np.array([[-1, -1]])
"""The home of a passenger."""


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """`tensor[rows]`, copied row by row where each lies in one piece: that takes half of the time on a CPU."""
    if not (tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))):
        return tensor[rows]
    flat = tensor.as_strided((len(tensor), math.prod(tensor.shape[1:])), (math.prod(tensor.shape[1:]), 1))
    return flat.index_select(0, rows).as_strided((len(rows), *tensor.shape[1:]), tensor.stride())


def _number(images: Tensor, pixels: int) -> int:
    """How many of such images have so many pixels together."""
    return math.ceil(pixels / images[0, 0].numel())


@contextmanager
def visiting(store: Store, visit: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Forward passes inside are visited; afterwards the store is as it was, empty."""
    store.visit, store.open = visit, True
    try:
        yield
    finally:
        store.visit, store.open = None, False
        store.tensors = {}


def reasons(
    backbone: nn.Module, store: Store, stages: Mapping[str, Stage], input_size: Sequence[int]
) -> dict[str, str]:
    """For every exit but `final`, why images cannot leave there, in words; "" where they can.

    A stage has to be a clean cut, and a pass from which images leave has to give the same as a pass of all: models
    remember the size of the batch, or share something between images. The backbone has to be in eval mode.
    """
    exits = list(stages)[:-1]
    why = {
        point: "" if stages[point].clean else f"what follows {stages[point].module} also reads earlier tensors"
        for point in exits
    }
    clean = [point for point in exits if not why[point]]
    parameter = next(backbone.parameters())
    generator = torch.Generator().manual_seed(0)
    # One image leaves at each exit, and two are left at the end.
    images = torch.randn(len(clean) + 2, *input_size, generator=generator).to(parameter)
    with torch.no_grad():
        whole = _pass(backbone, store, images, {})
        if clean and _differs(backbone, store, images, whole, clean):
            why |= {point: _differs(backbone, store, images, whole, [point]) for point in clean}
            # Deep networks with random weights amplify rounding, which depends on the size of a batch: what fails is
            # tried again in double precision, where the model can be run in it.
            copied, kept = copy.deepcopy((backbone, store))
            copied, images = copied.cpu().double(), images.cpu().double()
            with suppress(RuntimeError):
                whole = _pass(copied, kept, images, {})
                why |= {point: _differs(copied, kept, images, whole, [point]) for point in clean if why[point]}
    return why


def _differs(
    backbone: nn.Module, store: Store, images: Tensor, whole: Mapping[str, Tensor], exits: Sequence[str]
) -> str:
    """What is wrong when images leave at each of `exits`, or others join there, in words; "" if nothing is."""
    fewer, more = {}, {}
    for number, point in enumerate(exits):
        left = len(images) - number
        # Now the first of those that are left, now the last but one.
        gone = 0 if number % 2 else left - 2
        fewer[point] = torch.tensor([row for row in range(left) if row != gone], device=images.device)
        more[point] = torch.arange(len(images) + number + 1, device=images.device).flip(0) % (len(images) + number)
    return _differs_with(backbone, store, images, whole, fewer) or _differs_with(backbone, store, images, whole, more)


def _differs_with(
    backbone: nn.Module, store: Store, images: Tensor, whole: Mapping[str, Tensor], keeps: Mapping[str, Tensor]
) -> str:
    try:
        other = _pass(backbone, store, images, keeps)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        return f"what follows relies on the number of images before it ({reason})"
    now = torch.arange(len(images), device=images.device)
    for name, tensor in whole.items():
        if name in keeps:
            now = now[keeps[name]]
        wanted, found = tensor[now], other[name]
        if found.shape != wanted.shape or not _close(found, wanted):
            return "what follows gives other results with fewer or more images"
    return ""


def _pass(backbone: nn.Module, store: Store, images: Tensor, keeps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What every tap and the end of one pass give, in order; `keeps` are the rows that go on at some of the taps."""
    seen: dict[str, Tensor] = {}

    def visit(point: str, tensor: Tensor) -> Tensor:
        # A stage's module and those inside it return the same tensor.
        if point not in seen:
            seen[point] = tensor[keeps[point]] if point in keeps else tensor
        return seen[point]

    with visiting(store, visit):
        output = averaged(backbone(images))
    return seen | {"end": output}


def averaged(output: Tensor | Sequence[Tensor]) -> Tensor:
    """What a backbone returns, as one tensor: distilled models return a prediction per head in training and average
    them in evaluation."""
    return output if isinstance(output, Tensor) else torch.stack(list(output)).mean(dim=0)


def _close(found: Tensor, wanted: Tensor) -> bool:
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float64: 1e-6}.get(wanted.dtype, 1e-4)
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max() + 1e-6)
