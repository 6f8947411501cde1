"""The adapter of an error: the best of its rank in the Hessian's metric, whatever the sides, the order and the rank."""

import pytest
import torch
from torch import Tensor

from gptq_ao.recipe import Recipe
from gptq_ao.solver.factor import factor
from gptq_ao.solver.hessian import Hessian
from gptq_ao.solver.low_rank import low_rank

SHAPES = [(24, 48), (48, 24), (32, 32), (1, 16), (16, 2)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(k: int, dead: tuple[int, ...] = ()) -> Hessian:
    x = random(4 * k, k, seed=1) @ (torch.eye(k) + random(k, k, seed=2))
    x[:, dead] = 0
    return Hessian(x.T @ x / len(x), len(x))


def damped(hessian: Hessian, added: float, mean: float) -> Tensor:
    H = hessian.matrix.double()
    return H + torch.diag((H.diagonal() == 0) * mean + added)


def loss(left: Tensor, H: Tensor) -> float:
    left = left.double()
    return ((left @ H) * left).sum().item()


@pytest.mark.parametrize("order", ["none", "group_aware", "static", "group"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_no_other_of_its_rank_is_better(n: int, k: int, order: str) -> None:
    """What is left is exactly the singular values of E·L that were dropped."""
    error, hessian = random(n, k, seed=3), correlated(k)
    f = factor(hessian, Recipe(act_order=order, damp_percent=0.05))
    H = damped(hessian, f.added, f.mean)
    values = torch.linalg.svdvals(error.double() @ torch.linalg.cholesky(H)).square()
    for rank in {1, min(n, k) // 2 or 1, min(n, k)}:
        found = low_rank(error, f, rank)
        assert (found.A.shape, found.B.shape, found.rank) == ((rank, k), (n, rank), rank)
        assert found.A.dtype == found.B.dtype == torch.float32
        # fp32 results: relative to the whole, 1e-6 and the squares of rounding errors.
        assert loss(error - found.dense(), H) == pytest.approx(
            values[rank:].sum().item(), abs=2e-6 * values.sum().item()
        )


def test_columns_without_data_are_corrected_as_damped() -> None:
    error, hessian = random(8, 16, seed=3), correlated(16, dead=(2, 5))
    f = factor(hessian, Recipe(damp_percent=0.05))
    H = damped(hessian, f.added, f.mean)
    values = torch.linalg.svdvals(error.double() @ torch.linalg.cholesky(H)).square()
    assert loss(error - low_rank(error, f, 3).dense(), H) == pytest.approx(values[3:].sum().item(), rel=1e-5)


@pytest.mark.parametrize(("n", "k"), [(24, 48), (48, 24)])
def test_both_factors_have_the_same_norms_the_largest_first(n: int, k: int) -> None:
    found = low_rank(random(n, k), factor(correlated(k), Recipe()), 6)
    a, b = found.A.norm(dim=1), found.B.norm(dim=0)
    assert torch.allclose(a, b, rtol=1e-5)
    assert found.A.isfinite().all()


@pytest.mark.parametrize(("n", "k"), [(24, 48), (48, 24)])
def test_an_error_of_lower_rank_leaves_directions_that_can_be_trained(n: int, k: int) -> None:
    """A pair of zeros would have no gradient, ever."""
    f = factor(correlated(k), Recipe())
    nothing = low_rank(torch.zeros(n, k), f, 4)
    assert nothing.dense().count_nonzero() == 0
    assert nothing.B.norm(dim=0).min() > 0.5
    one = random(n, 1) @ random(1, k, seed=4)
    assert torch.allclose(low_rank(one, f, 4).dense(), one, atol=1e-5 * one.abs().max().item())


def test_arguments_stay_as_they_are() -> None:
    error, f = random(6, 8), factor(correlated(8), Recipe(act_order="static"))
    before = error.clone(), f.unit.clone(), f.pivots.clone()
    low_rank(error, f, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, (error, f.unit, f.pivots), strict=True))


@pytest.mark.parametrize(("n", "k"), [(12, 20), (20, 12)])
@pytest.mark.parametrize("act_order", ["none", "static"])
def test_each_matrix_of_a_stack_has_its_own(n: int, k: int, act_order: str) -> None:
    error, f = torch.stack([random(n, k, seed=i) for i in range(3)]), factor(correlated(k), Recipe(act_order=act_order))
    found = low_rank(error, f, 4)
    assert (found.A.shape, found.B.shape, found.rank) == ((3, 4, k), (3, n, 4), 4)
    expected = torch.cat([low_rank(each, f, 4).dense() for each in error])
    assert torch.allclose(found.dense(), expected, atol=1e-5)
