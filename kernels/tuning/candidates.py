"""Configurations of the linear kernel that are worth timing for a product: what `tune` and the benchmark try."""

import dataclasses
from collections.abc import Iterator

from gptq_ao.kernels.tuning.heuristics import SHARED_MEMORY, LinearConfig, columns_ahead, computes, programs_per_sm

__all__ = ["candidates", "variations"]

SCALES = 3 * 2**10  # bytes of shared memory that are left for words of scale and zero point
REGISTERS = 160  # registers that the sums of one thread may take


def candidates(
    rows: int, out_features: int, in_features: int, bits: int, group_size: int, sms: int, capability: int
) -> Iterator[LinearConfig]:
    """For x [rows, in_features] and a weight [out_features, in_features]; the smallest first."""
    few = rows <= 16
    block_m = max(8, 1 << (rows - 1).bit_length())
    for c in _few_rows(block_m) if few else _many_rows(block_m):
        step = c.block_k * c.slices
        steps = -(-in_features // step)
        blocks = -(-rows // c.block_m) * -(-out_features // c.block_n)
        whole = group_size == in_features or group_size % c.block_k == 0
        for split in (1, 2, 4, 8, 16, 32):
            programs, each = blocks * split, -(-steps // split)
            # Half of the device idle, programs that hardly begin, or a part without a step.
            if not sms // 2 <= programs <= 40 * sms or each * (split - 1) >= steps:
                continue
            # Sums of many rows are much to add up, and there are programs enough.
            if split > 1 and rows > 16 and programs > 8 * sms:
                continue
            if each < 2:  # nothing is on its way while a step is computed
                continue
            scale_sum = whole and rows <= 64
            ahead = columns_ahead(c.block_n) if capability >= 9 else 0
            per_sm = programs_per_sm(programs, sms)
            found = dataclasses.replace(c, split=split, scale_sum=scale_sum, ahead=ahead, per_sm=per_sm)
            if _fits(found, bits) and computes(found, bits, group_size, in_features):
                yield found


def variations(c: LinearConfig, group_size: int, in_features: int, capability: int) -> Iterator[LinearConfig]:
    """`c` with one attribute changed that `candidates` does not try."""
    yield dataclasses.replace(c, evict_first=not c.evict_first)
    if c.split > 1:
        yield dataclasses.replace(c, last_adds=not c.last_adds)
    if c.scale_sum or group_size == in_features or group_size % c.block_k == 0:
        yield dataclasses.replace(c, scale_sum=not c.scale_sum)
    if capability >= 9:
        yield dataclasses.replace(c, ahead=0 if c.ahead else columns_ahead(c.block_n))
    if c.per_sm:
        yield dataclasses.replace(c, per_sm=0)
    for stages in {2, 3, 4, 5, 6, 8} - {c.stages}:
        yield dataclasses.replace(c, stages=stages)


def _few_rows(block_m: int) -> Iterator[LinearConfig]:
    """Reading the weight takes the time, so much of it must be on its way."""
    for stages in (3, 4):
        for block_n, warps in ((32, 2), (64, 4), (64, 2), (128, 4), (256, 8)):
            for block_k in (128, 256):
                yield LinearConfig(block_m, block_n, block_k, warps, stages=stages)
        for block_n in (16, 32, 64):
            for slices in (4, 8):
                yield LinearConfig(block_m, block_n, 128, slices, slices=slices, stages=stages)


def _many_rows(block_m: int) -> Iterator[LinearConfig]:
    for m in sorted({min(block_m, 32), min(block_m, 64), min(block_m, 128), min(block_m, 256)}):
        for block_n in (64, 128, 256):
            for block_k in (64, 128):
                for warps in (4, 8):
                    for stages in (3, 4):
                        yield LinearConfig(m, block_n, block_k, warps, stages=stages)


def _fits(c: LinearConfig, bits: int) -> bool:
    """Whether there are tiles for all warps, shared memory for all stages, and registers for the sums."""
    threads = 32 * c.warps
    # Per step: words of 32 bits that hold codes. Per thread: sums.
    words = c.block_n * c.block_k * c.slices * bits // 32
    sums = c.block_m * c.block_n * c.slices // threads
    whole_tiles = c.block_k % (128 if bits < 4 else 256 // bits) == 0
    # Each stage holds a step of words (4 bytes) and of x (2 bytes a number).
    memory = c.stages * (4 * words + 2 * c.block_m * c.block_k * c.slices)
    # Warps share the rows of the weight by tiles of 16. If those are too few, they need rows of x to share.
    enough_rows = c.slices > 1 or c.block_n >= 16 * c.warps or c.block_m > 16
    return whole_tiles and enough_rows and memory <= SHARED_MEMORY - SCALES and sums <= REGISTERS
