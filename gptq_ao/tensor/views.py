"""Other shapes and parts of a quantized weight: views where packed codes allow it, else dense, with the same values.

Codes lie in tiles of output and input features, and columns that share a scale stay together. So a view can exchange
the last two dimensions, take whole tiles of either, and do anything to the dimensions in front of these two.
"""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from gptq_ao.codes.tiles import TILE_ROWS, tile_columns
from gptq_ao.tensor.group_tensor import GroupTensor
from gptq_ao.tensor.sharding import axis_of, called_from, refuse_cut, why_uncut
from gptq_ao.tensor.table import aten, implements
from gptq_ao.tensor.values import on_values


def _aliased(func: Any, args: Any, kwargs: Any, part: Tensor) -> Tensor:
    """What a handler returns as a view of args[0]: torch is told that they share memory, unless it had to be dense."""
    return return_and_correct_aliasing(func, args, kwargs, part) if isinstance(part, GroupTensor) else part


@implements([aten.t.default, aten.transpose.int, aten.permute.default])
def transpose(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """[..., N, K] as [..., K, N], or the other way round; dense, if other dimensions move."""
    weight = args[0]
    d = weight.dim()
    # All three operators as one list of axes; `t` takes none, it is the transpose of dimensions 0 and 1.
    if func is aten.permute.default:
        axes = [a % d for a in args[1]]
    else:
        i, j = (a % d for a in args[1:]) if func is aten.transpose.int else (0, 1)
        axes = list(range(d))
        axes[i], axes[j] = axes[j], axes[i]
    identity = list(range(d))
    if axes not in (identity, [*identity[:-2], d - 1, d - 2]):
        return on_values(GroupTensor, func, args, kwargs)
    with torch.inference_mode(False):  # a view of an ordinary tensor is an ordinary tensor, also under inference_mode
        # The codes stay where they are; a flag says which way they are read.
        flipped = weight.replace(transposed=weight.transposed != (axes != identity))
    return _aliased(func, args, kwargs, flipped)


@implements([aten.expand.default])
def expand(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """A matrix [N, K], or a stack of them, as a stack [..., N, K] in which equal ones lie on top of each other; dense,
    if the matrix itself grows."""
    weight, size = args[:2]
    lead, last = size[:-2], tuple(size[-2:])
    # Nothing to expand: another tensor object of the same weight.
    same = tuple(size) == tuple(weight.shape)
    if not same and (weight.view_shape is not None or last not in (tuple(weight.shape[-2:]), (-1, -1))):
        return on_values(GroupTensor, func, args, kwargs)
    with torch.inference_mode(False):
        stack = weight.replace() if same else weight.each(lambda t: t.expand(*lead, *t.shape[-3:]))
    return _aliased(func, args, kwargs, stack)


@implements([aten.view.default, aten._unsafe_view.default])
def view(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """The same matrices under other leading dimensions, or their rows cut into other matrices; any other shape is
    dense, with the same values."""
    weight, size = args
    # `matmul` expands a matrix over the batch and flattens that: the matrices of such a stack lie on top of each other.
    one_matrix = weight.qdata.stride()[:-3] == (0,) * (weight.dim() - 2)
    with torch.inference_mode(False):
        # A view must be a new tensor object even if nothing changes.
        if tuple(size) == tuple(weight.shape):
            return _aliased(func, args, kwargs, weight.replace())
        if (flat := _flattened(weight, tuple(size))) is not None:
            return _aliased(func, args, kwargs, flat)
        if weight.view_shape is None and tuple(size[-2:]) == tuple(weight.shape[-2:]):
            *lead, _, _ = size
            if one_matrix and -1 not in lead:
                same = weight.expanded(()).expanded(tuple(lead))
            else:
                # A copy of what was expanded, if the stack has no such view.
                same = weight.each(lambda t: t.reshape(*lead, *t.shape[-3:]))
            return _aliased(func, args, kwargs, same)
        if weight.view_shape is None and not weight.transposed and size[-1] == weight.in_features:
            return _aliased(func, args, kwargs, _restacked(weight, tuple(size)))
    # Not `view`: the dense weight of a transposed one is not contiguous.
    return weight.dequantize().reshape(size)


def _flattened(weight: GroupTensor, size: tuple[int, ...]) -> GroupTensor | None:
    """A matrix or stack whose shape is one dimension, or back: what FSDP2 and DistributedDataParallel hold on to as a
    list of numbers keeps its codes."""
    matrices = (*weight.qdata.shape[:-3], weight.out_features, weight.in_features)
    flat = size in ((-1,), (weight.numel(),))
    if weight.transposed or not (flat or size == matrices):
        return None
    if not called_from("torch.distributed."):
        return None
    return weight.replace(view_shape=(weight.numel(),) if flat else None)


def _restacked(weight: GroupTensor, size: tuple[int, ...]) -> Tensor:
    """The same rows as another stack: a view where every matrix is made of whole tiles, else dense."""
    # What −1 stands for: all rows, divided by the sizes that are given.
    rows = weight.shape[:-1].numel()
    known = torch.Size(s for s in size[:-1] if s != -1).numel()
    # n is the number of rows of each matrix of the new stack.
    *lead, n = (rows // known if s == -1 else s for s in size[:-1])
    if (*lead, n) == weight.shape[:-1]:
        return weight.replace()
    # A tile of 16 rows lies in one piece, so a matrix can begin only where a tile does.
    if n % TILE_ROWS or weight.out_features % TILE_ROWS:
        return weight.dequantize().view(size)
    return weight.each(lambda t: t.reshape(*lead, n // TILE_ROWS, *t.shape[-2:]), out_features=n)


def _rows(weight: GroupTensor, start: int, stop: int) -> GroupTensor | None:
    """Rows of every matrix, where whole tiles are meant."""
    # The end may lie within a tile only where the weight itself ends there: the rest of that tile is padding.
    if start % TILE_ROWS or (stop % TILE_ROWS and stop != weight.out_features):
        return None
    # The end is rounded up, to include a last tile that is partly filled.
    tiles = slice(start // TILE_ROWS, -(-stop // TILE_ROWS))
    shape = weight.view_shape and (stop - start, *weight.view_shape[1:])
    return weight.each(lambda t: t[..., tiles, :, :], out_features=stop - start, view_shape=shape)


def _columns(weight: GroupTensor, start: int, stop: int) -> GroupTensor | None:
    """Columns of every matrix, where whole tiles of whole groups are meant, or a part of one group."""
    wide, group_size = tile_columns(weight.bits), weight.group_size
    if weight.perm is not None or start % wide or (stop % wide and stop != weight.in_features):
        return None
    if start % group_size == 0 and stop % group_size == 0:
        groups = slice(start // group_size, stop // group_size)
    elif start // group_size == (stop - 1) // group_size:
        groups = slice(start // group_size, start // group_size + 1)
        group_size = stop - start
    else:
        return None
    tiles = slice(start // wide, -(-stop // wide))
    parts = {n: t[..., groups if n == "scale_zero" else tiles, :] for n, t in weight.tiled().items()}
    return weight.replace(**parts, in_features=stop - start, group_size=group_size)


def _narrowed(weight: GroupTensor, dim: int, start: int, stop: int) -> Tensor:
    """`weight[start:stop]` along `dim`."""
    size, dim = weight.shape[dim], dim % weight.dim()
    # Python's rules for slices: negative numbers count from the end, and what is out of range is cut off.
    start, stop = (min(max(i + size if i < 0 else i, 0), size) for i in (start, stop))
    if (start, stop) == (0, size):
        return weight.replace()
    if start < stop:
        axis, part = axis_of(weight, dim), None
        if axis == "rows":
            part = _rows(weight, start, stop)
        elif axis == "columns":
            part = _columns(weight, start, stop)
        elif axis == "stack":
            part = weight.experts((slice(None),) * dim + (slice(start, stop),))
        if part is not None:
            return part
        refuse_cut(weight, dim, 0, f"[{start}:{stop}] does not begin and end with a tile and a group")
    return weight.dequantize().narrow(dim, start, max(stop - start, 0))


@implements([aten.slice.Tensor])
def take_slice(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """`weight[start:end:step]` along one dimension."""

    def part(w: GroupTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
        if step != 1:
            return w.dequantize()[(slice(None),) * (dim % w.dim()) + (slice(start, end, step),)]
        return _narrowed(w, dim, 0 if start is None else start, w.shape[dim] if end is None else end)

    with torch.inference_mode(False):
        return _aliased(func, args, kwargs, part(*args, **kwargs))


@implements([aten.split.Tensor, aten.split_with_sizes.default])
def split(func: Any, types: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The parts of a weight along one dimension, of one size or of those given."""

    def parts(w: GroupTensor, sizes: int | list[int], dim: int = 0) -> list[Tensor]:
        total = w.shape[dim]
        # One size: the last part is what remains. As `torch.split` does it.
        each = [min(sizes, total - i) for i in range(0, total, sizes)] if isinstance(sizes, int) else sizes
        if (why := why_uncut(w, dim % w.dim(), len(each))) is not None:
            refuse_cut(w, dim, len(each), why)
        ends = itertools.accumulate(each)
        return [_narrowed(w, dim, end - size, end) for size, end in zip(each, ends, strict=True)]

    with torch.inference_mode(False):
        return parts(*args, **kwargs)


@implements([aten.as_strided.default])
def as_strided(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """The weight with the strides that it has; with any other ones dense."""
    weight, size, stride, *offset = args
    if tuple(size) != tuple(weight.shape) or tuple(stride) != weight.stride() or any(offset):
        return on_values(GroupTensor, func, args, kwargs)
    with torch.inference_mode(False):
        return _aliased(func, args, kwargs, weight.replace())


@implements([aten.select.int])
def select(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """`weight[index]` along one dimension, which goes: of a stack a view, of a matrix dense."""
    weight, dim, index = args
    dim %= weight.dim()
    with torch.inference_mode(False):
        # Only whole matrices can be taken by number; a single row of one lies within a tile.
        stacked = dim < weight.dim() - 2 and weight.view_shape is None
        part = weight.experts((slice(None),) * dim + (index,)) if stacked else weight.dequantize().select(dim, index)
    return _aliased(func, args, kwargs, part)


@implements([aten.squeeze.default, aten.squeeze.dim])
def squeeze(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """The weight without leading dimensions of size 1, or without one of them; dense, if one of the matrix goes."""
    weight, *given = args
    dims = [d % weight.dim() for d in given] or [d for d in range(weight.dim()) if weight.shape[d] == 1]
    if weight.view_shape is not None or any(d > weight.dim() - 3 for d in dims):
        return on_values(GroupTensor, func, args, kwargs)
    # From the last one on: removing a dimension would renumber those behind it.
    for dim in sorted(dims, reverse=True):
        # A dimension of another size stays, as `torch.squeeze` leaves it.
        weight = weight.select(dim, 0) if weight.shape[dim] == 1 else weight
    return weight


@implements([aten.unsqueeze.default])
def unsqueeze(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """The weight with one more dimension of size 1: a leading one, or else dense."""
    weight, dim = args
    dim %= weight.dim() + 1
    if weight.view_shape is not None or dim > weight.dim() - 2:
        return on_values(GroupTensor, func, args, kwargs)
    with torch.inference_mode(False):
        return _aliased(func, args, kwargs, weight.each(lambda t: t.unsqueeze(dim)))


@implements([aten.unbind.int])
def unbind(func: Any, types: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """All of `select` along one dimension."""
    weight, dim = args[0], args[1] if len(args) > 1 else 0
    return [weight.select(dim, i) for i in range(weight.shape[dim])]


@implements([aten.index.Tensor])
def index(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """`weight[numbers]`, a copy: quantized where leading dimensions are indexed by integers, else dense."""
    weight, numbers = args
    lead = weight.dim() - 2
    # A boolean index may span several dimensions, so the count of indices would not tell which ones it takes.
    if weight.view_shape is None and len(numbers) <= lead and all(n is None or n.dtype != torch.bool for n in numbers):
        return weight.experts(tuple(slice(None) if n is None else n for n in numbers))
    return weight.dequantize()[tuple(slice(None) if n is None else n for n in numbers)]


# Kept before the registration below replaces it in the table.
_torchao_detach = GroupTensor._ATEN_OP_TABLE[GroupTensor][aten.detach.default]


@implements([aten.detach.default, aten.alias.default])
def alias(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """The same weight as another tensor, detached from autograd."""
    with torch.inference_mode(False):  # as in `transpose`
        return _torchao_detach(func, types, args, kwargs)
