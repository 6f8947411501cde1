"""The best correction of low rank for what rounding did to a weight.

B·A of rank r is to make tr((E − BA)·H·(E − BA)ᵀ) smallest, for the error E = W − Ŵ. With H = L·Lᵀ that is the squared
norm of (E − BA)·L, so BA·L is E·L without all but its r largest singular values (Eckart-Young). Projecting on the left
singular vectors U that are left does that, so L is never inverted:

    BA = U·Uᵀ·E          U = the r leading left singular vectors of E·L

Source: Liu et al., "EoRA" (2024), arXiv:2410.21271, and Zhang et al., "QERA" (2024), arXiv:2410.06040 (QERA-exact).
"""

import torch
from torch import Tensor

from gptq_ao.adapter import LowRank
from gptq_ao.solver.factor import Factor
from gptq_ao.solver.fp32 import ieee_fp32

__all__ = ["low_rank"]


def low_rank(error: Tensor, factor: Factor, rank: int) -> LowRank:
    """The correction of `error` [N, K] fp32, or of each matrix of a stack, [E, N, K], in the metric of the Hessian that
    `factor` was made of, damped as there.

    Row i of A and column i of B have the same norm, the largest first, as training wants them; where the error has
    fewer than `rank` directions, A is zero and B is not.

    Args:
        rank: 1 to min(N, K).
    """
    n, k = error.shape[-2:]
    with ieee_fp32():
        # L is the factor's triangle, with its rows in solving order.
        ordered = error if factor.order is None else error[..., factor.order]
        scaled = (ordered @ (factor.unit * factor.pivots.sqrt())).double()
        # Singular vectors of the shorter side, from a symmetric matrix of its size; in fp64, since that squares E·L.
        if n <= k:
            left = _leading(scaled @ scaled.mT, rank).float()
        else:
            left = torch.linalg.qr(scaled @ _leading(scaled.mT @ scaled, rank)).Q.float()
        right = left.mT @ error
    norms = right.norm(dim=-1)
    balance = torch.where(norms > 0, norms, 1).sqrt()
    return LowRank(right / balance.unsqueeze(-1), left * balance.unsqueeze(-2))


def _leading(square: Tensor, rank: int) -> Tensor:
    """The eigenvectors [..., n, rank] of the largest eigenvalues, the largest first."""
    return torch.linalg.eigh(square).eigenvectors[..., -rank:].flip(-1)
