# mypy: disable-error-code="no-untyped-def, assignment"
"""Which rows of x a program works on if rows are sorted by expert: found on the device, as `offsets` are only there.

x [M, K] is sorted by expert, and the rows of expert e end at offsets[e]. Each expert's rows are cut into blocks of BM,
and all blocks are numbered. The rows that belong to no expert, beyond the last offset, count as those of one more.
"""

import triton
import triton.language as tl

__all__ = ["find_rows", "most_blocks"]


@triton.jit
def most_blocks(M, EXPERTS: tl.constexpr, BM: tl.constexpr):
    """How many blocks there are at most, whatever the offsets: as many experts as possible have one row beyond full
    blocks."""
    begun = tl.minimum(M, EXPERTS + 1)
    return begun + (M - begun) // BM


@triton.jit
def find_rows(offsets, block, M, EXPERTS: tl.constexpr, BM: tl.constexpr):
    """(expert, first row, number of rows from there to the end of the expert's) of a block. Rows that belong to none
    count as those of expert EXPERTS. A block beyond the last has a larger expert, and no rows."""
    WIDTH: tl.constexpr = triton.next_power_of_2(EXPERTS + 1)
    e = tl.arange(0, WIDTH)
    end = tl.load(offsets + e, mask=e < EXPERTS, other=M)  # rows that belong to none end with x
    begin = tl.load(offsets + e - 1, mask=(e > 0) & (e <= EXPERTS), other=0)
    begin = tl.where(e > EXPERTS, M, begin)
    blocks = (end - begin + BM - 1) // BM
    until = tl.cumsum(blocks, axis=0)
    # As many experts as have all of their blocks before this one: that is the number of its expert.
    expert = tl.sum((until <= block).to(tl.int32), axis=0)
    before = tl.max(tl.where(until <= block, until, 0), axis=0)
    first = tl.load(offsets + expert - 1, mask=(expert > 0) & (expert <= EXPERTS), other=0) + (block - before) * BM
    last = tl.load(offsets + expert, mask=expert < EXPERTS, other=M)
    return expert, first, tl.where(expert > EXPERTS, 0, last - first)
