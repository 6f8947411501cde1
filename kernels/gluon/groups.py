# mypy: disable-error-code="no-untyped-def,assignment,misc"
"""`kernels/groups.py` on an NVIDIA GPU: two launches for a group, one to try grids, one to choose and round. How a
program walks from column to column: `tiles.py`."""

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from gptq_ao.codes.grid import NARROWEST, SMALLEST_SCALE, max_code
from gptq_ao.kernels.gluon.tiles import (
    LEFT,
    OPTIONS,
    PLAIN,
    SPREAD,
    TILE,
    WITHOUT_CONFLICTS,
    arrived,
    nearest_step,
    passed_on,
    pick,
    put,
    tile_of,
)
from gptq_ao.kernels.triton.launch import Kernel, launch_there

__all__ = ["round_group"]

RATE_ROWS, ROUND_ROWS = 2, 1  # of a thread
_SMALLEST = gl.constexpr(SMALLEST_SCALE)


@gluon.jit
def _stored(scale):
    """See `codes/grid.py`."""
    smallest = gl.where(scale < 0, -_SMALLEST, _SMALLEST)
    return gl.where(gl.abs(scale) < _SMALLEST, smallest, scale).to(gl.float16)


@gluon.jit
def _candidate(low, high, shares, c, count, levels, SYM: gl.constexpr):
    """Grid number c of `candidate_grids`, for rows with these smallest and largest weights."""
    second = c >= count
    share = gl.load(shares + gl.where(second, c - count, c))
    if SYM:
        wide = share * (2 * gl.where(-low > high, -low, high) / levels)
        return _stored(gl.where(second, -wide, wide)), gl.zeros_like(low) + (levels + 1) * 0.5
    low = gl.where(low > 0, 0.0, low)
    high = gl.where(high < 0, 0.0, high)
    scale = _stored(share * ((high - low) / levels))
    origin = share * -low / scale.to(gl.float32)
    zero_point = gl.where(second, gl.ceil(origin), gl.floor(origin))
    return scale, gl.minimum(gl.maximum(zero_point, 0.0), levels)


@gluon.jit
def _least(loss, row, mask, rows, grids):
    """The number of the grid with the smallest loss, the first of equal ones; NaN is not small."""
    best = gl.where(mask, float("inf"), 0.0)
    number = gl.where(mask, 0, 0)
    for first in range(0, grids, 8):
        for i in gl.static_range(8):  # loaded together
            c = first + i
            lost = gl.load(loss + c * rows + row, mask=mask & (c < grids), other=float("inf"))
            better = lost < best
            best = gl.where(better, lost, best)
            number = gl.where(better, c, number)
    return number


@gluon.jit(do_not_specialize=["rows", "count", "grids"])
def _walk(
    x,
    low,
    high,
    shares,
    follow,
    loss,
    importance,
    weight,
    codes,
    scale,
    zero_point,
    rows,
    count,
    grids,
    levels,
    SYM: gl.constexpr,
    COLUMNS: gl.constexpr,
    ROWS: gl.constexpr,
):
    """For 32·ROWS rows: with `importance` the loss of one grid, without it the codes of the grid that lost least."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([TILE, ROWS], [1, 32], [1, 1], [1, 0])
    OF_ROW: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    OF_COLUMN: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    TILES: gl.constexpr = COLUMNS // TILE
    BEFORE: gl.constexpr = TILES - 1 if TILES > 1 else 1
    row = gl.program_id(0) * (32 * ROWS) + gl.arange(0, 32 * ROWS, layout=OF_ROW)
    column = gl.arange(0, TILE, layout=OF_COLUMN)
    mask = row < rows
    inside = mask.expand_dims(0)
    lowest = gl.load(low + row, mask=mask, other=0.0)
    highest = gl.load(high + row, mask=mask, other=0.0)
    if importance is not None:
        stored, z = _candidate(lowest, highest, shares, gl.program_id(1), count, levels, SYM)
    else:
        number = _least(loss, row, mask, rows, grids)
        stored, z = _candidate(lowest, highest, shares, number, count, levels, SYM)
        gl.store(scale + row, stored, mask=mask)
        gl.store(zero_point + row, z.to(gl.uint8), mask=mask)
    s = stored.to(gl.float32)
    inverse = 1.0 / s
    lost = gl.zeros_like(s)
    passed = gl.allocate_shared_memory(gl.float32, [BEFORE, TILE, 32 * ROWS], WITHOUT_CONFLICTS)
    own = gl.allocate_shared_memory(gl.float32, [TILE, TILE], PLAIN)
    # What a tile needs from memory is asked for while the tile before it is walked through.
    at = column.expand_dims(1) * rows + row.expand_dims(0)
    x_ahead = gl.load(x + at, mask=inside, other=0.0)
    own_ahead = tile_of(follow, 0, 0, COLUMNS, SPREAD, False)
    first_ahead = tile_of(follow, 0, 0, COLUMNS, LEFT, True)
    for t in range(TILES):
        n = gl.minimum(t + 1, TILES - 1)
        X = x_ahead + gl.convert_layout(arrived(passed, follow, first_ahead, t, COLUMNS, ROWS), LAYOUT)
        own.store(own_ahead)
        x_ahead = gl.load(x + n * TILE * rows + at, mask=inside, other=0.0)
        own_ahead = tile_of(follow, n, n, COLUMNS, SPREAD, False)
        first_ahead = tile_of(follow, 0, n, COLUMNS, LEFT, True)
        # Codes less the zero point. X becomes what rounding has changed, column by column.
        steps = gl.zeros_like(X)
        for i in gl.static_range(TILE):
            value = pick(X, column, i)
            step = nearest_step(value, inverse, z, levels)
            p = step * s - value
            f = own.slice(i, 1).permute((1, 0)).load(LAYOUT)
            X = passed_on(X, column, i, f, p)
            steps = put(steps, column, i, step)
        if t < TILES - 1:
            passed.index(t).store(X)
        if importance is not None:
            lost += gl.sum(gl.load(importance + t * TILE + column).expand_dims(1) * X * X, axis=0)
        else:
            here = t * TILE * rows + at
            gl.store(codes + here, (steps + z.expand_dims(0)).to(gl.uint8), mask=inside)
            w = gl.load(weight + here, mask=inside, other=0.0)
            gl.store(weight + here, w - steps * s.expand_dims(0), mask=inside)
    if importance is not None:
        gl.store(loss + gl.program_id(1) * rows + row, lost, mask=mask)


def round_group(
    x: Tensor,
    follow: Tensor,
    importance: Tensor,
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    sym: bool,
    signed: bool,
    count: int,
) -> None:
    """See `round_group` in `kernels/groups.py`, also for shapes and dtypes; what is set is contiguous."""
    columns, rows = x.shape
    x, follow, importance = x.contiguous(), follow.contiguous(), importance.contiguous()
    low, high = x.aminmax(dim=0)
    grids = count if sym and not signed else 2 * count
    loss = x.new_empty(grids, rows)
    seen = (x, low, high, _shares(NARROWEST[bits], count, x.device), follow, loss)
    numbers = (rows, count, grids, float(max_code(bits)))
    rate, choose = _kernels(columns, sym, x.get_device())
    tried, done = (importance, None, None, None, None), (None, weight, codes, scale, zero_point)
    launch_there(rate, (-(-rows // (32 * RATE_ROWS)), grids, 1), (*seen, *tried), numbers)
    launch_there(choose, (-(-rows // (32 * ROUND_ROWS)), 1, 1), (*seen, *done), numbers)


@functools.cache
def _shares(narrowest: float, count: int, device: torch.device) -> Tensor:
    return torch.linspace(1, narrowest, count, device=device)


@functools.cache
def _kernels(columns: int, sym: bool, device: int) -> tuple[Kernel, Kernel]:
    rate, choose = (
        Kernel(_walk, {"SYM": sym, "COLUMNS": columns, "ROWS": rows}, OPTIONS) for rows in (RATE_ROWS, ROUND_ROWS)
    )
    return rate, choose
