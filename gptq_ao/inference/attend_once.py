"""The pass that has attention of one new token read keys and values where the cache has them."""

import operator
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from gptq_ao.kernels import cuda_decoding, decoding

__all__ = ["attend_once"]

Fits = Callable[[Tensor, Tensor, Tensor, Tensor | None], bool]
NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # of F.scaled_dot_product_attention, in order


def attend_once(graph: Graph, fits: Fits = cuda_decoding.attends) -> int:
    """Change a graph as TorchDynamo hands it to a backend, in place: `F.scaled_dot_product_attention` with a query of
    one position becomes `decoding.attend_once`, where that has a kernel. Heads of keys and values that were repeated
    for the heads of queries which share them no longer are. The result differs by the order of sums.

    Returns:
        How many were changed.
    """
    changed = 0
    for node in graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
        given: dict[str, Any] = {**dict(zip(NAMES, node.args, strict=False)), **node.kwargs}
        if given.get("dropout_p", 0.0) or given.get("is_causal", False):
            continue
        q, mask = given["query"], given.get("attn_mask")
        k, v = (_before_repeating(given[name]) for name in ("key", "value"))
        values: list[Any] = [None if n is None else n.meta.get("example_value") for n in (q, k, v, mask)]
        if not all(_known(t) for t in values[:3]) or (mask is not None and not _known(values[3])) or not fits(*values):
            continue
        scale = given.get("scale")
        scale = values[0].shape[-1] ** -0.5 if scale is None else scale
        with graph.inserting_before(node):
            new = graph.call_function(decoding.attend_once, (q, k, v, mask, scale))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        for repeated, origin in ((given["value"], v), (given["key"], k)):
            while repeated is not origin and not repeated.users:
                gone, repeated = repeated, repeated.args[0]
                graph.erase_node(gone)
        changed += 1
    return changed


def _known(value: Any) -> bool:
    """Whether it is a tensor without gradient, all of whose sizes are numbers."""
    if not isinstance(value, Tensor) or value.requires_grad:
        return False
    return all(isinstance(size, int) for size in (*value.shape, *value.stride()))


def _before_repeating(node: Any) -> Any:
    """What heads were repeated of, as Transformers does it: [B, heads, S, D] seen as [B, heads, 1, S, D], expanded to
    [B, heads, n, S, D], and reshaped to [B, heads·n, S, D]."""
    chain = [node]
    for target in ("reshape", "expand"):
        if not _is(chain[-1], target):
            return node
        chain.append(chain[-1].args[0])
    every = slice(None)
    if chain[-1].target is not operator.getitem or chain[-1].args[1] != (every, every, None, every, every):
        return node
    origin = chain[-1].args[0]
    shapes = [n.meta["example_value"].shape for n in (origin, chain[1], node)]
    (batch, heads, *rest), expanded, final = shapes
    repeats = expanded[2]
    same = tuple(expanded) == (batch, heads, repeats, *rest) and tuple(final) == (batch, heads * repeats, *rest)
    return origin if same else node


def _is(node: Any, method: str) -> bool:
    return isinstance(node, Node) and (node.op == "call_method" and node.target == method)
