# mypy: disable-error-code="no-untyped-def"
"""The dense weight of packed codes on a GPU: `reference.dequantize`, bit for bit, in one pass."""

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptq_ao.kernels.packed import Packed
from gptq_ao.kernels.triton.launch import Kernel
from gptq_ao.kernels.triton.unpack import unpack

__all__ = ["DequantizeLaunch", "dequantize", "prepared"]

ROWS, COLUMNS = 64, 256  # of a program
INTERPRETED = not isinstance(unpack, triton.runtime.JITFunction)


@triton.jit
def _dequantize(
    qdata,
    high,
    scale_zero,
    weight,
    N,
    K,
    groups,
    group_size,
    BITS: tl.constexpr,
    RUN: tl.constexpr,  # columns that share a scale, wherever they begin in a block
    BN: tl.constexpr,
    BK: tl.constexpr,
    FAST: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One block [BN, BK] of one matrix. (code − zero_point)·scale in fp32, rounded once."""
    KE: tl.constexpr = 128 if BITS < 4 else 256 // BITS
    NT: tl.constexpr = BN // 16
    KT: tl.constexpr = BK // KE
    NG: tl.constexpr = BK // RUN
    row_tiles, column_tiles = tl.cdiv(N, 16), tl.cdiv(K, KE)
    tile_column = tl.program_id(0) * KT
    tile_row = tl.program_id(1) * NT
    expert = tl.program_id(2).to(tl.int64)
    qdata += expert * row_tiles * column_tiles * 128
    scale_zero += expert * row_tiles * groups * 16

    # Beyond the edge the last tile is read again; what comes of it is not stored.
    i = tl.minimum(tile_column + tl.arange(0, KT), column_tiles - 1)[:, None]
    j = tl.arange(0, NT * 128)[None, :]
    tile = tl.minimum(tile_row + j // 128, row_tiles - 1) * column_tiles + i
    q = tl.load(qdata + (tile * 128 + j % 128), eviction_policy="evict_first")
    # A stand-in: without a plane of high bits, `unpack` does not look at it.
    h = q
    if BITS == 3:
        high += expert * row_tiles * column_tiles * 64
        j = tl.arange(0, NT * 64)[None, :]
        tile = tl.minimum(tile_row + j // 64, row_tiles - 1) * column_tiles + i
        h = tl.load(high + (tile * 64 + j % 64), eviction_policy="evict_first")
    row = tl.minimum(tile_row * 16 + tl.arange(0, BN), row_tiles * 16 - 1)
    k = tile_column * KE + tl.arange(0, NG) * RUN
    group = tl.minimum(k // group_size, groups - 1)
    word = tl.load(scale_zero + ((row // 16 * groups * 16 + row % 16)[:, None] + (group * 16)[None, :]))
    w = unpack(q, h, word >> 16, 1, KT, NT, BITS, FAST, True, COMPUTE).to(tl.float32)
    scale = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    w = (w * scale[:, :, None]).reshape(BN, BK)

    n = tl.arange(0, BN)[:, None]
    c = tl.arange(0, BK)[None, :]
    n0, c0 = tile_row * 16, tile_column * KE
    mask = (n < N - n0) & (c < K - c0)
    # What a program writes is near its first element: only the distance to that needs 64 bits.
    weight += (expert * N + n0) * K + c0
    tl.store(weight + (n * K + c), w.to(weight.dtype.element_ty), mask=mask)


@dataclasses.dataclass(frozen=True)
class DequantizeLaunch:
    """Launches for weights [out_features, in_features], or stacks of them, on one device: all that is the same each
    time is found out once, as a training step makes hundreds.

    Attributes:
        device: index of the GPU; -1 for the CPU, in Triton's interpreter.
        fast: see `unpack.py`.
    """

    bits: int
    group_size: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    device: int
    fast: bool = not INTERPRETED

    @functools.cached_property
    def kernel(self) -> Kernel:
        values = {
            "BITS": self.bits,
            "RUN": _run(self.group_size, self.in_features),
            "BN": ROWS,
            "BK": COLUMNS,
            "FAST": self.fast,
            "COMPUTE": tl.float32 if INTERPRETED else tl.bfloat16,  # holds integers up to 255 exactly
        }
        return Kernel(_dequantize, values, {"num_warps": 4, "enable_fp_fusion": True})

    def __call__(self, packed: Packed) -> Tensor:
        """[..., out_features, in_features] in `dtype`, columns as they are stored; `packed` is contiguous, and its
        device is the current one."""
        qdata, n, k = packed.qdata, self.out_features, self.in_features
        lead = qdata.shape[:-3]
        weight = torch.empty((*lead, n, k), dtype=self.dtype, device=qdata.device)
        if matrices := lead.numel():
            grid = (-(-k // COLUMNS), -(-n // ROWS), matrices)
            stream = torch._C._cuda_getCurrentRawStream(self.device) if self.device >= 0 else 0
            tensors = (qdata, packed.high_plane, packed.scale_zero, weight)
            self.kernel(grid, stream, tensors, (n, k, k // self.group_size, self.group_size))
        return weight


prepared = functools.cache(DequantizeLaunch)  # it keeps the kernels that it has compiled


def dequantize(packed: Packed, dtype: torch.dtype, fast: bool = not INTERPRETED) -> Tensor:
    """[..., out_features, in_features] in `dtype`, columns as they are stored.

    Args:
        packed: contiguous; group_size is a multiple of `heuristics.SMALLEST_RUN`, or in_features.
        fast: see `unpack.py`.
    """
    sizes = (packed.bits, packed.group_size, packed.out_features, packed.in_features)
    return prepared(*sizes, dtype, packed.qdata.get_device(), fast)(packed)


def _run(group_size: int, in_features: int) -> int:
    """The largest power of two of neighbouring columns that never lie in two groups, at most a block's."""
    # n & −n is the largest power of two that divides n.
    return COLUMNS if group_size == in_features else min(COLUMNS, group_size & -group_size)
