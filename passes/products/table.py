"""A node of the graph → the products of an activation and a weight that it may compute.

The table of operators that multiply. Everything about an operator that the rest of the pass needs to know stands here:
which operand is which, how the weight's matrix lies in its operand, and how the activation's rows lie in its.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from gptq_ao.passes.products import activation_rows
from gptq_ao.passes.products.operators import op_name
from gptq_ao.passes.records import dim

__all__ = ["DEPTHWISE", "MULTIPLYING", "Product", "bias_of", "multiplies", "products"]

DEPTHWISE = "depthwise convolution: a filter sees one channel only"
Arrange = tuple[Callable[..., Tensor], tuple[Any, ...]]


@dataclass(frozen=True)
class Product:
    """A candidate: it is one if `weight` turns out to be a parameter.

    Attributes:
        matrix: function from the weight's operand to a view of it, [out, in] or [experts, out, in]; it returns None if
            there is no such view.
        any_shape: whether the operator may read a weight that is neither a matrix nor a stack (a convolution, einsum).
        arrange, offsets: see `records.Rows`.
        experts: False if a stack's matrices all multiply the same rows.
        note: why such a product is not quantized unless a rule asks for it, or None.
    """

    activation: fx.Node
    weight: fx.Node
    matrix: Callable[[Tensor], Tensor | None]
    any_shape: bool = False
    arrange: Arrange | None = None
    offsets: fx.Node | None = None
    experts: bool = True
    note: str | None = None


def products(node: fx.Node) -> Iterator[Product]:
    """Candidates, the likelier first. At most one of them is real: only one operand can be the activation."""
    if node.op == "call_function":
        find = _OPERATORS.get(op_name(node))
        if find is not None:
            yield from find(node)


def multiplies(node: fx.Node) -> bool:
    """Whether the operator is a product in which a weight could take part."""
    return node.op == "call_function" and op_name(node) in MULTIPLYING


def bias_of(node: fx.Node) -> Any:
    """The operand of a product that is added to it, if it has one."""
    # (bias, a, b): here it goes by its place, as the schemas do not call it "bias".
    if _OPERATORS.get(op_name(node)) is _addmm:
        return node.args[0]
    schema: Any = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else []
    return (dict(zip(names, node.args, strict=False)) | node.kwargs).get("bias")


def _same(view: Tensor) -> Tensor:
    return view


def _flipped(view: Tensor) -> Tensor | None:
    return view.mT if view.dim() >= 2 else None


def _linear(node: fx.Node) -> Iterator[Product]:
    x, w = _arguments(node, "input", "weight")
    yield Product(x, w, _same)


def _mm(node: fx.Node, first: int = 0) -> Iterator[Product]:
    """x·W and W·x."""
    a, b = node.args[first : first + 2]
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        # Matrices of a stack meet rows of their own, unless x is broadcast over the stack.
        separate = dim(b) == 3 and dim(a) >= 3 and a.meta["val"].shape[-3] != 1
        # With axes before that of the experts, rows of one expert do not lie together yet.
        arrange: Arrange | None = (activation_rows.experts_first, ()) if separate and dim(a) > 3 else None
        yield Product(a, b, _flipped, arrange=arrange, experts=separate)
        if dim(b) <= 3:
            separate = dim(a) == 3 and dim(b) == 3 and b.meta["val"].shape[0] != 1
            yield Product(b, a, _same, arrange=(activation_rows.columns, ()), experts=separate)


def _addmm(node: fx.Node) -> Iterator[Product]:
    yield from _mm(node, first=1)


def _grouped_mm(node: fx.Node) -> Iterator[Product]:
    x, w, offsets = _arguments(node, "input", "mat2", "offs")
    if isinstance(offsets, fx.Node) and dim(x) == 2 and dim(w) == 3:
        yield Product(x, w, _flipped, offsets=offsets)


def _filters(x: fx.Node, w: fx.Node, stride: Any, padding: Any, dilation: Any, groups: int | None) -> Iterator[Product]:
    kernel = tuple(int(k) for k in w.meta["val"].shape[2:])
    n, groups = len(kernel), groups or 1
    pads = padding if isinstance(padding, str) else _each(padding, n, 0)
    alone = groups > 1 and w.meta["val"].shape[1] == 1
    yield Product(
        x,
        w,
        # Filters see only the channels of their own part of x: as many matrices as parts, like experts.
        lambda view: view.reshape(groups, view.shape[0] // groups, -1),
        any_shape=True,
        arrange=(activation_rows.patches, (kernel, _each(stride, n, 1), pads, _each(dilation, n, 1), groups)),
        note=DEPTHWISE if alone else None,
    )


def _transposed_filters(x: fx.Node, w: fx.Node, groups: int | None) -> Iterator[Product]:
    # A weight [in, out, *kernel]: each position of x is multiplied by [in, out·prod(kernel)].
    if groups in (None, 1):
        arrange = (activation_rows.channels_last, (dim(w) - 2,))
        yield Product(x, w, lambda view: view.reshape(view.shape[0], -1).mT, any_shape=True, arrange=arrange)


def _convolution(node: fx.Node) -> Iterator[Product]:
    x, w, _, stride, padding, dilation, groups = _arguments(
        node, "input", "weight", "bias", "stride", "padding", "dilation", "groups"
    )
    yield from _filters(x, w, stride, padding, dilation, groups)


def _transposed_convolution(node: fx.Node) -> Iterator[Product]:
    x, w, _, _, _, _, groups = _arguments(
        node, "input", "weight", "bias", "stride", "padding", "output_padding", "groups"
    )
    yield from _transposed_filters(x, w, groups)


def _general_convolution(node: fx.Node) -> Iterator[Product]:
    x, w, _, stride, padding, dilation, transposed, _, groups = _arguments(
        node, "input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups"
    )
    yield from _transposed_filters(x, w, groups) if transposed else _filters(x, w, stride, padding, dilation, groups)


def _einsum(node: fx.Node) -> Iterator[Product]:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if not isinstance(operands, list | tuple) or len(operands) != 2:
        return
    # An equation without an arrow gets an empty output here, in which `_read_equation` finds no out_features.
    inputs, _, output = equation.partition("->")
    labels, nodes = inputs.split(","), [o for o in operands if isinstance(o, fx.Node)]
    # Either operand may be the weight.
    for x, w in ((0, 1), (1, 0)):
        found = _read_equation(labels[x], labels[w], output, dim(nodes[x]))
        if found is not None:
            matrix, axes, batch, contracted, shared = found
            arrange = (activation_rows.permuted, (axes, batch, contracted))
            yield Product(nodes[x], nodes[w], matrix, any_shape=True, arrange=arrange, experts=not shared)


def _read_equation(
    x: str, w: str, output: str, x_dim: int
) -> tuple[Callable[[Tensor], Tensor | None], tuple[int, ...], int, int, bool] | None:
    """How `x,w->output` reads its weight, and the axes of x in the order batch, others, contracted."""
    # A label that is repeated within one operand stands for a diagonal.
    if "..." in w or len(set(w)) != len(w) or len(set(x.replace(".", ""))) != len(x.replace(".", "")):
        return None
    lead, dots, tail = x.partition("...")
    # Axes behind the dots are counted from the end of x, as the dots stand for any number of them.
    axis = {label: i for i, label in enumerate(lead)} | {label: i - len(tail) + x_dim for i, label in enumerate(tail)}
    # The labels of w: one matrix for each of `batch`; `inner` is summed over (in_features); `outer` are out_features.
    batch = [a for a in w if a in axis and a in output]
    inner = [a for a in w if a in axis and a not in output]
    outer = [a for a in w if a not in axis]
    if not inner or not outer or any(a not in output for a in outer) or (dots and "..." not in output):
        return None
    if any(a not in output and a not in w for a in axis):
        return None  # summed over on its own
    named = [axis[a] for a in (*batch, *inner)]
    axes = (
        *(axis[a] for a in batch),
        *(i for i in range(x_dim) if i not in named),
        *(axis[a] for a in inner),
    )
    order = [w.index(a) for a in (*batch, *outer, *inner)]

    def matrix(view: Tensor) -> Tensor | None:
        b, o = len(batch), len(outer)
        view = view.permute(order)
        # [batch, out, in], or [out, in] without a batch; each of the three may be several axes in one.
        sizes = [view.shape[:b].numel()] * (b > 0) + [view.shape[b : b + o].numel(), view.shape[b + o :].numel()]
        return _viewed(view, sizes)

    # in_features lie between the two outer axes, so these cannot be seen as one without a copy.
    if not batch and len(outer) == 2 and len(inner) == 1 and w.index(inner[0]) == 1:

        def stack(view: Tensor) -> Tensor | None:  # [out₁, in, out₂]: out₁ matrices, which multiply the same rows
            return view.mT

        return stack, axes, 0, len(inner), True
    return matrix, axes, len(batch), len(inner), False


def _viewed(view: Tensor, sizes: list[int]) -> Tensor | None:
    try:
        return view.view(sizes)
    except RuntimeError:  # not without a copy
        return None


_OPERATORS: dict[str, Callable[[fx.Node], Iterator[Product]]] = {
    "aten::linear": _linear,
    "aten::mm": _mm,
    "aten::mv": _mm,
    "aten::bmm": _mm,
    "aten::matmul": _mm,
    "aten::addmm": _addmm,
    "aten::addmv": _addmm,
    "aten::baddbmm": _addmm,
    "aten::_grouped_mm": _grouped_mm,
    "transformers::grouped_mm_fallback": _grouped_mm,
    "aten::einsum": _einsum,
    "aten::convolution": _general_convolution,
    **{f"aten::conv{n}d": _convolution for n in (1, 2, 3)},
    **{f"aten::conv_transpose{n}d": _transposed_convolution for n in (1, 2, 3)},
}
# Operators that multiply by weights inside, and cannot be given quantized ones.
_CLOSED = {
    "aten::bilinear",
    "aten::_trilinear",
    "aten::lstm",
    "aten::gru",
    "aten::rnn_tanh",
    "aten::rnn_relu",
    "aten::lstm_cell",
    "aten::gru_cell",
    "aten::rnn_tanh_cell",
    "aten::rnn_relu_cell",
    "aten::_transformer_encoder_layer_fwd",
    "aten::_native_multi_head_attention",
    "aten::_scaled_mm",
}
MULTIPLYING = frozenset({*_OPERATORS, *_CLOSED})


def _arguments(node: fx.Node, *names: str) -> list[Any]:
    """The node's first arguments, given by position or by name; None for what is left to its default."""
    schema: Any = getattr(node.target, "_schema", None)
    # By the operator's own names for them, which may be others: `input` is often declared as `self`.
    declared = [a.name for a in schema.arguments][: len(names)] if schema is not None else list(names)
    given = dict(zip(declared, node.args, strict=False)) | dict(node.kwargs)
    return [given.get(d, given.get(n)) for d, n in zip(declared, names, strict=True)]


def _each(value: Any, count: int, default: int) -> tuple[int, ...]:
    """One number per spatial axis."""
    values = (default,) if not value else (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values
