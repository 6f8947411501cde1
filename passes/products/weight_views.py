"""An operand of a product → which rows of which parameter's matrix it is.

Between a parameter and the product that reads it lie views: transposes, slices, selected experts, reshapes. Their
effect is found by applying them to an empty tensor of the parameter's shape on the meta device: the strides and the
offset of the result say which elements the product reads, whatever views led there.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from gptq_ao.passes.products.operators import CASTS, COPIES, RESHAPES, is_view, op_name
from gptq_ao.passes.records import Layout, Program

__all__ = ["ParameterView", "read_matrix", "same_storage", "trace_parameter"]

# These leave each element where it was, seen as a tensor, and may copy: what is read is the same without them.
_SKIPPED = COPIES | CASTS


@dataclass(frozen=True)
class ParameterView:
    """A parameter as an operand sees it: the storage of `view`, on meta, has the parameter's elements in order."""

    weight: str
    shape: tuple[int, ...]
    view: Tensor


def trace_parameter(node: Any, program: Program) -> ParameterView | None:
    """The parameter of two or more dimensions that `node` is a view of, or None."""
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function":
        if not (node.target is operator.getitem or op_name(node) in _SKIPPED | RESHAPES or is_view(node)):
            return None
        chain.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.name not in program.parameters:
        return None
    shape = tuple(int(s) for s in node.meta["val"].shape)
    if len(shape) < 2:
        return None
    # It has strides as if contiguous, so that an offset says which element it is, in the parameter's order.
    parameter = torch.empty(shape, device="meta")
    view: Any = parameter
    # From the parameter to the product. On meta nothing is computed: only strides and offsets change.
    for step in reversed(chain):
        if op_name(step) in _SKIPPED:
            continue
        try:
            if op_name(step) in RESHAPES:
                # Not by the operator itself: that of `view_as` takes the shape from another tensor.
                view = view.view(step.meta["val"].shape)
            elif len(step.all_input_nodes) > 1:
                return None  # which elements are read depends on data
            else:
                view = step.target(view, *step.args[1:], **step.kwargs)  # type: ignore[operator]
        except RuntimeError:
            return None  # not without a copy, or of a copy that was skipped and whose elements lie in another order
    # A step has copied: then strides tell nothing about the parameter.
    if not isinstance(view, Tensor) or not same_storage(view, parameter):
        return None
    return ParameterView(program.parameters[node.name], shape, view)


def read_matrix(shape: tuple[int, ...], view: Tensor) -> tuple[Layout, tuple[int, int], int] | None:
    """How a parameter of `shape` is read by a product with `view`, [out, in] or [experts, out, in].

    Returns:
        The layout, the rows of its matrix that are read, and how many experts they hold; None if they are not
        consecutive rows with all input features.
    """
    if view.dim() == 3 and (view.shape[0] == 1 or view.stride(0) == 0):
        view = view[0]  # one matrix, or one that is expanded over a batch
    if view.dim() == 3:
        first = read_matrix(shape, view[0])
        if first is None:
            return None
        layout, part, _ = first
        experts, n, k = view.shape
        # All matrices of the parameter, in order and without gaps: then expert e has rows e·n to (e+1)·n.
        in_a_row = part[0] == 0 and experts * n == layout.rows and view.stride(0) == n * k
        # Of matrices stored as [in, out] one is one expert. Rows stored as [out, in] may be cut anywhere.
        aligned = layout.stack == experts if layout.transposed else True
        return (layout, (0, layout.rows), experts) if in_a_row and aligned else None
    if view.dim() != 2:
        return None
    (n, k), (down, right) = view.shape, view.stride()
    total, offset = torch.Size(shape).numel(), int(view.storage_offset())
    if (right == 1 or k == 1) and (down == k or n == 1) and offset % k == 0 and total % k == 0:
        # Each row lies in one piece, k elements from the one before: a matrix stored as [out, in].
        stack = shape[0] if len(shape) == 3 and shape[2] == k else 1
        # `stack`: a tall matrix would read the same, but a stack keeps its three dimensions when it is packed.
        start = offset // k
        return Layout(shape, stack, total // k // stack, k, False), (start, start + n), 1
    if down == 1 or n == 1:  # stored as [in, out]
        # Here `right` is the distance between input features, hence all outputs of one matrix, those not read included.
        expert, column = divmod(offset, k * right)
        # A stored matrix has k·right elements. More than `right` outputs would reach into the next input feature's.
        if total % (k * right) or column + n > right:
            return None
        start = expert * right + column
        return Layout(shape, total // (k * right), right, k, True), (start, start + n), 1
    return None


def same_storage(a: Tensor, b: Tensor) -> bool:
    """Whether one is a view of the other, whatever their shapes and device. On meta addresses are all zero; storages
    still differ."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
