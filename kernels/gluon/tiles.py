# mypy: disable-error-code="no-untyped-def,assignment,misc"
"""A walk from column to column on an NVIDIA GPU, in Gluon, which lets us say where each number lies.

A thread owns rows: all numbers of a row's tile of columns are in its registers. So the walk needs no other thread, and
picking a column out of the tile, which is known at compile time, is no instruction at all. The rest of a block is not
kept in registers: what columns pass on waits in shared memory, and a tile that is begun adds up what all tiles before
it have passed on to it, on the tensor cores.

A program is one warp, with few others beside it, and nearly all of its time is waiting. So what a tile needs from
memory is asked for while the tile before it is walked through, and the row of the matrix that says how much a column
passes on is read from shared memory: the L1 cache has little room left.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

TILE = gl.constexpr(16)  # columns: what an instruction of the tensor cores takes
OPTIONS = {"num_warps": 1, "maxnreg": 255, "enable_fp_fusion": True}
# Added and subtracted again, it rounds any number below 2^22 to the nearest integer, ties to even.
ROUNDER = gl.constexpr(12582912.0)  # 1.5 · 2^23
SUM = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, SUM, 1))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, SUM, 1))
SPREAD = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [1, 1], [1, 0]))  # a tile of `follow` over the threads
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
WITHOUT_CONFLICTS = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))  # also when read as `RIGHT`


@gluon.jit
def pick(tile, column, i: gl.constexpr):
    """[rows]: column i of a tile. (A sum of integers, since a sum with 0.0 would be an instruction.)"""
    bits = tile.to(gl.int32, bitcast=True)
    return gl.sum(gl.where(column.expand_dims(1) == i, bits, 0), axis=0).to(gl.float32, bitcast=True)


@gluon.jit
def put(tile, column, i: gl.constexpr, value):
    """The tile with another column i."""
    return gl.where(column.expand_dims(1) == i, value.expand_dims(0), tile)


@gluon.jit
def passed_on(tile, column, i: gl.constexpr, f, p):
    """The tile with p as column i, and f·p added to the columns after it; those before it stay."""
    return gl.where(column.expand_dims(1) > i, tile + f * p.expand_dims(0), put(tile, column, i, p))


@gluon.jit
def tile_of(follow, first, t, stride, LAYOUT: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Of the rows of tile `first` what belongs to the columns of tile t."""
    down = gl.arange(0, TILE, layout=gl.SliceLayout(1, LAYOUT)).expand_dims(1)
    along = gl.arange(0, TILE, layout=gl.SliceLayout(0, LAYOUT)).expand_dims(0)
    if TRANSPOSED:
        return gl.load(follow + (first * TILE + along) * stride + t * TILE + down)
    return gl.load(follow + (first * TILE + down) * stride + t * TILE + along)


@gluon.jit
def _high(t):
    """The part of fp32 numbers that the tensor cores take, 11 bits."""
    return (t.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)


@gluon.jit
def arrived(passed, follow, f, t, stride, ROWS: gl.constexpr):
    """[TILE, 32·ROWS]: what the tiles before tile t have passed on to it, as three products of tensor cores: of the
    numbers' high parts, and of each high part with the other's low part. `f` is what belongs to the first of them."""
    total = gl.zeros([TILE, 32 * ROWS], gl.float32, layout=SUM)
    for b in range(t):
        ahead = tile_of(follow, gl.minimum(b + 1, t - 1), t, stride, LEFT, True)
        p = passed.index(b).load(RIGHT)
        f_high = _high(f)
        p_high = _high(p)
        total = mma_v2(f - f_high, p_high, total, "tf32")
        total = mma_v2(f_high, p - p_high, total, "tf32")
        total = mma_v2(f_high, p_high, total, "tf32")
        f = ahead
    return total


@gluon.jit
def nearest_step(value, inverse, z, levels):
    """The nearest code to value / scale, less the zero point. (The ends of the grid are integers: to cut off at them
    before rounding is the same as after it.)"""
    step = gl.minimum(gl.maximum(value * inverse, -z), levels - z)
    return (step + ROUNDER) - ROUNDER
