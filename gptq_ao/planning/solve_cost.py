"""How much memory, and work, solving takes: `solve_together` and what it calls, counted.

A simulation would loop over the columns of every matrix. What is alive at once does not depend on the column, so a
formula says the same. N = rows that are solved together, n = rows of the largest part, K = in_features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gptq_ao.codes.grid import group_columns
from gptq_ao.kernels.columns import MAX_COLUMNS, OUTER, SCRATCH
from gptq_ao.recipe import Recipe
from gptq_ao.solver.factor import LARGEST_FP64
from gptq_ao.solver.fp32 import PARTS

__all__ = ["SolveCost", "result_bytes", "solve_cost"]


@dataclass(frozen=True)
class SolveCost:
    """For weights of one Hessian and equal settings.

    Attributes:
        peak: bytes at most, besides the Hessian and the weights.
        kept: bytes until the last of the weights is in its place.
        columns: steps that follow one another.
        fp64, fp32: operations in products, of the factor and of the rest.
        rounded: how many weights are rounded in the loops over columns; each once for every grid that is tried.
    """

    peak: int
    kept: int
    columns: int
    fp64: int
    fp32: int
    rounded: int


def solve_cost(
    rows: Sequence[int], k: int, itemsize: int, recipe: Recipe, compensated: bool = False, cuda: bool = False
) -> SolveCost:
    """Of parts with these numbers of rows, [n, K] each, of a dtype of `itemsize` bytes.

    Args:
        compensated: whether the Hessian has a drift, or residuals, for `corrected_target`.
        cuda: whether it is solved on a GPU.
    """
    N, n = sum(rows), max(rows)
    result = result_bytes(N, k, recipe)
    weights = 4 * N * k  # in fp32
    # `solve_together` holds the weights in fp32 beside the model's own, unless those are fp32 already.
    widened = weights if itemsize != 4 else 0
    energies = 2 * 2 * N * k * k  # M·H for the weight and for the error, a multiplication and an addition each
    if recipe.method == "rtn":
        # One part after the other. Per weight: scale and zero point, 4 bytes each; the weight in fp32, if it was not;
        # the quotient, which becomes the code.
        rounding = n * k * (4 + 4 + (4 if widened else 0) + 4)
        return SolveCost(widened + result + max(rounding, _energy(n, k)), widened + result, 0, 0, energies, 0)
    compensated = compensated and recipe.compensates
    square = 4 * k * k  # a matrix of the Hessian's size, in fp32
    fp64 = k <= LARGEST_FP64
    rounds = recipe.adapter_rounds if recipe.adapter_rank else 1
    again = rounds > 1
    # What is alive at once in each of the steps that follow one another; the largest is the peak.
    peak = max(
        # factor: H in reverse order and its Cholesky factor, then two copies of the factor
        widened + 2 * (2 if fp64 else 1) * square,
        # corrected_target: the factor, H damped and its Cholesky factor; W, what is wrong with it, its copy and T; on a
        # GPU, while that is solved, the two parts of what is solved in place of T
        compensated * (widened + 3 * square + (5 if cuda else 4) * weights),
        # solve and refine: the weights in fp32, the target, what an adapter leaves of it and the factor stay
        widened + (1 + again) * weights + square + _solve(N, k, recipe, cuda),
        (recipe.refine_sweeps > 0) * (widened + (1 + again) * weights + square + _refine(N, k, recipe, cuda)),
        (recipe.adapter_rank > 0) * (widened + (2 + again) * weights + square + result + _correct(n, k)),
        # the errors that are reported
        weights + square + result + _energy(n, k),
    )
    # Each weight is rounded once for every grid tried, once for good, and once in every sweep.
    # Candidates are tried in one loop over the columns.
    passes = rounds * (1 + _grids(recipe) + recipe.refine_sweeps)
    cholesky = k**3 // 3  # operations: as many additions as multiplications, K³/6 each
    # Errors times the triangle A while solving: half of a product's 2·N·K². Errors times all of H in every sweep.
    products = rounds * N * k * k * (1 + 2 * recipe.refine_sweeps) + energies
    if compensated:
        products += cholesky + 4 * N * k * k  # W·drift, 2·N·K², and two triangular systems, N·K² each
    # Of `low_rank`: a symmetric matrix of the shorter side, and its eigenvectors (about nine products of its size).
    sides = [(m, min(m, k)) for m in rows] if recipe.adapter_rank else []
    corrections = rounds * sum(2 * m * k * side + 9 * side**3 for m, side in sides)
    return SolveCost(
        peak,
        weights + square + result,
        rounds * k * (1 + (_grids(recipe) > 0) + recipe.refine_sweeps),
        corrections + (cholesky if fp64 else 0),
        products + (0 if fp64 else cholesky),
        N * k * passes,
    )


def result_bytes(rows: int, k: int, recipe: Recipe) -> int:
    """Of a `Solution`: codes uint8, and for each group a scale fp16 and a zero point uint8."""
    return rows * (k + (2 + 1) * (k // group_columns(k, recipe.group_size)))


def _grids(recipe: Recipe) -> int:
    """How many are tried for each group, see `candidate_grids`."""
    if recipe.act_order == "static" or recipe.scale_candidates == 1:
        return 0
    return recipe.scale_candidates * (1 if recipe.sym and not recipe.signed else 2)


def _solve(n: int, k: int, recipe: Recipe, cuda: bool) -> int:
    """`solve`: first the inverses of blocks, in fp64. Then W in solving order and the codes; inside the loop
    besides them the inverses, a range X of columns (and the one before it), and what a group takes; at the end the
    codes in both orders."""
    columns = MAX_COLUMNS if recipe.act_order == "static" else group_columns(k, recipe.group_size)
    columns, block, span = min(columns, k), min(columns, MAX_COLUMNS, k), _span(k, columns)
    inverses = 4 * k * block
    # The group; grids in fp16 and fp32, with zero points, and two sums; some rows of the block, for every grid.
    grids = _grids(recipe)
    at_once = min(n, SCRATCH // (4 * block * grids)) if grids else 0
    choose = 4 * columns * n + 19 * grids * n + 4 * (block + 4) * grids * at_once
    # The block three times; its scales and zero points, where columns have different ones.
    rounding = (5 if recipe.act_order == "static" else 3) * 4 * block * n
    parts = _parts(n, k) if cuda and k > OUTER else 0  # of a range that others come before
    loop = inverses + 4 * n * span + max(choose, rounding, 2 * 4 * columns * n, parts)
    codes = result_bytes(n, k, recipe)
    return max(5 * inverses + 8 * block * block, 4 * n * k + codes + loop, n * k + codes)


def _refine(n: int, k: int, recipe: Recipe, cuda: bool) -> int:
    """`refine`: codes before and after, target and error in fp32, the Hessian, a range of gradients (and the one
    before it), and what a group or a block of it takes."""
    columns = group_columns(k, recipe.group_size)
    permuted = 4 * n * k if recipe.permutes else 0
    matrices = (3 if permuted else 2) * 4 * k * k  # while it is made
    change = 4 * n * columns  # of the error of a group
    parts = _parts(n, k) if cuda else 0
    loop = 4 * n * _span(k, columns) + change
    loop += max(3 * 4 * columns * n, 6 * 4 * min(columns, MAX_COLUMNS) * n, parts)
    codes = result_bytes(n, k, recipe)
    return codes + permuted + max(matrices, 4 * k * k + 2 * 4 * n * k + codes + loop)


def _parts(n: int, k: int) -> int:
    """`product` of a range of columns, on a GPU: both factors in two parts."""
    return 2 * 4 * min(OUTER, k) * k + min(PARTS, 2 * 4 * n * k)


def _correct(n: int, k: int) -> int:
    """`low_rank`: the error in solving order, the factor with its pivots, their product and that in fp64; the matrix of
    the shorter side, its eigenvectors, and what finding them takes."""
    return 16 * n * k + 4 * k * k + 4 * 8 * min(n, k) ** 2


def _span(k: int, columns: int) -> int:
    """Columns of a range of `column_blocks`, or of two where one follows another."""
    outer = max(columns, OUTER // columns * columns)
    return k if k <= outer else 2 * outer


def _energy(n: int, k: int) -> int:
    """The error in fp32, its product with H, and the product of both."""
    return 12 * n * k
