# mypy: disable-error-code="no-untyped-def"
"""How the linear kernel reads x and a packed weight: whole words of tiles, in the order in which `codes/tiles.py` lays
them out. What its arguments and constants are, and what is read beyond the last tile: `linear.py`.
"""

import triton
import triton.language as tl

__all__ = ["prefetch_weight", "read_weight", "read_x"]


@triton.jit
def _tiles(
    pointer,
    tile_row,
    row_tiles,
    tile_column,
    column_tiles,
    WORDS: tl.constexpr,
    NT: tl.constexpr,
    KT: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Words of the tiles of one step. Warps are neighbours along the second axis: [KT, NT·WORDS] if each has rows of
    its own, [NT·KT, SLICES·WORDS] if each has columns of its own."""
    if SLICES == 1:
        i = tl.arange(0, KT)[:, None]
        j = tl.arange(0, NT * WORDS)[None, :]
        row, column, word = tile_row + j // WORDS, i, j % WORDS
    else:
        i = tl.arange(0, NT * KT)[:, None]
        j = tl.arange(0, SLICES * WORDS)[None, :]
        row, column, word = tile_row + i // KT, i % KT + j // WORDS * KT, j % WORDS
    row = tl.minimum(row, row_tiles - 1)
    if EVEN:
        at = pointer + ((row * column_tiles + column) * WORDS + word) + tile_column * WORDS
    else:
        column = tl.minimum(tile_column + column, column_tiles - 1)
        at = pointer + ((row * column_tiles + column) * WORDS + word)
    return tl.load(at, eviction_policy=POLICY)


@triton.jit
def read_weight(
    qdata,
    high,
    scale_zero,
    k,
    row,
    tile_row,
    row_tiles,
    column_tiles,
    groups,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Of columns from k on: codes, high bits (or codes again), words of scale and zero [SLICES·BN, groups in BK]."""
    KE: tl.constexpr = 128 if BITS < 4 else 256 // BITS
    NT: tl.constexpr = BN // 16
    KT: tl.constexpr = BK // KE
    tile = k // KE
    q = _tiles(qdata, tile_row, row_tiles, tile, column_tiles, 128, NT, KT, SLICES, EVEN, POLICY)
    h = q
    if BITS == 3:
        h = _tiles(high, tile_row, row_tiles, tile, column_tiles, 64, NT, KT, SLICES, EVEN, POLICY)
    group = tl.arange(0, BK // GROUP if GROUP > 0 and GROUP < BK else 1)[None, :]
    if GROUP > 0:
        if SLICES == 1:
            group += k // GROUP
        else:
            group += (k + tl.arange(0, SLICES * BN)[:, None] // BN * BK) // GROUP
        if not EVEN:
            group = tl.minimum(group, groups - 1)
    word = tl.load(scale_zero + (row // 16 * groups * 16 + row % 16)[:, None] + group * 16)
    return q, h, word


@triton.jit
def _prefetch(pointer, row, end, length, first, BYTES: tl.constexpr, NT: tl.constexpr):
    """Ask for BYTES, from byte `first` on, of each of NT rows of `length` bytes: they are to be in the L2 cache when
    they are read. All multiprocessors share it, so that what is written in between is read as it was written."""
    i = tl.arange(0, 128)  # NT threads ask for a row each, and the copy engine does the rest
    address = pointer.to(tl.int64) + tl.minimum(row + i, end - 1).to(tl.int64) * length + first
    address &= -16  # which it insists on
    size = tl.where(i < NT, tl.minimum(BYTES, length - first), 0)
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;}",
        "=r,l,r",
        [address, size],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_weight(
    qdata,
    high,
    scale_zero,
    k,
    tile_row,
    end,
    column_tiles,
    groups,
    NT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of COLUMNS columns from k on."""
    KE: tl.constexpr = 128 if BITS < 4 else 256 // BITS
    TILES: tl.constexpr = COLUMNS // KE
    _prefetch(qdata, tile_row, end, column_tiles * 512, k // KE * 512, TILES * 512, NT)
    if BITS == 3:
        _prefetch(high, tile_row, end, column_tiles * 256, k // KE * 256, TILES * 256, NT)
    if GROUP > 0:
        GROUPS: tl.constexpr = COLUMNS // GROUP if COLUMNS > GROUP else 1
        _prefetch(scale_zero, tile_row, end, groups * 64, k // GROUP * 64, GROUPS * 64, NT)


@triton.jit
def read_x(x, k, m, M, K, BK: tl.constexpr, EVEN: tl.constexpr):
    """xᵀ [BK, BM]."""
    c = k + tl.arange(0, BK)[:, None]
    mask = (m < M)[None, :]
    if not EVEN:
        mask = mask & (c < K)
    return tl.load(x + m[None, :] * K + c, mask=mask, other=0.0)
