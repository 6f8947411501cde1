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

from collections.abc import Mapping

import torch
from torch import Tensor

from gptq_ao.codes.grid import candidate_grids, choose_grid, group_columns, round_to_grid
from gptq_ao.errors import NonFiniteError
from gptq_ao.kernels.columns import MAX_COLUMNS, column_blocks, round_columns, score_grids
from gptq_ao.solver.factor import Factor
from gptq_ao.solver.fp32 import ieee_fp32
from gptq_ao.solver.hessian import Hessian
from gptq_ao.solver.solution import Solution

__all__ = ["output_energy", "relative_error", "round_to_nearest", "solve"]


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

    A = factor.unit
    inverses = _inverses(A, columns if grid is None else MAX_COLUMNS)
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
    groups_met = group_of[::columns].tolist()  # read on the host once: the loop must not wait for the device

    with ieee_fp32():
        for first, last, blocks in column_blocks(k, columns if grid is None else MAX_COLUMNS):
            # W holds the errors of all columns before these, and these as they were; X has the errors' part added.
            X = torch.addmm(W[first:last], A[:first, first:last].T, W[:first]) if first else W[first:last].clone()
            for block in blocks:
                inverse, of_block = inverses[block.start], group_of[block]
                ahead = X[block.start - first :]
                if grid is None and block.start % columns == 0:
                    group = slice(block.start, block.start + columns)
                    x = _unrounded(W[group], ahead[:columns], A[group, group], inverse)
                    g = groups_met[block.start // columns]
                    scale[g], zero_point[g] = _choose(
                        x, inverses, factor.pivots, block.start, bits, sym, signed, scale_candidates
                    )
                    x = x[: len(of_block)]
                else:
                    x = _unrounded(W[block], ahead[: len(of_block)], A[block, block], inverse)
                s, z = scale[of_block].float(), zero_point[of_block].float()
                codes[block] = round_columns(x, inverse, s, z, bits)
                W[block] -= (codes[block] - z).mul_(s)
                X[block.stop - first :].addmm_(A[block, block.stop : last].T, W[block])
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
    return Solution(codes.T.contiguous(), scale.T.contiguous(), zero_point.T.contiguous(), perm)


def _inverses(A: Tensor, columns: int) -> dict[int, Tensor]:
    """The inverses of the blocks on the diagonal of A, by the blocks' first column."""
    blocks = [b for *_, blocks in column_blocks(len(A), columns) for b in blocks]
    found: dict[int, Tensor] = {}
    for size in {b.stop - b.start for b in blocks}:
        alike = [b for b in blocks if b.stop - b.start == size]
        stacked = torch.stack([A[b, b] for b in alike]).double()
        eye = torch.eye(size, dtype=torch.float64, device=A.device)
        inverted = torch.linalg.solve_triangular(stacked, eye, upper=True, unitriangular=True).float()
        found |= {b.start: m for b, m in zip(alike, inverted, strict=True)}
    return found


def _unrounded(weight: Tensor, carried: Tensor, A: Tensor, inverse: Tensor) -> Tensor:
    """X of some columns [B, N], see above.

    Args:
        weight, carried: [B, N], W and W + C.
        A: [B, B], the block of A on the diagonal.
        inverse: of A, or only of its first columns if there are more than fit into a block.
    """
    if len(inverse) == len(A):
        return torch.addmm(weight, inverse.T, carried - weight)
    return weight + torch.linalg.solve_triangular(A.T, carried - weight, upper=False, unitriangular=True)


def _choose(
    group: Tensor,
    inverses: Mapping[int, Tensor],
    pivots: Tensor,
    start: int,
    bits: int,
    sym: bool,
    signed: bool,
    candidates: int,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [N] of a group [columns, N] that begins at `start`."""
    if candidates == 1:
        scale, zero_point = choose_grid(group.T, -1, bits, sym, signed)
        return scale.squeeze(1), zero_point.squeeze(1)
    scale, zero_point = candidate_grids(group, bits, sym, signed, candidates)
    s, z = scale.float(), zero_point.float()
    loss = torch.zeros_like(s)
    # A group longer than a block is judged block by block, as if the others were not rounded.
    for i in range(0, len(group), MAX_COLUMNS):
        inverse = inverses[start + i]
        block = slice(i, i + len(inverse))
        loss += score_grids(group[block], inverse, pivots[start:][block], s, z, bits)
    best = loss.nan_to_num_(torch.inf).argmin(0, keepdim=True)
    return scale.gather(0, best)[0], zero_point.gather(0, best)[0]


def round_to_nearest(weight: Tensor, *, bits: int, group_size: int, sym: bool, signed: bool = False) -> Solution:
    """Each weight of `weight` [..., N, K] to its nearest code: no Hessian, the baseline."""
    scale, zero_point = choose_grid(weight, group_size, bits, sym, signed)
    per_column = group_columns(weight.shape[-1], group_size)
    s, z = (t.float().repeat_interleave(per_column, -1) for t in (scale, zero_point))
    return Solution(round_to_grid(weight.float(), s, z, bits).to(torch.uint8), scale, zero_point)


def output_energy(matrix: Tensor, hessian: Hessian) -> float:
    """tr(M·H·Mᵀ): the mean square of the outputs of M [N, K] over the rows of H, summed over the N outputs."""
    matrix = matrix.float()
    with ieee_fp32(cuda="tf32"):
        return torch.sum((matrix @ hessian.matrix) * matrix, dtype=torch.float64).item()


def relative_error(weight: Tensor, quantized: Tensor, hessian: Hessian) -> float:
    """tr(E·H·Eᵀ) / tr(W·H·Wᵀ) with E = W − Ŵ: the share of the output's energy that the rounding changed."""
    energy = output_energy(weight, hessian)
    return output_energy(weight.float() - quantized, hessian) / energy if energy > 0 else 0.0
