"""How a product with many rows on Hopper is cut into tiles, chosen by a formula: nothing is tried out when a model
runs."""

import dataclasses
import itertools

__all__ = ["FEWEST_ROWS", "ManyRowsConfig", "candidates", "choose", "computes"]

BLOCK_N = 128  # rows of the weight in a tile: 64 for each of two groups of warps
BLOCKS_M = (128, 256)
SPLITS = (1, 2, 4)
SHARED_MEMORY = 210 * 2**10  # bytes for what is on its way; some more is left for what is stored
FEWEST_ROWS = 96  # with fewer the kernels for few rows are as fast
# Microseconds on an H200 with all multiprocessors at work, by rows of x in a tile: of a step of 64 columns, by bits
# (to unpack 3 or 8 takes more instructions), and to leave the sums of two or four parts and add them up.
STEP = {128: {2: 0.385, 3: 0.465, 4: 0.385, 8: 0.465}, 256: {2: 0.64, 3: 0.66, 4: 0.64, 8: 0.715}}
SPLIT = {128: {1: 0.0, 2: 3.4, 4: 5.0}, 256: {1: 0.0, 2: 5.2, 4: 9.0}}
TILE = 1.0  # to store a tile's results
LAUNCH = 2.0


@dataclasses.dataclass(frozen=True)
class ManyRowsConfig:
    """How `kernels/gluon/many_rows.py` computes one product.

    Attributes:
        block_m: rows of x in a tile.
        split: programs among which in_features are divided.
    """

    block_m: int
    split: int

    def at_once(self, bits: int) -> int:
        """Steps of a stage. The products of a step of 128 rows are done before the next one could be waited for, and
        of 2 and 3 bits, a tile of codes (`codes/tiles.py`) is two steps."""
        return 2 if self.block_m <= 128 or bits < 4 else 1

    def stages(self, bits: int) -> int:
        """How many are on their way from memory at a time."""
        return SHARED_MEMORY // (64 * self.at_once(bits) * (2 * self.block_m + BLOCK_N * bits // 8))


def computes(bits: int, group_size: int, out_features: int, in_features: int) -> bool:
    """Whether the kernel is right for such a weight: groups of whole steps, or of half a step; and the copy
    engine wants rows of x and y to begin at multiples of 16 bytes."""
    whole = group_size in (32, 64, in_features) or group_size % 128 == 0
    return bits in (2, 3, 4, 8) and whole and out_features % 8 == 0 and in_features % 8 == 0


def choose(rows: int, out_features: int, in_features: int, bits: int, sms: int) -> ManyRowsConfig:
    """The configuration for x [rows, in_features] and a weight [out_features, in_features] that takes the shortest time
    as the constants above tell it."""
    configs = candidates(rows, out_features, in_features, sms)
    return min(configs, key=lambda c: _microseconds(c, rows, out_features, in_features, bits, sms))


def candidates(rows: int, out_features: int, in_features: int, sms: int) -> list[ManyRowsConfig]:
    """Those worth trying. A part of a split has at least eight steps; they are taken by twos."""
    found = []
    for block_m, split in itertools.product(BLOCKS_M, SPLITS):
        if rows < block_m and block_m > min(BLOCKS_M):
            continue  # what is beyond the last row takes its time, too
        work = _tiles(block_m, rows, out_features) * split
        if split == 1 or (work <= sms and in_features >= 512 * split):
            found.append(ManyRowsConfig(block_m, split))
    return found


def _tiles(block_m: int, rows: int, out_features: int) -> int:
    return -(-rows // block_m) * -(-out_features // BLOCK_N)


def _microseconds(c: ManyRowsConfig, rows: int, out_features: int, in_features: int, bits: int, sms: int) -> float:
    waves = -(-_tiles(c.block_m, rows, out_features) * c.split // sms)
    steps = -(-in_features // (64 * c.split))
    return waves * (steps * STEP[c.block_m][bits] + TILE) + LAUNCH + SPLIT[c.block_m][c.split]
