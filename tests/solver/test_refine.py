"""Coordinate descent on a solution: never worse, in no row, and nothing else changed."""

import dataclasses
import functools
import itertools

import pytest
import torch
from torch import Tensor

from gptq_ao.codes.grid import choose_grid
from gptq_ao.recipe import Recipe
from gptq_ao.solver.factor import Factor, factor
from gptq_ao.solver.hessian import Hessian
from gptq_ao.solver.refine import refine
from gptq_ao.solver.solution import Solution
from gptq_ao.solver.solve import round_to_nearest, solve

N, K = 8, 480  # three groups of 160, which is longer than a block
GROUPS = [32, 64, 128, -1, 48, 160]
every_group = pytest.mark.parametrize("group", GROUPS, ids=[f"g{g}" for g in GROUPS])
every_bits = pytest.mark.parametrize("bits", [2, 3, 4, 8], ids=["2bit", "3bit", "4bit", "8bit"])
KINDS = [(True, True), (True, False), (False, False)]
GRIDS = [(2, True, True), (2, False, False), (3, True, False), (4, False, False), (4, True, True), (8, True, False)]
kinds = pytest.mark.parametrize(("sym", "signed"), KINDS, ids=["signed", "sym", "asym"])
grids = pytest.mark.parametrize(
    ("bits", "sym", "signed"),
    GRIDS,
    ids=[f"{b}bit-{'signed' if signed else 'sym' if sym else 'asym'}" for b, sym, signed in GRIDS],
)
starts = pytest.mark.parametrize("start", ["nearest", "gptq"])


pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def make_hessian(k: int, size: float = 1.0, dead: tuple[int, ...] = ()) -> Hessian:
    """Few directions carry most of the energy."""
    x = size * (random(2 * k, k // 4, seed=2) @ random(k // 4, k, seed=3) / 5 + 0.3 * random(2 * k, k, seed=1))
    x[:, dead] = 0
    return Hessian(x.T @ x / len(x), len(x))


@functools.cache
def damped(hessian: Hessian, f: Factor) -> Tensor:
    """What `factor` factored, in fp64 and natural order."""
    assert f.damp > 0
    H = hessian.matrix.double()
    diagonal = H.diagonal()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean()
    diagonal[dead] = mean
    diagonal += f.damp * mean
    return H


def losses(weight: Tensor, s: Solution, H: Tensor) -> Tensor:
    """[N], of each row."""
    E = weight.double() - s.dequantize().double()
    return ((E @ H) * E).sum(1)


def check_not_worse(weight: Tensor, hessian: Hessian, f: Factor, before: Solution, after: Solution) -> float:
    """Every row's loss is no larger, and the share of it that is left, of all rows."""
    H = damped(hessian, f)
    old, new = losses(weight, before, H), losses(weight, after, H)
    # Products of fp32 are off by K·2^-24 of their parts at most. Steps that gain less than that may be losses.
    E = (weight - before.dequantize()).double().abs()
    assert (new <= old + len(H) * 2.0**-24 * ((E @ H.abs()) * E).sum(1)).all()
    return (new.sum() / old.sum()).item()


def check_format(before: Solution, after: Solution, bits: int) -> None:
    assert after.codes.dtype == torch.uint8
    assert after.scale.dtype == torch.float16
    assert after.codes.shape == before.codes.shape
    assert after.scale.shape == before.scale.shape
    assert all(t.is_contiguous() for t in (after.codes, after.scale))
    assert after.codes.max() <= 2**bits - 1
    assert after.scale.isfinite().all()
    assert (after.scale != 0).all()
    assert torch.equal(after.zero_point, before.zero_point)
    assert (after.perm is None) == (before.perm is None)
    assert after.perm is before.perm or torch.equal(*(s.perm for s in (before, after) if s.perm is not None))


@functools.cache
def make_factor(hessian: Hessian, recipe: Recipe) -> Factor:
    return factor(hessian, recipe)


def refined(
    solution: Solution, target: Tensor, hessian: Hessian, f: Factor, *, bits: int, signed: bool, sweeps: int
) -> Solution:
    """`refine` as if the factor had been made for a recipe with these settings."""
    sym = f.recipe.sym or signed
    recipe = dataclasses.replace(f.recipe, bits=bits, sym=sym, signed_scale=signed, refine_sweeps=sweeps)
    return refine(solution, target, hessian, dataclasses.replace(f, recipe=recipe))


def begin(
    weight: Tensor, hessian: Hessian, start: str, bits: int, group: int, sym: bool, signed: bool, order: str
) -> tuple[Factor, Solution]:
    f = make_factor(hessian, Recipe(bits, group, sym, order, signed_scale=signed))
    return f, round_to_nearest(weight, f.recipe) if start == "nearest" else solve(weight, f)


@starts
@grids
@every_group
def test_no_row_gets_worse(group: int, bits: int, sym: bool, signed: bool, start: str) -> None:
    # 480 columns are no multiple of 64 or 128.
    k = 384 if group in (64, 128) else K
    weight, hessian = random(N, k, seed=5), make_hessian(k)
    f, first = begin(weight, hessian, start, bits, group, sym, signed, "none")
    after = refined(first, weight, hessian, f, bits=bits, signed=signed, sweeps=2)
    check_format(first, after, bits)
    share = check_not_worse(weight, hessian, f, first, after)
    assert share < (0.7 if start == "nearest" else 1.0)
    if not signed:
        assert (after.scale > 0).all()


@pytest.mark.parametrize("order", ["group", "group_aware", "static"])
@pytest.mark.parametrize("group", [32, 160])
def test_every_order_of_columns(group: int, order: str) -> None:
    weight, hessian = random(N, K, seed=5), make_hessian(K)
    f, first = begin(weight, hessian, "gptq", 3, group, True, True, order)
    assert (first.perm is not None) == (order == "group")
    after = refined(first, weight, hessian, f, bits=3, signed=True, sweeps=2)
    check_format(first, after, 3)
    assert check_not_worse(weight, hessian, f, first, after) < 0.95


def test_columns_between_two_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a range of columns changed must be in the gradient of the next."""
    weight, hessian = random(N, K, seed=5), make_hessian(K)
    f, first = begin(weight, hessian, "gptq", 3, 32, True, True, "none")
    whole = refined(first, weight, hessian, f, bits=3, signed=True, sweeps=2)
    monkeypatch.setattr("gptq_ao.kernels.columns.OUTER", 96)
    parts = refined(first, weight, hessian, f, bits=3, signed=True, sweeps=2)
    assert check_not_worse(weight, hessian, f, first, parts) < 0.95
    assert (whole.codes == parts.codes).double().mean() > 0.99  # the same sums in another order: equal up to near-ties


def test_one_sweep_is_exact_coordinate_descent() -> None:
    """Against the same sweep in fp64, one number after the other, each from the loss alone."""
    n, k, group, bits = 6, 40, 20, 3
    weight, hessian = random(n, k, seed=5), make_hessian(k)
    f, first = begin(weight, hessian, "nearest", bits, group, False, False, "none")
    H = damped(hessian, f)
    codes, scale, zero = first.codes.double(), first.scale.double(), first.zero_point.double()
    W, group_of = weight.double(), torch.arange(k) // group
    for g in range(k // group):
        columns = group_of == g
        rest = W - (codes - zero[:, group_of]) * scale[:, group_of]
        steps = torch.where(columns, codes - zero[:, group_of], 0.0)
        rest += steps * scale[:, [g]]  # the error if the group were zero: a straight line in the scale
        best = ((steps @ H) * rest).sum(1) / ((steps @ H) * steps).sum(1)
        scale[:, g] = best.half().double()
        for j in columns.nonzero().flatten():
            rest = W - (codes - zero[:, group_of]) * scale[:, group_of]
            rest[:, j] = W[:, j]
            others = rest.clone()
            others[:, j] = 0
            wanted = W[:, j] + (others @ H[:, j]) / H[j, j]
            codes[:, j] = (wanted / scale[:, g] + zero[:, g]).round().clamp(0, 7)
    after = refined(first, weight, hessian, f, bits=bits, signed=False, sweeps=1)
    assert torch.equal(after.scale.double(), scale)
    assert torch.equal(after.codes.double(), codes)


def test_the_best_codes_of_a_tiny_problem_are_kept() -> None:
    k, bits = 4, 2
    hessian = Hessian(make_hessian(16).matrix[:k, :k], 1000)
    f = factor(hessian, Recipe())
    H = damped(hessian, f)
    weight = random(5, k, seed=7)
    scale, zero = choose_grid(weight, -1, bits, sym=False)
    every = torch.tensor(list(itertools.product(range(4), repeat=k)))  # [256, k]
    best = []
    for w, s, z in zip(weight, scale, zero, strict=True):
        # For each of the codes, the best of all fp16 scales around the best real one.
        steps = every.double() - z.double()
        slope, curvature = steps @ H @ w.double(), ((steps @ H) * steps).sum(1)
        real = torch.where(curvature > 0, slope / curvature, s.double())
        scales = real.half().double().where((real.half() > 0) & (curvature > 0), s.double())
        E = w.double() - steps * scales.unsqueeze(1)
        i = ((E @ H) * E).sum(1).argmin()
        best.append((every[i], scales[i]))
    codes = torch.stack([c for c, _ in best]).to(torch.uint8)
    optimum = Solution(codes, torch.stack([s for _, s in best]).half().unsqueeze(1), zero)
    after = refined(optimum, weight, hessian, f, bits=bits, signed=False, sweeps=3)
    assert torch.equal(after.codes, optimum.codes)
    assert torch.equal(after.scale, optimum.scale)
    # And it is not kept because nothing ever moves.
    worst = Solution(3 - codes, scale, zero)
    moved = refined(worst, weight, hessian, f, bits=bits, signed=False, sweeps=9)
    assert (losses(weight, moved, H) < 0.5 * losses(weight, worst, H)).all()
    assert (losses(weight, moved, H) >= losses(weight, optimum, H) * (1 - 1e-6)).all()


def mirrored(bits: int) -> tuple[Tensor, Solution]:
    """Codes that stand for the weights exactly, but for the sign of their scale."""
    codes = torch.randint(1, 2**bits, (6, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    scale = torch.full((6, 1), 0.125, dtype=torch.float16)
    solution = Solution(codes, scale, torch.full((6, 1), 2 ** (bits - 1), dtype=torch.uint8))
    return -solution.dequantize(), solution


@every_bits
def test_a_signed_scale_may_flip(bits: int) -> None:
    weight, solution = mirrored(bits)
    hessian = make_hessian(64)
    after = refined(solution, weight, hessian, factor(hessian, Recipe()), bits=bits, signed=True, sweeps=1)
    assert torch.equal(after.scale, -solution.scale)
    assert torch.equal(after.codes, solution.codes)
    assert torch.equal(after.dequantize(), weight)


@every_bits
def test_an_unsigned_scale_stays_positive(bits: int) -> None:
    weight, solution = mirrored(bits)
    hessian = make_hessian(64)
    f = factor(hessian, Recipe())
    after = refined(solution, weight, hessian, f, bits=bits, signed=False, sweeps=4)
    assert (after.scale > 0).all()
    assert check_not_worse(weight, hessian, f, solution, after) < 0.2  # by its codes


def test_a_scale_that_would_be_zero_or_infinite_in_fp16_is_not_taken() -> None:
    hessian = make_hessian(64)
    f = factor(hessian, Recipe())
    s = round_to_nearest(random(4, 64), Recipe(4, 32))
    for size in (1e-12, 1e9):
        after = refined(s, size * random(4, 64), hessian, f, bits=4, signed=True, sweeps=2)
        assert after.scale.isfinite().all()
        assert (after.scale != 0).all()


@kinds
def test_groups_of_zero_codes(sym: bool, signed: bool) -> None:
    """No scale is better than another: the old one stays, and codes are found on it."""
    weight, hessian = random(N, 96, seed=5), make_hessian(96)
    f, first = begin(weight, hessian, "nearest", 4, 32, sym, signed, "none")
    first.codes[:, 32:64] = first.zero_point[:, 1:2]
    codes = first.codes.clone()
    after = refined(first, weight, hessian, f, bits=4, signed=signed, sweeps=1)
    assert torch.equal(after.scale[:, 1], first.scale[:, 1])
    assert not torch.equal(after.codes[:, 32:64], codes[:, 32:64])
    check_not_worse(weight, hessian, f, first, after)


def test_weights_of_zero_stay_zero() -> None:
    weight, hessian = torch.zeros(3, 64), make_hessian(64)
    f, first = begin(weight, hessian, "gptq", 4, 32, True, True, "none")
    after = refined(first, weight, hessian, f, bits=4, signed=True, sweeps=3)
    assert torch.equal(after.dequantize(), weight)
    assert torch.equal(after.scale, first.scale)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_dead_columns_weigh_what_the_factor_gives_them(size: float) -> None:
    """They have no say about a group's scale beyond that of an average column, however small the activations are."""
    dead = (0, 1, 33, 50, 95)
    weight, hessian = random(N, 96, seed=5), make_hessian(96, size, dead)
    weight[:, dead] *= 3  # the others would want another scale
    f, first = begin(weight, hessian, "nearest", 3, 32, True, False, "none")
    after = refined(first, weight, hessian, f, bits=3, signed=False, sweeps=3)
    assert check_not_worse(weight, hessian, f, first, after) < 0.9
    # Activations of another size are the same problem.
    same = make_hessian(96, 1.0, dead)
    expected = refined(first, weight, same, factor(same, Recipe()), bits=3, signed=False, sweeps=3)
    assert (after.codes == expected.codes).double().mean() >= 0.99  # near-ties


@kinds
def test_it_converges(sym: bool, signed: bool) -> None:
    weight, hessian = random(N, 96, seed=5), make_hessian(96)
    f, first = begin(weight, hessian, "gptq", 3, 32, sym, signed, "none")
    H = damped(hessian, f)
    few = refined(first, weight, hessian, f, bits=3, signed=signed, sweeps=2)
    many = refined(first, weight, hessian, f, bits=3, signed=signed, sweeps=60)
    more = refined(many, weight, hessian, f, bits=3, signed=signed, sweeps=1)
    assert torch.equal(many.codes, more.codes)
    assert torch.equal(many.scale, more.scale)
    assert losses(weight, many, H).sum() < losses(weight, few, H).sum()


def test_sweeps_add_up() -> None:
    weight, hessian = random(N, 96, seed=5), make_hessian(96)
    f, s = begin(weight, hessian, "nearest", 4, 32, True, True, "none")
    at_once = refined(s, weight, hessian, f, bits=4, signed=True, sweeps=3)
    for _ in range(3):
        s = refined(s, weight, hessian, f, bits=4, signed=True, sweeps=1)
    # Each call computes the error anew where one keeps adding to it: near-ties.
    assert (at_once.codes == s.codes).double().mean() >= 0.99


def test_no_sweeps() -> None:
    weight, hessian = random(N, 96, seed=5), make_hessian(96)
    f, first = begin(weight, hessian, "nearest", 4, 32, True, True, "none")
    assert refined(first, weight, hessian, f, bits=4, signed=True, sweeps=0) is first


@pytest.mark.parametrize("order", ["none", "group"])
@pytest.mark.parametrize(("n", "group"), [(N, 32), (N, -1), (1, 32), (1, -1)])  # the transpose of one row is no copy
def test_arguments_are_unchanged_and_bytes_the_same(n: int, group: int, order: str) -> None:
    weight, hessian = random(n, 96, seed=6), make_hessian(96, dead=(3, 70))
    f, first = begin(weight, hessian, "nearest", 4, group, False, False, order)
    if order == "group":
        assert f.order is not None
        first = dataclasses.replace(first, perm=f.order.to(torch.int32))
    arguments = [weight, hessian.matrix, f.unit, f.pivots, first.codes, first.scale, first.zero_point]
    arguments += [t for t in (first.perm, f.order) if t is not None]
    before = [t.clone() for t in arguments]
    results = [refined(first, weight, hessian, f, bits=4, signed=False, sweeps=2) for _ in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
    for name in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name))
    assert not torch.equal(results[0].codes, first.codes)


def test_weights_of_other_dtype_and_strides() -> None:
    weight, hessian = random(N, 96, seed=5).bfloat16(), make_hessian(96)
    f, first = begin(weight, hessian, "gptq", 4, 32, True, True, "none")
    expected = refined(first, weight.float(), hessian, f, bits=4, signed=True, sweeps=2)
    for other in (weight, weight.T.contiguous().T, torch.cat([weight] * 2, 1)[:, 96:]):
        result = refined(first, other, hessian, f, bits=4, signed=True, sweeps=2)
        assert torch.equal(result.codes, expected.codes)
        assert torch.equal(result.scale, expected.scale)


def test_rows_are_independent() -> None:
    weight, hessian = random(N, 96, seed=5), make_hessian(96)
    f, first = begin(weight, hessian, "gptq", 4, 32, True, True, "none")
    whole = refined(first, weight, hessian, f, bits=4, signed=True, sweeps=2).split([3, 5])
    for part, rows, old in zip(whole, weight.split([3, 5]), first.split([3, 5]), strict=True):
        alone = refined(old, rows, hessian, f, bits=4, signed=True, sweeps=2)
        assert (alone.codes == part.codes).double().mean() >= 0.99  # products of another height: near-ties
