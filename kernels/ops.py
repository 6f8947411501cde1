"""The operators a quantized weight computes with, as `torch.library` sees them: schema, shape function, gradient.

    gptq_ao::linear           x·Wᵀ + bias
    gptq_ao::grouped_linear   x·Wᵀ by a stack of experts, where every row of x belongs to one of them
    gptq_ao::dequantize       W

They take plain tensors and numbers, so torch.compile and torch.export keep each as one node, and the choice of a kernel
(by device, dtype and number of rows) happens inside, at run time. Registered through `Library.define`, whose call is
cheaper than that of the `custom_op` decorator. Triton is imported when its kernels run: this file needs torch alone.

Names and arguments never change, as exported programs contain them. "Grouped" is torch's word for rows that are sorted
by expert (`grouped_mm`); everywhere else here a group is columns that share a scale.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptq_ao.kernels import cpu, cuda, cuda_experts, reference
from gptq_ao.kernels.packed import Packed

__all__ = ["dequantize", "grouped_linear", "grouped_linear_backward", "kernel_name", "linear"]

_PACKED = (
    "Tensor qdata, Tensor scale_zero, Tensor? high_plane, Tensor? perm, "
    "int bits, int group_size, int out_features, int in_features"
)
_library = torch.library.Library("gptq_ao", "DEF")
_library.define(f"linear(Tensor x, {_PACKED}, Tensor? bias=None) -> Tensor")
_library.define(f"grouped_linear(Tensor x, {_PACKED}, Tensor offsets) -> Tensor")
_library.define(f"grouped_linear_backward(Tensor grad, {_PACKED}, Tensor offsets) -> Tensor")
_library.define(f"dequantize({_PACKED}, ScalarType dtype) -> Tensor")


def _of_packed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorates a function of x, a `Packed`, and a bias or offsets, for `torch.library`, which knows no tuples: an
    operator is given the fields one by one."""

    def flat(
        x: Tensor,
        qdata: Tensor,
        scale_zero: Tensor,
        high_plane: Tensor | None,
        perm: Tensor | None,
        bits: int,
        group_size: int,
        out_features: int,
        in_features: int,
        last: Tensor | None = None,
    ) -> Tensor:
        packed = Packed(qdata, scale_zero, high_plane, perm, bits, group_size, out_features, in_features)
        return function(x, packed, last)

    return flat


@_of_packed
def _linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    if x.is_cpu and cpu.supports(x, packed):
        return cpu.linear(x, packed, bias)
    return reference.linear(x, packed, bias)


@_of_packed
def _linear_cuda(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    # A kernel is launched on the current device, and it takes longer to set it than to look.
    if x.get_device() == torch.cuda.current_device():
        return cuda.linear(x, packed, bias)
    with torch.cuda.device(x.device):
        return cuda.linear(x, packed, bias)


@_of_packed
def _linear_experts(x: Tensor, packed: Packed, offsets: Tensor) -> Tensor:
    return (cpu if x.is_cpu else reference).linear_experts(x, packed, offsets)


@_of_packed
def _linear_experts_cuda(x: Tensor, packed: Packed, offsets: Tensor) -> Tensor:
    with torch.cuda.device(x.device):
        return cuda_experts.linear(x, packed, offsets)


@_of_packed
def _linear_experts_backward(grad: Tensor, packed: Packed, offsets: Tensor) -> Tensor:
    """dX = dY·W, one dequantized expert at a time. An operator, as the loop depends on the values of `offsets`."""

    def product(rows: Tensor, expert: int) -> Tensor:
        return rows @ dequantize(*packed.expert(expert), rows.dtype)

    return reference.by_expert(grad, offsets, packed.in_features, product)


def _dequantize(*arguments: Any) -> Tensor:
    *fields, dtype = arguments
    return reference.dequantize(Packed(*fields), dtype)


def _dequantize_cuda(qdata: Tensor, *more: Any) -> Tensor:
    *fields, dtype = more
    with torch.cuda.device(qdata.device):
        return cuda.dequantize(Packed(qdata, *fields), dtype)


def kernel_name(
    device: torch.device, dtype: torch.dtype, bits: int, group_size: int, in_features: int, stacked: bool
) -> str:
    """In words: what `linear` runs on such a weight, or `grouped_linear` on such a stack."""
    rows, name = 0, ""
    if device.type == "cpu":
        rows, name = cpu.max_rows(dtype, bits, group_size), "cpu int4"
    elif device.type == "cuda":
        rows, name = cuda.max_rows(device, dtype, bits, group_size, in_features), "triton"
    each = " per expert" if stacked else ""
    return f"{name} up to {rows} rows{each}, else dequantize + matmul" if rows else "dequantize + matmul"


_library.impl("linear", _linear, "CompositeExplicitAutograd")
_library.impl("linear", _linear_cuda, "CUDA")
_library.impl("grouped_linear", _linear_experts, "CompositeExplicitAutograd")
_library.impl("grouped_linear", _linear_experts_cuda, "CUDA")
_library.impl("grouped_linear_backward", _linear_experts_backward, "CompositeExplicitAutograd")
_library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
_library.impl("dequantize", _dequantize_cuda, "CUDA")


@torch.library.register_fake("gptq_ao::linear", lib=_library)
@_of_packed
def _(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    k = packed.in_features
    torch._check(x.shape[-1] == k, lambda: f"x {tuple(x.shape)} does not end in {k} features")
    return x.new_empty(*x.shape[:-1], packed.out_features)


@torch.library.register_fake("gptq_ao::grouped_linear", lib=_library)
@_of_packed
def _(x: Tensor, packed: Packed, offsets: Tensor) -> Tensor:
    reference.check_experts(x, packed, offsets)
    return x.new_empty(x.shape[0], packed.out_features)


@torch.library.register_fake("gptq_ao::grouped_linear_backward", lib=_library)
@_of_packed
def _(grad: Tensor, packed: Packed, offsets: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], packed.in_features)


@torch.library.register_fake("gptq_ao::dequantize", lib=_library)
def _(qdata: Tensor, *more: Any) -> Tensor:
    *_, out_features, in_features, dtype = more
    return qdata.new_empty(*qdata.shape[:-3], out_features, in_features, dtype=dtype)


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # x and the eight fields of `Packed`. A bias may follow, and is not needed for any gradient.
    _, qdata, scale_zero, high_plane, perm, *ctx.numbers = inputs[:9]
    ctx.save_for_backward(qdata, scale_zero, high_plane, perm)


def _input_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dX = dY·W, and the sum of dY's rows. Codes are integers: the weight itself has no gradient."""
    needed = ctx.needs_input_grad  # as many as inputs were given: a bias is optional
    dx = dbias = None
    if needed[0]:
        dx = grad @ torch.ops.gptq_ao.dequantize(*ctx.saved_tensors, *ctx.numbers, grad.dtype)
    if any(needed[9:]):
        dbias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return (dx, *([None] * 8), dbias)[: len(needed)]


torch.library.register_autograd("gptq_ao::linear", _input_gradient, setup_context=_save_weight, lib=_library)


def _save_stack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qdata, scale_zero, high_plane, perm, *ctx.numbers, offsets = inputs
    ctx.save_for_backward(qdata, scale_zero, high_plane, perm, offsets)


def _experts_input_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *packed, offsets = ctx.saved_tensors
    dx = None
    if ctx.needs_input_grad[0]:
        dx = grouped_linear_backward(grad, *packed, *ctx.numbers, offsets)
    return (dx, *([None] * 9))


torch.library.register_autograd(
    "gptq_ao::grouped_linear", _experts_input_gradient, setup_context=_save_stack, lib=_library
)

linear = torch.ops.gptq_ao.linear.default
grouped_linear = torch.ops.gptq_ao.grouped_linear.default
grouped_linear_backward = torch.ops.gptq_ao.grouped_linear_backward.default
dequantize = torch.ops.gptq_ao.dequantize.default
