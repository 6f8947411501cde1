"""The operators a quantized weight computes with, as `torch.library` sees them: schema, shape function, gradient.

    gptq_ao::linear       x·Wᵀ + bias
    gptq_ao::dequantize   W

They take plain tensors and numbers, so torch.compile and torch.export keep each as one node, and the choice of a kernel
(by device, dtype and number of rows) happens inside, at run time. Registered through `Library.define`, whose call is
cheaper than that of the `custom_op` decorator. Triton is imported when its kernels run: this file needs torch alone.
"""

from typing import Any

import torch
from torch import Tensor

from gptq_ao.kernels import cpu, cuda, reference

__all__ = ["dequantize", "kernel_name", "linear"]

_PACKED = (
    "Tensor qdata, Tensor scale_zero, Tensor? high_plane, Tensor? perm, "
    "int bits, int group_size, int out_features, int in_features"
)
_library = torch.library.Library("gptq_ao", "DEF")
_library.define(f"linear(Tensor x, {_PACKED}, Tensor? bias=None) -> Tensor")
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


def kernel_name(
    device: torch.device, dtype: torch.dtype, bits: int, group_size: int, in_features: int, stacked: bool
) -> str:
    """What `linear` runs on such a weight, in words. `stacked`: it is a stack of matrices."""
    rows, name = 0, ""
    if device.type == "cpu" and not stacked:
        rows, name = cpu.max_rows(dtype, bits, group_size), "cpu int4"
    elif device.type == "cuda":
        rows, name = cuda.max_rows(device, dtype, bits, group_size, in_features), "triton"
    return f"{name} up to {rows} rows, else dequantize + matmul" if rows else "dequantize + matmul"


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

linear = torch.ops.gptq_ao.linear.default
dequantize = torch.ops.gptq_ao.dequantize.default
