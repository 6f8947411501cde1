"""What the operators of `decoding.py` run on a CUDA device: the Triton kernels for few rows, else `reference.py`.

Kernels that were never run on this architecture are compared with the reference once, and not used if they are wrong.
"""

import functools

import torch
from torch import Tensor

from gptq_ao.kernels import cuda, reference
from gptq_ao.kernels.packed import Packed

__all__ = ["FEW_ROWS", "attend_once", "attends", "gated", "linear_add", "rms_norm", "runs"]

FEW_ROWS = 64  # of x. With more, what is between products takes longer than a launch
LONGEST_ROW = 2**14  # that one program normalizes
HALVES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (32, 64, 128, 256)
MOST_APART = 2**31  # elements of one sequence: what the kernel can count to
MOST_SEQUENCES = 2**16 - 1  # of one launch


def runs(x: Tensor) -> bool:
    """Whether there are kernels for so many rows, of this dtype and device, whatever the values."""
    few = 0 < x.shape[:-1].numel() <= FEW_ROWS and 0 < x.shape[-1] <= LONGEST_ROW
    return x.device.type == "cuda" and x.dtype in HALVES and few and _usable(x.device)


def attends(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether there is a kernel for `attend_once` with such tensors, whatever their values."""
    if q.device.type != "cuda" or q.dtype not in HALVES or not q.dtype == k.dtype == v.dtype:
        return False
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[2] == 1 and q.shape[3] in HEAD_DIMS
    fits = fits and q.shape[::3] == k.shape[::3] and min(*q.shape, *k.shape) > 0
    if not fits or q.shape[1] % k.shape[1] or q.shape[1] // k.shape[1] > 64:
        return False
    if mask is not None:
        fits = mask.dim() == 4 and mask.shape[1:] == (1, 1, k.shape[2]) and mask.shape[0] in (1, len(q))
        if not fits or mask.dtype not in (torch.bool, q.dtype):
            return False
    if not all(t.stride(3) == 1 and _span(t) < MOST_APART for t in (q, k, v)) or len(q) > MOST_SEQUENCES:
        return False
    return _usable(q.device)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """See `reference.rms_norm`."""
    if not runs(x) or weight.device != x.device:
        return reference.rms_norm(x, weight, eps, offset)
    from gptq_ao.kernels.triton.launch_around import launch_rms_norm

    return launch_rms_norm(_rows(x), weight.contiguous(), eps, offset).view(x.shape)


def gated(gate: Tensor, x: Tensor, activation: str) -> Tensor:
    """See `reference.gated`."""
    if not runs(x) or (gate.device, gate.dtype, gate.shape) != (x.device, x.dtype, x.shape):
        return reference.gated(gate, x, activation)
    from gptq_ao.kernels.triton.launch_around import launch_gated

    return launch_gated(_rows(gate), _rows(x), activation).view(x.shape)


def linear_add(x: Tensor, packed: Packed, bias: Tensor | None, residual: Tensor) -> Tensor:
    """See `reference.linear_add`."""
    rows = x.shape[:-1].numel()
    sizes = (packed.out_features, packed.in_features, packed.bits, packed.group_size)
    same = all(t.device == x.device and t.dtype == x.dtype for t in (residual, bias) if t is not None)
    few = same and 0 < rows <= FEW_ROWS and packed.perm is None and packed.is_contiguous()
    launch = cuda.few_rows(cuda.bucket(rows), *sizes, 1, x.dtype, x.get_device()) if few else None
    if launch is None or residual.shape != (*x.shape[:-1], packed.out_features):
        return cuda.linear(x, packed, bias) + residual
    bias = None if bias is None else bias.contiguous()
    return launch(x.contiguous(), packed, bias, residual=residual.contiguous())


def attend_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See `reference.attend_once`."""
    if not attends(q, k, v, mask):
        return reference.attend_once(q, k, v, mask, scale)
    from gptq_ao.kernels.triton.launch_attention import launch_attention

    return launch_attention(q, k, v, None if mask is None else mask[:, 0, 0], scale)


def _span(t: Tensor) -> int:
    """How far apart the first and the last element of a sequence's heads are."""
    return sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))


@functools.cache
def _usable(device: torch.device) -> bool:
    """Whether the kernels between products can be trusted on this device."""
    if not cuda.usable(device, 4):
        return False
    if torch.cuda.get_device_capability(device) in cuda.TESTED:
        return True
    from gptq_ao.kernels.triton.self_check import decoding_agrees

    return decoding_agrees(device)


def _rows(x: Tensor) -> Tensor:
    """[M, K], with a contiguous last dimension; x may be a part of the columns of something."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
