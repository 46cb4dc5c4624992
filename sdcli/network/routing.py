"""Early exit inside a batch: every image leaves at the first exit that is sure, and only the others go on.

B images of the batch, R images that are left, K classes
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from sdcli.network.policies import Decided, Judge, Policy
from sdcli.network.stages import Stage
from sdcli.network.taps import Reached, Store
from sdcli.recipe.address import FINAL


class Router:
    """Visits the taps of one forward pass, takes the images out that leave, and keeps their answers."""

    def __init__(self, policy: Policy, logits_at: Callable[[str, Tensor], Tensor], num_images: int) -> None:
        """`logits_at` turns a point and its tensor into the logits of its head."""
        self.policy, self.logits_at = policy, logits_at
        self.points = (*policy.exits, FINAL)
        self.judge = Judge(policy)
        self.num_images = num_images
        self.rows: Tensor | None = None
        """The images that are left [R], as indices into the batch; None: all of them."""
        self.left: list[tuple[Tensor | None, Tensor, int]] = []
        """(images, their answers, place of the exit) of those that have left, in order."""
        self._visited: set[str] = set()

    def visit(self, point: str, tensor: Tensor) -> Tensor:
        """The images that go on; raises `Reached` where there are none."""
        # A stage's module and those inside it return the same tensor: the first one to return it is visited.
        if point not in self.points[:-1] or point in self._visited:
            return tensor
        self._visited.add(point)
        verdict = self.judge.read(point, self.logits_at(point, tensor))
        leaving = self.policy.lets_go(point, verdict)
        # Those that stay first, in order, so that the device is asked only for their number.
        order = leaving.to(torch.uint8).argsort(stable=True)
        staying = len(tensor) - int(leaving.sum())
        if staying == len(tensor):
            return tensor
        place = self.points.index(point)
        if staying == 0:
            self.left.append((self.rows, verdict.answer, place))
            raise Reached
        going, gone = order[:staying], order[staying:]
        self.left.append((gone if self.rows is None else self.rows[gone], verdict.answer[gone], place))
        self.rows = going if self.rows is None else self.rows[going]
        self.judge.keep(going)
        return tensor[going]

    def finish(self, logits: Tensor) -> None:
        """The images that have reached the end are answered with the final logits [R, K]."""
        self.left.append((self.rows, self.judge.read(FINAL, logits).answer, len(self.points) - 1))

    def decided(self) -> Decided:
        """The answers of all images, in the order of the batch."""
        rows, first, place = self.left[0]
        if rows is None:
            exits = torch.full((self.num_images,), place, device=first.device)
            return Decided(first, exits, self.points)
        answers = first.new_empty(self.num_images, first.shape[1])
        exits = torch.empty(self.num_images, dtype=torch.long, device=first.device)
        for rows, answer, place in self.left:
            assert rows is not None
            answers[rows] = answer
            exits[rows] = place
        return Decided(answers, exits, self.points)


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
    """What is wrong when one image leaves at each of `exits`, in words; "" if nothing is."""
    keeps, left = {}, len(images)
    for number, point in enumerate(exits):
        # Now the first of those that are left, now the last but one.
        gone = 0 if number % 2 else left - 2
        keeps[point] = torch.tensor([row for row in range(left) if row != gone], device=images.device)
        left -= 1
    try:
        fewer = _pass(backbone, store, images, keeps)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        return f"what follows relies on the number of images before it ({reason})"
    now = torch.arange(len(images), device=images.device)
    for name, tensor in whole.items():
        if name in keeps:
            now = now[keeps[name]]
        wanted, found = tensor[now], fewer[name]
        if found.shape != wanted.shape or not _close(found, wanted):
            return "what follows gives other results when some of the images have left"
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
