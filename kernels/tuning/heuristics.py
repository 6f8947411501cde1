"""How the linear kernel is cut into programs, chosen by a formula: nothing is tried out when a model runs."""

import dataclasses
import math

__all__ = [
    "FUSED_ROWS",
    "SHARED_MEMORY",
    "SMALLEST_RUN",
    "LinearConfig",
    "choose",
    "choose_experts",
    "columns_ahead",
    "computes",
    "programs_per_sm",
]

FUSED_ROWS = {8: 64, 9: 256}  # rows of x by compute capability: for more, dequantizing and a dense product are faster
# The dequantizing kernel takes groups of a multiple of this: scales of smaller ones are as much to read as codes.
SMALLEST_RUN = 8
SHARED_MEMORY = 227 * 2**10  # bytes of a multiprocessor, where compute capability is 9 or 10; others have less
MOST_PER_SM = 8  # the largest `LinearConfig.per_sm`: if each multiprocessor gets more programs, there is no limit
MOST_SPLIT = 16  # the largest `LinearConfig.split`: adding up the sums of more takes longer than their parts save


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """How `kernels/triton/linear.py` computes one product.

    Attributes:
        block_m: rows of x that a program works on, a power of two from 8 on.
        block_n: rows of the weight (out_features), a multiple of 16 and a power of two.
        block_k: columns of the weight (in_features) that one warp, or all warps together, take in one step: a power of
            two, and a multiple of a tile's columns.
        warps: number of warps in a program.
        slices: number of parts of a step that warps add up at the end. 1: all warps take the same columns, and each
            has other rows. Otherwise equal to `warps`: all have the same rows, and each takes other `block_k` columns.
        split: number of programs among which in_features are divided; if more than 1, their sums are added up in fp32.
        stages: number of steps that are on their way from memory at a time.
        scale_sum: whether the sums of a step are multiplied by the scale, instead of each weight. A step then has to
            lie in one group.
        last_adds: whether, with a split, the program that comes last adds up all sums, instead of a second kernel.
        evict_first: whether the weight is the first to leave the L2 cache.
        ahead: columns, a power of two, that each program prefetches into the L2 cache while the kernel before still
            runs (programmatic dependent launch, from Hopper on); 0: it starts when that kernel is done.
        per_sm: number of programs that a multiprocessor takes at a time at most, with `ahead` only; 0: as many as fit.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    slices: int = 1
    split: int = 1
    stages: int = 4
    scale_sum: bool = True
    last_adds: bool = True
    evict_first: bool = True
    ahead: int = 0
    per_sm: int = 0


def choose(
    rows: int, out_features: int, in_features: int, bits: int, group_size: int, experts: int, sms: int, capability: int
) -> LinearConfig | None:
    """The configuration for x [rows, in_features] and `experts` weights [out_features, in_features].

    Args:
        sms: number of multiprocessors of the device.
        capability: major compute capability of the device.

    Returns:
        None if the kernel does not compute this (a group size other than 32, 64, a multiple of 128, or the whole row),
        or is not the fastest way.
    """
    if not _takes(group_size, in_features) or rows > FUSED_ROWS[min(capability, 9)]:
        return None
    if rows > 64:
        return _many_rows(rows, out_features, in_features, bits, experts, sms)
    scale_sum = _scale_sum(rows, in_features, group_size, capability)
    return _few_rows(rows, out_features, in_features, bits, scale_sum, experts, sms)


def choose_experts(
    rows: int, out_features: int, in_features: int, bits: int, group_size: int, experts: int, sms: int, capability: int
) -> LinearConfig | None:
    """The configuration for x [rows, in_features], sorted by expert, and `experts` weights: see `choose`. A block has
    as many rows as an expert gets on average. In-features are not split: several experts make enough programs."""
    share = -(-rows // experts)
    if not _takes(group_size, in_features) or share > FUSED_ROWS[min(capability, 9)]:
        return None
    if share > 64:
        return _large_block(bits)
    block_m = max(8, 1 << (share - 1).bit_length())
    scale_sum = _scale_sum(block_m, in_features, group_size, capability)
    if block_m >= 32:
        return LinearConfig(block_m, 128, 128, warps=4, stages=3, scale_sum=scale_sum)
    reached = min(rows, experts)  # experts that can have rows: the others' programs end at once
    if reached * -(-out_features // 128) >= 1.6 * sms:
        return LinearConfig(block_m, 128, 128, warps=4, stages=5, scale_sum=scale_sum)
    # Too few large blocks to keep the device busy: smaller ones, whose warps share the columns if there are many.
    if block_m == 8 and in_features >= 1024:
        return LinearConfig(block_m, 16, 128, warps=4, slices=4, scale_sum=scale_sum)
    return LinearConfig(block_m, 64, 128, warps=4, stages=3, scale_sum=scale_sum)


def _takes(group_size: int, in_features: int) -> bool:
    """Whether blocks of 128 columns consist of whole groups (of at least 32 columns), or lie in one."""
    return group_size == in_features or group_size in (32, 64) or group_size % 128 == 0


def _scale_sum(rows: int, in_features: int, group_size: int, capability: int) -> bool:
    """Whether to scale sums: if a step lies in one group, and registers hold a step's sums beside the total. (On Ampere
    they do not for 64 rows.)"""
    return (group_size == in_features or group_size % 128 == 0) and (capability >= 9 or rows <= 32)


def _few_rows(
    rows: int, out_features: int, in_features: int, bits: int, scale_sum: bool, experts: int, sms: int
) -> LinearConfig:
    """In-features are split until each multiprocessor has six to twelve warps, in programs of two or four. Then enough
    is on its way from memory, and some warps compute while others wait. (Measured on an H200.)"""
    # The next power of two; fewer than eight rows take the matrix instruction as long as eight.
    block_m = max(8, 1 << (rows - 1).bit_length())
    steps = -(-in_features // 128)

    def wanted(block_n: int, warps: int) -> int:
        """The split that makes that many warps."""
        return _power_of_two(6.4 * sms / warps / (experts * -(-out_features // block_n)))

    quick = bits in (2, 4)  # to unpack
    if block_m == 8:
        block_n, warps = (64, 2) if quick else (128, 4)
    else:
        # With large blocks x is read less often, but a program has to have enough steps.
        long = steps >= 8 * wanted(128, 4) and (quick or block_m > 16)
        block_n, warps = 128 if long or wanted(128, 4) == 1 else 64, 4
    fewest = 2 if block_m == 8 else 4  # least steps of a part
    split = min(wanted(block_n, warps), MOST_SPLIT, 1 << max(0, (steps // fewest).bit_length() - 1))
    return LinearConfig(
        block_m,
        block_n,
        128,
        warps=warps,
        split=split,
        stages=4 if block_m <= 16 else 3,
        scale_sum=scale_sum,
        last_adds=block_m <= 16,  # the sums of more rows are many for one program
        ahead=columns_ahead(block_n),
        per_sm=programs_per_sm(experts * -(-out_features // block_n) * split, sms),
    )


def columns_ahead(block_n: int) -> int:
    """A good `LinearConfig.ahead`: some KB per program. (With more, times grow, as measured on an H200.)"""
    return max(128, 2**14 // block_n)


def programs_per_sm(programs: int, sms: int) -> int:
    """A good `LinearConfig.per_sm`: what each multiprocessor gets if all get the same number. Where there is room for
    more, programs of the next kernel are placed beside those of this one, on some multiprocessors more than on others,
    and the last of them take longer. (28672 × 4096, one row: 19.5 µs if two fit, 26.6 if three do, 19.9 if five do.)"""
    each = -(-programs // sms)
    return each if each <= MOST_PER_SM else 0


def _power_of_two(x: float) -> int:
    """The smallest that is not below x, from 1 on."""
    return 1 << max(0, math.ceil(math.log2(max(x, 1))))


def _balance(programs: int, sms: int) -> float:
    """The part of the time that multiprocessors are busy, if programs take equally long."""
    return programs / (-(-programs // sms) * sms)


def _many_rows(rows: int, out_features: int, in_features: int, bits: int, experts: int, sms: int) -> LinearConfig:
    """Large blocks use the matrix instructions best, if there are enough of them for two programs per multiprocessor:
    while one unpacks, the other multiplies. A split makes more programs, and costs memory traffic."""
    best, most = (64, 1), 0.0
    for block_m, worth in ((128, 1.0), (64, 0.8)):
        blocks = experts * -(-rows // block_m) * -(-out_features // 128)
        for split in (1, 2, 4):
            value = worth * _balance(blocks * split, 2 * sms) / (1 + 800 / in_features * split * (split > 1))
            if value > most and in_features >= 512 * split:
                best, most = (block_m, split), value
    block_m, split = best
    if block_m == 128:
        return dataclasses.replace(_large_block(bits), split=split, ahead=columns_ahead(128))
    return LinearConfig(64, 128, 128, warps=4, split=split, scale_sum=False, ahead=columns_ahead(128))


def _large_block(bits: int) -> LinearConfig:
    """For many rows. With four warps, two programs fit into a multiprocessor."""
    block_k, stages = (64, 4) if bits >= 4 else (128, 3)  # at least a tile
    return LinearConfig(128, 128, block_k, warps=4, stages=stages, scale_sum=False, last_adds=False)


def computes(c: LinearConfig, bits: int, group_size: int, in_features: int) -> bool:
    """Whether the kernel, cut like this, is right for such a weight."""
    sizes = (c.block_m, c.block_n, c.block_k, c.warps)
    # n & (n − 1) is zero for powers of two only.
    if any(n < 1 or n & (n - 1) for n in sizes) or c.block_m < 8 or c.block_n < 16 or c.split < 1 or c.stages < 1:
        return False
    whole_tiles = c.block_k % (128 if bits < 4 else 256 // bits) == 0
    one_group = group_size == in_features or group_size % c.block_k == 0
    if c.ahead < 0 or c.ahead & (c.ahead - 1) or c.ahead % 128:
        return False
    whole_groups = one_group or (c.block_k % group_size == 0 and not c.scale_sum)
    return whole_tiles and whole_groups and c.slices in (1, c.warps) and c.per_sm in range(MOST_PER_SM + 1)
