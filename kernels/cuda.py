"""What the operators run on a CUDA device: the Triton kernels where they compute this, else `reference.py`.

    few rows of x    one kernel that reads packed codes (`triton/linear.py`)
    many             on Hopper another one (`gluon/many_rows.py`); else dequantize a part of the weight, multiply by
                     it, and so on: a part at a time bounds the memory

For rows that are sorted by expert, see `cuda_experts.py`.

A kernel that was never run on this architecture is compared with the reference once, and not used if it is wrong.
"""

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gptq_ao.codes.tiles import TILE_ROWS
from gptq_ao.kernels import reference
from gptq_ao.kernels.packed import Packed
from gptq_ao.kernels.tuning import heuristics, many_rows, measured

__all__ = [
    "bucket",
    "dequantize",
    "few_rows",
    "forget",
    "in_one_pass",
    "linear",
    "max_rows",
    "reads_many_rows",
    "usable",
]

SCRATCH = 256 * 2**20  # bytes of dense weight at a time
TESTED = {(9, 0)}  # compute capabilities; for others kernels were at most compiled


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """See `reference.linear`: [..., N] in the dtype of x [..., K]. Sums are in fp32, and scales may be applied to sums
    rather than to weights."""
    qdata, scale_zero, high_plane, perm, bits, group_size, out_features, in_features = packed
    stacked = qdata.dim() > 3
    device = x.get_device()
    together = device == qdata.get_device() == scale_zero.get_device()
    # Kernels are handed addresses, which nothing checks.
    together = together and (high_plane is None or high_plane.get_device() == device)
    together = together and (bias is None or bias.get_device() == device)
    if not together or x.shape[-1] != in_features or (stacked and x.shape[:-2] != qdata.shape[:-3]):
        raise ValueError(f"x {tuple(x.shape)} on {x.device} and a weight [{out_features}, {in_features}] do not fit")
    experts = qdata.shape[:-3].numel() if stacked else 1
    rows = x.numel() // (experts * in_features)
    if perm is not None:
        x = x[..., perm]
    launch = None
    aligned = qdata.data_ptr() % 16 == 0 and (high_plane is None or high_plane.data_ptr() % 16 == 0)
    if not stacked and rows >= many_rows.FEWEST_ROWS and aligned:
        launch = _launch_many(rows, out_features, in_features, bits, group_size, x.dtype, device)
    if launch is None:
        launch = few_rows(bucket(rows), out_features, in_features, bits, group_size, experts, x.dtype, device)
    if launch is not None and packed.is_contiguous() and (bias is None or bias.dtype == x.dtype):
        return launch(x.contiguous(), packed, None if bias is None else bias.contiguous())
    packed = packed._replace(perm=None)  # x is in the order of the codes
    if stacked:
        return torch.bmm(x, dequantize(packed, x.dtype).mT)
    # Output features per part, in whole tiles, as `Packed.rows` can only begin at one.
    most = max(1, SCRATCH // (TILE_ROWS * in_features * x.itemsize)) * TILE_ROWS
    if most >= out_features:
        return F.linear(x, dequantize(packed, x.dtype), bias)
    flat = x.reshape(-1, in_features)
    y = x.new_empty(len(flat), out_features)
    for first in range(0, out_features, most):
        part = slice(first, min(first + most, out_features))
        weight = dequantize(packed.rows(part.start, part.stop), x.dtype)
        if bias is None:
            torch.mm(flat, weight.T, out=y[:, part])
        else:
            torch.addmm(bias[part], flat, weight.T, out=y[:, part])
    return y.view(*x.shape[:-1], out_features)


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """See `reference.dequantize`: the same [..., N, K] in `dtype`, bit for bit."""
    qdata, _, _, perm, bits, group_size, out_features, in_features = packed
    launch = _launch_dequantize(bits, group_size, out_features, in_features, dtype, qdata.get_device())
    if launch is None or not packed.is_contiguous():
        return reference.dequantize(packed, dtype)
    weight = launch(packed)
    return weight if perm is None else weight[..., torch.argsort(perm)]


@functools.cache
def _launch_dequantize(
    bits: int, group_size: int, out_features: int, in_features: int, dtype: torch.dtype, device: int
) -> Callable[[Packed], Tensor] | None:
    """The kernel, ready to be launched; None if it does not compute this."""
    if not in_one_pass(torch.device("cuda", device), bits, group_size, in_features, dtype):
        return None
    from gptq_ao.kernels.triton.dequantize import prepared

    return prepared(bits, group_size, out_features, in_features, dtype, device)


def in_one_pass(device: torch.device, bits: int, group_size: int, in_features: int, dtype: torch.dtype) -> bool:
    """Whether `dequantize` is one kernel and needs no memory but that of its result, as far as can be told from here:
    a GPU that is not in this machine is taken for a usable one."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    runs = group_size == in_features or group_size % heuristics.SMALLEST_RUN == 0
    return runs and (not torch.cuda.is_available() or usable(device, bits))


def max_rows(device: torch.device, dtype: torch.dtype, bits: int, group_size: int, in_features: int) -> int:
    """The number of rows of x up to which `linear` reads packed codes; 0 if it always dequantizes."""
    if dtype not in (torch.bfloat16, torch.float16) or not torch.cuda.is_available() or not usable(device, bits):
        return 0
    capability = torch.cuda.get_device_capability(device)[0]
    most = heuristics.FUSED_ROWS[min(capability, 9)]
    return most if heuristics.choose(1, 16, in_features, bits, group_size, 1, 1, capability) else 0


def reads_many_rows(device: torch.device, dtype: torch.dtype, bits: int, group_size: int, in_features: int) -> bool:
    """Whether `linear` reads packed codes for any number of rows from `many_rows.FEWEST_ROWS` on, if out_features are a
    multiple of 8."""
    if dtype not in (torch.bfloat16, torch.float16) or not torch.cuda.is_available():
        return False
    return many_rows.computes(bits, group_size, 8, in_features) and _usable_many(device, bits)


def bucket(rows: int) -> int:
    """The number of rows whose configuration serves for `rows`, so that there are few: a power of two from 8 on."""
    return 8 if rows <= 8 else 1 << (rows - 1).bit_length()


def forget() -> None:
    """Forget which configurations were chosen, and what the tuning file said."""
    _tuned.cache_clear()
    few_rows.cache_clear()
    _launch_many.cache_clear()
    _launch_dequantize.cache_clear()


@functools.cache
def _tuned(device_name: str) -> dict[measured.Product, measured.Tuned]:
    return measured.load(measured.default_path(device_name))


@functools.cache
def few_rows(
    rows: int,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    experts: int,
    dtype: torch.dtype,
    device: int,
) -> Callable[..., Tensor] | None:
    """The kernel that reads packed codes, ready to be launched; None if it does not compute this, or not faster.

    Args:
        rows: of x, as `bucket` gives them.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    config = _config(rows, out_features, in_features, bits, group_size, experts, torch.device("cuda", device))
    if config is None:
        return None
    from gptq_ao.kernels.triton.launch import prepared

    return prepared(config, bits, group_size, out_features, in_features, experts, dtype, device)


@functools.lru_cache(2**14)
def _launch_many(
    rows: int, out_features: int, in_features: int, bits: int, group_size: int, dtype: torch.dtype, device: int
) -> Callable[..., Tensor] | None:
    """The kernel for many rows, ready to be launched; None if it does not compute this."""
    place = torch.device("cuda", device)
    if not reads_many_rows(place, dtype, bits, group_size, in_features) or out_features % 8:
        return None
    from gptq_ao.kernels.gluon.launch_many_rows import prepared

    sms = torch.cuda.get_device_properties(device).multi_processor_count
    config = many_rows.choose(rows, out_features, in_features, bits, sms)
    return prepared(config, bits, group_size, out_features, in_features, dtype, device, sms)


def _config(
    rows: int, out_features: int, in_features: int, bits: int, group_size: int, experts: int, device: torch.device
) -> heuristics.LinearConfig | None:
    if not usable(device, bits):
        return None
    properties = torch.cuda.get_device_properties(device)
    product = measured.Product(rows, out_features, in_features, bits, group_size, experts)
    best = _tuned(properties.name).get(product)
    # Its config may be None: dequantizing was measured to be faster.
    if best is not None:
        return best.config
    sms, capability = properties.multi_processor_count, properties.major
    return heuristics.choose(rows, out_features, in_features, bits, group_size, experts, sms, capability)


@functools.cache
def usable(device: torch.device, bits: int) -> bool:
    """Whether there is Triton, and its kernels can be trusted on this device."""
    capability = torch.cuda.get_device_capability(device)
    # ROCm's devices are called "cuda", too. The kernels are for Ampere (8.0) and later.
    if importlib.util.find_spec("triton") is None or torch.version.hip or capability < (8, 0):
        return False
    if capability in TESTED:
        return True
    from gptq_ao.kernels.triton.self_check import agree

    return agree(device, bits)


@functools.cache
def _usable_many(device: torch.device, bits: int) -> bool:
    """Whether the kernel for many rows, which has Hopper's instructions, can be trusted on this device."""
    if torch.cuda.get_device_capability(device) != (9, 0) or not usable(device, bits):
        return False
    from gptq_ao.kernels.triton.self_check import many_rows_agree

    return many_rows_agree(device, bits)
