"""Whether the kernels compute what `kernels/reference.py` does, on a GPU on which they were never run."""

import warnings

import torch
from torch import Tensor

from gptq_ao.codes.tiles import pack_codes, pack_scale_zero
from gptq_ao.kernels import reference
from gptq_ao.kernels.packed import Packed
from gptq_ao.kernels.triton import dequantize
from gptq_ao.kernels.triton.launch import launch
from gptq_ao.kernels.triton.launch_experts import launch_experts
from gptq_ao.kernels.tuning import heuristics

__all__ = ["agree", "same_as_reference"]


def agree(device: torch.device, bits: int) -> bool:
    """`same_as_reference`; if not, or if they do not run at all, a warning says so."""
    capability = torch.cuda.get_device_capability(device)[0]
    try:
        same, found = same_as_reference(device, bits, torch.bfloat16, capability), "disagree with the reference"
    except Exception as error:  # whatever a compiler may throw
        same, found = False, f"do not run ({type(error).__name__}: {error})"
    if not same:
        name = torch.cuda.get_device_name(device)
        warnings.warn(
            f"gptq_ao: the {bits}-bit Triton kernels {found} on {name}; weights are dequantized by plain PyTorch "
            "operators instead, which is slow. Please report this, with the versions of torch and triton.",
            stacklevel=3,
        )
    return same


def same_as_reference(device: torch.device, bits: int, dtype: torch.dtype, capability: int) -> bool:
    """For small products of few and many rows, by two weights, and by two experts."""
    n, k, group = 80, 2048, 128
    numbers = torch.arange(2 * n * k, device=device).view(2, n, k)
    codes = (numbers * 2654435761 >> 16).bitwise_and(2**bits - 1).to(torch.uint8)
    scale = torch.linspace(-0.1, 0.1, 2 * n * k // group, device=device).half().view(2, n, -1)
    zero_point = torch.full_like(scale, 2 ** (bits - 1) - 1, dtype=torch.uint8)
    qdata, high_plane = pack_codes(codes, bits)
    packed = Packed(qdata, pack_scale_zero(scale, zero_point), high_plane, None, bits, group, n, k)
    weight = reference.dequantize(packed, dtype)
    if not torch.equal(dequantize.dequantize(packed, dtype), weight):
        return False

    def close(y: Tensor, x: Tensor, w: Tensor) -> bool:
        expected = x.float() @ w.float().mT
        # Scales, weights and results are rounded to 8 bits, which adds up to some 2⁻⁸ of what results usually are; the
        # largest of some ten thousand such errors is five times as large.
        return bool(((y.float() - expected).abs() <= 2**-5 * (expected.abs() + expected.square().mean().sqrt())).all())

    sms = 8
    for rows in (3, 16, 64, 200):
        x = torch.linspace(-1, 1, 2 * rows * k, device=device).view(2, rows, k).to(dtype)
        config = heuristics.choose(rows, n, k, bits, group, 2, sms, capability)
        if config is not None and not close(launch(x, packed, None, config), x, weight):
            return False
    rows = 24
    x = torch.linspace(-1, 1, rows * k, device=device).view(rows, k).to(dtype)
    config = heuristics.choose_experts(rows, n, k, bits, group, 2, sms, capability)
    assert config is not None
    y = launch_experts(x, packed, torch.tensor([5, rows], dtype=torch.int32, device=device), config)
    return close(y[:5], x[:5], weight[0]) and close(y[5:], x[5:], weight[1])
