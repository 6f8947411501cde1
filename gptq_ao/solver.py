"""GPTQ: round a weight matrix column by column and let the columns to come make up for each rounding error.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022).
With the factor H = A·diag(pivots)·Aᵀ (`factor.py`) the column j that is solved next is rounded from

    x_j = w_j + Σ_{i<j} e_i·A_ij          e_i = w_i − ŵ_i

which is the value GPTQ's updates of the weights give it, and tr(E·H·Eᵀ) = Σ pivots_j·(x_j − ŵ_j)². Earlier blocks of
columns add their part of the sum as matrix products. Within a block (`kernels/columns.py`) all columns are first
brought to the value that is best for them as long as none of the block is rounded,

    X = W + C·A_bb⁻¹          C = Σ_{i before the block} e_i·A_i

and what rounding column j changes, p_j = x_j − ŵ_j, moves the columns after it by −p_j·(A_bb⁻¹)_jk.

Rows are independent of each other: weights that share an activation are solved together by stacking them.

Pure functions of tensors, on any device; the arguments are never changed. N = out_features, K = in_features,
G = groups in a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_ao.errors import NonFiniteError
from gptq_ao.factor import Factor
from gptq_ao.grid import candidate_grids, choose_grid, dequantize, group_columns, round_to_grid
from gptq_ao.hessian import Hessian, ieee_fp32
from gptq_ao.kernels.columns import MAX_COLUMNS, round_columns, score_grids
from gptq_ao.refine import refine

__all__ = ["Solution", "output_energy", "relative_error", "round_to_nearest", "solve"]

OUTER = 1024  # columns between two products with all errors before them


@dataclass(frozen=True)
class Solution:
    """A quantized weight [N, K] with G groups per row.

    Attributes:
        codes: [N, K] uint8. Column i holds input feature `perm[i]` (or i).
        scale: [N, G] fp16.
        zero_point: [N, G] uint8.
        perm: [K] int32 for `act_order="group"`, else None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    perm: Tensor | None = None

    def split(self, sizes: list[int]) -> list["Solution"]:
        """Undo a stacking of weights along N."""
        parts = zip(self.codes.split(sizes), self.scale.split(sizes), self.zero_point.split(sizes), strict=True)
        return [Solution(c, s, z, self.perm) for c, s, z in parts]

    def dequantize(self) -> Tensor:
        """[N, K] fp32, columns in their natural order."""
        weight = dequantize(self.codes, self.scale, self.zero_point, torch.float32)
        return weight if self.perm is None else weight[:, torch.argsort(self.perm)]


def solve(
    weight: Tensor,
    factor: Factor,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    act_order: str,
    signed: bool = False,
    scale_candidates: int = 1,
    refine_rounds: int = 0,
    hessian: Hessian | None = None,
    grid: tuple[Tensor, Tensor] | None = None,
) -> Solution:
    """GPTQ of `weight` [N, K] under a factored Hessian.

    Grids: with `act_order="static"` groups are runs of neighbouring columns and their grids come from the given
    weights, since a group's columns are met at different times. With the others a group's columns are met together, and
    its grid comes from the weights as updated by all errors before it: the one of `scale_candidates` that rounding the
    group with error feedback likes best.

    Args:
        factor: made for the same `act_order` and `group_size`.
        signed: see `grid.choose_grid`.
        refine_rounds: see `refine.py`; 0: not refined.
        hessian: that was factored; only to refine.
        grid: scale [N, G] fp16 and zero_point [N, G] uint8 of natural groups, to use instead of choosing; not with
            `act_order="group"`, whose groups are not natural.

    Returns:
        The solution; codes are on the stored (fp16) scales exactly.

    Raises:
        NonFiniteError: a weight is NaN or infinite, or too large for an fp16 scale.
    """
    if grid is not None and act_order == "group":
        raise ValueError('act_order="group" makes its own groups: a given grid cannot fit them')
    weight = weight.detach()
    n, k = weight.shape
    columns = group_columns(k, group_size)
    device = weight.device
    if grid is None and act_order == "static":
        grid = choose_grid(weight, group_size, bits, sym, signed)

    # Columns are solved one at a time: as rows of the transposed matrix they are contiguous. In solving order:
    W = weight.float().T
    W = W[factor.order] if factor.order is not None else W.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(k, n, dtype=torch.uint8, device=device)
    if grid is not None:
        scale, zero_point = (t.T.contiguous() for t in grid)
    else:
        scale = torch.empty(k // columns, n, dtype=torch.float16, device=device)
        zero_point = torch.empty(k // columns, n, dtype=torch.uint8, device=device)
    group_of = torch.arange(k, device=device) // columns  # of each place
    if factor.order is not None and act_order != "group":
        group_of = factor.order // columns

    A = factor.unit
    eye = torch.eye(MAX_COLUMNS, dtype=torch.float64, device=device)
    with ieee_fp32():
        for first, last, blocks in _blocks(k, columns if grid is None else 1):
            # W holds the errors of all columns before these, and these as they were.
            X = torch.addmm(W[first:last], A[:first, first:last].T, W[:first]) if first else W[first:last].clone()
            for start, stop in blocks:
                block, of_block = slice(start, stop), group_of[start:stop]
                b = stop - start
                inverse = torch.linalg.solve_triangular(
                    A[block, block].double(), eye[:b, :b], upper=True, unitriangular=True
                ).float()
                x = X[start - first : stop - first]
                x = torch.addmm(W[block], inverse.T, x - W[block])
                if grid is None and start % columns == 0:
                    group = x
                    if columns > b:  # the others of the group, as long as none of it is rounded
                        whole = slice(start, start + columns)
                        carried = X[start - first : start - first + columns] - W[whole]
                        group = W[whole] + torch.linalg.solve_triangular(
                            A[whole, whole].T, carried, upper=False, unitriangular=True
                        )
                    g = of_block[:1]
                    scale[g], zero_point[g] = _search(
                        group, A, factor.pivots, start, bits, sym, signed, scale_candidates, eye
                    )
                s, z = scale[of_block].float(), zero_point[of_block].float()
                codes[block] = round_columns(x, inverse, s, z, bits)
                W[block] -= (codes[block] - z).mul_(s)
                X[stop - first :].addmm_(A[block, stop:last].T, W[block])
        del X, W
        if not torch.isfinite(scale).all():
            raise NonFiniteError(
                f"the weights reach {weight.abs().max().item():.3g}: a scale for them is not a finite fp16 number"
            )

    perm = None
    if factor.order is not None:
        if act_order == "group":
            perm = factor.order.to(torch.int32)
        else:
            codes = codes[torch.argsort(factor.order)]
    if refine_rounds:
        assert hessian is not None
        H, target = hessian.matrix, weight.float().T
        if perm is not None:
            H, target = H[factor.order][:, factor.order], target[factor.order]
        H = H + torch.diag((H.diagonal() <= 0) + factor.added)
        codes, scale = refine(
            target.contiguous(), H, codes, scale, zero_point, bits=bits, signed=signed, rounds=refine_rounds
        )
    return Solution(codes.T.contiguous(), scale.T.contiguous(), zero_point.T.contiguous(), perm)


def _search(
    group: Tensor,
    A: Tensor,
    pivots: Tensor,
    start: int,
    bits: int,
    sym: bool,
    signed: bool,
    count: int,
    eye: Tensor,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [1, N] of a group [columns, N] that begins at `start`."""
    if count == 1:
        scale, zero_point = choose_grid(group.T, -1, bits, sym, signed)
        return scale.T, zero_point.T
    scale, zero_point = candidate_grids(group, bits, sym, signed, count)
    s, z = scale.float(), zero_point.float()
    loss = torch.zeros_like(s)
    # A group longer than a block is judged block by block, as if the others were not rounded.
    for i in range(0, len(group), MAX_COLUMNS):
        b = min(MAX_COLUMNS, len(group) - i)
        block = slice(start + i, start + i + b)
        inverse = torch.linalg.solve_triangular(
            A[block, block].double(), eye[:b, :b], upper=True, unitriangular=True
        ).float()
        loss += score_grids(group[i : i + b], inverse, pivots[block], s, z, bits)
    best = loss.nan_to_num_(torch.inf).argmin(0, keepdim=True)
    return scale.gather(0, best), zero_point.gather(0, best)


def round_to_nearest(weight: Tensor, *, bits: int, group_size: int, sym: bool, signed: bool = False) -> Solution:
    """Each weight of `weight` [..., N, K] to its nearest code: no Hessian, the baseline."""
    scale, zero_point = choose_grid(weight, group_size, bits, sym, signed)
    per_column = group_columns(weight.shape[-1], group_size)
    s, z = (t.float().repeat_interleave(per_column, -1) for t in (scale, zero_point))
    return Solution(round_to_grid(weight.float(), s, z, bits).to(torch.uint8), scale, zero_point)


def output_energy(matrix: Tensor, hessian: Hessian) -> float:
    """tr(M·H·Mᵀ): the mean square of the outputs of M [N, K] over the rows of H, summed over the N outputs."""
    matrix = matrix.float()
    with ieee_fp32(), torch.autocast(matrix.device.type, enabled=False):
        return torch.sum((matrix @ hessian.matrix) * matrix, dtype=torch.float64).item()


def relative_error(weight: Tensor, quantized: Tensor, hessian: Hessian) -> float:
    """tr(E·H·Eᵀ) / tr(W·H·Wᵀ) with E = W − Ŵ: the share of the output's energy that the rounding changed."""
    energy = output_energy(weight, hessian)
    return output_energy(weight.float() - quantized, hessian) / energy if energy > 0 else 0.0


def _blocks(in_features: int, columns: int) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Column ranges (first, last) with the ranges of at most MAX_COLUMNS that make them up. Groups of `columns` begin
    and end with one of the former, and each with one of the latter unless it is longer."""
    outer = max(columns, OUTER // columns * columns)
    inner = columns if columns > 1 else MAX_COLUMNS
    for first in range(0, in_features, outer):
        last = min(first + outer, in_features)
        blocks = []
        for start in range(first, last, inner):
            stop = min(start + inner, last)
            blocks += [(i, min(i + MAX_COLUMNS, stop)) for i in range(start, stop, MAX_COLUMNS)]
        yield first, last, blocks
