"""X·(L·Lᵀ) = B, in blocks of columns."""

import pytest
import torch
from torch import Tensor

from gptq_ao.solver.normal_equations import in_blocks, solve_with_factor

EPS = 2.0**-21  # of a product's |left|·|right|, see `product`


def problem(n: int, k: int) -> tuple[Tensor, Tensor]:
    """Rows to solve for, and a factor of a matrix that is as ill-conditioned as a damped Hessian."""
    generator = torch.Generator().manual_seed(n + k)
    x = torch.randn(2 * k + 1, k, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, k)
    hessian = x.T @ x / len(x)
    hessian.diagonal().add_(0.3 * hessian.diagonal().mean())
    return torch.randn(n, k, generator=generator), torch.linalg.cholesky(hessian).float()


def check(right: Tensor, lower: Tensor, found: Tensor) -> None:
    L = lower.double()
    exact = torch.cholesky_solve(right.double().T, L).T
    condition = torch.linalg.cond(L) ** 2
    # Two passes, each with K sums and the inverses of the blocks on the diagonal.
    bound = 2 * len(lower) * EPS * condition * exact.norm()
    assert (found.cpu().double() - exact).norm() <= bound
    assert bound <= exact.norm() / 10  # or else this says nothing


@pytest.mark.parametrize("block", [1, 48, 64, 200, 1024])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 200), (70, 129), (5, 48)])
def test_blocks_solve_what_the_whole_does(n: int, k: int, block: int) -> None:
    right, lower = problem(n, k)
    before = right.clone()
    check(right, lower, in_blocks(right, lower, block))
    assert torch.equal(right, before)


def test_what_is_not_contiguous() -> None:
    right, lower = problem(40, 300)
    check(right, lower, in_blocks(right.T.contiguous().T, lower.T.contiguous().T, 128))


def test_no_rows() -> None:
    assert in_blocks(torch.empty(0, 200), problem(1, 200)[1], 64).shape == (0, 200)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 1000), (200, 2600), (70, 1024)])
def test_on_a_gpu(n: int, k: int) -> None:
    right, lower = problem(n, k)
    check(right, lower, solve_with_factor(right.cuda(), lower.cuda()))
