"""How much memory, and work, solving takes: `solver` and `solve_group`, counted.

A simulation would loop over the columns of every matrix. What is alive at once does not depend on the column, so a
formula says the same. N = rows that are solved together, n = rows of one part, K = in_features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gptq_ao.config import GPTQConfig
from gptq_ao.factor import LARGEST_FP64
from gptq_ao.grid import group_columns
from gptq_ao.kernels.columns import MAX_COLUMNS as BLOCK

__all__ = ["SolveCost", "result_bytes", "solve_cost"]


@dataclass(frozen=True)
class SolveCost:
    """For weights of one Hessian and equal settings.

    Attributes:
        peak: bytes at most, besides the Hessian and the weights.
        kept: bytes until the last of the weights is in its place.
        columns: steps that follow one another.
        fp64, fp32: operations in products, of the factor and of the rest.
    """

    peak: int
    kept: int
    columns: int
    fp64: int
    fp32: int


def solve_cost(rows: Sequence[int], k: int, itemsize: int, c: GPTQConfig) -> SolveCost:
    """Of parts with these numbers of rows, [n, K] each, of a dtype of `itemsize` bytes."""
    total, largest = sum(rows), max(rows)
    result = result_bytes(total, k, c)
    widened = 0 if itemsize == 4 else 4  # bytes per weight of an fp32 copy
    errors = 2 * 2 * total * k * k  # the output energy of weight and error
    if c.method == "rtn":
        # One part after the other: scale and zero point per weight, the weight in fp32, the quotient, the codes.
        rounding = result + largest * k * (8 + widened + 4)
        return SolveCost(max(rounding, result + _energy(largest, k)), result, 0, 0, errors)
    fp64 = k <= LARGEST_FP64
    square = (8 if fp64 else 4) * k * k
    # H, H reversed and its factor; or the factor, the identity and the inverse.
    factor = 3 * square
    upper = 4 * k * k
    # The stacked weights, and W in solving order in fp32: first beside a copy in natural order, then beside the codes
    # and a block of errors, then beside the codes in both orders.
    codes = total * k
    beside = max(widened * codes, codes + 4 * BLOCK * total, 2 * codes)
    solve = itemsize * codes + 4 * codes + beside + 11 * total * (k // group_columns(k, c.group_size))
    peak = max(factor, upper + solve, upper + result + _energy(largest, k))
    operations = 2 * k**3 // 3
    return SolveCost(
        peak, upper + result, k, operations if fp64 else 0, total * k * k + errors + (0 if fp64 else operations)
    )


def result_bytes(rows: int, k: int, c: GPTQConfig) -> int:
    """Codes uint8, scale fp16, zero point uint8."""
    return rows * (k + 3 * (k // group_columns(k, c.group_size)))


def _energy(n: int, k: int) -> int:
    """The error in fp32, its product with H, and the product of both."""
    return 12 * n * k
