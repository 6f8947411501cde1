"""Operators that a compiled step of decoding uses, as `torch.library` sees them; `gptq_ao.inference` puts them there.

    gptq_ao::rms_norm      x / √(mean(x²) + eps) · (offset + weight)
    gptq_ao::gated         activation(gate)·x
    gptq_ao::linear_add    x·Wᵀ + bias + residual
    gptq_ao::attend_once   attention of one new token for each sequence

For inference: none has a gradient. Elsewhere than on a GPU they are what `reference.py` says. Names and arguments never
change, as compiled programs contain them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptq_ao.kernels import cuda_decoding, ops, reference
from gptq_ao.kernels.packed import Packed

__all__ = ["attend_once", "gated", "linear_add", "rms_norm"]

_library = torch.library.Library("gptq_ao", "FRAGMENT")
_library.define("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor")
_library.define("gated(Tensor gate, Tensor x, str activation) -> Tensor")
_library.define(f"linear_add(Tensor x, {ops.PACKED}, Tensor? bias, Tensor residual) -> Tensor")
_library.define("attend_once(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor")


def _there(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function on the device of its first argument: a kernel is launched on the current one."""

    def run(x: Tensor, *more: Any) -> Tensor:
        with torch.cuda.device(x.device):
            return function(x, *more)

    return run


def _linear_add(x: Tensor, *more: Any) -> Tensor:
    *packed, bias, residual = more
    y: Tensor = ops.linear(x, *packed, bias)
    return y + residual


def _linear_add_cuda(x: Tensor, *more: Any) -> Tensor:
    *packed, bias, residual = more
    return cuda_decoding.linear_add(x, Packed(*packed), bias, residual)


_library.impl("rms_norm", reference.rms_norm, "CompositeExplicitAutograd")
_library.impl("rms_norm", _there(cuda_decoding.rms_norm), "CUDA")
_library.impl("gated", reference.gated, "CompositeExplicitAutograd")
_library.impl("gated", _there(cuda_decoding.gated), "CUDA")
_library.impl("linear_add", _linear_add, "CompositeExplicitAutograd")
_library.impl("linear_add", _there(_linear_add_cuda), "CUDA")
_library.impl("attend_once", reference.attend_once, "CompositeExplicitAutograd")
_library.impl("attend_once", _there(cuda_decoding.attend_once), "CUDA")


@torch.library.register_fake("gptq_ao::rms_norm", lib=_library)
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("gptq_ao::gated", lib=_library)
def _(gate: Tensor, x: Tensor, _: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("gptq_ao::linear_add", lib=_library)
def _(x: Tensor, *more: Any) -> Tensor:
    return x.new_empty(more[-1].shape)


@torch.library.register_fake("gptq_ao::attend_once", lib=_library)
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


rms_norm = torch.ops.gptq_ao.rms_norm.default
gated = torch.ops.gptq_ao.gated.default
linear_add = torch.ops.gptq_ao.linear_add.default
attend_once = torch.ops.gptq_ao.attend_once.default
