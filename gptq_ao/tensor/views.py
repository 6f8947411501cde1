"""Quantized weights as tensors: what a module's parameter becomes.

`Int4GroupTensor` (and its 2-, 3- and 8-bit siblings) behaves like the dense weight it stands for: same shape, a dtype
to compute in, `F.linear`, `mm`, `addmm` and `bmm` with it, `.to()`, `state_dict`, `torch.compile`. Inside are int32
tensors in the layout that `codes/tiles.py` draws. A weight that a model stores as [in, out] (GPT-2) is the transposed
view of one.
"""

import itertools
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from gptq_ao.codes.tiles import TILE_ROWS
from gptq_ao.kernels import ops
from gptq_ao.tensor.group_tensor import GroupTensor

aten = torch.ops.aten
implements = GroupTensor.implements
implements_torch_function = GroupTensor.implements_torch_function


def _times_transposed(x: Tensor, weight: GroupTensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + bias for a weight [N, K] (or a stack of them); x may be of another floating dtype than the weight."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if not x.is_floating_point() or x.shape[-1] != weight.in_features:
        raise ValueError(f"a product with {weight!r} cannot take {x.dtype} {tuple(x.shape)}")
    return ops.linear(x, *weight.packed(), None if bias is None else bias.to(x.dtype))


def _product(x: Any, y: Any) -> Tensor:
    """x·y for mm and bmm, one of them quantized."""
    if isinstance(y, GroupTensor) and y.transposed and not isinstance(x, GroupTensor):
        # One matrix, expanded over a batch: a product of all rows with that matrix.
        return _times_transposed(x, y.expanded(()) if y.dim() == 3 and y.qdata.stride(0) == 0 else y)
    if isinstance(x, GroupTensor):
        return torch.matmul(x.dequantize(y.dtype), y.dequantize() if isinstance(y, GroupTensor) else y)
    return torch.matmul(x, y.dequantize(x.dtype))


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


@implements([aten.linear.default])
@implements_torch_function([torch.nn.functional.linear, aten.linear.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, weight, bias = _linear_arguments(*args, **kwargs)
    if not isinstance(weight, GroupTensor) or isinstance(x, GroupTensor) or isinstance(bias, GroupTensor):
        kinds = tuple(type(a).__name__ for a in (x, weight, bias))
        raise NotImplementedError(f"linear takes a quantized weight only, got {kinds}")
    # Not `weight.shape`, which for a subclass goes through its table of functions, some microseconds each time.
    columns = weight.out_features if weight.transposed else weight.in_features
    if weight.qdata.dim() != 3 or weight.view_as is not None or x.shape[-1] != columns:
        raise ValueError(f"linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit")
    if weight.transposed:
        return torch.nn.functional.linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))
    return _times_transposed(x, weight, bias)


@implements([aten.mm.default, aten.bmm.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    return _product(*args)


@implements([aten.addmm.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    bias, x, y = args
    if not kwargs and bias.dim() == 1 and isinstance(y, GroupTensor) and y.transposed:
        return _times_transposed(x, y, bias)
    dense = (t.dequantize(x.dtype) if isinstance(t, GroupTensor) else t for t in (x, y))
    return torch.addmm(bias, *dense, **kwargs)


@implements([aten.t.default, aten.transpose.int, aten.permute.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    weight = args[0]
    d = weight.dim()
    if func is aten.permute.default:
        axes = [a % d for a in args[1]]
    else:
        i, j = (a % d for a in args[1:]) if func is aten.transpose.int else (0, 1)
        axes = list(range(d))
        axes[i], axes[j] = axes[j], axes[i]
    identity = list(range(d))
    if axes not in (identity, [*identity[:-2], d - 1, d - 2]):
        raise NotImplementedError(f"{weight!r}: only the last two dimensions can be exchanged, got {axes}")
    with torch.inference_mode(False):  # a view of an ordinary tensor is an ordinary tensor, also under inference_mode
        flipped = weight.replace(transposed=weight.transposed != (axes != identity))
    return return_and_correct_aliasing(func, args, kwargs, flipped)


@implements([aten.expand.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    weight, size = args
    *lead, n, k = size
    if tuple(size) == tuple(weight.shape):
        lead = []
    elif weight.dim() != 2 or (n, k) not in (tuple(weight.shape), (-1, -1)):
        raise NotImplementedError(f"{weight!r} cannot be expanded to {tuple(size)}")
    with torch.inference_mode(False):
        stack = weight.expanded(tuple(lead)) if lead else weight.replace()
    return return_and_correct_aliasing(func, args, kwargs, stack)


@implements([aten.view.default, aten._unsafe_view.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    weight, size = args
    one_matrix = weight.qdata.stride()[:-3] == (0,) * (weight.dim() - 2)  # expanded over leading dimensions, if any
    with torch.inference_mode(False):
        if tuple(size) == tuple(weight.shape):
            return return_and_correct_aliasing(func, args, kwargs, weight.replace())
        if one_matrix and tuple(size[-2:]) == tuple(weight.shape[-2:]):
            matrix = weight.expanded(())
            same = matrix.expanded(tuple(size[:-2])) if len(size) > 2 else matrix
            return return_and_correct_aliasing(func, args, kwargs, same)
        if weight.view_as is None and not weight.transposed and size[-1] == weight.in_features:
            return _view(func, args, kwargs, _regrouped(weight, tuple(size)))
    raise NotImplementedError(f"{weight!r} cannot be viewed as {tuple(size)}: packed codes have no other shape")


def _regrouped(weight: GroupTensor, size: tuple[int, ...]) -> Tensor:
    """The same rows as another stack: a view where every matrix is made of whole tiles, else dense."""
    rows = weight.shape[:-1].numel()
    known = torch.Size(s for s in size[:-1] if s != -1).numel()
    *lead, n = (rows // known if s == -1 else s for s in size[:-1])
    if (*lead, n) == weight.shape[:-1]:
        return weight.replace()
    if n % TILE_ROWS or weight.out_features % TILE_ROWS:
        return weight.dequantize().view(size)
    inner = {
        name: t.reshape(*lead, n // TILE_ROWS, *t.shape[-2:])
        for name in ("qdata", "scale_zero", "high_plane")
        if (t := getattr(weight, name)) is not None
    }
    return weight.replace(**inner, out_features=n)


def _rows(weight: GroupTensor, start: int, stop: int) -> Tensor:
    """Rows of every matrix: a view where whole tiles are meant, else dense, with the same values."""
    if start % TILE_ROWS or (stop % TILE_ROWS and stop != weight.out_features):
        dense = weight.replace(transposed=False).dequantize()[..., start:stop, :]
        return dense.mT if weight.transposed else dense
    tiles = slice(start // TILE_ROWS, -(-stop // TILE_ROWS))
    inner = {
        n: t[..., tiles, :, :] for n in ("qdata", "scale_zero", "high_plane") if (t := getattr(weight, n)) is not None
    }
    return weight.replace(**inner, out_features=stop - start)


def _narrowed(weight: GroupTensor, dim: int, start: int, stop: int) -> Tensor:
    """`weight[start:stop]` along `dim`."""
    size, dim = weight.shape[dim], dim % weight.dim()
    start, stop = (min(max(i + size if i < 0 else i, 0), size) for i in (start, stop))
    if weight.view_as is None and start < stop:
        if dim == weight.dim() - (1 if weight.transposed else 2):
            return _rows(weight, start, stop)
        if dim < weight.dim() - 2:
            return weight.experts((slice(None),) * dim + (slice(start, stop),))
    return weight.dequantize().narrow(dim, start, max(stop - start, 0))


def _view(func: Any, args: Any, kwargs: Any, part: Tensor) -> Tensor:
    return return_and_correct_aliasing(func, args, kwargs, part) if isinstance(part, GroupTensor) else part


@implements([aten.slice.Tensor])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    def part(w: GroupTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
        if step != 1:
            return w.dequantize()[(slice(None),) * (dim % w.dim()) + (slice(start, end, step),)]
        return _narrowed(w, dim, 0 if start is None else start, w.shape[dim] if end is None else end)

    with torch.inference_mode(False):
        return _view(func, args, kwargs, part(*args, **kwargs))


@implements([aten.split.Tensor, aten.split_with_sizes.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> list[Tensor]:
    def parts(w: GroupTensor, sizes: int | list[int], dim: int = 0) -> list[Tensor]:
        total = w.shape[dim]
        each = [min(sizes, total - i) for i in range(0, total, sizes)] if isinstance(sizes, int) else sizes
        ends = itertools.accumulate(each)
        return [_narrowed(w, dim, end - size, end) for size, end in zip(each, ends, strict=True)]

    with torch.inference_mode(False):
        return parts(*args, **kwargs)


@implements([aten.select.int])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    weight, dim, index = args
    dim %= weight.dim()
    with torch.inference_mode(False):
        stacked = dim < weight.dim() - 2 and weight.view_as is None
        part = weight.experts((slice(None),) * dim + (index,)) if stacked else weight.dequantize().select(dim, index)
    return _view(func, args, kwargs, part)


@implements([aten.squeeze.default, aten.squeeze.dim])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    weight, *given = args
    dims = [d % weight.dim() for d in given] or [d for d in range(weight.dim()) if weight.shape[d] == 1]
    if weight.view_as is not None or any(d > weight.dim() - 3 for d in dims):
        raise NotImplementedError(f"{weight!r}: only dimensions in front of the matrices' can be removed, not {dims}")
    for dim in sorted(dims, reverse=True):
        weight = weight.select(dim, 0) if weight.shape[dim] == 1 else weight
    return weight


@implements([aten.unbind.int])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> list[Tensor]:
    weight, dim = args[0], args[1] if len(args) > 1 else 0
    return [weight.select(dim, i) for i in range(weight.shape[dim])]


@implements([aten.index.Tensor])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    weight, numbers = args
    lead = weight.dim() - 2
    if weight.view_as is None and len(numbers) <= lead and all(n is None or n.dtype != torch.bool for n in numbers):
        return weight.experts(tuple(slice(None) if n is None else n for n in numbers))
    return weight.dequantize()[tuple(slice(None) if n is None else n for n in numbers)]


_codes, _scale, _zero_point = GroupTensor.codes, attrgetter("scale"), attrgetter("zero_point")


def _alike(weights: Any) -> str | None:
    """Why weights cannot become one, or None."""
    first = weights[0]
    if not all(isinstance(w, GroupTensor) for w in weights):
        return "some are quantized and some are not"
    if any(w.view_as is not None for w in weights):
        return "some are no matrices"
    same = ("group_size", "in_features", "transposed", "dtype")
    for w in weights:
        if type(w) is not type(first) or any(getattr(w, n) != getattr(first, n) for n in same):
            return f"they differ: {first!r} and {w!r}"
        if (w.perm is None) != (first.perm is None) or (w.perm is not None and not torch.equal(w.perm, first.perm)):
            return "their columns are in different orders, and one weight has one order"
    return None


@implements([aten.stack.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    weights, dim = args[0], args[1] if len(args) > 1 else 0
    why = _alike(weights) or (None if len({w.shape for w in weights}) == 1 else "their shapes differ")
    if why is None and dim % (weights[0].dim() + 1) > weights[0].dim() - 2:
        why = f"dimension {dim} is not in front of the matrices'"
    if why is not None:
        raise ValueError(f"quantized weights cannot be stacked: {why}")
    names = [n for n in ("qdata", "scale_zero", "high_plane") if getattr(weights[0], n) is not None]
    return weights[0].replace(**{n: torch.stack([getattr(w, n) for w in weights], dim) for n in names})


@implements([aten.cat.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    weights, dim = args[0], args[1] if len(args) > 1 else 0
    first, why = weights[0], _alike(weights)
    dim %= first.dim()
    rows = first.dim() - (1 if first.transposed else 2) if why is None else 0
    if why is None and dim > first.dim() - 3 and dim != rows:
        why = "only their output features can be joined"
    if why is not None:
        raise ValueError(f"quantized weights cannot be concatenated: {why}")
    names = [n for n in ("qdata", "scale_zero", "high_plane") if getattr(first, n) is not None]
    if dim != rows:
        return first.replace(**{n: torch.cat([getattr(w, n) for w in weights], dim) for n in names})
    if all(w.out_features % TILE_ROWS == 0 for w in weights[:-1]):
        inner = {n: torch.cat([getattr(w, n) for w in weights], -3) for n in names}
        return first.replace(**inner, out_features=sum(w.out_features for w in weights))
    parts = (torch.cat([f(w) for w in weights], -2) for f in (_codes, _scale, _zero_point))
    return type(first).from_codes(*parts, dtype=first.dtype, perm=first.perm, transposed=first.transposed)


def _on_dense(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Operators that have no kernel for packed codes: the same operator on the weight they stand for."""
    dense = torch.utils._pytree.tree_map_only(GroupTensor, lambda w: w.dequantize(), (args, kwargs or {}))
    return func(*dense[0], **dense[1])


def _grouped_arguments(x: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    return x, weight, offs, bias is None and out_dtype is None


def _grouped_mm(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """Rows [rows, K], sorted by expert, by a stack [E, K, N]: from its codes, if they are packed along K."""
    names = {"mat_a": "x", "mat_b": "weight", "self": "x", "mat2": "weight", "input": "x"}
    x, weight, offsets, plain = _grouped_arguments(*args, **{names.get(n, n): v for n, v in (kwargs or {}).items()})
    along_k = isinstance(weight, GroupTensor) and weight.transposed and weight.qdata.dim() == 4
    if along_k and plain and offsets is not None and x.dim() == 2 and not isinstance(x, GroupTensor):
        return ops.grouped_linear(x, *weight.packed(), offsets)
    return _on_dense(func, types, args, kwargs)


# As functions too, so that autograd meets the dense weight, not the subclass.
implements_torch_function(
    [
        torch.einsum,
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
    ]
)(_on_dense)
implements([aten.convolution.default, aten.baddbmm.default, aten.mv.default])(_on_dense)
# torch.nn.functional.grouped_mm hands its work to the builtin; torch.compile meets it itself.
_functions = [torch.nn.functional.grouped_mm, torch._grouped_mm, aten._grouped_mm, aten._grouped_mm.default]
implements_torch_function(_functions)(_grouped_mm)
implements([aten._grouped_mm.default])(_grouped_mm)
GroupTensor.implemented_by_name = {"transformers::grouped_mm_fallback": _grouped_mm}


@implements([aten._to_copy.default, aten.to.dtype_layout])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    # The base class keeps the dtype whatever is asked for.
    weight = args[0]
    device, in_background = kwargs.get("device") or weight.device, kwargs.get("non_blocking", False)
    moved = weight._apply_fn_to_data(lambda t: t.to(device, non_blocking=in_background, copy=True))
    return return_and_correct_aliasing(func, args, kwargs, moved.replace(dtype=kwargs.get("dtype") or weight.dtype))


def _kind(value: Any) -> str:
    return repr(value) if isinstance(value, GroupTensor) else f"a {value.dtype} tensor {tuple(value.shape)}"


def _layout(weight: GroupTensor) -> tuple[Any, ...]:
    names, attributes = weight.__tensor_flatten__()
    return weight.shape, names, attributes


@implements([aten.copy_.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    target, source = args[:2]
    if not isinstance(target, GroupTensor):
        return target.copy_(source.dequantize(target.dtype))
    if type(target) is not type(source) or _layout(target) != _layout(source):
        raise ValueError(
            f"cannot copy {_kind(source)} into {target!r}: a quantized weight takes one of the same kind and groups"
        )
    for name in target.__tensor_flatten__()[0]:
        inner = getattr(target, name)
        inner.copy_(getattr(source, name))
        if not inner.is_inference():
            # Below autograd nothing counts versions, by which a kernel knows that its converted weight is out of date.
            torch.autograd.graph.increment_version(inner)
    return target


_alias = GroupTensor._ATEN_OP_TABLE[GroupTensor][aten.detach.default]


@implements([aten.detach.default, aten.alias.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    with torch.inference_mode(False):  # as for transposed views
        return _alias(func, types, args, kwargs)
