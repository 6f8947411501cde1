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
from torch.utils.flop_counter import register_flop_formula

from gptq_ao.kernels import cpu, cuda, cuda_experts, reference
from gptq_ao.kernels.derivatives import register_derivatives
from gptq_ao.kernels.packed import Packed
from gptq_ao.kernels.tuning import many_rows

__all__ = ["PACKED", "dequantize", "grouped_linear", "grouped_linear_backward", "kernel_name", "linear"]

# What stands for a weight in a schema.
PACKED = (
    "Tensor qdata, Tensor scale_zero, Tensor? high_plane, Tensor? perm, "
    "int bits, int group_size, int out_features, int in_features"
)
_library = torch.library.Library("gptq_ao", "DEF")
_library.define(f"linear(Tensor x, {PACKED}, Tensor? bias=None) -> Tensor")
_library.define(f"grouped_linear(Tensor x, {PACKED}, Tensor offsets) -> Tensor")
_library.define(f"grouped_linear_backward(Tensor grad, {PACKED}, Tensor offsets) -> Tensor")
_library.define(f"dequantize({PACKED}, ScalarType dtype) -> Tensor")


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
    packed = Packed(qdata, *fields)
    if qdata.get_device() == torch.cuda.current_device():
        return cuda.dequantize(packed, dtype)
    with torch.cuda.device(qdata.device):
        return cuda.dequantize(packed, dtype)


def kernel_name(
    device: torch.device, dtype: torch.dtype, bits: int, group_size: int, in_features: int, stacked: bool
) -> str:
    """In words: what `linear` runs on such a weight, or `grouped_linear` on such a stack."""
    rows, name = 0, ""
    if device.type == "cpu":
        rows, name = cpu.max_rows(dtype, bits, group_size), "cpu int4"
    elif device.type == "cuda":
        rows, name = cuda.max_rows(device, dtype, bits, group_size, in_features), "triton"
        if not stacked and cuda.reads_many_rows(device, dtype, bits, group_size, in_features):
            return f"triton up to {many_rows.FEWEST_ROWS - 1} rows, gluon for more"
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


def _keep_weight(ctx: Any, inputs: tuple[Any, ...]) -> None:
    # x and the eight fields of `Packed`. A bias or offsets may follow.
    x, qdata, scale_zero, high_plane, perm, *ctx.numbers = inputs[:9]
    ctx.count, ctx.rows = len(inputs), x.shape[:-1]
    # A bias is not needed for any derivative. Offsets are, and they are integers.
    offsets = [t for t in inputs[9:] if t is not None and not t.is_floating_point()]
    ctx.save_for_backward(qdata, scale_zero, high_plane, perm, *offsets)
    ctx.save_for_forward(qdata, scale_zero, high_plane, perm, *offsets)


def _weight(ctx: Any) -> tuple[Any, ...]:
    """The fields of `Packed`, and what else was kept."""
    saved = ctx.saved_tensors  # asked for once: `torch.utils.checkpoint` gives it once
    return (*saved[:4], *ctx.numbers, *saved[4:])


def _linear_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dX = dY·W, and the sum of dY's rows. Codes are integers: the weight itself has no gradient."""
    needed = ctx.needs_input_grad[1:]
    dx = dbias = None
    if needed[0]:
        dx = grad @ dequantize(*_weight(ctx), grad.dtype)
    if any(needed[9:]):
        dbias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return (dx, *([None] * 8), dbias)[: ctx.count]


# The products are linear in x (and in the bias): a tangent takes the place of what it is the tangent of.
def _linear_tangent(ctx: Any, x: Tensor | None, *more: Tensor | None) -> Tensor:
    bias = more[8] if len(more) > 8 else None
    if x is None:
        assert bias is not None
        return bias.expand(*ctx.rows, -1)
    return linear(x, *_weight(ctx), bias)


def _experts_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (grouped_linear_backward(grad, *_weight(ctx)), *([None] * 9))


def _experts_tangent(ctx: Any, x: Tensor, *_: None) -> Tensor:
    return grouped_linear(x, *_weight(ctx))


# The gradient of a product is a linear map as well, and the product is that map's gradient.
def _experts_gradient_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (grouped_linear(grad, *_weight(ctx)), *([None] * 9))


def _experts_gradient_tangent(ctx: Any, grad: Tensor, *_: None) -> Tensor:
    return grouped_linear_backward(grad, *_weight(ctx))


for _name, _gradient, _tangent in (
    ("linear", _linear_gradient, _linear_tangent),
    ("grouped_linear", _experts_gradient, _experts_tangent),
    ("grouped_linear_backward", _experts_gradient_gradient, _experts_gradient_tangent),
):
    register_derivatives(_library, _name, setup_context=_keep_weight, gradient=_gradient, tangent=_tangent)


linear = torch.ops.gptq_ao.linear.default
grouped_linear = torch.ops.gptq_ao.grouped_linear.default
grouped_linear_backward = torch.ops.gptq_ao.grouped_linear_backward.default
dequantize = torch.ops.gptq_ao.dequantize.default

for _operator in (linear, grouped_linear, grouped_linear_backward, dequantize):

    @torch.library.register_vmap(_operator._schema.name, lib=_library)
    def _(info: Any, dims: tuple[Any, ...], *arguments: Any, operator: Any = _operator) -> tuple[Tensor, int]:
        # x may have any dimensions in front. Of anything else that differs, one result is computed after the other.
        if operator is linear and all(d is None for d in dims[1:]):
            return operator(arguments[0].movedim(dims[0], 0), *arguments[1:]), 0
        batch = (
            [a if d is None else a.select(d, i) for a, d in zip(arguments, dims, strict=True)]
            for i in range(info.batch_size)
        )
        return torch.stack([operator(*one) for one in batch]), 0


@register_flop_formula(
    [torch.ops.gptq_ao.linear, torch.ops.gptq_ao.grouped_linear, torch.ops.gptq_ao.grouped_linear_backward]
)
def _flops(x: torch.Size, *packed: Any, out_shape: Any = None, **_: Any) -> int:
    """Of a product by rows `x`, for `FlopCounterMode`: those of a dense weight. What unpacking takes is not counted, as
    the counts are compared with what a device can multiply."""
    out_features, in_features = packed[6:8]
    flops: int = 2 * x[:-1].numel() * out_features * in_features
    return flops
