# mypy: disable-error-code="no-untyped-def,assignment,misc"
"""`kernels/refinement.py` on a GPU: a kernel for each of the two steps, where plain torch launches some fifty."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptq_ao.kernels.triton.columns import TILE, _code, _load, _pick, _row, tiles
from gptq_ao.kernels.triton.launch import Kernel, launch_there

__all__ = ["fit_codes", "fit_scale"]

SCALE_ROWS = 64  # of a program of `fit_scale`
CODE_ROWS = 16  # of a program of `fit_codes`, which is one warp


@triton.jit(do_not_specialize=["rows", "columns", "stride"])
def _fit_scale(
    H,
    gradient,
    codes,
    scale,
    zero_point,
    error,
    change,
    rows,
    columns,
    stride,  # of H
    SIGNED: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = row < rows
    mask = (column < columns)[:, None] & inside[None, :]
    at = column[:, None] * rows + row[None, :]
    old = tl.load(scale + row, mask=inside, other=1.0).to(tl.float32)
    z = tl.load(zero_point + row, mask=inside, other=0.0)
    steps = tl.where(mask, tl.load(codes + at, mask=mask, other=0).to(tl.float32) - z[None, :], 0.0)
    square = (column < columns)[:, None] & (column < columns)[None, :]
    h = tl.load(H + column[:, None] * stride + column[None, :], mask=square, other=0.0)
    product = tl.dot(h, steps, input_precision=PRECISION)
    g = tl.load(gradient + at, mask=mask, other=0.0)
    slope = tl.sum(steps * g, axis=0)
    curvature = tl.sum(steps * product, axis=0)
    # Without steps the curvature is 0, which must not reach the division: what comes of it is not defined.
    new = (old + slope / tl.where(curvature > 0, curvature, 1.0)).to(tl.float16).to(tl.float32)
    delta = new - old
    better = (curvature > 0) & (tl.abs(new) <= 65504.0) & (new != 0)
    better = better & (2 * slope * delta > curvature * delta * delta)
    if not SIGNED:
        better = better & (new > 0)
    smaller = tl.where(better, -delta, 0.0)
    tl.store(scale + row, tl.where(better, new, old).to(tl.float16), mask=inside)
    tl.store(gradient + at, g + product * smaller[None, :], mask=mask)
    e = tl.load(error + at, mask=mask, other=0.0)
    grown = steps * smaller[None, :]
    tl.store(error + at, e + grown, mask=mask)
    tl.store(change + at, grown, mask=mask)


@triton.jit
def _fit_one(
    tile, i, first, column, row, rows, H, stride, code, goal, grown, codes, error, change, s, z, LEVELS: tl.constexpr
):
    """Set the code of column first + i, which is in `tile`. Returns by how much the error grows."""
    at = (first + i) * rows + row
    now = (code.to(tl.float32) - z) * s
    best = now + _pick(tile, column, i) / tl.load(H + (first + i) * (stride + 1))
    new_code = _code(best, s, z, LEVELS)
    new = (new_code - z) * s
    tl.store(codes + at, new_code.to(tl.uint8), mask=row < rows)
    tl.store(error + at, goal - new, mask=row < rows)
    tl.store(change + at, grown + now - new, mask=row < rows)
    return now - new


@triton.jit(do_not_specialize=["rows", "columns", "stride"])
def _fit_codes(
    H,
    gradient,
    codes,
    scale,
    zero_point,
    target,
    error,
    change,
    rows,
    columns,
    stride,  # of H
    LEVELS: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradients stay in registers, in tiles of 32 columns (see `columns.py`); tiles that are done are left alone."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, TILE)
    s = tl.load(scale + row, mask=inside, other=1.0).to(tl.float32)
    z = tl.load(zero_point + row, mask=inside, other=0.0)
    us = ()
    hs = ()
    for k in tl.static_range(TILES):
        us = us + (_load(gradient, TILE * k, column, columns, row, rows),)
        hs = hs + (_row(H, stride, 0, TILE * k, column, columns),)
    code = tl.load(codes + row, mask=inside, other=0)
    goal = tl.load(target + row, mask=inside, other=0.0)
    grown = tl.load(change + row, mask=inside, other=0.0)
    for t in tl.static_range(TILES):
        for i in range(tl.minimum(columns - TILE * t, TILE)):
            # What the next column needs is loaded while this one is fitted. (Behind the last, that one's again.)
            n = tl.minimum(TILE * t + i + 1, columns - 1)
            next_code = tl.load(codes + n * rows + row, mask=inside, other=0)
            next_goal = tl.load(target + n * rows + row, mask=inside, other=0.0)
            next_grown = tl.load(change + n * rows + row, mask=inside, other=0.0)
            p = _fit_one(
                us[0],
                i,
                TILE * t,
                column,
                row,
                rows,
                H,
                stride,
                code,
                goal,
                grown,
                codes,
                error,
                change,
                s,
                z,
                LEVELS,
            )
            left = ()
            coming = ()
            for k in tl.static_range(TILES - t):
                left = left + (us[k] + hs[k][:, None] * p[None, :],)
                coming = coming + (_row(H, stride, n, TILE * (t + k), column, columns),)
            us = left
            hs = coming
            code = next_code
            goal = next_goal
            grown = next_grown
        # The tile to pick from is always the first: it cannot be computed which.
        us = us[1:]
        hs = hs[1:]


def fit_scale(
    H: Tensor,
    gradient: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    error: Tensor,
    change: Tensor,
    signed: bool,
) -> None:
    """See `fit_scale` in `kernels/refinement.py`; [B, N] tensors are rows of contiguous ones, and H part of a larger
    matrix. The product is as precise as torch's are at the moment."""
    columns, rows = gradient.shape
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    kernel = _scale_kernel(columns, signed, tf32, H.get_device())
    tensors = (H, gradient, codes, scale, zero_point, error, change)
    launch_there(kernel, (-(-rows // SCALE_ROWS), 1, 1), tensors, (rows, columns, H.stride(0)))


def fit_codes(
    H: Tensor,
    gradient: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    target: Tensor,
    error: Tensor,
    change: Tensor,
    bits: int,
) -> None:
    """See `fit_codes` in `kernels/refinement.py`, and above for the layout."""
    columns, rows = gradient.shape
    kernel = _codes_kernel(bits, columns, H.get_device())
    tensors = (H, gradient, codes, scale, zero_point, target, error, change)
    launch_there(kernel, (-(-rows // CODE_ROWS), 1, 1), tensors, (rows, columns, H.stride(0)))


@functools.cache
def _scale_kernel(columns: int, signed: bool, tf32: bool, device: int) -> Kernel:
    constants = {
        "SIGNED": signed,
        "COLUMNS": max(16, triton.next_power_of_2(columns)),
        "ROWS": SCALE_ROWS,
        "PRECISION": "tf32" if tf32 else "tf32x3",  # three products, as good as one in fp32 and much faster
    }
    return Kernel(_fit_scale, constants, {"num_warps": 4, "enable_fp_fusion": True})


@functools.cache
def _codes_kernel(bits: int, columns: int, device: int) -> Kernel:
    constants = {"LEVELS": float(2**bits - 1), "TILES": tiles(columns), "ROWS": CODE_ROWS}
    return Kernel(_fit_codes, constants, {"num_warps": 1, "enable_fp_fusion": True})
