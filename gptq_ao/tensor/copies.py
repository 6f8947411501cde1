"""What makes a new weight of others, or changes one: moved, cast, joined, overwritten."""

import warnings
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from gptq_ao.codes.tiles import TILE_ROWS, tile_columns
from gptq_ao.errors import ConfigError, TrainingWarning
from gptq_ao.tensor.group_tensor import GroupTensor
from gptq_ao.tensor.sharding import axis_of, called_from, written
from gptq_ao.tensor.table import aten, implements
from gptq_ao.tensor.values import on_values, refuse_to_write

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
    if any(w.dim() == 1 for w in weights):
        return on_values(GroupTensor, func, args, kwargs)
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
    """Weights [..., N, K] along a dimension; flat ones are dense.

    Raises:
        ValueError: they differ in more than their values and that size, or would be joined along K within a tile.
        ConfigError: FullyShardedDataParallel (FSDP1) joins all weights to one, which would be dense.
    """
    weights, dim = args[0], args[1] if len(args) > 1 else 0
    if any(w.dim() == 1 for w in weights):
        return _flat_cat(func, args, kwargs)
    first, why = weights[0], _differ(weights)
    dim %= first.dim()
    axis = axis_of(first, dim) if why is None else None
    if axis == "columns" and not all(_can_be_followed(w) for w in weights[:-1]):
        why = "their input features can be joined only where tiles and groups end, and in their own order"
    if why is None and axis != "columns" and len({w.in_features for w in weights}) > 1:
        why = f"they differ: {', '.join(map(repr, weights))}"
    if why is not None:
        raise ValueError(f"quantized weights cannot be concatenated: {why}")
    names = first.tiled()
    # A leading dimension: it is a leading one of every inner tensor too.
    if axis == "stack":
        return first.replace(**{n: torch.cat([getattr(w, n) for w in weights], dim) for n in names})
    if axis == "columns":
        # Dimension −2 of every inner tensor counts tiles of columns, or groups.
        inner = {n: torch.cat([getattr(w, n) for w in weights], -2) for n in names}
        return first.replace(**inner, in_features=sum(w.in_features for w in weights))
    # The last weight may end in a partly filled tile, because nothing follows it.
    if all(w.out_features % TILE_ROWS == 0 for w in weights[:-1]):
        # Dimension −3 of every inner tensor counts tiles of rows.
        inner = {n: torch.cat([getattr(w, n) for w in weights], -3) for n in names}
        return first.replace(**inner, out_features=sum(w.out_features for w in weights))
    # Rows of one weight begin in the middle of a tile: their codes are packed again.
    parts = (torch.cat([f(w) for w in weights], -2) for f in (_codes, _scale, _zero_point))
    return type(first).from_codes(*parts, dtype=first.dtype, perm=first.perm, transposed=first.transposed)


def _can_be_followed(weight: GroupTensor) -> bool:
    """Whether more columns can be put behind those of a weight."""
    return weight.perm is None and weight.in_features % tile_columns(weight.bits) == 0


def _flat_cat(func: Any, args: Any, kwargs: Any) -> Tensor:
    # DistributedDataParallel compares all ranks' values this way, bucket by bucket. FSDP1 would keep the result.
    if called_from("torch.distributed.fsdp."):
        raise ConfigError(
            "FullyShardedDataParallel (FSDP1) makes one dense parameter of all weights, quantized ones too: use FSDP2, "
            "torch.distributed.fsdp.fully_shard, which keeps them packed"
        )
    dense: Tensor = on_values(GroupTensor, func, args, kwargs)
    return dense


def _differ(weights: Any) -> str | None:
    """Why weights cannot become one, or None."""
    first = weights[0]
    if not all(isinstance(w, GroupTensor) for w in weights):
        return "some are quantized and some are not"
    # With a shape of its own (a convolution's), a dimension is not simply one of rows or columns.
    if any(w.view_shape is not None for w in weights):
        return "some are neither matrices nor stacks"
    same = ("group_size", "transposed", "dtype")
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
        ValueError: the target is quantized, and the source is not of the same class, shape and group size; dense values
            are taken if they are those that the target has.
    """
    target, source = args[:2]
    if not isinstance(target, GroupTensor):
        if called_from("torch.distributed.checkpoint."):
            # `dcp_to_torch_save` makes room for every weight by its shape and dtype.
            warnings.warn(
                f"the checkpoint has {source!r} where a dense tensor is to be filled: the values are right, and no "
                "longer quantized. To keep the codes, load into the state dict of a quantized model",
                TrainingWarning,
                stacklevel=2,
            )
        return target.copy_(source.dequantize(target.dtype))
    if not isinstance(source, GroupTensor) and _has_values(target, source):
        return target
    # Converting codes to other bits or groups would be quantizing again: `copy_` only ever copies.
    if type(target) is not type(source) or _layout(target) != _layout(source):
        if called_from("torch.distributed.utils"):
            raise ValueError(
                f"this rank's {target!r} is not that of rank 0: DistributedDataParallel trains equal models. Quantize "
                "on every rank with the same calibration data, or load one checkpoint on all"
            )
        raise ValueError(
            f"cannot copy {kind_of(source)} into {target!r}: a quantized weight takes one of the same kind and groups"
        )
    # In place, tensor by tensor: whoever holds the inner tensors (a captured CUDA graph, a view) sees the new values.
    for name, inner in target.parts().items():
        inner.copy_(getattr(source, name))
        if not inner.is_inference():
            # Below autograd nothing counts versions, by which autograd knows that what it has kept was overwritten.
            torch.autograd.graph.increment_version(inner)
    written(target)
    return target


@implements([aten.lerp_.Scalar, aten.lerp_.Tensor, aten._foreach_lerp_.Scalar, aten._foreach_lerp_.ScalarList])
def lerp_(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """`average.lerp_(weight, share)`, or lists of both: an average of equal quantized weights is left as it is.

    Raises:
        NotImplementedError: they differ, so that the average would have other codes.
    """
    averages, weights = (a if isinstance(a, list) else [a] for a in args[:2])
    for average, weight in zip(averages, weights, strict=True):
        if isinstance(average, GroupTensor) and not _has_values(average, weight):
            refuse_to_write(average, func)
    moving = [i for i, average in enumerate(averages) if not isinstance(average, GroupTensor)]
    if moving and isinstance(args[0], list):
        shares = [args[2][i] for i in moving] if isinstance(args[2], list) else args[2]
        func([averages[i] for i in moving], [weights[i] for i in moving], shares)
    elif moving:
        func(args[0], *(a.dequantize() if isinstance(a, GroupTensor) else a for a in args[1:]))
    return None if isinstance(args[0], list) else args[0]


def _has_values(weight: GroupTensor, source: Tensor) -> bool:
    """Whether `source`, quantized or not, has the values of a weight."""
    return source.shape == weight.shape and torch.equal(weight.dequantize(source.dtype), source)


def _layout(weight: GroupTensor) -> tuple[Any, ...]:
    # The names too: with or without `perm` or a high plane, weights hold different tensors.
    names, attributes = weight.__tensor_flatten__()
    return weight.shape, names, attributes


def kind_of(value: Tensor) -> str:
    """What a message calls it."""
    return repr(value) if isinstance(value, GroupTensor) else f"a {value.dtype} tensor {tuple(value.shape)}"
