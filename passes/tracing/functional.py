"""Graph → graph in which no node writes to its inputs, without tracing again (which takes three times an export).

1. Bodies of higher-order operators that only set a mode (gradients, checkpointing, autocast that is off) are inlined.
2. `x.add_(y)` becomes `add(x, y)`, which every later use of x reads; a write to a slice of x becomes a new x in which
   that slice is replaced. Both need that no other view of x's memory is read afterwards.

What is written to an input or a buffer stays inside the graph: a calibration batch does not change the model.
"""

import operator
import re
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload

from gptq_ao.passes.tracing.layer_calls import LAYER

__all__ = ["make_functional"]

aten = torch.ops.aten

# Operators whose result is a part of their first argument → what gives that argument with the part replaced.
_PARTS: dict[Any, OpOverload] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


def make_functional(module: fx.GraphModule) -> bool:
    """In place. False if there is more to do, for which `ExportedProgram.run_decompositions({})` has to trace again: a
    write that has no counterpart or needs real alias analysis, autocast, a body that computes something."""
    _inline_modes(module)
    bodies = any(isinstance(n.target, HigherOrderOperator) and n.target is not LAYER for n in module.graph.nodes)
    return not bodies and _replace_writes(module.graph)


def _inline_modes(module: fx.GraphModule) -> None:
    graph = module.graph
    # Until there are none: an inlined body may contain further calls.
    while calls := [n for n in graph.nodes if _body(n) is not None]:
        for node in calls:
            # Only now: what an earlier call returned has been replaced among the arguments.
            name, arguments = _body(node)  # type: ignore[misc]
            inner = getattr(module, name).graph
            values = dict(zip(inner.find_nodes(op="placeholder"), arguments, strict=True))
            with graph.inserting_before(node):
                # The body's own bodies are attributes of the body.
                for attribute in inner.find_nodes(op="get_attr"):
                    setattr(module, f"{name}_{attribute.target}", getattr(getattr(module, name), attribute.target))
                    values[attribute] = graph.get_attr(f"{name}_{attribute.target}")
                results = graph.graph_copy(inner, values)
            # Several results come as a tuple. The `getitem` nodes that take it apart are replaced by the results.
            for user in list(node.users):
                if user.target is operator.getitem and not isinstance(results, fx.Node):
                    user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
                    graph.erase_node(user)
            if isinstance(results, fx.Node):
                node.replace_all_uses_with(results)
            graph.erase_node(node)
    # The bodies, which nothing calls any more.
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)
    graph.lint()


def _body(node: fx.Node) -> tuple[str, tuple[Any, ...]] | None:
    """The attribute that holds what a mode-setting node runs, and the arguments for it; None for all other nodes."""
    if not isinstance(node.target, HigherOrderOperator):
        return None
    name, arguments = node.target.name(), node.args
    if name == "wrap_with_set_grad_enabled":  # enabled, body, …
        rest = arguments[1:]
    elif name == "wrap_with_autocast" and arguments[2] is False:  # device, dtype, enabled, cache, body, …
        rest = arguments[4:]
    elif name == "tag_activation_checkpoint":  # body, …
        rest = arguments
    else:
        return None
    return str(rest[0].target), tuple(rest[1:])  # type: ignore[union-attr]


def _replace_writes(graph: fx.Graph) -> bool:
    """In place; False, and nothing is changed, if some write cannot be replaced."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    owner: dict[fx.Node, fx.Node] = {}  # what a write returns is the tensor it wrote to
    sharing: dict[Any, list[fx.Node]] = {}
    chains: dict[fx.Node, list[fx.Node]] = {}
    # First only look. A write may be replaced if from then on its memory is read through names that are known here: the
    # tensor that was written to, and the wholes that it is a part of. They become new values below; any other view of
    # the memory would still show the old ones.
    for node in graph.nodes:
        owner[node] = node
        if _writes(node):
            if _out_of_place(node) is None:
                return False
            chain = [owner[node.args[0]]]  # the tensor, what it is a part of, and so on
            while chain[-1].target in _PARTS:
                chain.append(owner[chain[-1].args[0]])  # type: ignore[index]
            owner[node], chains[node] = chain[0], chain
            # Further names of this memory, which would go on to show the old values.
            others = [n for n in sharing.get(_memory(chain[0]), ()) if owner[n] not in chain]
            if any(order[user] > order[node] for n in others for user in n.users):
                return False
        sharing.setdefault(_memory(node), []).append(node)

    now: dict[fx.Node, fx.Node] = {}  # tensor → what it is after the last write
    for node in list(graph.nodes):
        # Whoever read the tensor after a write now reads the value that took its place.
        node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: now.get(owner[n], n))
        if node in chains:
            part, *wholes = chains[node]
            with graph.inserting_before(node):
                now[part] = _written(graph, node)
                for whole in wholes:  # the part is written: so is what contains it, outwards
                    before = now.get(whole, whole)
                    now[whole] = graph.call_function(
                        _PARTS[part.target], (before, now[part], *part.args[1:]), part.kwargs
                    )
                    # It belongs to where the write is, not to where the whole comes from.
                    now[whole].meta.update({**node.meta, "val": whole.meta["val"]})
                    part = whole
    for node in reversed(chains):
        graph.erase_node(node)
    graph.lint()
    return True


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _memory(node: fx.Node) -> Any:
    """Equal for nodes that are views of one another."""
    value = node.meta.get("val")
    # What is not a tensor shares memory only with itself.
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else node


def _out_of_place(node: fx.Node) -> OpOverload | None:
    """`add` for `add_`, `__or__` for `__ior__`; None if there is none, or if the operator writes to anything but its
    first argument."""
    target, first = node.target, node.args[0] if node.args else None
    assert isinstance(target, OpOverload)
    written = [a.alias_info is not None and a.alias_info.is_write for a in target._schema.arguments]
    if written != [True] + [False] * (len(written) - 1) or not isinstance(first, fx.Node):
        return None
    name = re.sub(r"^__i(?=\w+__$)", "__", target._schema.name.removeprefix("aten::"))
    packet = getattr(aten, name if name.endswith("__") else name.removesuffix("_"), None)
    found = getattr(packet, target._overloadname, None)
    usable = found is not None and not found._schema.is_mutable
    same = node.meta["val"].shape == first.meta["val"].shape  # unsqueeze_ and the like do not write to memory
    return found if usable and same else None


def _written(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The value that a write leaves in its first argument. `add_` keeps the dtype of that argument; `add` may promote,
    and then a cast brings it back."""
    target, kept = _out_of_place(node), node.meta["val"]
    assert target is not None
    value = graph.call_function(target, node.args, node.kwargs)
    value.meta.update(node.meta)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    # On fake tensors: only the dtype is of interest.
    with kept.fake_mode, enable_python_dispatcher(), torch.no_grad():
        promoted = target(*args, **kwargs)
    if promoted.dtype == kept.dtype:
        return value
    value.meta["val"] = promoted
    cast = graph.call_function(aten.to.dtype, (value, kept.dtype))
    cast.meta.update(node.meta)
    return cast
