"""Program → Program in which equal activations are one node.

torch.export leaves nodes that only serve its own checks, or that do nothing for the captured dtypes and shapes. They
stand between an activation and the linears that read it, which would then seem to read different values. Removed are

1. assertions on metadata and sizes,
2. copies, casts, reshapes, expands and slices whose result is in all respects what they were given,
3. dropout in eval mode,
4. what is left without a user.

No rule changes a number. Devices named in the graph (`arange(device=…)`) become the device that will run it.
"""

from typing import Any

import torch
from torch import fx

from gptq_ao.errors import PassError
from gptq_ao.passes.products.operators import (
    ASSERTIONS,
    CASTS,
    COPIES,
    DATA_ASSERTIONS,
    DROPOUTS,
    RESHAPES,
    RESIZES,
    op_name,
)
from gptq_ao.passes.records import Program
from gptq_ao.passes.tracing.graph_module import graph_module

__all__ = ["canonicalize"]

_PERHAPS_NOTHING = COPIES | CASTS | RESHAPES | RESIZES


def canonicalize(program: Program, device: torch.device | None = None) -> Program:
    """A new Program; the given one is unchanged.

    Args:
        device: where the graph will run, if not where the model is.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if _asserts(node) and not node.users:
            continue
        if _does_nothing(node):
            # All that read this node will read its input.
            copies[node] = copies[node.args[0]]
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].name = node.name
    # Backwards, so that what served only a removed node goes as well.
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    if device is not None:
        for node in graph.nodes:
            node.args, node.kwargs = fx.node.map_aggregate(
                (node.args, node.kwargs), lambda a: device if isinstance(a, torch.device) else a
            )
    graph.lint()
    result = Program(**{**vars(program), "module": graph_module(program.module, graph)})
    _check(program, result)
    return result


def _asserts(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node) in ASSERTIONS | DATA_ASSERTIONS


def _does_nothing(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if op_name(node) in DROPOUTS:
        return bool(node.args[2] is False or node.args[1] == 0)
    if op_name(node) not in _PERHAPS_NOTHING:
        return False
    x, y = node.args[0].meta.get("val"), node.meta.get("val")
    return isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and _kind(x) == _kind(y)


def _kind(x: torch.Tensor) -> tuple[Any, ...]:
    """All of a tensor but its numbers. How they lie in memory matters to a later view."""
    sizes = [_expression(s) for s in x.shape]
    strides = x.stride() if x.layout is torch.strided else sizes
    # An axis of size 1 is never stepped along, so its stride may be anything.
    strides = [_expression(s) for s, size in zip(strides, sizes, strict=True) if size != 1]
    return x.dtype, x.device, x.layout, sizes, strides


def _expression(size: int | torch.SymInt) -> Any:
    return size if isinstance(size, int) else size.node.expr


def _check(before: Program, after: Program) -> None:
    """The inputs are those of `before`; no node that `canonicalize` exists to remove is left."""
    names = [[n.name for n in p.graph.find_nodes(op="placeholder")] for p in (before, after)]
    if names[0] != names[1]:
        raise PassError(f"canonicalize changed the inputs of the graph: {set(names[0]) ^ set(names[1])}")
    left = next((n.name for n in after.graph.nodes if _does_nothing(n) or _asserts(n)), None)
    if left is not None:
        raise PassError(f"canonicalize left node {left}, which does nothing")
