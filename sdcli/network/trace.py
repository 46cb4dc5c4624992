"""Records one forward pass: what each module returned, what each tensor was computed from, and the cost up to there.

On the meta device this needs neither memory nor arithmetic.

B batch, C channels
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default


def count(module: nn.Module, *inputs: Tensor) -> tuple[int, int]:
    """The parameters of `module`, and the multiply-adds (MACs) of one call with `inputs`."""
    record = record_forward(module, inputs)
    return sum(parameter.numel() for parameter in module.parameters()), record.macs


@dataclass
class Call:
    """One call of a module: its inputs and outputs, as nodes of the dataflow graph."""

    path: str
    inputs: list[int]
    outputs: list[tuple[int | None, int]] = field(default_factory=list)
    """(index in the returned tuple, node), in order; the index is None for a single tensor."""
    params: int = 0
    macs: int = 0

    @property
    def depth(self) -> int:
        return self.path.count(".")


@dataclass
class _Operation:
    name: str
    args: tuple[Any, ...]
    sources: list[int]
    """Nodes of the tensor arguments, in order."""
    results: list[int]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Builds the dataflow graph of a forward pass and counts its multiply-adds.

    A node is one value of one tensor: an in-place write creates a new node for each tensor that shares the memory, and
    a view is a node that depends on its base. Nodes are numbered as they appear, so the order is topological.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0
        self.params = 0
        self.values: list[Tensor] = []  # by node; also keeps every tensor alive, so that no id is used twice
        self.sources: list[list[int]] = []
        self.rewritten: set[int] = set()
        self.operations: list[_Operation] = []
        self._node_of: dict[int, int] = {}
        self._sharing: dict[int, list[Tensor]] = {}

    def node(self, tensor: Tensor) -> int:
        """The node of a tensor's current value."""
        if id(tensor) not in self._node_of:
            self._add(tensor, [])
            if isinstance(tensor, nn.Parameter):
                self.params += tensor.numel()
        return self._node_of[id(tensor)]

    def _add(self, tensor: Tensor, sources: list[int]) -> int:
        node = len(self.values)
        self.values.append(tensor)
        self.sources.append(sources)
        if id(tensor) in self._node_of:
            self.rewritten.add(self._node_of[id(tensor)])
        else:
            self._sharing.setdefault(_memory(tensor), []).append(tensor)
        self._node_of[id(tensor)] = node
        return node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry and func is not torch.ops.prim.device.default:
            with self:
                result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        if func is _BATCH_NORM and args[0].device.type == "meta":
            # torch works through the arithmetic for the shape, which takes long.
            result = (torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0))
        else:
            result = func(*args, **kwargs)
        if packet in flop_registry:
            self.macs += int(flop_registry[packet](*args, **kwargs, out_val=result)) // 2

        sources = [self.node(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = _written(func, args, kwargs)
        changed = {id(tensor): tensor for target in written for tensor in self._sharing[_memory(target)]}
        for tensor in changed.values():
            self._add(tensor, [self._node_of[id(tensor)], *sources])
        results = []
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                results.append(self._node_of[id(leaf)] if id(leaf) in self._node_of else self._add(leaf, sources))
        self.operations.append(_Operation(packet.__name__, args, sources, results))
        return result


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation changes in place."""
    written: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return written


@dataclass
class Record:
    calls: list[Call]
    graph: Recorder
    inputs: list[int]
    outputs: list[int]
    macs: int


def record_forward(module: nn.Module, inputs: Sequence[Tensor]) -> Record:
    """Records one forward pass in eval mode without gradients; leaves `module` unchanged."""
    graph = Recorder()
    calls: list[Call] = []
    stack: list[Call] = []
    hooks: list[Any] = []

    def entered(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = [graph.node(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            stack.append(Call(path, given))

        return hook

    def returned(module: nn.Module, args: Any, output: Any) -> None:
        call = stack.pop()
        if isinstance(output, Tensor):
            call.outputs = [(None, graph.node(output))]
        elif isinstance(output, (tuple, list)):
            call.outputs = [
                (index, graph.node(entry)) for index, entry in enumerate(output) if isinstance(entry, Tensor)
            ]
        call.params, call.macs = graph.params, graph.macs
        calls.append(call)

    training = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        for path, part in module.named_modules():
            hooks.append(part.register_forward_pre_hook(entered(path), with_kwargs=True))
            hooks.append(part.register_forward_hook(returned))
        # As plain matrix products, attention has the same count on all devices and in every version of torch.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), graph:
            given = [graph.node(tensor) for tensor in inputs]
            output = module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for part, flag in training:
            part.training = flag
    outputs = [graph.node(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return Record(calls, graph, given, outputs, graph.macs)


def reaching(sources: list[list[int]], targets: Iterable[int]) -> set[int]:
    """The nodes from which one of `targets` can be reached, including the targets."""
    found = set(targets)
    for node in range(len(sources) - 1, -1, -1):
        if node in found:
            found.update(sources[node])
    return found


def clean_cuts(record: Record) -> set[int]:
    """The nodes that lie on every path from the input to the logits.

    Of the nodes on any such path, in topological order, these are exactly the ones that no edge jumps over.
    """
    sources = record.graph.sources
    fed = set(record.inputs)
    for node, before in enumerate(sources):
        if not fed.isdisjoint(before):
            fed.add(node)
    path = sorted(fed & reaching(sources, record.outputs))
    cuts, reach = set(), -1
    furthest = {node: node for node in path}
    for node in path:
        for source in sources[node]:
            if source in furthest:
                furthest[source] = max(furthest[source], node)
    for node in path:
        if reach <= node:
            cuts.add(node)
        reach = max(reach, furthest[node])
    return cuts


_AXIS_1 = ("convolution", "batch_norm", "native_group_norm", "max_pool2d", "avg_pool2d", "upsample", "grid_sampler")

RESHAPES = ("view", "_unsafe_view", "squeeze", "alias")

_LAST_AXIS = ("native_layer_norm", "_fused_rms_norm", "mm", "addmm")


def channel_axes(graph: Recorder) -> dict[int, int]:
    """The channel axis of each node for which the following operations show it.

    Convolutions, batch norms and poolings have their channels in axis 1, layer norms and linear layers in the last
    axis; through permutations, views and elementwise operations the axis is traced back. If several operations show an
    axis, the earliest one decides.
    """
    axes: dict[int, int] = {}
    for operation in reversed(graph.operations):
        for source in operation.sources:
            axis = _axis_of(operation, source, graph.values, axes)
            if axis is not None:
                axes[source] = axis
    return axes


def _axis_of(operation: _Operation, source: int, values: list[Tensor], axes: dict[int, int]) -> int | None:
    """The axis of `source` that this operation treats as channels, given the known axes of its results."""
    name, args, before = operation.name, operation.args, values[source].shape
    if len(before) < 2 or not operation.results:
        return None
    if any(part in name for part in _AXIS_1):
        return 1 if source == operation.sources[0] else None
    if name in _LAST_AXIS:
        return len(before) - 1
    if name == "mean" and len(before) == 4 and len(args) > 1:
        # Global pooling: the axis that is left beside the batch holds the channels.
        left = {1, 2, 3} - {int(dim) % 4 for dim in args[1] or ()}
        return left.pop() if len(left) == 1 else None
    after, axis = values[operation.results[0]].shape, axes.get(operation.results[0])
    if axis is None:
        return None
    if name == "permute":
        return int(args[1][axis]) % len(before)
    if name == "transpose":
        first, second = int(args[1]) % len(before), int(args[2]) % len(before)
        return {first: second, second: first}.get(axis, axis)
    if name == "t":
        return 1 - axis
    if "view" in name:
        if axis == len(after) - 1 and before[-1] == after[-1]:
            return len(before) - 1
        return axis if before[: axis + 1] == after[: axis + 1] else None
    if name in ("bmm", "baddbmm", "expand", "unsqueeze", "select"):
        return None
    return axis if len(before) == len(after) else None


def calls_by_path(calls: Iterable[Call]) -> dict[str, list[Call]]:
    grouped: dict[str, list[Call]] = {}
    for call in calls:
        grouped.setdefault(call.path, []).append(call)
    return grouped
