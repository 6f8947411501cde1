"""X·(L·Lᵀ) = B for a lower triangle L, many rows at once, so that a GPU spends its time in products.

A block of columns of X needs those that are solved already, in one product, and the inverse of its own block on the
diagonal of L; first from left to right for Y·Lᵀ = B, then from right to left for X·L = Y.
"""

import torch
from torch import Tensor

from gptq_ao.solver.fp32 import ieee_fp32, product

__all__ = ["in_blocks", "solve_with_factor"]

BLOCK = 1024  # columns: products are large, and what is left on the diagonal is a small part of the work
SMALL = 128  # columns of which an inverse is found one after the other


def solve_with_factor(right: Tensor, lower: Tensor) -> Tensor:
    """X [N, K] with X·(L·Lᵀ) = `right` [N, K], for `lower` [K, K]; all fp32, in full precision."""
    with ieee_fp32():
        if right.is_cuda:
            return in_blocks(right, lower, BLOCK)
        return torch.cholesky_solve(right.T, lower).T


def in_blocks(right: Tensor, lower: Tensor, block: int) -> Tensor:
    """See `solve_with_factor`, with `block` columns at a time."""
    k = len(lower)
    bounds = [(first, min(first + block, k)) for first in range(0, k, block)]
    inverses = _inverses(lower, bounds)
    x = right.clone(memory_format=torch.contiguous_format)
    for (first, last), inverse in zip(bounds, inverses, strict=True):
        if first:
            x[:, first:last] -= product(x[:, :first], lower[first:last, :first].T)
        x[:, first:last] = x[:, first:last] @ inverse.T
    for (first, last), inverse in reversed(list(zip(bounds, inverses, strict=True))):
        if last < k:
            x[:, first:last] -= product(x[:, last:], lower[last:, first:last])
        x[:, first:last] = x[:, first:last] @ inverse
    return x


def _inverses(lower: Tensor, bounds: list[tuple[int, int]]) -> list[Tensor]:
    """Of the blocks on the diagonal; those of one size at once."""
    blocks = [lower[first:last, first:last] for first, last in bounds]
    alike = [b for b in blocks if len(b) == len(blocks[0])]
    found = list(_inverse(torch.stack(alike)))
    return found if len(alike) == len(blocks) else [*found, _inverse(blocks[-1].unsqueeze(0))[0]]


def _inverse(lower: Tensor) -> Tensor:
    """Of lower triangles [n, b, b]: from those of their two halves."""
    size = lower.shape[-1]
    if size <= SMALL:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    half = size // 2
    above, below = _inverse(lower[:, :half, :half]), _inverse(lower[:, half:, half:])
    whole = torch.zeros_like(lower)
    whole[:, :half, :half], whole[:, half:, half:] = above, below
    whole[:, half:, :half] = -(below @ lower[:, half:, :half] @ above)
    return whole
