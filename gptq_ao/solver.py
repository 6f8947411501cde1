"""GPTQ: round a weight matrix column by column and let the columns to come make up for each rounding error.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022),
algorithm 1. With H = XᵀX + damping and U the upper factor of H⁻¹ = UᵀU, for column j from left to right

    q_j = grid(w_j)          e_j = (w_j − q_j) / U_jj          w_k ← w_k − e_j·U_jk   for k > j

and tr((W−Ŵ)·H·(W−Ŵ)ᵀ) = Σ e_j². Rows are independent of each other: weights that share an activation are solved
together by stacking them.

U is found without an inverse of H: reversing rows and columns turns a lower Cholesky factor into an upper one,
H = R·Rᵀ with R upper, and U = R⁻¹ (one Cholesky, one triangular inverse, both in fp64 where that is affordable).

Pure functions of tensors, on any device; the arguments are never changed. N = out_features, K = in_features.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_ao.errors import NonFiniteError, SolverError
from gptq_ao.grid import choose_grid, dequantize, group_columns, round_to_grid
from gptq_ao.hessian import Hessian, ieee_fp32

__all__ = ["Factor", "Solution", "factor", "output_energy", "relative_error", "round_to_nearest", "solve"]

BLOCK = 128  # columns between two updates of all that follows, which are matrix products
DAMPING_TRIES = 12
LARGEST_FP64 = 8192  # above, an fp64 factor takes more memory (3·8·K² bytes) and time than its accuracy is worth


@dataclass(frozen=True)
class Factor:
    """What a Hessian contributes to the solution, the same for every weight that reads the activation.

    Attributes:
        upper: [K, K] fp32, U above, rows and columns in solving order.
        order: [K] int64, `order[i]` is the column solved in place i; None for left to right.
        damp: the fraction of the mean diagonal that was finally added.
        dead: how many columns were zero in all calibration data. They are rounded to nearest.
    """

    upper: Tensor
    order: Tensor | None
    damp: float
    dead: int


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


def factor(hessian: Hessian, act_order: str = "static", damp_percent: float | None = None) -> Factor:
    """Damp, order and factor a Hessian.

    Damping: `damp_percent` (None: K / rows, at least 0.01 and at most 1, since few rows determine H poorly) of the mean
    diagonal; tripled until the Cholesky factor exists. Dead columns (zero diagonal) get the mean as their diagonal:
    they couple to nothing and keep their weight's nearest codes.

    Raises:
        NonFiniteError: H holds NaN or infinity.
        SolverError: no factor after the damping was tripled 12 times.
    """
    k = hessian.matrix.shape[-1]
    diagonal = hessian.matrix.diagonal()
    if not torch.isfinite(hessian.matrix).all():
        raise NonFiniteError(f"the Hessian [{k}, {k}] holds NaN or infinity")
    dead = diagonal <= 0
    order = None
    if act_order != "none":
        order = torch.argsort(diagonal, descending=True, stable=True)
    live = diagonal[~dead]
    mean = live.mean().item() if live.numel() else 1.0

    dtype = torch.float64 if k <= LARGEST_FP64 else torch.float32
    # Five matrices of this size can be alive at once, of which none is kept longer than it takes.
    H = hessian.matrix.to(dtype, copy=True) if order is None else hessian.matrix[order][:, order].to(dtype)
    H.diagonal()[dead if order is None else dead[order]] = mean
    damp = min(max(k / max(hessian.rows, 1), 0.01), 1.0) if damp_percent is None else damp_percent
    added = 0.0
    for _ in range(DAMPING_TRIES):
        H.diagonal().add_((damp - added) * mean)
        added = damp
        lower, info = torch.linalg.cholesky_ex(H.flip(0, 1))
        if info.item() == 0:
            del H
            lower = lower.flip(0, 1)
            eye = torch.eye(k, dtype=dtype, device=lower.device)
            upper = torch.linalg.solve_triangular(lower, eye, upper=True)
            del lower, eye
            return Factor(upper.float(), order, damp, int(dead.sum()))
        damp *= 3
    raise SolverError(
        f"the Hessian [{k}, {k}] of {hessian.rows} rows is not positive definite even with {added:.3g} of its mean "
        "diagonal added: check the calibration data, or leave the layer out with a rule"
    )


def solve(
    weight: Tensor,
    factor: Factor,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    act_order: str,
    grid: tuple[Tensor, Tensor] | None = None,
) -> Solution:
    """GPTQ of `weight` [N, K] under a factored Hessian.

    Grids: with `act_order="static"` groups are runs of neighbouring columns and their grids come from the given
    weights, since a group's columns are met at different times. With "none" and "group" a group's columns are met
    together, and its grid comes from the weights as updated by all errors before it.

    Args:
        grid: scale [N, G] fp16 and zero_point [N, G] uint8 of natural groups, to use instead of choosing; not with
            `act_order="group"`, whose groups are not natural.

    Returns:
        The solution; codes are on the stored (fp16) scales exactly.
    """
    if grid is not None and act_order == "group":
        raise ValueError('act_order="group" makes its own groups: a given grid cannot fit them')
    weight = weight.detach()
    n, k = weight.shape
    columns = group_columns(k, group_size)
    groups = k // columns
    fixed = grid if grid is not None else choose_grid(weight, group_size, bits, sym) if act_order == "static" else None

    # Columns are solved one at a time: as rows of the transposed matrix they are contiguous.
    W = weight.float().T
    W = W[factor.order] if factor.order is not None else W.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(k, n, dtype=torch.uint8, device=weight.device)
    if fixed is not None:
        scale, zero_point = (t.T.contiguous() for t in fixed)
    else:
        scale = torch.empty(groups, n, dtype=torch.float16, device=weight.device)
        zero_point = torch.empty(groups, n, dtype=torch.uint8, device=weight.device)
    # Group of each place in solving order. Read on the host once: the loop below must not wait for the device.
    group_of = torch.arange(k) // columns
    if factor.order is not None and act_order != "group":
        group_of = group_of[factor.order.cpu()]
    place_to_group = group_of.tolist()
    s, z = scale.float(), zero_point.float()

    with ieee_fp32():
        for start, stop in _blocks(k, columns):
            block, U = W[start:stop], factor.upper[start:stop, start:stop]
            errors = torch.empty_like(block)
            pivots = U.diagonal().unsqueeze(1)
            for i in range(stop - start):
                g = place_to_group[start + i]
                if fixed is None and (start + i) % columns == 0:
                    chosen = choose_grid(W[start + i : start + i + columns].T, -1, bits, sym)
                    scale[g], zero_point[g] = (t.squeeze(1) for t in chosen)
                    s[g], z[g] = scale[g].float(), zero_point[g].float()
                code = round_to_grid(block[i], s[g], z[g], bits)
                codes[start + i] = code.to(torch.uint8)
                torch.div(block[i] - code.sub_(z[g]).mul_(s[g]), pivots[i], out=errors[i])
                block[i + 1 :].addr_(U[i, i + 1 :], errors[i], alpha=-1)
            W[stop:].addmm_(factor.upper[start:stop, stop:].T, errors, alpha=-1)

    perm = None
    if factor.order is not None:
        if act_order == "group":
            perm = factor.order.to(torch.int32)
        else:
            codes = codes[torch.argsort(factor.order)]
    return Solution(codes.T.contiguous(), scale.T.contiguous(), zero_point.T.contiguous(), perm)


def round_to_nearest(weight: Tensor, *, bits: int, group_size: int, sym: bool) -> Solution:
    """Each weight of `weight` [..., N, K] to its nearest code: no Hessian, the baseline."""
    scale, zero_point = choose_grid(weight, group_size, bits, sym)
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


def _blocks(in_features: int, group: int) -> Iterator[tuple[int, int]]:
    """Column ranges of at most BLOCK that never begin a group in their middle and end it in another range, unless the
    group is longer than BLOCK: when a group's grid is chosen, all its columns are then up to date."""
    step = max(group, BLOCK // group * group)
    for start in range(0, in_features, step):
        for part in range(start, min(start + step, in_features), BLOCK):
            yield part, min(part + BLOCK, start + step, in_features)
