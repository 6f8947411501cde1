"""Whether the kernels compute what `kernels/reference.py` does, on a GPU or with a Triton that they never ran with."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from gptq_ao.codes.tiles import pack_codes, pack_scale_zero
from gptq_ao.kernels import reference
from gptq_ao.kernels.packed import Packed
from gptq_ao.kernels.triton import dequantize
from gptq_ao.kernels.triton.launch import VERSION, launch
from gptq_ao.kernels.triton.launch_around import launch_gated, launch_rms_norm
from gptq_ao.kernels.triton.launch_attention import launch_attention
from gptq_ao.kernels.triton.launch_experts import launch_experts
from gptq_ao.kernels.tuning import heuristics
from gptq_ao.kernels.tuning.many_rows import ManyRowsConfig

__all__ = ["agree", "decoding_agrees", "decoding_same", "many_rows_agree", "same_as_reference"]

RUN_WITH = {(3, 6)}  # versions of Triton


def agree(device: torch.device, bits: int) -> bool:
    """`same_as_reference`; if not, or if they do not run at all, a warning says so."""
    capability = torch.cuda.get_device_capability(device)[0]
    return _warned(
        lambda: same_as_reference(device, bits, torch.bfloat16, capability),
        f"the {bits}-bit Triton kernels",
        f"on {torch.cuda.get_device_name(device)}; weights are dequantized by plain PyTorch operators instead, which "
        "is slow",
    )


def many_rows_agree(device: torch.device, bits: int) -> bool:
    """Whether `kernels/gluon/many_rows.py` computes what the reference does: a warning says so if not. With versions
    of Triton that it was run with, nothing is compared."""
    if VERSION in RUN_WITH:
        return True
    instead = f"with Triton {VERSION[0]}.{VERSION[1]}; the other kernels are used instead, which are slower"
    return _warned(lambda: _many_rows_same(device, bits), f"the {bits}-bit kernels for many rows", instead)


def _warned(same: Callable[[], bool], what: str, instead: str) -> bool:
    try:
        if same():
            return True
        found = "disagree with the reference"
    except Exception as error:  # whatever a compiler may throw
        found = f"do not run ({type(error).__name__}: {error})"
    report = "Please report this, with the versions of torch and triton."
    warnings.warn(f"gptq_ao: {what} {found} {instead}. {report}", stacklevel=4)
    return False


def _many_rows_same(device: torch.device, bits: int) -> bool:
    from gptq_ao.kernels.gluon.launch_many_rows import prepared

    n, k, group = 136, 1024, 128
    packed, weight = _example(1, n, k, bits, group, device, torch.bfloat16)
    packed = packed.expert(0)
    x = torch.linspace(-1, 1, 300 * k, device=device).view(300, k).bfloat16()
    configs = (ManyRowsConfig(block_m, split) for block_m in (128, 256) for split in (1, 2))
    launches = (prepared(c, bits, group, n, k, torch.bfloat16, x.get_device(), 4) for c in configs)
    with torch.cuda.device(device):
        return all(_close(launch(x, packed), x, weight[0]) for launch in launches)


def decoding_agrees(device: torch.device) -> bool:
    """Whether the kernels between products compute what the reference does: a warning says so if not."""
    name = torch.cuda.get_device_name(device)
    return _warned(
        lambda: decoding_same(device, torch.bfloat16),
        "the Triton kernels between products",
        f"on {name}; plain PyTorch operators are used instead, which are slower",
    )


def decoding_same(device: torch.device, dtype: torch.dtype) -> bool:
    """For few rows, and for attention with a mask, heads that share keys, and more than one part of positions."""
    numbers = torch.linspace(-2, 3, 3 * 8 * 200 * 64, device=device)
    rows = numbers[:6000].view(3, 2000).to(dtype)
    gate, x, weight = rows[:, :1000], rows[:, 1000:], rows[0, :1000].contiguous()
    pairs = [(launch_rms_norm(x, weight, 1e-5, 1.0), reference.rms_norm(x, weight, 1e-5, 1.0))]
    pairs += [(launch_gated(gate, x, a), reference.gated(gate, x, a)) for a in reference.ACTIVATIONS]
    heads = numbers.sin().view(3, 8, 200, 64).to(dtype)
    q, k, v = heads[:, :, :1], heads[:, :2], heads[:, 2:4]
    mask = torch.arange(200, device=device).expand(3, 1, 1, -1) < 130
    exact = reference.attend_once(q.float(), k.float(), v.float(), mask, 0.125)
    pairs.append((launch_attention(q, k, v, mask[:, 0, 0], 0.125), exact))
    # Results are rounded to 8 bits at least; weights of attention, too, before they are multiplied.
    return all(bool(((y - e).abs() <= 2**-6 * (e.abs() + e.abs().max() / 8)).all()) for y, e in pairs)


def same_as_reference(device: torch.device, bits: int, dtype: torch.dtype, capability: int) -> bool:
    """For small products of few and many rows, by two weights, and by two experts."""
    n, k, group = 80, 2048, 128
    packed, weight = _example(2, n, k, bits, group, device, dtype)
    if not torch.equal(dequantize.dequantize(packed, dtype), weight):
        return False

    sms = 8
    for rows in (3, 16, 64, 200):
        x = torch.linspace(-1, 1, 2 * rows * k, device=device).view(2, rows, k).to(dtype)
        config = heuristics.choose(rows, n, k, bits, group, 2, sms, capability)
        if config is not None and not _close(launch(x, packed, None, config), x, weight):
            return False
    rows = 24
    x = torch.linspace(-1, 1, rows * k, device=device).view(rows, k).to(dtype)
    config = heuristics.choose_experts(rows, n, k, bits, group, 2, sms, capability)
    assert config is not None
    y = launch_experts(x, packed, torch.tensor([5, rows], dtype=torch.int32, device=device), config)
    return _close(y[:5], x[:5], weight[0]) and _close(y[5:], x[5:], weight[1])


def _example(
    count: int, n: int, k: int, bits: int, group: int, device: torch.device, dtype: torch.dtype
) -> tuple[Packed, Tensor]:
    """A stack of weights, and what they are."""
    numbers = torch.arange(count * n * k, device=device).view(count, n, k)
    codes = (numbers * 2654435761 >> 16).bitwise_and(2**bits - 1).to(torch.uint8)
    scale = torch.linspace(-0.1, 0.1, count * n * k // group, device=device).half().view(count, n, -1)
    zero_point = torch.full_like(scale, 2 ** (bits - 1) - 1, dtype=torch.uint8)
    qdata, high_plane = pack_codes(codes, bits)
    packed = Packed(qdata, pack_scale_zero(scale, zero_point), high_plane, None, bits, group, n, k)
    return packed, reference.dequantize(packed, dtype)


def _close(y: Tensor, x: Tensor, w: Tensor) -> bool:
    expected = x.float() @ w.float().mT
    # Scales, weights and results are rounded to 8 bits, which adds up to some 2⁻⁸ of what results usually are; the
    # largest of some ten thousand such errors is five times as large.
    return bool(((y.float() - expected).abs() <= 2**-5 * (expected.abs() + expected.square().mean().sqrt())).all())
