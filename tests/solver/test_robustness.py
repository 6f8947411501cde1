"""Everything that a weight goes through, on data that breaks things: with the default effort, but fewer candidates."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gptq_ao.config import EFFORTS
from gptq_ao.errors import NonFiniteError
from gptq_ao.recipe import Recipe
from gptq_ao.solver.compensate import corrected_target
from gptq_ao.solver.factor import Factor, factor
from gptq_ao.solver.hessian import Hessian
from gptq_ao.solver.refine import refine
from gptq_ao.solver.solution import Solution
from gptq_ao.solver.solve import round_to_nearest, solve

from ..measures import relative_error

N, K, GROUP = 10, 160, 32
DEFAULT = EFFORTS["default"]
GRIDS = [(2, True), (3, False), (4, True), (8, False)]
grids = pytest.mark.parametrize(("bits", "sym"), GRIDS, ids=[f"{b}bit-{'signed' if s else 'asym'}" for b, s in GRIDS])
kinds = pytest.mark.parametrize(("sym", "signed"), [(True, True), (False, False)], ids=["signed", "asym"])


pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(x: Tensor) -> Hessian:
    return Hessian(x.T @ x / len(x), len(x))


def activations(rows: int = 300) -> Tensor:
    return random(rows, K // 4, seed=1) @ random(K // 4, K, seed=2) / 6 + 0.3 * random(rows, K, seed=3)


def quantize(
    weight: Tensor, hessian: Hessian, bits: int, sym: bool = True, signed: bool = True
) -> tuple[Factor, Solution]:
    recipe = Recipe(**{"bits": bits, "group_size": GROUP, "sym": sym, **DEFAULT, "signed_scale": signed})
    f = factor(hessian, dataclasses.replace(recipe, scale_candidates=6))
    return f, refine(solve(weight, f), weight, hessian, f)


def check(
    weight: Tensor, hessian: Hessian, bits: int, sym: bool = True, signed: bool = True, share: float = 1.0
) -> Solution:
    """What it makes is finite, on the grid, and loses no more than `share` of what rounding to nearest does."""
    kept = weight.clone(), hessian.matrix.clone()
    f, s = quantize(weight, hessian, bits, sym, signed)
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian.matrix, kept[1])
    assert f.unit.isfinite().all()
    assert (f.pivots > 0).all()
    assert s.codes.shape == weight.shape
    assert s.codes.max() <= 2**bits - 1
    assert s.scale.isfinite().all()
    assert (s.scale != 0).all() if signed else (s.scale > 0).all()
    assert s.dequantize().isfinite().all()
    nearest = round_to_nearest(weight, Recipe(bits, GROUP, sym))
    errors = [relative_error(weight, t.dequantize(), hessian) for t in (s, nearest)]
    assert errors[0] <= share * errors[1]
    return s


def one_channel(rows: int = 300) -> Tensor:
    x = activations(rows)
    x[:, 7] *= 1e4
    return x


def outlier_channels() -> Tensor:
    x = one_channel()
    x[:, [50, 51, 120]] *= 1e4
    return x


def outlier_rows() -> Tensor:
    x = activations()
    x[3] *= 1e4
    return x


# And how much of what rounding to nearest loses may be left.
DATA: dict[str, tuple[Callable[[], Tensor], float]] = {
    "plain": (activations, 0.5),
    "a single token": (lambda: activations(1), 0.1),
    "two tokens": (lambda: activations(2), 0.1),
    "fewer rows than columns": (lambda: activations(K // 2), 0.5),
    "constant": (lambda: torch.ones(50, K), 0.1),
    "constant per channel": (lambda: random(1, K).expand(50, K), 0.1),
    "one channel": (one_channel, 0.5),
    "outlier channels": (outlier_channels, 0.5),
    "outlier row": (outlier_rows, 0.1),
    # Dead columns count as average ones when a scale is chosen: the live one's error is not all that matters.
    "one live column": (lambda: activations() * (torch.arange(K) == 40), 1.25),
    "many dead columns": (lambda: activations() * (torch.arange(K) % 3 == 0), 0.6),
    "tiny": (lambda: 1e-6 * activations(), 0.5),
    "huge": (lambda: 1e6 * activations(), 0.5),
    "equal columns": (lambda: activations()[:, :1].expand(300, K) + 0.001 * random(300, K), 0.1),
    "one nonzero row": (lambda: torch.cat([activations(1), torch.zeros(99, K)]), 0.1),
}


@grids
@pytest.mark.parametrize("data", DATA)
def test_data(data: str, bits: int, sym: bool) -> None:
    make, share = DATA[data]
    check(random(N, K, seed=5), hessian_of(make()), bits, sym, sym, share)


def zero_groups() -> Tensor:
    weight = random(N, K, seed=5)
    weight[2, :32] = 0
    weight[3] = 0
    weight[:, 64:96] = 0
    return weight


def outliers() -> Tensor:
    weight = random(N, K, seed=5)
    weight[1, 5] = 1000.0
    weight[:, 70] *= 100
    return weight


def tiny_and_large_rows() -> Tensor:
    return random(N, K, seed=5) * torch.logspace(-7, 4, N).unsqueeze(1)


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "zero groups": zero_groups,
    "all zero": lambda: torch.zeros(N, K),
    "no negative weights": lambda: random(N, K, seed=5).abs() + 0.1,
    "no positive weights": lambda: -random(N, K, seed=5).abs() - 0.1,
    "constant": lambda: torch.full((N, K), 0.7),
    "one weight per group": lambda: random(N, K, seed=5) * (torch.arange(K) % GROUP == 3),
    "outliers": outliers,
    "tiny and large rows": tiny_and_large_rows,
    "one row": lambda: random(1, K, seed=5),
    "bf16": lambda: random(N, K, seed=5).bfloat16(),
    "transposed": lambda: random(K, N, seed=5).T,
}


@grids
@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights(weights: str, bits: int, sym: bool) -> None:
    check(WEIGHTS[weights](), hessian_of(activations()), bits, sym, sym)


@grids
def test_weights_of_zero_stay_zero_among_others(bits: int, sym: bool) -> None:
    """A row of zeros has nothing to make up for; a group of zeros may have."""
    s = check(zero_groups(), hessian_of(activations()), bits, sym, sym)
    assert (s.dequantize()[3] == 0).all()


@grids
def test_dead_columns_have_no_say(bits: int, sym: bool) -> None:
    """However small activations are, and however large the dead columns' weights."""
    weight, x = random(N, K, seed=5), 1e-3 * activations()
    dead = torch.arange(K) % 16 == 5
    x[:, dead] = 0
    check(weight, hessian_of(x), bits, sym, sym, share=0.8)


BAD = [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "inf"), (1e8, r"1e\+08"), (3e38, r"3e\+38")]


@kinds
@pytest.mark.parametrize(("value", "shown"), BAD)
@pytest.mark.parametrize("candidates", [1, 6])
@pytest.mark.parametrize("act_order", ["group_aware", "static", "none", "group"])
def test_weights_that_have_no_grid(
    act_order: str, candidates: int, value: float, shown: str, sym: bool, signed: bool
) -> None:
    weight = random(N, K, seed=5)
    weight[4, 100] = value
    recipe = Recipe(4, GROUP, sym, act_order, signed_scale=signed, scale_candidates=candidates)
    f = factor(hessian_of(activations()), recipe)
    # What is solved later is updated with infinities; the message is about the weights as given.
    message = r"the weights reach \S+: a scale for them is not a finite fp16 number"
    with pytest.raises(NonFiniteError, match=message) as raised:
        solve(weight, f)
    if candidates > 1 or act_order == "static":
        assert raised.match(f"the weights reach {shown}:")


@kinds
def test_weights_that_are_too_large_for_the_full_range_only(sym: bool, signed: bool) -> None:
    """A narrower grid has a scale that fp16 can hold."""
    weight = random(N, K, seed=5)
    weight[4, 100] = 6e5 if sym else 1.2e6
    _, s = quantize(weight, hessian_of(activations()), 4, sym, signed)
    assert s.scale.isfinite().all()
    assert s.dequantize()[4, 100] > 0.5 * weight[4, 100]
    others = [i for i in range(N) if i != 4]
    _, alone = quantize(weight[others], hessian_of(activations()), 4, sym, signed)
    assert (s.codes[others] == alone.codes).double().mean() >= 0.99  # near-ties


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite(value: float) -> None:
    x = activations()
    x[7, 9] = value
    with pytest.raises(NonFiniteError, match=r"the Hessian \[160, 160\] holds NaN or infinity"):
        quantize(random(N, K), hessian_of(x), 4)


@pytest.mark.parametrize("data", DATA)
def test_a_corrected_target_is_quantized_as_well(data: str) -> None:
    """As `solve_together` does by default."""
    x = DATA[data][0]()
    weight, x_now = random(N, K, seed=5), x + 0.1 * x.abs().mean(0) * random(len(x), K, seed=6)
    hessian = dataclasses.replace(hessian_of(x_now), drift=(x - x_now).T @ x_now / len(x))
    target = corrected_target(weight, hessian)
    assert target.isfinite().all()
    s = check(target, hessian, 4)

    def lost(weights: Tensor) -> float:
        return (x.double() @ weight.double().T - x_now.double() @ weights.double().T).square().sum().item()

    nearest = round_to_nearest(weight, Recipe(4, GROUP))
    assert lost(s.dequantize()) < lost(nearest.dequantize())
