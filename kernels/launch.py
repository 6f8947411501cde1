"""One launch of `linear_triton.py`: buffers, constants, and compiled kernels that are found again quickly."""

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptq_ao.kernels.counters import zeroed_counters
from gptq_ao.kernels.heuristics import LinearConfig
from gptq_ao.kernels.linear_triton import add_splits_kernel, linear_kernel

__all__ = ["constants", "launch", "warm_up"]

INTERPRETED = not isinstance(linear_kernel, triton.runtime.JITFunction)
# An operand of mma.sync made in registers: up to Triton 3.6 its columns are in an order of their own, see `unpack`.
NATURAL_MMA = tuple(int(i) for i in triton.__version__.split(".")[:2]) > (3, 6)
ADD_BLOCK = 512  # results per program of the second kernel

# What Triton's own launch finds out each time, some 20 µs, is the same for the same key.
_compiled: dict[Any, Any] = {}


def constants(
    c: LinearConfig,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
    capability: int,
    fast: bool,
    experts: int = 0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kernel's constants, and the compiler's options. `experts`: that share the rows of a grouped product."""
    step = c.slices * c.block_k
    steps = -(-in_features // step)
    per_program = -(-steps // c.split)
    wgmma = capability == 9 and c.block_m >= 16 and c.block_n >= 64 and c.warps % 4 == 0 and c.slices == 1
    values = {
        "EXPERTS": experts,
        "BITS": bits,
        "GROUP": 0 if group_size == in_features else group_size,
        "BM": c.block_m,
        "BN": c.block_n,
        "BK": c.block_k,
        "SLICES": c.slices,
        "SPLIT": c.split,
        "STEPS": 0 if c.stages else per_program,
        "STAGES": c.stages,
        "SCALE_SUM": c.scale_sum,
        "LAST_ADDS": c.last_adds,
        "EVEN": in_features % (step * c.split) == 0,
        "POLICY": "evict_first" if c.evict_first else "",
        "PDL": c.pdl,
        "FAST": fast,
        "NATURAL": wgmma or NATURAL_MMA,
        "ASYNC": capability == 9,
        "COMPUTE": tl.float16 if dtype == torch.float16 else tl.float32 if INTERPRETED else tl.bfloat16,
    }
    options = {"num_warps": c.warps, "num_stages": max(c.stages, 1), "enable_fp_fusion": True}
    return values, options | ({"launch_pdl": True} if c.pdl else {})


def launch(
    x: Tensor,
    qdata: Tensor,
    scale_zero: Tensor,
    high_plane: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    c: LinearConfig,
    bias: Tensor | None = None,
    fast: bool = not INTERPRETED,
    counters: Tensor | None = None,
) -> Tensor:
    """[E, M, N] from x [E, M, K] and a stack of E weights, or from x [1, M, K] and one; all contiguous.

    Args:
        fast: whether codes are cut out of words in pairs, see `unpack_triton.py`.
        counters: int32 zeros, one for each program of one split, that no other launch uses at the same time; made or
            found here if they are needed and not given.
    """
    experts, rows, in_features = x.shape
    y = x.new_empty(experts, rows, out_features)
    if y.numel() == 0:
        return y
    blocks = -(-rows // c.block_m) * -(-out_features // c.block_n)
    partial = None
    if c.split > 1:
        partial = x.new_empty(experts, c.split, rows, out_features, dtype=torch.float32)
        if c.last_adds and counters is None:
            counters = _counters(x.device, experts * blocks)
            if counters is None:
                c = dataclasses.replace(c, last_adds=False)
    if c.split == 1 or not c.last_adds:
        counters = None
    tensors = (x, qdata, high_plane, scale_zero, bias, y, partial, counters, None)
    arguments = (*tensors, rows, out_features, in_features, scale_zero.shape[-2])
    # All that Triton specializes a kernel for.
    aligned = all(t is None or t.data_ptr() % 16 == 0 for t in tensors[:5])
    shape = (out_features, in_features, scale_zero.shape[-2])
    key: tuple[Any, ...] = (c, bits, group_size, *shape, x.dtype, bias is None, aligned, fast, x.device.index)
    _run(linear_kernel, key, (blocks, c.split, experts), arguments, lambda: _constants(x, c, bits, group_size, fast))
    if c.split > 1 and not c.last_adds:
        grid = (-(-rows * out_features // ADD_BLOCK), experts, 1)
        values = {"SPLIT": c.split, "BLOCK": ADD_BLOCK, "PDL": c.pdl}
        options = {"num_warps": 4, "enable_fp_fusion": True} | ({"launch_pdl": True} if c.pdl else {})
        key = ("add", c.split, c.pdl, out_features, x.dtype, bias is None, aligned, x.device.index)
        _run(add_splits_kernel, key, grid, (partial, bias, y, rows, out_features), lambda: (values, options))
    return y


def warm_up(
    c: LinearConfig,
    rows: int,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    fast: bool = True,
) -> None:
    """Compile what `launch` will run without a bias, into Triton's cache on disk. For a process that only compiles."""
    values, options = constants(c, bits, group_size, in_features, dtype, torch.cuda.get_device_capability()[0], fast)
    partial = torch.float32 if c.split > 1 else None
    counters = torch.int32 if c.split > 1 and c.last_adds else None
    high_plane = torch.int32 if bits == 3 else None
    tensors = (dtype, torch.int32, high_plane, torch.int32, None, dtype, partial, counters, None)
    numbers = (rows, out_features, in_features, in_features // group_size)
    linear_kernel.warmup(*tensors, *numbers, grid=(1, 1, 1), **values, **options)


def _constants(
    x: Tensor, c: LinearConfig, bits: int, group_size: int, fast: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    capability = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0
    return constants(c, bits, group_size, x.shape[-1], x.dtype, capability, fast)


def _run(kernel: Any, key: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], describe: Any) -> None:
    known = _compiled.get(key)
    if known is None:
        values, options = describe()
        compiled = kernel[grid](*arguments, **values, **options)
        if not INTERPRETED:
            _compiled[key] = compiled, tuple(values.values())
    else:
        compiled, values = known
        compiled[grid](*arguments, *values)


def _counters(device: torch.device, count: int) -> Tensor | None:
    if device.type == "cuda":
        return zeroed_counters(device, count)
    return torch.zeros(count, dtype=torch.int32, device=device)
