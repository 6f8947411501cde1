"""Recognizes, in a graph of ATen operators as inductor sees it, what may be next to a product.

By then modules are gone and functions are decomposed, so that an RMS norm looks the same whoever wrote it: what differs
is the order of factors, and where dtypes change. Numbers of 16 and 32 bits are taken for each other: what is computed
in one kernel is rounded less often, not more.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Node

__all__ = ["Gate", "Norm", "added", "gate", "rms_norm"]

aten = torch.ops.aten
CONVERT = torch.ops.prims.convert_element_type.default
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Norm(NamedTuple):
    """x / √(mean(x²) + eps) · (offset + weight)"""

    x: Node
    weight: Node
    eps: float
    offset: float


class Gate(NamedTuple):
    """activation(gate)·x"""

    x: Node
    gate: Node
    activation: str


def rms_norm(node: Node) -> Norm | None:
    """The norm whose result `node` is, if it is one over the last dimension."""
    for weight, normed in _factors(_origin(node)):
        for root, x in _factors(_origin(normed)):
            eps = _root_mean_square(root, _origin(x))
            weight_and_offset = _with_offset(_origin(weight))
            if eps is not None and weight_and_offset is not None and _shape(weight_and_offset[0]) == _shape(x)[-1:]:
                return Norm(_like(x, node), weight_and_offset[0], eps, weight_and_offset[1])
    return None


def gate(node: Node) -> Gate | None:
    """The gated unit whose result `node` is."""
    for active, x in _factors(_origin(node)):
        for name, find in (("silu", _silu), ("gelu", _gelu), ("gelu_tanh", _gelu_tanh)):
            origin = find(_origin(active))
            if isinstance(origin, Node) and _shape(origin) == _shape(x):
                return Gate(_like(x, node), _like(origin, node), name)
    return None


def added(node: Node) -> tuple[Node, Node] | None:
    """The node that alone uses `node`, if it adds something of its shape and dtype; and what that is."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    if user.target is not aten.add.Tensor or user.kwargs or len(user.args) != 2:
        return None
    first, second = user.args
    other = second if first is node else first
    if not isinstance(other, Node) or other is node:
        return None
    values: list[Any] = [n.meta.get("val") for n in (node, other, user)]
    tensors = all(isinstance(t, torch.Tensor) for t in values)
    return (user, other) if tensors and len({(t.shape, t.dtype) for t in values}) == 1 else None


def _origin(node: Any) -> Any:
    """What a node's values are, whatever the dtype."""
    while isinstance(node, Node) and node.target is CONVERT and node.args[1] in FLOATS:
        (before, _) = node.args
        if not isinstance(before, Node) or before.meta["val"].dtype not in FLOATS:
            break
        node = before
    return node


def _like(node: Any, other: Node) -> Any:
    """Of the nodes with a node's values, the last one of the dtype of `other`; the first one if there is none."""
    while isinstance(node, Node) and node.meta["val"].dtype != other.meta["val"].dtype:
        before = node.args[0] if node.target is CONVERT else None
        if not isinstance(before, Node) or _origin(before) is not _origin(node):
            return node
        node = before
    return node


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _factors(node: Any) -> Iterator[tuple[Any, Any]]:
    """Both orders of the two factors of a product."""
    yield from _both(node, aten.mul.Tensor, aten.mul.Scalar)


def _both(node: Any, *targets: Any) -> Iterator[tuple[Any, Any]]:
    if _is(node, *targets) and len(node.args) == 2 and not node.kwargs:
        a, b = node.args
        yield a, b
        yield b, a


def _plus(node: Any) -> Iterator[tuple[Any, float]]:
    """a and c, if a node is a + c with a number c."""
    for a, c in _both(_origin(node), aten.add.Tensor, aten.add.Scalar):
        if isinstance(c, int | float):
            yield _origin(a), float(c)


def _product(node: Any, ends: list[Any]) -> tuple[float, list[Any]]:
    """The number and the nodes whose product a node is, in whatever order they are multiplied; nodes of `ends` may be
    products themselves."""
    node = _origin(node)
    if isinstance(node, int | float):
        return float(node), []
    if node in ends:
        return 1.0, [node]
    if _is(node, aten.pow.Tensor_Scalar) and node.args[1] in (2, 3):
        number, nodes = _product(node.args[0], ends)
        return number ** node.args[1], nodes * node.args[1]
    for a, b in _factors(node):
        (first, of_a), (second, of_b) = _product(a, ends), _product(b, ends)
        return first * second, of_a + of_b
    return 1.0, [node]


def _is_product(node: Any, number: float, nodes: list[Any]) -> bool:
    found, factors = _product(node, nodes)
    return abs(found - number) <= 1e-6 * number and factors == nodes


def _scaled(node: Any) -> tuple[float, Any]:
    """A number and a node whose product a node is."""
    number, node = 1.0, _origin(node)
    while (found := next(((c, x) for x, c in _factors(node) if isinstance(c, int | float)), None)) is not None:
        number, node = number * found[0], _origin(found[1])
    return number, node


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.target in targets


def _root_mean_square(node: Any, x: Node) -> float | None:
    """eps, if a node is 1/√(mean(x²) + eps) over the last dimension, which is kept."""
    node = _origin(node)
    if not _is(node, aten.rsqrt.default):
        return None
    for mean, eps in _plus(node.args[0]):
        last = _is(mean, aten.mean.dim) and tuple(mean.args[1:]) in (([-1], True), ([len(_shape(x)) - 1], True))
        if last and _is_product(mean.args[0], 1.0, [x, x]):
            return eps
    return None


def _with_offset(node: Any) -> tuple[Node, float] | None:
    """A weight, and what is added to it."""
    for weight, offset in _plus(node):
        return weight, offset
    return (node, 0.0) if isinstance(node, Node) else None


def _silu(node: Any) -> Any:
    """x of x / (1 + e⁻ˣ)"""
    if _is(node, aten.silu.default):
        return _origin(node.args[0])
    if _is(node, aten.div.Tensor):
        x = _origin(node.args[0])
        for power, one in _plus(node.args[1]):
            negative: Any = _origin(power.args[0]) if _is(power, aten.exp.default) else None
            if one == 1 and _is(negative, aten.neg.default) and _origin(negative.args[0]) is x:
                return x
    for x, sigmoid in _factors(node):
        if _is(_origin(sigmoid), aten.sigmoid.default) and _origin(_origin(sigmoid).args[0]) is _origin(x):
            return _origin(x)
    return None


def _halved(node: Any) -> Iterator[tuple[Any, Any]]:
    """x and f, if a node is x/2 · (1 + f)."""
    number, product = _scaled(node)
    for half, sum_ in _factors(product):
        (first, x), (second, sum_) = _scaled(half), _scaled(sum_)
        for f, one in _plus(sum_):
            if number * first * second == 0.5 and one == 1:
                yield x, f


def _gelu(node: Any) -> Any:
    """x of x/2 · (1 + erf(x/√2))"""
    if _is(node, aten.gelu.default):
        return _origin(node.args[0]) if node.kwargs.get("approximate", "none") == "none" else None
    for x, f in _halved(node):
        if _is(f, aten.erf.default) and _is_product(f.args[0], 0.5**0.5, [x]):
            return x
    return None


def _gelu_tanh(node: Any) -> Any:
    """x of x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))"""
    if _is(node, aten.gelu.default):
        return _origin(node.args[0]) if node.kwargs.get("approximate") == "tanh" else None
    for x, f in _halved(node):
        number, sum_ = _scaled(f.args[0]) if _is(f, aten.tanh.default) else (0.0, None)
        if abs(number - (2 / math.pi) ** 0.5) <= 1e-6:
            for first, second in _both(sum_, aten.add.Tensor):
                if _origin(first) is x and _is_product(second, 0.044715, [x, x, x]):
                    return x
    return None
