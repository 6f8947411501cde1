"""The two loops of GPTQ that go column by column, over a block of columns that fits in registers.

Both walk through a block x of a transposed matrix, one column (here: a row of x) after the other; what rounding one
changes is passed on to the columns after it:

    ŵ_i = grid(x_i)        p_i = x_i − ŵ_i        x_j ← x_j − p_i·follow_ij   for j > i

With `follow` the block of U / diag(U) (see `solver/factor.py`) this is GPTQ's rounding with error feedback. With
`follow`_ij = −H_ij / H_jj, x_j = ŵ_j + (E·H)_j / H_jj and p_i the change of ŵ_i, it is coordinate descent (see
`solver/refine.py`).

Shapes: a block has B columns of N rows (out_features), and is stored as [B, N]: all threads of a warp then do the same
to neighbouring rows. fp32, except for codes (uint8).
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gptq_ao.codes.grid import round_to_grid

__all__ = ["MAX_COLUMNS", "column_blocks", "in_gluon", "round_columns", "score_grids"]

MAX_COLUMNS = 128  # of a block: more do not fit in registers
OUTER = 1024  # columns between two products with all of the columns before them, or of the matrix
SCRATCH = 2**23  # bytes that trying grids takes on the CPU: more would not stay in its caches


def column_blocks(in_features: int, columns: int) -> Iterator[tuple[int, int, list[slice]]]:
    """Ranges (first, last) of about OUTER columns, with the blocks of at most MAX_COLUMNS that they consist of. A group
    of `columns` is one block, or several if it is longer, in one range.
    """
    # Whole groups, at least one.
    outer = max(columns, OUTER // columns * columns)
    for first in range(0, in_features, outer):
        last = min(first + outer, in_features)
        yield (
            first,
            last,
            [
                slice(i, min(i + MAX_COLUMNS, start + columns, last))
                for start in range(first, last, columns)
                for i in range(start, min(start + columns, last), MAX_COLUMNS)
            ],
        )


def in_gluon(block: Tensor) -> bool:
    """Whether kernels in Gluon (`kernels/gluon/`) take a block: on NVIDIA's GPUs since Ampere, of whole tiles."""
    whole = len(block) % 32 == 0 and len(block) <= MAX_COLUMNS
    return block.is_cuda and whole and torch.version.hip is None and _capability(block.get_device()) >= (8, 0)


_capability = functools.cache(torch.cuda.get_device_capability)


def round_columns(
    x: Tensor, follow: Tensor, scale: Tensor, zero_point: Tensor, bits: int, before: Tensor | None = None
) -> Tensor:
    """Round a block, passing on what each column's rounding changes.

    Args:
        x: [B, N].
        follow: [B, B]; what is not above its diagonal is not read.
        scale, zero_point: [B, N] fp32, of each column.
        before: [B, N], values to take the place of x in p: the change is then that from these values.

    Returns:
        [B, N] uint8, codes.
    """
    if x.is_cuda:
        from gptq_ao.kernels.triton import columns

        return columns.round_columns(x, follow, scale, zero_point, bits, before)
    x = x.clone()
    codes = torch.empty_like(x, dtype=torch.uint8)
    with _one_thread():
        for i in range(len(x)):
            code = round_to_grid(x[i], scale[i], zero_point[i], bits)
            codes[i] = code
            value = code.sub_(zero_point[i]).mul_(scale[i])
            p = (x[i] if before is None else before[i]) - value
            x[i + 1 :].addr_(follow[i, i + 1 :], p, alpha=-1)
    return codes


def score_grids(x: Tensor, follow: Tensor, importance: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Σ importance_i·p_i² of rounding the block with each of C grids, the same for all of its columns.

    Args:
        x, follow: as for `round_columns`.
        importance: [B], the pivots of `Factor`: the sum is then the part of tr(E·H·Eᵀ) that the block is to blame for,
            if the columns after it make up for what they can.
        scale, zero_point: [C, N] fp32.

    Returns:
        [C, N] fp32.
    """
    if x.is_cuda:
        from gptq_ao.kernels.triton import columns

        return columns.score_grids(x, follow, importance, scale, zero_point, bits)
    # Every grid works on its own copy of the block, in fp32.
    rows = max(1, SCRATCH // (4 * len(x) * len(scale)))
    parts = zip(x.split(rows, 1), scale.split(rows, 1), zero_point.split(rows, 1), strict=True)
    with _one_thread():
        return torch.cat([_score(*part, follow, importance, bits) for part in parts], 1)


def _score(x: Tensor, scale: Tensor, zero_point: Tensor, follow: Tensor, importance: Tensor, bits: int) -> Tensor:
    loss = torch.zeros_like(scale)
    each = x.unsqueeze(1).repeat(1, len(scale), 1)  # [B, C, N]
    # addr_ takes a matrix: grids stand side by side, as if they were more rows.
    flat = each.view(len(x), -1)
    for i in range(len(x)):
        p = each[i] - (round_to_grid(each[i], scale, zero_point, bits) - zero_point) * scale
        loss.addcmul_(p, p, value=float(importance[i]))
        flat[i + 1 :].addr_(follow[i, i + 1 :], p.view(-1), alpha=-1)
    return loss


@contextmanager
def _one_thread() -> Iterator[None]:
    """Operations are short here, thousands of them: threads would mostly wait for each other, and where another process
    holds one of the cores, each time until it lets go."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
