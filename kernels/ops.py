"""The operators a quantized weight computes with, as `torch.library` sees them: schema, shape function, gradient.

    gptq_ao::linear           x·Wᵀ + bias
    gptq_ao::grouped_linear   x·Wᵀ by a stack of experts, of which each has its own rows of x
    gptq_ao::dequantize       W

They take plain tensors and numbers, so torch.compile and torch.export keep each as one node, and the choice of a kernel
(by device, dtype and number of rows) happens inside, at run time. Registered through `Library.define`, whose call is
cheaper than that of the `custom_op` decorator. Triton is imported when its kernels run: this file needs torch alone.
"""

from typing import Any

import torch
from torch import Tensor

from gptq_ao.kernels import cpu, cuda, cuda_experts, reference

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


def _linear(
    x: Tensor,
    qdata: Tensor,
    scale_zero: Tensor,
    high_plane: Tensor | None,
    perm: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    if x.device.type == "cpu" and cpu.supports(x, qdata, bits, group_size):
        y = cpu.linear(x, qdata, scale_zero, perm, group_size, out_features, in_features)
        return y if bias is None else y + bias
    return reference.linear(x, qdata, scale_zero, high_plane, perm, bits, out_features, in_features, bias)


def _linear_cuda(x: Tensor, *arguments: Any) -> Tensor:
    # A kernel is launched on the current device, and it takes longer to set it than to look.
    if x.get_device() == torch.cuda.current_device():
        return cuda.linear(x, *arguments)
    with torch.cuda.device(x.device):
        return cuda.linear(x, *arguments)


def _grouped_linear(
    x: Tensor,
    qdata: Tensor,
    scale_zero: Tensor,
    high_plane: Tensor | None,
    perm: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    offsets: Tensor,
) -> Tensor:
    packed = (qdata, scale_zero, high_plane, perm, bits)
    if x.device.type == "cpu":
        return cpu.grouped_linear(x, *packed, group_size, out_features, in_features, offsets)
    return reference.grouped_linear(x, *packed, out_features, in_features, offsets)


def _grouped_linear_cuda(x: Tensor, *arguments: Any) -> Tensor:
    with torch.cuda.device(x.device):
        return cuda_experts.linear(x, *arguments)


def _grouped_linear_backward(
    grad: Tensor,
    qdata: Tensor,
    scale_zero: Tensor,
    high_plane: Tensor | None,
    perm: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    offsets: Tensor,
) -> Tensor:
    """dX = dY·W, one dequantized expert at a time. An operator, as the loop depends on the values of `offsets`."""

    def product(rows: Tensor, expert: int) -> Tensor:
        high = None if high_plane is None else high_plane[expert]
        numbers = (bits, group_size, out_features, in_features)
        return rows @ dequantize(qdata[expert], scale_zero[expert], high, perm, *numbers, rows.dtype)

    return reference.by_expert(grad, offsets, in_features, product)


def kernel_name(
    device: torch.device, dtype: torch.dtype, bits: int, group_size: int, in_features: int, stacked: bool
) -> str:
    """What `linear`, or `grouped_linear` if it is a stack, runs on such a weight, in words."""
    rows, name = 0, ""
    if device.type == "cpu":
        rows, name = cpu.max_rows(dtype, bits, group_size), "cpu int4"
    elif device.type == "cuda":
        rows, name = cuda.max_rows(device, dtype, bits, group_size, in_features), "triton"
    each = " per expert" if stacked else ""
    return f"{name} up to {rows} rows{each}, else dequantize + matmul" if rows else "dequantize + matmul"


def _dequantize(
    qdata: Tensor,
    scale_zero: Tensor,
    high_plane: Tensor | None,
    perm: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return reference.dequantize(qdata, scale_zero, high_plane, perm, bits, out_features, in_features, dtype)


def _dequantize_cuda(qdata: Tensor, *arguments: Any) -> Tensor:
    with torch.cuda.device(qdata.device):
        return cuda.dequantize(qdata, *arguments)


_library.impl("linear", _linear, "CompositeExplicitAutograd")
_library.impl("linear", _linear_cuda, "CUDA")
_library.impl("grouped_linear", _grouped_linear, "CompositeExplicitAutograd")
_library.impl("grouped_linear", _grouped_linear_cuda, "CUDA")
_library.impl("grouped_linear_backward", _grouped_linear_backward, "CompositeExplicitAutograd")
_library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
_library.impl("dequantize", _dequantize_cuda, "CUDA")


@torch.library.register_fake("gptq_ao::linear", lib=_library)
def _(
    x: Tensor,
    qdata: Tensor,
    scale_zero: Tensor,
    high_plane: Tensor | None,
    perm: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    torch._check(x.shape[-1] == in_features, lambda: f"x {tuple(x.shape)} does not end in {in_features} features")
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("gptq_ao::grouped_linear", lib=_library)
def _(
    x: Tensor,
    qdata: Tensor,
    scale_zero: Tensor,
    high_plane: Tensor | None,
    perm: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    offsets: Tensor,
) -> Tensor:
    reference.check_grouped(x, qdata, in_features, offsets)
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake("gptq_ao::grouped_linear_backward", lib=_library)
def _(grad: Tensor, *arguments: Any) -> Tensor:
    in_features = arguments[7]
    return grad.new_empty(grad.shape[0], in_features)


@torch.library.register_fake("gptq_ao::dequantize", lib=_library)
def _(
    qdata: Tensor,
    scale_zero: Tensor,
    high_plane: Tensor | None,
    perm: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return qdata.new_empty(*qdata.shape[:-3], out_features, in_features, dtype=dtype)


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
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


def _grouped_input_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *packed, offsets = ctx.saved_tensors
    dx = None
    if ctx.needs_input_grad[0]:
        dx = grouped_linear_backward(grad, *packed, *ctx.numbers, offsets)
    return (dx, *([None] * 9))


torch.library.register_autograd(
    "gptq_ao::grouped_linear", _grouped_input_gradient, setup_context=_save_stack, lib=_library
)

linear = torch.ops.gptq_ao.linear.default
grouped_linear = torch.ops.gptq_ao.grouped_linear.default
grouped_linear_backward = torch.ops.gptq_ao.grouped_linear_backward.default
dequantize = torch.ops.gptq_ao.dequantize.default
