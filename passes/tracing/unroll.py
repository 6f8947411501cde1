"""A graph in which single nodes stand for layers (`layer_calls.py`) → the graph of all layers.

Copies share the fake tensors of the nodes that they are copies of: `make_functional`, to which it matters what shares
memory with what, comes first.
"""

import operator
from collections.abc import Iterable
from typing import Any

from torch import fx

from gptq_ao.passes.products.operators import ASSERTIONS, op_name
from gptq_ao.passes.tracing.layer_calls import LAYER, NUMBER, is_size

__all__ = ["NotRepeatableError", "unroll"]


class NotRepeatableError(Exception):
    """Something outside of a layer takes part in it, or reads what is inside of it."""


def unroll(graph: fx.Graph, constants: Iterable[str] = ()) -> None:
    """In place.

    Args:
        constants: names of the placeholders that hold constants.

    Raises:
        NotRepeatableError: then the graph is left unfinished.
    """
    bodies: dict[Any, list[fx.Node]] = {}
    calls = [n for n in graph.nodes if n.target is LAYER]
    for node in graph.nodes:
        # A placeholder has it from what it stands for: a constant of the layer.
        if NUMBER in node.meta and node.op != "placeholder":
            bodies.setdefault(node.meta[NUMBER], []).append(node)
    ends = {n.args[1]: n for n in calls if n.args[0] == "traced"}
    for number, end in ends.items():
        _check(bodies.get(number, []), end, set(constants))
    for call in calls:
        if call.args[0] == "repeat":
            _copy_in_place_of(call, bodies.get(call.args[1], []), ends[call.args[1]])
    for end in ends.values():
        graph.erase_node(end)
    for node in graph.nodes:
        node.meta.pop(NUMBER, None)
    graph.lint()


def _check(body: list[fx.Node], end: fx.Node, constants: set[str]) -> None:
    arguments: Any = end.args
    _, _, inputs, weights, outputs = arguments
    inside, returned = set(body), set(outputs)
    known = {*inputs, *weights}
    for node in body:
        if is_size(node):
            continue
        for i in node.all_input_nodes:
            if not (i in inside or i in known or is_size(i) or i.op == "get_attr" or i.name in constants):
                raise NotRepeatableError(f"{i.name}, which is neither an input nor a weight, is read by {node.name}")
        if node not in returned:
            # torch.export adds assertions afterwards. They only serve its own checks.
            others = (u for u in node.users if u not in inside and u is not end)
            reader = next((u for u in others if not is_size(u) and op_name(u) not in ASSERTIONS), None)
            if reader is not None:
                raise NotRepeatableError(f"{reader.name} reads {node.name}, which the layer does not return")


def _copy_in_place_of(call: fx.Node, body: list[fx.Node], end: fx.Node) -> None:
    graph = call.graph
    arguments: Any = (*end.args, *call.args)
    _, _, inputs, weights, outputs, _, _, own_inputs, own_weights = arguments
    now: dict[fx.Node, fx.Node] = {}
    for here, there in zip((*inputs, *weights), (*own_inputs, *own_weights), strict=True):
        if now.setdefault(here, there) is not there:
            raise NotRepeatableError(f"{here.name} is one tensor in one layer, and two in another")
    with graph.inserting_before(call):
        for node in body:
            if not is_size(node):  # those are the same in all layers
                now[node] = graph.node_copy(node, lambda n: now.get(n, n))
                now[node].meta = {"val": node.meta.get("val")}
    made = [o for o in outputs if o not in (*inputs, *weights)]
    users: list[Any] = list(call.users)
    for user in users:
        if user.target is not operator.getitem:
            raise NotRepeatableError(f"{user.name} reads all outputs of a layer at once")
        user.replace_all_uses_with(now[made[user.args[1]]])
        graph.erase_node(user)
    graph.erase_node(call)
