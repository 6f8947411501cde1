# mypy: disable-error-code="no-untyped-def"
"""`kernels/columns.py` on a GPU: one thread per row, which keeps its part of the block in registers.

A row's columns are walked through in order, so what parallelism there is comes from rows (and, for scores, from grids).
A register cannot be chosen by a number that is known only at run time: a column is picked out of its tile by comparing
all of the tile's column numbers. Tiles of 32 columns keep that cheap, and tiles that are done are left alone. Unrolling
the walk instead would take a minute to compile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["round_columns", "score_grids"]

ROWS = 32  # of a program, which is one warp: neighbouring threads work on neighbouring rows
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}  # of the compiler; Triton 3.9 warns if fusion is left to it
TILE = tl.constexpr(32)  # columns
# Added and subtracted again, it rounds any number below 2^22 to the nearest integer, ties to even.
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2^23


@triton.jit
def _pick(tile, column, i):
    """[ROWS]: column i of a tile [TILE, ROWS]."""
    return tl.sum(tl.where((column == i)[:, None], tile, 0.0), axis=0)


@triton.jit
def _code(x, scale, zero_point, LEVELS: tl.constexpr):
    """The nearest code. A quotient beyond ±512 is off the grid in any case."""
    # div_rn rounds correctly, which Triton's plain division need not do.
    quotient = tl.minimum(tl.maximum(tl.div_rn(x, scale), -512.0), 512.0)
    nearest = (quotient + _ROUNDER) - _ROUNDER
    return tl.minimum(tl.maximum(nearest + zero_point, 0.0), LEVELS)


@triton.jit
def _load(pointer, first, column, columns, row, rows):
    """A tile of [columns, rows], zero outside."""
    c = first + column
    mask = (c < columns)[:, None] & (row < rows)[None, :]
    return tl.load(pointer + c[:, None] * rows + row[None, :], mask=mask, other=0.0)


@triton.jit
def _pass_on(tile, p, follow, first, column, columns):
    """What is left of a tile's columns after a change by p of the column whose row of `follow` is given."""
    f = tl.load(follow + first + column, mask=first + column < columns, other=0.0)
    return tile - f[:, None] * p[None, :]


@triton.jit
def _round_one(
    tile, i, first, row, rows, column, scale, zero_point, before, codes, importance, lost, LEVELS: tl.constexpr
):
    """Round column first + i, which is in `tile`: what that changes, and the loss with it."""
    at = (first + i) * rows + row
    mask = row < rows
    x = _pick(tile, column, i)
    if importance is not None:
        p = x - (_code(x, scale, zero_point, LEVELS) - zero_point) * scale
        lost += tl.load(importance + first + i) * p * p
    else:
        s = tl.load(scale + at, mask=mask, other=1.0)
        z = tl.load(zero_point + at, mask=mask, other=0.0)
        code = _code(x, s, z, LEVELS)
        tl.store(codes + at, code.to(tl.uint8), mask=mask)
        # The change to pass on is that from these values, not from those that were rounded.
        if before is not None:
            x = tl.load(before + at, mask=mask, other=0.0)
        p = x - (code - z) * s
    return p, lost


@triton.jit(do_not_specialize=["rows", "columns"])
def _walk(
    x,
    follow,
    scale,
    zero_point,
    before,
    codes,
    importance,
    loss,
    rows,
    columns,
    LEVELS: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Both loops of `kernels/columns.py`. With `importance`, a grid per program writes its loss; without, its codes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, TILE)
    lost = tl.zeros([ROWS], tl.float32)
    # What `_round_one` reads grids from: for scores these are the values, the same for all columns.
    s = scale
    z = zero_point
    if importance is not None:
        at = tl.program_id(1) * rows + row
        s = tl.load(scale + at, mask=row < rows, other=1.0)
        z = tl.load(zero_point + at, mask=row < rows, other=0.0)
    x0 = _load(x, 0, column, columns, row, rows)
    # All four tiles need a name, as arguments below, also where TILES is less.
    x1 = x0
    x2 = x0
    x3 = x0
    if TILES > 1:
        x1 = _load(x, 32, column, columns, row, rows)
    if TILES > 2:
        x2 = _load(x, 64, column, columns, row, rows)
        x3 = _load(x, 96, column, columns, row, rows)
    # A loop for each tile: which one to pick from has to be written down, it cannot be computed.
    for i in range(tl.minimum(columns, 32)):
        f = follow + i * columns
        p, lost = _round_one(x0, i, 0, row, rows, column, s, z, before, codes, importance, lost, LEVELS)
        x0 = _pass_on(x0, p, f, 0, column, columns)
        if TILES > 1:
            x1 = _pass_on(x1, p, f, 32, column, columns)
        if TILES > 2:
            x2 = _pass_on(x2, p, f, 64, column, columns)
            x3 = _pass_on(x3, p, f, 96, column, columns)
    if TILES > 1:
        for i in range(tl.minimum(columns - 32, 32)):
            f = follow + (32 + i) * columns
            p, lost = _round_one(x1, i, 32, row, rows, column, s, z, before, codes, importance, lost, LEVELS)
            x1 = _pass_on(x1, p, f, 32, column, columns)
            if TILES > 2:
                x2 = _pass_on(x2, p, f, 64, column, columns)
                x3 = _pass_on(x3, p, f, 96, column, columns)
    if TILES > 2:
        for i in range(tl.minimum(columns - 64, 32)):
            f = follow + (64 + i) * columns
            p, lost = _round_one(x2, i, 64, row, rows, column, s, z, before, codes, importance, lost, LEVELS)
            x2 = _pass_on(x2, p, f, 64, column, columns)
            x3 = _pass_on(x3, p, f, 96, column, columns)
        for i in range(tl.minimum(columns - 96, 32)):
            f = follow + (96 + i) * columns
            p, lost = _round_one(x3, i, 96, row, rows, column, s, z, before, codes, importance, lost, LEVELS)
            x3 = _pass_on(x3, p, f, 96, column, columns)
    if importance is not None:
        tl.store(loss + at, lost, mask=row < rows)


def round_columns(
    x: Tensor, follow: Tensor, scale: Tensor, zero_point: Tensor, bits: int, before: Tensor | None = None
) -> Tensor:
    """See `round_columns` in `kernels/columns.py`, also for shapes and dtypes."""
    columns, rows = x.shape
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=x.device)
    inputs = [t.contiguous() for t in (x, follow, scale, zero_point)]
    _walk[(triton.cdiv(rows, ROWS),)](
        *inputs,
        before if before is None else before.contiguous(),
        codes,
        None,
        None,
        rows,
        columns,
        LEVELS=float(2**bits - 1),
        TILES=_tiles(columns),
        ROWS=ROWS,
        **OPTIONS,
    )
    return codes


def score_grids(x: Tensor, follow: Tensor, importance: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """See `score_grids` in `kernels/columns.py`, also for shapes and dtypes."""
    columns, rows = x.shape
    loss = torch.empty_like(scale, memory_format=torch.contiguous_format)
    _walk[(triton.cdiv(rows, ROWS), len(scale))](
        *(t.contiguous() for t in (x, follow, scale, zero_point)),
        None,
        None,
        importance.contiguous(),
        loss,
        rows,
        columns,
        LEVELS=float(2**bits - 1),
        TILES=_tiles(columns),
        ROWS=ROWS,
        **OPTIONS,
    )
    return loss


def _tiles(columns: int) -> int:
    """1, 2 or 4."""
    return 1 if columns <= 32 else 2 if columns <= 64 else 4
