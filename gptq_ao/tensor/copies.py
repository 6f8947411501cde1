"""What makes a new weight of others, or changes one: moved, cast, joined, overwritten."""

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from gptq_ao.codes.tiles import TILE_ROWS
from gptq_ao.tensor.group_tensor import GroupTensor
from gptq_ao.tensor.table import aten, implements

__all__ = ["kind_of"]

_codes, _scale, _zero_point = GroupTensor.codes, attrgetter("scale"), attrgetter("zero_point")


@implements([aten._to_copy.default, aten.to.dtype_layout])
def to_copy(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """The weight on another device or of another dtype: the codes are the same, whatever the dtype."""
    # The base class keeps the dtype whatever is asked for.
    weight = args[0]
    device, in_background = kwargs.get("device") or weight.device, kwargs.get("non_blocking", False)
    # Tiles, scales and `perm` move; their own integer dtypes stay, and only the dtype that the weight pretends to be
    # changes.
    moved = weight._apply_fn_to_data(lambda t: t.to(device, non_blocking=in_background, copy=True))
    return return_and_correct_aliasing(func, args, kwargs, moved.replace(dtype=kwargs.get("dtype") or weight.dtype))


@implements([aten.stack.default])
def stack(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """Weights [..., N, K] of one shape along a new dimension, which is one of the leading ones.

    Raises:
        ValueError: they differ in more than their values.
    """
    weights, dim = args[0], args[1] if len(args) > 1 else 0
    why = _differ(weights) or (None if len({w.shape for w in weights}) == 1 else "their shapes differ")
    # The result has one dimension more; its last two must remain those of the matrices.
    if why is None and dim % (weights[0].dim() + 1) > weights[0].dim() - 2:
        why = f"dimension {dim} is not in front of the matrices'"
    if why is not None:
        raise ValueError(f"quantized weights cannot be stacked: {why}")
    # `perm` is left out: one order of columns holds for the whole stack, and `_differ` has found them equal.
    names = weights[0].tiled()
    return weights[0].replace(**{n: torch.stack([getattr(w, n) for w in weights], dim) for n in names})


@implements([aten.cat.default])
def cat(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """Weights [..., N, K] along their output features or a leading dimension.

    Raises:
        ValueError: they differ in more than their values and that size, or would be joined along K.
    """
    weights, dim = args[0], args[1] if len(args) > 1 else 0
    first, why = weights[0], _differ(weights)
    dim %= first.dim()
    # The dimension of output features: the last but one, or the last in a transposed weight.
    rows = first.dim() - (1 if first.transposed else 2) if why is None else 0
    if why is None and dim > first.dim() - 3 and dim != rows:
        why = "only their output features can be joined"
    if why is not None:
        raise ValueError(f"quantized weights cannot be concatenated: {why}")
    names = first.tiled()
    # A leading dimension: it is a leading one of every inner tensor too.
    if dim != rows:
        return first.replace(**{n: torch.cat([getattr(w, n) for w in weights], dim) for n in names})
    # The last weight may end in a partly filled tile, because nothing follows it.
    if all(w.out_features % TILE_ROWS == 0 for w in weights[:-1]):
        # Dimension −3 of every inner tensor counts tiles of rows.
        inner = {n: torch.cat([getattr(w, n) for w in weights], -3) for n in names}
        return first.replace(**inner, out_features=sum(w.out_features for w in weights))
    # Rows of one weight begin in the middle of a tile: their codes are packed again.
    parts = (torch.cat([f(w) for w in weights], -2) for f in (_codes, _scale, _zero_point))
    return type(first).from_codes(*parts, dtype=first.dtype, perm=first.perm, transposed=first.transposed)


def _differ(weights: Any) -> str | None:
    """Why weights cannot become one, or None."""
    first = weights[0]
    if not all(isinstance(w, GroupTensor) for w in weights):
        return "some are quantized and some are not"
    # With a shape of its own (a convolution's), a dimension is not simply one of rows or columns.
    if any(w.view_shape is not None for w in weights):
        return "some are neither matrices nor stacks"
    same = ("group_size", "in_features", "transposed", "dtype")
    for w in weights:
        if type(w) is not type(first) or any(getattr(w, n) != getattr(first, n) for n in same):
            return f"they differ: {first!r} and {w!r}"
        # Last, since it is the only comparison that reads values.
        if (w.perm is None) != (first.perm is None) or (w.perm is not None and not torch.equal(w.perm, first.perm)):
            return "their columns are in different orders, and one weight has one order"
    return None


@implements([aten.copy_.default])
def copy_(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """`target.copy_(source)`: codes into a quantized weight, or the values they stand for into a dense one.

    Raises:
        ValueError: the target is quantized, and the source is not, or not of the same class, shape and group size.
    """
    target, source = args[:2]
    if not isinstance(target, GroupTensor):
        return target.copy_(source.dequantize(target.dtype))
    # Converting codes to other bits or groups would be quantizing again: `copy_` only ever copies.
    if type(target) is not type(source) or _layout(target) != _layout(source):
        raise ValueError(
            f"cannot copy {kind_of(source)} into {target!r}: a quantized weight takes one of the same kind and groups"
        )
    # In place, tensor by tensor: whoever holds the inner tensors (a captured CUDA graph, a view) sees the new values.
    for name, inner in target.parts().items():
        inner.copy_(getattr(source, name))
        if not inner.is_inference():
            # Below autograd nothing counts versions, by which a kernel knows that its converted weight is out of date.
            torch.autograd.graph.increment_version(inner)
    return target


def _layout(weight: GroupTensor) -> tuple[Any, ...]:
    # The names too: with or without `perm` or a high plane, weights hold different tensors.
    names, attributes = weight.__tensor_flatten__()
    return weight.shape, names, attributes


def kind_of(value: Tensor) -> str:
    """What a message calls it."""
    return repr(value) if isinstance(value, GroupTensor) else f"a {value.dtype} tensor {tuple(value.shape)}"
