"""Launches of `many_rows.py`: what is the same each time is found out once."""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gptq_ao.kernels.gluon.many_rows import many_rows_kernel
from gptq_ao.kernels.gluon.operands import words_of
from gptq_ao.kernels.packed import Packed
from gptq_ao.kernels.triton.counters import zeroed_counters
from gptq_ao.kernels.triton.launch import Kernel
from gptq_ao.kernels.tuning.many_rows import BLOCK_N, ManyRowsConfig

__all__ = ["OPTIONS", "ManyRowsLaunch", "boxes", "constants", "prepared"]

STORED = 64  # rows of y that are stored at a time
# By the number of dimensions: of 16-bit numbers, swizzled as wgmma reads them; of words.
LAYOUTS = {2: gl.NVMMASharedLayout(128, 16, rank=2), 3: gl.NVMMASharedLayout(128, 32, rank=3)}
OPTIONS = {"num_warps": 4, "launch_pdl": True, "enable_fp_fusion": True}


def constants(c: ManyRowsConfig, bits: int, group_size: int, in_features: int, dtype: torch.dtype) -> dict[str, Any]:
    """The kernel's."""
    return {
        "BITS": bits,
        "GROUP": 0 if group_size == in_features else group_size,
        "BN": BLOCK_N,
        "BM": c.block_m,
        "STAGES": c.stages(bits),
        "EC": STORED,
        "SPLIT": c.split,
        "AT_ONCE": c.at_once(bits),
        "DTYPE": gl.float16 if dtype == torch.float16 else gl.bfloat16,
    }


def boxes(c: ManyRowsConfig, bits: int) -> dict[str, tuple[int, ...]]:
    """What the copy engine moves at a time: of x, of words, of words of high bits, and of y."""
    return {
        "x_desc": (c.block_m, 64),
        "w_desc": (BLOCK_N // 32, words_of(bits) * c.at_once(bits), 32),
        "h_desc": (BLOCK_N // 32, 2, 32),
        "y_desc": (STORED, 64),
    }


@dataclasses.dataclass(frozen=True)
class _At:
    """What Triton asks of a tensor that it describes to the copy engine. It keeps no memory alive, as one would."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@functools.lru_cache(2**14)  # some hundred bytes each; making one takes longer than a launch
def _described(address: int, dtype: torch.dtype, shape: tuple[int, ...], box: tuple[int, ...]) -> TensorDescriptor:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return TensorDescriptor(_At(address, dtype), list(shape), strides, list(box), LAYOUTS[len(shape)])


@dataclasses.dataclass(frozen=True)
class ManyRowsLaunch:
    """Products of x with a weight [out_features, in_features] on one device, cut by one configuration.

    Attributes:
        sms: programs that run at the same time.
    """

    config: ManyRowsConfig
    bits: int
    group_size: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    device: int
    sms: int

    @functools.cached_property
    def kernel(self) -> Kernel:
        values = constants(self.config, self.bits, self.group_size, self.in_features, self.dtype)
        return Kernel(many_rows_kernel, values, OPTIONS)

    @functools.cached_property
    def whole(self) -> "ManyRowsLaunch":
        """The same without a split: for a CUDA graph that gets no counters."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, split=1))

    def __call__(self, x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
        """[..., N] from x [..., K], at least one row, on the current device; all are contiguous, and codes begin at a
        multiple of 16 bytes. x, bias [N] and the result are of `self.dtype`; columns of x are in the order of codes."""
        c, n, k = self.config, self.out_features, self.in_features
        rows = x.numel() // k
        if x.data_ptr() % 16:  # which the copy engine cannot read
            x = x.clone()
        tiles_m = -(-rows // c.block_m)
        tiles = tiles_m * -(-n // BLOCK_N)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        counters = partial = None
        if c.split > 1:
            counters = zeroed_counters(self.device, 2 * tiles, stream)
            if counters is None:
                return self.whole(x, packed, bias)
            # Allocated in each call, so that every CUDA graph has its own.
            partial = x.new_empty(tiles * c.split * BLOCK_N * c.block_m, dtype=torch.float32)
        y = x.new_empty((*x.shape[:-1], n))
        words, high = packed.qdata, packed.high_plane
        tiles_k = words.shape[1]
        box = boxes(c, self.bits)
        of_high = None
        if high is not None:
            of_high = _described(high.data_ptr(), torch.int32, (len(words), tiles_k * 2, 32), box["h_desc"])
        descriptors = (
            _described(x.data_ptr(), self.dtype, (rows, k), box["x_desc"]),
            _described(words.data_ptr(), torch.int32, (len(words), tiles_k * 4, 32), box["w_desc"]),
            of_high,
            _described(y.data_ptr(), self.dtype, (rows, n), box["y_desc"]),
        )
        tensors = (words, packed.scale_zero, bias, partial, counters)
        last_m = max(rows - c.block_m, 0)
        numbers = (tiles * c.split, tiles_m, last_m, tiles_k, packed.scale_zero.shape[1], n)
        waves = -(-tiles * c.split // self.sms)
        programs = -(-tiles * c.split // waves)  # of which each gets as much work, but for one piece
        self.kernel((programs, 1, 1), stream, tensors, (*descriptors, *numbers))
        return y


prepared = functools.cache(ManyRowsLaunch)  # it keeps the kernels that it has compiled
