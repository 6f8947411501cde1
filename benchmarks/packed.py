"""Random packed weights, made on the GPU, and the bandwidth at which it reads: for the benchmarks of kernels."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptq_ao.codes.tiles import TILE_ROWS, packed_bytes, tile_columns
from gptq_ao.kernels.packed import Packed
from gptq_ao.kernels.tuning.timing import BEYOND_CACHE, microseconds

__all__ = ["Shape", "read_bandwidth", "ring"]


@dataclass(frozen=True)
class Shape:
    """Of one weight. `bytes`: what a kernel has to read of it."""

    bits: int
    group: int
    n: int
    k: int

    @property
    def bytes(self) -> int:
        return packed_bytes((self.n, self.k), self.bits, self.k // self.group)


def ring(shape: Shape, least: int = BEYOND_CACHE) -> list[Packed]:
    """As many weights as have `least` bytes together."""
    return [_random(shape, seed) for seed in range(-(-least // shape.bytes))]


def _random(s: Shape, seed: int) -> Packed:
    generator = torch.Generator("cuda").manual_seed(seed)

    def words(*size: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, size, dtype=torch.int32, device="cuda", generator=generator)

    tiles = -(-s.n // TILE_ROWS), -(-s.k // tile_columns(s.bits))
    scale = torch.rand(tiles[0], s.k // s.group, TILE_ROWS, device="cuda", generator=generator)
    scale = (scale + 0.5) * 2.0**-s.bits * s.k**-0.5
    scale_zero = scale.half().view(torch.int16).int() | (2 ** (s.bits - 1) << 16)
    high_plane = words(*tiles, 64) if s.bits == 3 else None
    return Packed(words(*tiles, 128), scale_zero, high_plane, None, s.bits, s.group, s.n, s.k)


@triton.jit
def _read(source, sums, PER_PROGRAM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.program_id(0).to(tl.int64) * PER_PROGRAM
    total = tl.zeros((BLOCK,), tl.int32)
    for i in tl.range(0, PER_PROGRAM, BLOCK):
        total += tl.load(source + first + i + tl.arange(0, BLOCK))
    tl.store(sums + tl.program_id(0), tl.sum(total))


def read_bandwidth() -> float:
    """GB/s at which a kernel reads 2 GB and does next to nothing else."""
    count, per_program = 2**29, 2**16
    source = torch.zeros(count, dtype=torch.int32, device="cuda")
    sums = torch.empty(count // per_program, dtype=torch.int32, device="cuda")

    def read(_: int) -> None:
        _read[(count // per_program,)](
            source, sums, PER_PROGRAM=per_program, BLOCK=4096, num_warps=8, enable_fp_fusion=True
        )

    return 4 * count / microseconds(read, 1, calls=4) / 1e3
