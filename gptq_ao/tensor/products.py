"""Products with a quantized weight: by its codes where the columns that share a scale are summed over, else dense."""

from typing import Any

import torch
from torch import Tensor

from gptq_ao.kernels import ops
from gptq_ao.tensor.group_tensor import GroupTensor
from gptq_ao.tensor.table import aten, implements, implements_torch_function


def _times_transposed(x: Tensor, weight: GroupTensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + bias for a weight [N, K] (or a stack of them); x may be of another floating dtype than the weight."""
    # Autocast casts the arguments of torch's own operators; `ops.linear` is ours, so its x is cast here.
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if not x.is_floating_point() or x.shape[-1] != weight.in_features:
        raise ValueError(f"a product with {weight!r} cannot take {x.dtype} {tuple(x.shape)}")
    return ops.linear(x, *weight.packed(), None if bias is None else bias.to(x.dtype))


# F.linear may be given any of its arguments by keyword: Python's own call rules sort them out.
def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


@implements([aten.linear.default])
@implements_torch_function([torch.nn.functional.linear, aten.linear.default])
def linear(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """[..., N] in the dtype of x [..., K] (or autocast's), from a weight [N, K] and a bias [N] or None."""
    x, weight, bias = _linear_arguments(*args, **kwargs)
    # The handler runs if any argument is quantized, so x or the bias may be the quantized one.
    if not isinstance(weight, GroupTensor) or isinstance(x, GroupTensor) or isinstance(bias, GroupTensor):
        kinds = tuple(type(a).__name__ for a in (x, weight, bias))
        raise NotImplementedError(f"linear takes a quantized weight only, got {kinds}")
    # Not `weight.shape`, which for a subclass goes through its table of functions, some microseconds each time.
    columns = weight.out_features if weight.transposed else weight.in_features
    # `qdata` of one matrix has three dimensions (see `codes/tiles.py`), that of a stack has more.
    if weight.qdata.dim() != 3 or weight.view_shape is not None or x.shape[-1] != columns:
        raise ValueError(f"linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit")
    # The kernel sums over in_features, but a transposed weight is multiplied along out_features: only dense values do
    # that.
    if weight.transposed:
        return torch.nn.functional.linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))
    return _times_transposed(x, weight, bias)


@implements([aten.mm.default, aten.bmm.default])
def mm(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """[..., M, N] from x [..., M, K] and y [..., K, N]; x, y or both are quantized."""
    x, y = args
    # [K, N] is the transposed view of codes [N, K], so x·y is the product that the kernel knows, x·Wᵀ.
    if isinstance(y, GroupTensor) and y.transposed and not isinstance(x, GroupTensor):
        # One matrix, expanded over a batch: a product of all rows with that matrix.
        return _times_transposed(x, y.expanded(()) if y.dim() == 3 and y.qdata.stride(0) == 0 else y)
    if isinstance(x, GroupTensor):
        return torch.matmul(x.dequantize(y.dtype), y.dequantize() if isinstance(y, GroupTensor) else y)
    return torch.matmul(x, y.dequantize(x.dtype))


@implements([aten.addmm.default])
def addmm(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """[M, N] from a bias, x [M, K] and y [K, N]; x, y or both are quantized. Codes are read if the bias is [N]."""
    bias, x, y = args
    # kwargs are `alpha` and `beta`, factors that the kernel does not apply.
    if not kwargs and bias.dim() == 1 and isinstance(y, GroupTensor) and y.transposed:
        return _times_transposed(x, y, bias)
    dense = (t.dequantize(x.dtype) if isinstance(t, GroupTensor) else t for t in (x, y))
    return torch.addmm(bias, *dense, **kwargs)


# As functions too, so that autograd meets the dense weight, not the subclass.
@implements_torch_function(
    [
        torch.einsum,
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
    ]
)
def on_dense(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Functions that have no kernel for packed codes: the same on the weight they stand for."""
    dense = torch.utils._pytree.tree_map_only(GroupTensor, lambda w: w.dequantize(), (args, kwargs or {}))
    return func(*dense[0], **dense[1])


def _grouped_mm_arguments(x: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    # The kernel has no bias and gives the dtype of x: anything else is left to the dense operator.
    return x, weight, offs, bias is None and out_dtype is None


# torch.nn.functional.grouped_mm hands its work to the builtin; torch.compile meets it itself.
@implements_torch_function(
    [torch.nn.functional.grouped_mm, torch._grouped_mm, aten._grouped_mm, aten._grouped_mm.default]
)
@implements([aten._grouped_mm.default])
def grouped_mm(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """[rows, N] from x [rows, K], sorted by expert, and a stack [E, K, N]: by its codes, if they are packed along K."""
    # The functions that are registered above call the same two arguments by different names.
    names = {"mat_a": "x", "mat_b": "weight", "self": "x", "mat2": "weight", "input": "x"}
    x, weight, offsets, plain = _grouped_mm_arguments(*args, **{names.get(n, n): v for n, v in (kwargs or {}).items()})
    # A stack packed as [E, N, K] (four dimensions of tiles) and seen as [E, K, N].
    along_k = isinstance(weight, GroupTensor) and weight.transposed and weight.qdata.dim() == 4
    if along_k and plain and offsets is not None and x.dim() == 2 and not isinstance(x, GroupTensor):
        return ops.grouped_linear(x, *weight.packed(), offsets)
    return on_dense(func, types, args, kwargs)


# By name: transformers registers this operator when it is imported, which may be later or never.
GroupTensor.implemented_by_name["transformers::grouped_mm_fallback"] = grouped_mm
