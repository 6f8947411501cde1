"""The corrected weights: least squares, solved another way."""

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_ao.errors import SolverError
from gptq_ao.solver.compensate import OF_INPUTS, OF_RESIDUAL, SMALLEST_DAMPING, corrected_target
from gptq_ao.solver.hessian import Hessian, HessianObserver

N, K = 11, 24


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass
class Calibration:
    """Rows of a layer's inputs and of the residual stream, in the original model and in the quantized one."""

    weight: Tensor
    x: Tensor
    x_now: Tensor
    r: Tensor
    r_now: Tensor

    @functools.cached_property
    def hessian(self) -> Hessian:
        observer = HessianObserver(self.x.shape[1])
        observer(self.x_now, original=self.x, streams=((self.r_now, self.r),))
        return observer.finish()[0]

    def lost(self, weight: Tensor, residual: bool) -> Tensor:
        """[rows, N]: what the layer, with `weight`, misses of its output in the original model."""
        lost = self.x.double() @ self.weight.double().T - self.x_now.double() @ weight.double().T
        return lost + (self.r - self.r_now).double() if residual else lost


def calibration(rows: int = 200, size: float = 1.0, dead: tuple[int, ...] = (), drift: float = 0.3) -> Calibration:
    """Activations are correlated, what went wrong is partly a function of them, partly noise."""
    x = size * (random(rows, K // 3, seed=1) @ random(K // 3, K, seed=2) + 0.5 * random(rows, K, seed=3))
    wrong = drift * (0.3 * x @ random(K, K, seed=4) / math.sqrt(K) + 0.3 * size * random(rows, K, seed=5))
    x_now = x + wrong
    x_now[:, dead] = 0
    r = random(rows, N, seed=6)
    r_now = r + drift * (x_now @ random(K, N, seed=7) / K + 0.2 * size * random(rows, N, seed=8))
    return Calibration(random(N, K, seed=9), x, x_now, r, r_now)


def damping(c: Calibration) -> float:
    rows = len(c.x)
    energy = c.x_now.double().square().mean(0)
    mean = energy.sum().item() / max(int((energy > 0).sum()), 1)
    return mean * min(max(K / rows, SMALLEST_DAMPING), 1.0)


def least_squares(c: Calibration, inputs: bool, residual: bool) -> Tensor:
    """min_T |T·X̃ − Y|² / rows + λ|T − W|², Y being W·X̃ and a part of what is lost, by `lstsq` of stacked rows."""
    rows, W = len(c.x), c.weight.double()
    x_now = c.x_now.double() / math.sqrt(rows)
    wanted = c.x_now.double() @ W.T
    if inputs:
        wanted += OF_INPUTS * ((c.x - c.x_now).double() @ W.T)
    if residual:
        wanted += OF_RESIDUAL * (c.r - c.r_now).double()
    root = math.sqrt(damping(c))
    A = torch.cat([x_now, root * torch.eye(K, dtype=torch.float64)])
    B = torch.cat([wanted / math.sqrt(rows), root * W.T])
    return torch.linalg.lstsq(A, B, driver="gelsd").solution.T


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one row": {"rows": 1},
    "fewer rows than columns": {"rows": 7},
    "as many rows": {"rows": K},
    "dead columns": {"dead": (0, 5, K - 1)},
    "tiny": {"size": 1e-4},
    "large": {"size": 1e3},
    "far off": {"drift": 3.0},
}
cases = pytest.mark.parametrize("case", CASES)


@pytest.mark.parametrize(("inputs", "residual"), [(True, True), (True, False), (False, True)], ids=["both", "in", "r"])
@cases
def test_it_solves_the_least_squares_problem(case: str, inputs: bool, residual: bool) -> None:
    c = calibration(**CASES[case])
    h = c.hessian if inputs else dataclasses.replace(c.hessian, drift=None)
    target = corrected_target(c.weight, h, h.residuals[0] if residual else None)
    expected = least_squares(c, inputs, residual)
    assert target.dtype == torch.float32
    # The condition number is (largest eigenvalue + λ) / λ, at most K / 0.3; sums of fp32 are off by a few roundings
    # for each of `rows` and K.
    change = (expected - c.weight).norm()
    rounding = 2.0**-24 * (K / SMALLEST_DAMPING) * math.sqrt(len(c.x) + K)
    bound = rounding * change + 2.0**-23 * c.weight.norm()
    assert bound < 0.01 * change
    assert (target - expected).norm() <= bound


def test_nothing_went_wrong() -> None:
    c = calibration(drift=0.0)
    drift, residual = torch.zeros(K, K), torch.zeros(N, K)
    for h, r in [
        (dataclasses.replace(c.hessian, drift=None), None),
        (dataclasses.replace(c.hessian, drift=drift), None),
        (dataclasses.replace(c.hessian, drift=drift), residual),
        (dataclasses.replace(c.hessian, drift=None), residual),
    ]:
        assert torch.equal(corrected_target(c.weight, h, r), c.weight)
    assert c.hessian.drift is not None
    assert not c.hessian.drift.any()  # as it was observed
    assert not c.hessian.residuals[0].any()


def test_dead_columns_stay_as_they_are() -> None:
    """Whatever size the others have: their own diagonal is made up."""
    dead = [0, 5, K - 1]
    for size in (1e-4, 1.0, 1e3):
        c = calibration(size=size, dead=tuple(dead))
        assert (c.hessian.matrix.diagonal()[dead] == 0).all()
        target = corrected_target(c.weight, c.hessian, c.hessian.residuals[0])
        assert torch.equal(target[:, dead], c.weight[:, dead])
        live = [i for i in range(K) if i not in dead]
        assert (target[:, live] != c.weight[:, live]).double().mean() > 0.99


def test_no_live_columns() -> None:
    h = Hessian(torch.zeros(K, K), 10, None, torch.zeros(K, K))
    weight = random(N, K)
    assert torch.equal(corrected_target(weight, h, torch.zeros(N, K)), weight)


def test_singular_hessian() -> None:
    """Columns that are equal share the correction."""
    c = calibration()
    for x in (c.x, c.x_now):
        x[:, 1] = x[:, 0]
        x[:, 2] = 2 * x[:, 0]
    weight = c.weight
    weight[:, 1] = weight[:, 0]
    target = corrected_target(weight, c.hessian, c.hessian.residuals[0])
    change = (target - weight).double()
    assert target.isfinite().all()
    assert torch.allclose(change[:, 1], change[:, 0], rtol=1e-3, atol=1e-5)
    assert torch.allclose(change[:, 2], 2 * change[:, 0], rtol=1e-3, atol=1e-5)


def test_a_hessian_without_a_factor() -> None:
    """Eigenvalues 1 ± 5, of which damping makes up for 0.3 only."""
    matrix = torch.eye(K) + 5 * torch.eye(K).flip(0)
    weight = random(N, K)
    message = r"the Hessian \[\d+, \d+\] of 1000 rows is not positive definite even with 0\.3 of its mean diagonal"
    with pytest.raises(SolverError, match=message):
        corrected_target(weight, Hessian(matrix, 1000, None, random(K, K)), random(N, K))


@cases
def test_less_is_lost_on_the_calibration_data(case: str) -> None:
    c = calibration(**CASES[case])
    h = c.hessian
    inputs = corrected_target(c.weight, h)
    before, after = c.lost(c.weight, False).square().sum(), c.lost(inputs, False).square().sum()
    assert after < (1.0 if "row" in case else 0.9) * before
    both = corrected_target(c.weight, h, h.residuals[0])
    assert c.lost(both, True).square().sum() < c.lost(c.weight, True).square().sum()
    # Of rows the least squares problem is the same for each output: none of them gets worse.
    assert (c.lost(inputs, False).square().sum(0) <= c.lost(c.weight, False).square().sum(0)).all()


def test_the_residual_is_worth_something_of_its_own() -> None:
    c = calibration()
    h = c.hessian
    inputs, both = corrected_target(c.weight, h), corrected_target(c.weight, h, h.residuals[0])
    alone = corrected_target(c.weight, dataclasses.replace(h, drift=None), h.residuals[0])
    errors = [c.lost(t, True).square().sum() for t in (both, inputs, c.weight)]
    assert errors[0] < 0.95 * errors[1]
    assert c.lost(alone, True).square().sum() < errors[2]
    # Corrections add up: the problem is linear in what is wrong.
    assert torch.allclose((both - c.weight), (inputs - c.weight) + (alone - c.weight), atol=1e-5)


@pytest.mark.parametrize(("rows", "damp"), [(0, 1.0), (1, 1.0), (K, 1.0), (2 * K, 0.5), (100 * K, 0.3)])
def test_damping_follows_the_amount_of_data(rows: int, damp: float) -> None:
    """On a Hessian of 2 everywhere on its diagonal: T − W = 0.75·W·drift / (2 + 2·damp)."""
    weight, drift = random(N, K), random(K, K, seed=1)
    target = corrected_target(weight, Hessian(2 * torch.eye(K), rows, None, drift))
    expected = weight.double() + OF_INPUTS * (weight.double() @ drift.double()) / (2 + 2 * damp)
    assert torch.allclose(target.double(), expected, rtol=1e-5, atol=1e-5)


def test_arguments_are_unchanged_and_bytes_the_same() -> None:
    c = calibration(dead=(3,))
    h = c.hessian
    assert h.drift is not None
    arguments = [c.weight, h.matrix, h.drift, *h.residuals]
    before = [t.clone() for t in arguments]
    first, second = (corrected_target(c.weight, h, h.residuals[0]) for _ in "ab")
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
    turned = corrected_target(c.weight.T.contiguous().T, h, h.residuals[0])
    assert torch.allclose(turned, first, rtol=1e-5, atol=1e-6)  # sums in another order
    half = c.weight.bfloat16()
    assert torch.equal(corrected_target(half, h), corrected_target(half.float(), h))
    parts = [corrected_target(w, h, r) for w, r in zip(c.weight.split(4), h.residuals[0].split(4), strict=True)]
    assert torch.allclose(torch.cat(parts), first, rtol=1e-5, atol=1e-6)
