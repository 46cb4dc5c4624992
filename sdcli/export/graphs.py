"""Networks as graphs of torch.export: one exit, all exits, or one graph per section.

B batch, K classes
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node

from sdcli.errors import UserError
from sdcli.export.compare import Reader
from sdcli.network.multi_exit import MultiExit
from sdcli.network.routing import visiting
from sdcli.network.stages import tap_modules
from sdcli.network.taps import Store, Tap
from sdcli.recipe.address import FINAL

IMAGES = "images"
EXAMPLE = 2
"""Images of the example batch. With one, torch.export would take the batch for a constant: where it is `fixed`, it
is."""

_BATCH_SIZE = torch.ops.aten.sym_size.int


@dataclass(frozen=True)
class Part:
    """One graph, and the names of what it reads and returns."""

    program: ExportedProgram
    input: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Section(Part):
    """One part of a chain: it ends at an exit, whose logits come first, and passes its tensor on to the next."""

    exit: str
    input_shape: tuple[int, ...]
    """Without the batch."""

    @property
    def passes(self) -> str:
        """The tensor that the next section reads; "" for the last."""
        return self.outputs[1] if len(self.outputs) > 1 else ""


def one_exit(network: MultiExit, point: str, fixed: bool = False) -> Part:
    """A graph that ends at one exit: what is deeper is not in it, nor the heads of other exits."""
    images = _example(network, fixed)
    graph, source, ends = _whole(network, (), fixed)
    cut = _between(graph, source, source, [ends[network.classifiers.index(point)]], point)
    return Part(_traced(cut, images, fixed), IMAGES, (point,))


def all_exits(network: MultiExit, fixed: bool = False) -> Part:
    """One graph with the logits of all exits."""
    program = _traced(_Marked(network, ()), _example(network, fixed), fixed)
    return Part(program, IMAGES, tuple(network.classifiers))


def sections(network: MultiExit, exits: Sequence[str], fixed: bool = False) -> list[Section]:
    """The network cut at `exits`: each section reads what the one before passes on, and nothing else.

    Raises UserError where something else crosses a cut. The batch size does in many models (a reshape of a later stage
    asks the images for it): there it is read from the section's own input instead.
    """
    graph, source, ends = _whole(network, exits, fixed)
    logits = dict(zip(network.classifiers, ends, strict=False))
    marks = dict(zip(exits, ends[len(network.classifiers) :], strict=True))
    start, reads, tensor = source, IMAGES, _example(network, fixed)
    found: list[Section] = []
    for exit in (*exits, FINAL):
        passed = [marks[exit]] if exit in marks else []
        cut = _between(graph, source, start, [logits[exit], *passed], exit)
        outputs = (exit, *(f"after_{exit}" for _ in passed))
        found.append(Section(_traced(cut, tensor, fixed), reads, outputs, exit, tuple(tensor.shape[1:])))
        if passed:
            start, reads = passed[0], outputs[1]
            with torch.no_grad():
                tensor = cut(tensor)[1]
    return found


def chain(outputs: Sequence[Sequence[str]], runs: Sequence[Callable[[Tensor], Sequence[Tensor]]]) -> Reader:
    """Parts that were read back, one after the other: each reads the last output of the one before.

    `outputs` are the names of what each returns. One graph is a chain of one.
    """

    def read(images: Tensor) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        tensor = images
        for names, run in zip(outputs, runs, strict=True):
            found |= zip(names, run(tensor), strict=True)
            tensor = found[names[-1]]
        return found

    return read


class _Marked(nn.Module):
    """Images [B, 3, H, W] to the logits of all exits, and then the tensor that passes each of `exits`.

    Head and rest of the network both read a copy of that tensor: whatever depends on the stage goes through one node.
    """

    def __init__(self, network: MultiExit, exits: Sequence[str]) -> None:
        super().__init__()
        self.network, self.exits = network, tuple(exits)
        self._store = Store()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        marks: dict[str, Tensor] = {}

        def mark(point: str, tensor: Tensor) -> Tensor:
            # A stage's module and those inside it return the same tensor.
            if point not in marks:
                marks[point] = tensor.clone()
                return marks[point]
            return tensor

        stages = self.network.stages
        hooks = [
            # Before the network's own taps, so that its heads read the copy.
            self.network.backbone.get_submodule(path).register_forward_hook(
                Tap(self._store, point, stages[point].tensor), prepend=True
            )
            for point in reversed(self.exits)
            for path in tap_modules(stages[point])
        ]
        try:
            with visiting(self._store, mark):
                signals = self.network(images)
        finally:
            for hook in hooks:
                hook.remove()
        logits = [signals[point].logits for point in self.network.classifiers]
        return (*logits, *(marks[point] for point in self.exits))


def _example(network: MultiExit, fixed: bool) -> Tensor:
    return torch.randn(1 if fixed else EXAMPLE, *network.plan.input_size, generator=torch.Generator().manual_seed(0))


def _traced(module: nn.Module, images: Tensor, fixed: bool) -> ExportedProgram:
    """The module as a graph; raises UserError where torch.export cannot follow it."""
    try:
        shapes = None if fixed else ({0: Dim.DYNAMIC},)
        with warnings.catch_warnings():
            # LeViT keeps its attention biases at its first pass: a copy is traced, and what is written is compared.
            warnings.simplefilter("ignore")
            program = torch.export.export(module.eval(), (images,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises errors of dozens of kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"torch.export cannot follow this network: {reason}",
            "a model whose operations do not depend on the values of its images",
            "--to safetensors, or --to timm for the plain model",
        ) from error
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, GraphModule) else ():
            # Source files of this machine, which a saved graph would name.
            node.meta.pop("stack_trace", None)
    return program


def _whole(network: MultiExit, exits: Sequence[str], fixed: bool) -> tuple[GraphModule, Node, Sequence[Node]]:
    """The graph of `_Marked`, its input, and what it returns."""
    # Decomposed with no table, a graph has no operations in place: what a node gives is what its users read.
    program = _traced(_Marked(network, exits), _example(network, fixed), fixed).run_decompositions({})
    graph = program.module(check_guards=False)
    assert isinstance(graph, GraphModule)
    source = next(node for node in graph.graph.nodes if node.op == "placeholder")
    return graph, source, next(node for node in graph.graph.nodes if node.op == "output").args[0]


def _between(graph: GraphModule, images: Node, start: Node, ends: Sequence[Node], exit: str) -> GraphModule:
    """The part of a graph that leads from `start` to `ends`."""
    needed: set[Node] = set()
    waiting = list(ends)
    while waiting:
        node = waiting.pop()
        if node in needed or node is start or _asks_batch_size(node, images):
            needed.add(node)
            continue
        if node is images:
            raise UserError(
                f"the section that ends at {exit} also reads the images, not only what the section before passes on",
                "exits at clean cuts",
                "--exit all",
            )
        needed.add(node)
        waiting += node.all_input_nodes
    section = Graph()
    inside: dict[Node, Node] = {start: section.placeholder("tensor")}
    for node in graph.graph.nodes:
        if node not in needed or node in inside:
            continue
        if _asks_batch_size(node, images):
            inside[node] = section.call_function(_BATCH_SIZE, (inside[start], 0))
        else:
            inside[node] = section.node_copy(node, lambda other: inside[other])
    section.output(tuple(inside[node] for node in ends))
    return GraphModule(graph, section)


def _asks_batch_size(node: Node, images: Node) -> bool:
    return node.op == "call_function" and node.target == _BATCH_SIZE and node.args == (images, 0)
