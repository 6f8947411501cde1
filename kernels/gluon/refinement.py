# mypy: disable-error-code="no-untyped-def,assignment,misc"
"""`fit_codes` of `kernels/refinement.py` on an NVIDIA GPU. How a program walks from column to column: `tiles.py`."""

import functools

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from gptq_ao.codes.grid import max_code
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

__all__ = ["fit_codes"]

ROWS = 1  # of a thread


@gluon.jit(do_not_specialize=["rows", "stride"])
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
    stride,  # of H
    levels,
    COLUMNS: gl.constexpr,
    ROWS: gl.constexpr,
):
    """For 32·ROWS rows."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([TILE, ROWS], [1, 32], [1, 1], [1, 0])
    OF_COLUMN: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    TILES: gl.constexpr = COLUMNS // TILE
    BEFORE: gl.constexpr = TILES - 1 if TILES > 1 else 1
    row = gl.program_id(0) * (32 * ROWS) + gl.arange(0, 32 * ROWS, layout=gl.SliceLayout(0, LAYOUT))
    column = gl.arange(0, TILE, layout=OF_COLUMN)
    mask = row < rows
    inside = mask.expand_dims(0)
    s = gl.load(scale + row, mask=mask, other=1.0).to(gl.float32)
    z = gl.load(zero_point + row, mask=mask, other=0.0)
    inverse = 1.0 / s
    passed = gl.allocate_shared_memory(gl.float32, [BEFORE, TILE, 32 * ROWS], WITHOUT_CONFLICTS)
    own = gl.allocate_shared_memory(gl.float32, [TILE, TILE], PLAIN)
    at = column.expand_dims(1) * rows + row.expand_dims(0)
    gradient_ahead = gl.load(gradient + at, mask=inside, other=0.0)
    codes_ahead = gl.load(codes + at, mask=inside, other=0)
    own_ahead = tile_of(H, 0, 0, stride, SPREAD, False)
    first_ahead = tile_of(H, 0, 0, stride, LEFT, True)
    for t in range(TILES):
        n = gl.minimum(t + 1, TILES - 1)
        G = gradient_ahead + gl.convert_layout(arrived(passed, H, first_ahead, t, stride, ROWS), LAYOUT)
        now = (codes_ahead.to(gl.float32) - z.expand_dims(0)) * s.expand_dims(0)
        own.store(own_ahead)
        gradient_ahead = gl.load(gradient + n * TILE * rows + at, mask=inside, other=0.0)
        codes_ahead = gl.load(codes + n * TILE * rows + at, mask=inside, other=0)
        own_ahead = tile_of(H, n, n, stride, SPREAD, False)
        first_ahead = tile_of(H, 0, n, stride, LEFT, True)
        steps = gl.zeros_like(G)  # codes less the zero point
        # G becomes the change of the error, column by column.
        for i in gl.static_range(TILE):
            h = own.slice(i, 1).permute((1, 0)).load(LAYOUT)  # [TILE, 1]
            was = pick(now, column, i)
            better = pick(G, column, i).expand_dims(0) * (1.0 / pick(h, column, i)).expand_dims(0)
            step = nearest_step(was + gl.sum(better, axis=0), inverse, z, levels)
            p = was - step * s
            G = passed_on(G, column, i, h, p)
            steps = put(steps, column, i, step)
        if t < TILES - 1:
            passed.index(t).store(G)
        here = t * TILE * rows + at
        goal = gl.load(target + here, mask=inside, other=0.0)
        grown = gl.load(change + here, mask=inside, other=0.0)
        gl.store(codes + here, (steps + z.expand_dims(0)).to(gl.uint8), mask=inside)
        gl.store(error + here, goal - steps * s.expand_dims(0), mask=inside)
        gl.store(change + here, grown + G, mask=inside)


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
    """See `fit_codes` in `kernels/refinement.py`; [B, N] tensors are rows of contiguous ones, and H part of a larger
    matrix."""
    columns, rows = gradient.shape
    kernel = _kernel(columns, H.get_device())
    tensors = (H, gradient, codes, scale, zero_point, target, error, change)
    launch_there(kernel, (-(-rows // (32 * ROWS)), 1, 1), tensors, (rows, H.stride(0), float(max_code(bits))))


@functools.cache
def _kernel(columns: int, device: int) -> Kernel:
    return Kernel(_fit_codes, {"COLUMNS": columns, "ROWS": ROWS}, OPTIONS)
