"""Program → Program in which equal activations are one node.

torch.export leaves nodes that only serve its own checks, or that do nothing for the captured dtypes and shapes. They
stand between an activation and the linears that read it, which would then seem to read different values. Removed are

1. assertions on metadata and sizes,
2. casts to the dtype and device a value already has; alias, detach, dropout in eval mode,
3. views, expands and slices to the shape a value already has,
4. what is left without a user.

No rule changes a number. Devices named in the graph (`arange(device=…)`) become the device that will run it.
"""

from typing import Any

import torch
from torch import fx

from gptq_ao.errors import PassError
from gptq_ao.passes.records import Program

__all__ = ["canonicalize"]

aten = torch.ops.aten

_ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten._assert_async.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
    torch._check,
}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default}
_ALIASES = {aten.alias.default, aten.detach.default, aten.lift_fresh.default, aten.lift_fresh_copy.default}
_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default, aten.slice.Tensor}


def canonicalize(program: Program, device: torch.device | None = None) -> Program:
    """A new Program; the given one is unchanged.

    Args:
        device: where the graph will run, if not where the model is.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in _ASSERTIONS and not node.users:
            continue
        if _does_nothing(node):
            copies[node] = copies[node.args[0]]
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].name = node.name
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    if device is not None:
        for node in graph.nodes:
            node.args, node.kwargs = fx.node.map_aggregate(
                (node.args, node.kwargs), lambda a: device if isinstance(a, torch.device) else a
            )
    graph.lint()
    result = Program(**{**vars(program), "module": fx.GraphModule(program.module, graph)})
    _check(program, result)
    return result


def _does_nothing(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    x, y = node.args[0].meta.get("val"), node.meta.get("val")
    if node.target in _DROPOUTS:
        return bool(node.args[2] is False or node.args[1] == 0)
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return False
    if node.target in _ALIASES:
        return True
    if node.target in _CASTS:
        return bool(x.dtype == y.dtype and x.device == y.device and x.layout == y.layout)
    if node.target is aten.contiguous.default:
        return x.is_contiguous()
    return node.target in _VIEWS and [_expression(s) for s in x.shape] == [_expression(s) for s in y.shape]


def _expression(size: int | torch.SymInt) -> Any:
    return size if isinstance(size, int) else size.node.expr


def _check(before: Program, after: Program) -> None:
    """The inputs are those of `before`; no node that `canonicalize` exists to remove is left."""
    names = [[n.name for n in p.graph.find_nodes(op="placeholder")] for p in (before, after)]
    if names[0] != names[1]:
        raise PassError(f"canonicalize changed the inputs of the graph: {set(names[0]) ^ set(names[1])}")
    left = next((n.name for n in after.graph.nodes if _does_nothing(n) or n.target in _ASSERTIONS), None)
    if left is not None:
        raise PassError(f"canonicalize left node {left}, which does nothing")
