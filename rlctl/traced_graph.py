"""What is made of a recorded loss (`rlctl.traced`) before it runs: fewer operations, and two sides at a time.

All of it keeps the bits: operations are left out, computed once for all calls, or run beside others, never changed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten

_NAMED = (aten.scalar_tensor.default, aten.full.default, aten.ones.default, aten.zeros.default)
"""Operations that make a constant of numbers alone."""


def simplify(traced: GraphModule) -> None:
    """Take out operations that give their argument back or do not depend on any input, of which a backward pass has
    many; values stay as they are. Where memory is written to that has other readers, next to nothing is taken out."""
    graph = traced.graph
    plain = _in_order_of_data(graph)
    for node in list(graph.nodes):
        same = None
        power = plain and node.target is aten.pow.Tensor_Scalar
        if node.target is aten.detach.default or (power and _first_power(node)):
            same = node.args[0]
        elif node.target is aten.t.default and node.args[0].target is aten.t.default:
            same = node.args[0].args[0]
        if same is not None:
            node.replace_all_uses_with(same)
    graph.eliminate_dead_code()
    if _in_order_of_data(graph):
        _fold(traced)
    traced.recompile()


def side_by_side(traced: GraphModule, gradients: int) -> nn.Module:
    """A program that computes what `traced` does, parts that share nothing at the same time; `traced` if it has none.

    Actor and critic without common layers are the case in point. The last `gradients` outputs tell the parts: two of
    them belong together if any operation serves both. Outputs that need several parts are computed behind them.
    """
    graph = traced.graph
    outputs: list[Node] = list(_output(graph).args[0])  # type: ignore[arg-type]
    if not _in_order_of_data(graph):
        return traced
    parts: list[set[Node]] = []
    for output in outputs[-gradients:]:
        part = _needed([output])
        if not part:
            continue  # a constant
        for other in [p for p in parts if p & part]:
            parts.remove(other)
            part |= other
        parts.append(part)
    if len(parts) < 2:
        return traced
    parts.sort(key=len)
    aside, here = parts[-2], set[Node]().union(*parts[:-2], parts[-1])
    behind = _needed(outputs) - aside - here
    read = {x for n in behind for x in n.all_input_nodes} | set(outputs)
    ends = [[n for n in graph.nodes if n in read and n in part] for part in (here, aside)]
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    return _SideBySide(
        _program(traced, inputs, here, ends[0]),
        _program(traced, inputs, aside, ends[1]),
        _program(traced, [*inputs, *ends[0], *ends[1]], behind, outputs),
    )


class _SideBySide(nn.Module):
    """`here` and, in another thread, `aside`, both of the same inputs; `behind` takes those and what the two give."""

    def __init__(self, here: nn.Module, aside: nn.Module, behind: nn.Module) -> None:
        super().__init__()
        self.here, self.aside, self.behind = here, aside, behind

    def forward(self, *inputs: Tensor) -> Any:
        """The outputs of the whole."""
        other = torch.jit.fork(self.aside, *inputs)  # type: ignore[no-untyped-call]
        mine = self.here(*inputs)
        return self.behind(*inputs, *mine, *torch.jit.wait(other))  # type: ignore[no-untyped-call]


def _program(traced: GraphModule, inputs: Sequence[Node], nodes: set[Node], outputs: Sequence[Node]) -> GraphModule:
    """The operations `nodes` of `traced` as a program of their own, in their order."""
    graph = Graph()
    twins = {n: graph.placeholder(f"x{k}") for k, n in enumerate(inputs)}
    for n in traced.graph.nodes:
        if n.op == "get_attr" or (n in nodes and n not in twins):
            twins[n] = graph.node_copy(n, twins.__getitem__)
    graph.output(tuple(twins[n] for n in outputs))
    graph.eliminate_dead_code()
    return GraphModule(traced, graph)


def _fold(traced: GraphModule) -> None:
    """Compute once what no input and no parameter has a part in."""
    graph = traced.graph
    values: dict[Node, Tensor] = {}
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or _writes(node):
            continue
        if node.target is aten.ones_like.default and node.args[0].meta["tensor_meta"].shape == ():
            # where every backward pass begins; it looks at its argument for no more than the kind
            values[node] = torch.ones((), dtype=node.meta["tensor_meta"].dtype)
        elif node.target in _NAMED or (node.all_input_nodes and all(n in values for n in node.all_input_nodes)):
            args, named = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            value = node.target(*args, **named)
            if isinstance(value, Tensor):
                values[node] = value
    # not what is written to later on, by itself or as the base of a view
    for node in reversed(list(values)):
        if any(user not in values and _shares(user) for user in node.users):
            del values[node]
    for k, (node, value) in enumerate(values.items()):
        name = f"_folded{k}"
        traced.register_buffer(name, value)
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.get_attr(name))
    graph.eliminate_dead_code()


def _needed(ends: Iterable[Node]) -> set[Node]:
    """The operations behind `ends`, themselves included."""
    found: set[Node] = set()
    waiting = [n for n in ends if _is_call(n)]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [n for n in node.all_input_nodes if _is_call(n)]
    return found


def _output(graph: Graph) -> Node:
    return next(n for n in reversed(graph.nodes) if n.op == "output")


def _is_call(node: Node) -> bool:
    return node.op == "call_function"


def _writes(node: Node) -> bool:
    """Whether the operation changes an argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _in_order_of_data(graph: Graph) -> bool:
    """Whether what an operation needs is all that has to come before it.

    So it is where those that write do so to a result of their own, that nothing else reads: an activation in place. A
    write to a view, an input or a parameter reaches readers that no edge of the graph tells of.
    """
    return all(_is_own(x) for n in graph.nodes if _is_call(n) and _writes(n) for x in _written(n))


def _is_own(x: Any) -> bool:
    return isinstance(x, Node) and _is_call(x) and len(x.users) == 1 and (_writes(x) or not _shares(x))


def _written(node: Node) -> list[Any]:
    """The arguments that an operation writes to."""
    assert isinstance(node.target, torch._ops.OpOverload)
    named = {a.name: a for a in node.target._schema.arguments}
    given = dict(zip(named, node.args, strict=False)) | node.kwargs
    return [x for name, x in given.items() if (alias := named[name].alias_info) is not None and alias.is_write]


def _first_power(node: Node) -> bool:
    """Whether a power has the exponent 1 and leaves the kind of number alone."""
    base: Any = node.args[0]
    kinds = [n.meta["tensor_meta"].dtype if "tensor_meta" in n.meta else None for n in (base, node)]
    return bool(node.args[1] == 1) and kinds[0] is not None and kinds[0] == kinds[1]


def _shares(node: Node) -> bool:
    """Whether the operation changes an argument, or gives a view of one."""
    if node.target is operator.getitem or not isinstance(node.target, torch._ops.OpOverload):
        return True
    return _writes(node) or any(x.alias_info is not None for x in node.target._schema.returns)
