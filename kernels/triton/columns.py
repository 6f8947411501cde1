# mypy: disable-error-code="no-untyped-def,assignment,misc"
"""`kernels/columns.py` on a GPU: a few threads per row, which keep its part of the block in registers.

A row's columns are walked through in order, so what parallelism there is comes from rows (and, for scores, from grids).
A register cannot be chosen by a number that is known only at run time: a column is picked out of its tile by comparing
all of the tile's column numbers. Tiles of 32 columns keep that cheap, and tiles that are done are left alone. Unrolling
the walk instead would take a minute to compile. Memory would be waited for in each column: what the next one needs is
loaded one column ahead.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptq_ao.kernels.triton.launch import Kernel, launch_there

__all__ = ["round_columns", "score_grids", "tiles"]

ROWS = 16  # of a program, which is one warp: neighbouring threads work on neighbouring rows
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
def _row(matrix, stride, i, first, column, columns):
    """Of row i of a matrix [columns, columns] what belongs to a tile's columns, zero outside."""
    return tl.load(matrix + i * stride + first + column, mask=first + column < columns, other=0.0)


@triton.jit(do_not_specialize=["rows", "columns", "stride"])
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
    stride,  # between the grids of two columns
    LEVELS: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Both loops of `kernels/columns.py`. With `importance`, a grid per program writes its loss; without, its codes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, TILE)
    mask = row < rows
    lost = tl.zeros([ROWS], tl.float32)
    # For scores, grids are the same for all columns. For codes these are those of the first.
    grid = row
    if importance is not None:
        grid += tl.program_id(1) * rows
    s = tl.load(scale + grid, mask=mask, other=1.0)
    z = tl.load(zero_point + grid, mask=mask, other=0.0)
    was = s
    if before is not None:
        was = tl.load(before + row, mask=mask, other=0.0)
    xs = ()
    fs = ()
    for k in tl.static_range(TILES):
        xs = xs + (_load(x, TILE * k, column, columns, row, rows),)
        fs = fs + (_row(follow, columns, 0, TILE * k, column, columns),)
    for t in tl.static_range(TILES):
        for i in range(tl.minimum(columns - TILE * t, TILE)):
            # What the next column needs is loaded while this one is rounded. (Behind the last, that one's again.)
            n = tl.minimum(TILE * t + i + 1, columns - 1)
            value = _pick(xs[0], column, i)
            code = _code(value, s, z, LEVELS)
            if importance is not None:
                p = value - (code - z) * s
                lost += tl.load(importance + TILE * t + i) * p * p
            else:
                tl.store(codes + (TILE * t + i) * rows + row, code.to(tl.uint8), mask=mask)
                # The change to pass on is that from these values, not from those that were rounded.
                if before is not None:
                    value = was
                    was = tl.load(before + n * rows + row, mask=mask, other=0.0)
                p = value - (code - z) * s
                s = tl.load(scale + n * stride + row, mask=mask, other=1.0)
                z = tl.load(zero_point + n * stride + row, mask=mask, other=0.0)
            left = ()
            coming = ()
            for k in tl.static_range(TILES - t):
                left = left + (xs[k] - fs[k][:, None] * p[None, :],)
                coming = coming + (_row(follow, columns, n, TILE * (t + k), column, columns),)
            xs = left
            fs = coming
        # The tile to pick from is always the first: it cannot be computed which.
        xs = xs[1:]
        fs = fs[1:]
    if importance is not None:
        tl.store(loss + grid, lost, mask=mask)


def round_columns(
    x: Tensor, follow: Tensor, scale: Tensor, zero_point: Tensor, bits: int, before: Tensor | None = None
) -> Tensor:
    """See `round_columns` in `kernels/columns.py`, also for shapes and dtypes."""
    columns, rows = x.shape
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=x.device)
    # One grid for all columns is often a row that is expanded: it needs no copies, but a stride of 0.
    if scale.stride() != zero_point.stride() or scale.stride(1) != 1:
        scale, zero_point = scale.contiguous(), zero_point.contiguous()
    before = before if before is None else before.contiguous()
    tensors = (x.contiguous(), follow.contiguous(), scale, zero_point, before, codes, None, None)
    launch_there(
        _kernel(bits, columns, x.get_device()), (-(-rows // ROWS), 1, 1), tensors, (rows, columns, scale.stride(0))
    )
    return codes


def score_grids(x: Tensor, follow: Tensor, importance: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """See `score_grids` in `kernels/columns.py`, also for shapes and dtypes."""
    columns, rows = x.shape
    loss = torch.empty_like(scale, memory_format=torch.contiguous_format)
    x, follow, scale, zero_point, importance = (t.contiguous() for t in (x, follow, scale, zero_point, importance))
    tensors = (x, follow, scale, zero_point, None, None, importance, loss)
    grid = (-(-rows // ROWS), len(scale), 1)
    launch_there(_kernel(bits, columns, x.get_device()), grid, tensors, (rows, columns, rows))
    return loss


@functools.cache
def _kernel(bits: int, columns: int, device: int) -> Kernel:
    return Kernel(_walk, {"LEVELS": float(2**bits - 1), "TILES": tiles(columns), "ROWS": ROWS}, OPTIONS)


def tiles(columns: int) -> int:
    """1, 2 or 4."""
    return 1 if columns <= 32 else 2 if columns <= 64 else 4
