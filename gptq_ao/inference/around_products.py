"""The pass that gives what is computed between products with quantized weights to kernels which know of each other."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from gptq_ao.inference import patterns
from gptq_ao.kernels import cuda_decoding, decoding, ops

__all__ = ["around_products"]

Runs = Callable[[Tensor], bool]


def around_products(graph: Graph, runs: Runs = cuda_decoding.runs) -> dict[str, int]:
    """Change a graph of ATen operators without gradients, in place. Of products with quantized weights and few rows:

    - an RMS norm, or activation(gate)·x, whose result is multiplied becomes one operator;
    - where something of its shape is added to a product, and to that only, the product's kernel adds it.

    Results differ by roundings that are left out: what came between was rounded to the dtype of x.

    Args:
        runs: whether there are kernels for x, of which only the shape, dtype and device are looked at. Sizes that are
            not known when the graph is compiled are never few.

    Returns:
        How many of each kind were changed.
    """
    products = [n for n in graph.find_nodes(op="call_function", target=ops.linear) if _few(n.args[0], runs)]
    changed = {"norms": 0, "gates": 0, "sums": 0}
    for x in dict.fromkeys(product.args[0] for product in products):
        gate, norm = patterns.gate(x), patterns.rms_norm(x)
        if gate is not None and _alike(x, gate.x, gate.gate):
            _replace(graph, x, decoding.gated, (gate.gate, gate.x, gate.activation))
            changed["gates"] += 1
        elif norm is not None and _alike(x, norm.x):
            _replace(graph, x, decoding.rms_norm, (norm.x, norm.weight, norm.eps, norm.offset))
            changed["norms"] += 1
    for product in products:
        place, residual = patterns.added(product) or (None, None)
        if place is not None:
            bias = product.args[9] if len(product.args) > 9 else None
            _replace(graph, place, decoding.linear_add, (*product.args[:9], bias, residual))
            changed["sums"] += 1
    graph.eliminate_dead_code()
    return changed


def _few(x: Any, runs: Runs) -> bool:
    value = x.meta["val"]
    return all(isinstance(size, int) for size in value.shape) and runs(value)


def _alike(x: Node, *others: Node) -> bool:
    """Whether they are of one shape and dtype: between them numbers may have had another."""
    values = [n.meta["val"] for n in (x, *others)]
    return all(v.shape == values[0].shape and v.dtype == values[0].dtype for v in values)


def _replace(graph: Graph, node: Node, operator: Any, arguments: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(operator, arguments)
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
