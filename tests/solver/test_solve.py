import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptq_ao.codes.grid import choose_grid, round_to_grid
from gptq_ao.errors import NonFiniteError, SolverError
from gptq_ao.kernels.columns import MAX_COLUMNS
from gptq_ao.recipe import Recipe
from gptq_ao.solver import factor as factor_module
from gptq_ao.solver.factor import factor
from gptq_ao.solver.hessian import Hessian
from gptq_ao.solver.solution import Solution
from gptq_ao.solver.solve import round_to_nearest, solve

from ..measures import relative_error

# [N, K] and group size: one block and a part, two blocks, one group longer than a block, groups that do not divide one.
SHAPES = [(40, 160, 32), (24, 256, 128), (33, 130, -1), (21, 144, 48)]
GRIDS = [(2, True), (3, False), (4, True), (8, False)]
shapes = pytest.mark.parametrize(("n", "k", "group"), SHAPES, ids=[f"{n}x{k}g{g}" for n, k, g in SHAPES])
grids = pytest.mark.parametrize(("bits", "sym"), GRIDS, ids=[f"{b}bit-{'sym' if s else 'asym'}" for b, s in GRIDS])
kinds = pytest.mark.parametrize("kind", ["random", "correlated", "ill-conditioned"])
orders = pytest.mark.parametrize("act_order", ["static", "none", "group", "group_aware"])


pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


@functools.cache
def make_hessian(kind: str, k: int) -> Hessian:
    x = random(3 * k, k, seed=1)
    if kind != "random":  # few directions carry most of the energy
        x = random(3 * k, k // 4, seed=2) @ random(k // 4, k, seed=3) + 0.3 * x
    if kind == "ill-conditioned":  # fewer rows than columns, and columns of very different size
        place = torch.randperm(k, generator=torch.Generator().manual_seed(4))
        x = x[: k // 2] * torch.logspace(0, -3, k)[place]
    x = x.double()
    return Hessian((x.T @ x / len(x)).float(), len(x))


def quantize(weight: Tensor, hessian: Hessian, damp: float, bits: int, group: int, sym: bool, order: str) -> Solution:
    return solve(weight, factor(hessian, Recipe(bits, group, sym, order, damp)))


@dataclasses.dataclass
class Textbook:
    """Optimal brain quantization in fp64 from an explicit inverse, without any factor.

    Attributes:
        hessian: damped, natural order.
        order: the column that is eliminated at each place.
        inverse: row i of the inverse Hessian after columns 0 … i-1 are eliminated, all in solving order.
    """

    hessian: Tensor
    order: Tensor
    inverse: Tensor


def solving_order(diagonal: Tensor, act_order: str, columns: int) -> Tensor:
    """One column after the other, from the description."""
    if act_order == "none":
        return torch.arange(len(diagonal))
    size, place = diagonal.tolist(), range(len(diagonal))
    if act_order != "group_aware":
        return torch.tensor(sorted(place, key=lambda i: -size[i]))
    groups = [list(place[i : i + columns]) for i in range(0, len(diagonal), columns)]
    groups = [sorted(g, key=lambda i: -size[i]) for g in groups]
    return torch.tensor([i for g in sorted(groups, key=lambda g: -size[g[0]]) for i in g])


@functools.cache
def eliminate(kind: str, k: int, act_order: str, damp: float, columns: int) -> Textbook:
    H = make_hessian(kind, k).matrix.double()
    H = H + damp * H.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    order = solving_order(make_hessian(kind, k).matrix.diagonal(), act_order, columns)
    inverse, rows = torch.linalg.inv(H[order][:, order]), torch.zeros_like(H)
    for i in range(k):
        rows[i, i:] = inverse[0]
        inverse = inverse[1:, 1:] - torch.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return Textbook(H, order, rows)


@dataclasses.dataclass
class Replay:
    """What the textbook chooses at each place *given the solution's earlier codes*: one near-tie that falls to the
    other side would otherwise change all that follows in its row.

    Attributes:
        given: [N, K] the solution's codes in solving order.
        place: [N, K] where the updated weight lies between the codes.
        scale, zero_point: [N, G], from the updated weights where the grid is chosen on the way.
        error: Σ e² / [H⁻¹]_jj, which is tr(E·H·Eᵀ).
    """

    given: Tensor
    place: Tensor
    scale: Tensor
    zero_point: Tensor
    error: float


def replay(book: Textbook, weight: Tensor, s: Solution, bits: int, group: int, sym: bool, act_order: str) -> Replay:
    k = weight.shape[1]
    columns = k if group == -1 else group
    group_of = torch.arange(k) // columns
    given = s.codes
    if act_order != "group":
        group_of, given = group_of[book.order], given[:, book.order]
    step, origin = s.scale.double()[:, group_of], s.zero_point.double()[:, group_of]
    quantized = (given - origin) * step
    pivots = book.inverse.diagonal()
    follow = book.inverse / pivots.unsqueeze(1)
    W = weight.double()[:, book.order]
    scale, zero = choose_grid(weight, group, bits, sym)
    for i in range(k):
        if act_order != "static" and i % columns == 0:
            g = int(group_of[i])
            scale[:, g], zero[:, g] = (t.squeeze(1) for t in choose_grid(W[:, i : i + columns], -1, bits, sym))
        W[:, i + 1 :].addr_(W[:, i] - quantized[:, i], follow[i, i + 1 :], alpha=-1)
    # Nothing changes a column once its turn has come.
    place = (W / step + origin).clamp(0, 2**bits - 1)
    return Replay(given, place, scale, zero, ((W - quantized) ** 2 / pivots).sum().item())


def check_against_textbook(kind: str, n: int, k: int, group: int, bits: int, sym: bool, act_order: str) -> None:
    damp = 0.01
    weight, book = random(n, k, seed=5), eliminate(kind, k, act_order, damp, k if group == -1 else group)
    solution = quantize(weight, make_hessian(kind, k), damp, bits, group, sym, act_order)
    r = replay(book, weight, solution, bits, group, sym, act_order)

    # A weight is updated k times in fp32, within 2^-24 of its magnitude each, and so are the factor's entries it is
    # updated with; the magnitude is that of the grid, 2^bits steps. Nearer to a tie than that, either code is right.
    rounding = 2 * k * 2.0 ** (bits - 24)
    assert ((r.place - r.given).abs() <= 0.5 + rounding).all()
    assert (r.place.round() == r.given).double().mean() >= 0.999

    # The same error of weights moves a scale over a tie of fp16 now and then.
    step = r.scale.view(torch.int16).int() - solution.scale.view(torch.int16).int()
    assert step.abs().max() <= 1
    assert (step == 0).double().mean() >= 0.95
    assert (r.zero_point == solution.zero_point).double().mean() >= 0.95
    if act_order == "static":
        assert torch.equal(r.scale, solution.scale)
        assert torch.equal(r.zero_point, solution.zero_point)

    E = (weight - solution.dequantize()).double()
    assert ((E @ book.hessian) * E).sum().item() == pytest.approx(r.error, rel=1e-6)  # Ŵ is rounded to fp32


@orders
@grids
@shapes
@kinds
def test_codes_are_those_of_the_textbook(
    kind: str, n: int, k: int, group: int, bits: int, sym: bool, act_order: str
) -> None:
    check_against_textbook(kind, n, k, group, bits, sym, act_order)


@orders
def test_group_that_is_longer_than_a_block_and_no_multiple_of_it(act_order: str) -> None:
    check_against_textbook("correlated", 19, 480, 160, 4, False, act_order)


def test_ill_conditioned_is_what_it_says() -> None:
    for _, k, _ in SHAPES:
        assert torch.linalg.cond(make_hessian("ill-conditioned", k).matrix.double()) > 1e8


# peer_hessians.safetensors: 2·XᵀX / sequences of the four distinct activations (q/k/v, o, gate/up, down) of both layers
# of a tiny Llama, as llm-compressor 0.14 recorded them while it wrote a W4A16 checkpoint with groups of 32.
PEER_HESSIANS = Path(__file__).parent / "peer_hessians.safetensors"
OUT_FEATURES = {"self_attn.q_proj": 96, "self_attn.o_proj": 64, "mlp.gate_proj": 160, "mlp.down_proj": 64}


def llm_compressor(weight: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor, act_order: str) -> Tensor:
    """Codes of llm-compressor's `quantize_weight` for given 4-bit grids of groups of 32, written from its description:
    all in fp32, an inverse of H between two Cholesky factors, signed codes, clamped before they are rounded."""
    k = weight.shape[1]
    W, H, group_of = weight.clone(), hessian.clone(), torch.arange(k) // 32
    order = torch.argsort(H.diagonal(), descending=True) if act_order == "static" else torch.arange(k)
    W, H, group_of = W[:, order], H[order][:, order], group_of[order]
    H.diagonal().add_(0.01 * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    codes = torch.empty_like(W)
    for first in range(0, k, 128):
        last = min(first + 128, k)
        block, inverse = W[:, first:last].clone(), U[first:last, first:last]
        errors = torch.zeros_like(block)
        for i in range(last - first):
            s, z = (t[:, group_of[first + i]].float() for t in (scale, zero_point))
            z = z - 8
            q = torch.clamp(block[:, i] / s + z, -8, 7).round()
            e = (block[:, i] - (q - z) * s) / inverse[i, i]
            block[:, i:] -= torch.outer(e, inverse[i, i:])
            codes[:, first + i], errors[:, i] = q, e
        W[:, last:] -= errors @ U[first:last, last:]
    return (codes[:, torch.argsort(order)] + 8).to(torch.uint8)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("act_order", ["static", "none"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", OUT_FEATURES)
def test_codes_are_those_of_llm_compressor(name: str, layer: int, act_order: str, sym: bool) -> None:
    """Its grids come from the weights as given, like ours of "static". Without an order it goes from left to right, and
    so does "static" where that is the order of the diagonal."""
    matrix = load_file(PEER_HESSIANS)[f"layers.{layer}.{name}"]
    if act_order == "none":
        descending = torch.argsort(matrix.diagonal(), descending=True, stable=True)
        matrix = matrix[descending][:, descending]
    weight = 0.08 * random(OUT_FEATURES[name], len(matrix), seed=layer)
    grid = choose_grid(weight, 32, 4, sym)
    ours = solve(weight, factor(Hessian(matrix, 1), Recipe(4, 32, sym, "static", 0.01)))
    theirs = llm_compressor(weight, matrix, *grid, act_order)
    assert (ours.codes == theirs).double().mean() >= 0.999
    assert torch.equal(ours.scale, grid[0])
    assert torch.equal(ours.zero_point, grid[1])


@orders
@pytest.mark.parametrize(("bits", "share"), [(2, 0.4), (3, 0.25), (4, 0.25), (8, 0.25)], ids=["2", "3", "4", "8"])
def test_error_is_far_below_that_of_rounding_to_nearest(bits: int, share: float, act_order: str) -> None:
    weight, hessian = random(32, 160, seed=5), make_hessian("correlated", 160)
    nearest = round_to_nearest(weight, Recipe(bits, 32, True))
    solved = quantize(weight, hessian, 0.01, bits, 32, True, act_order)
    ours, baseline = (relative_error(weight, s.dequantize(), hessian) for s in (solved, nearest))
    assert ours < share * baseline


def with_dead_columns(k: int, dead: list[int]) -> Hessian:
    matrix = make_hessian("correlated", k).matrix.clone()
    matrix[dead] = 0
    matrix[:, dead] = 0
    return Hessian(matrix, 3 * k)


@orders
def test_dead_columns_are_rounded_to_nearest(act_order: str) -> None:
    dead = [0, 31, 32, 63, 100, 140, 159]
    weight, hessian = random(24, 160, seed=5), with_dead_columns(160, dead)
    f = factor(hessian, Recipe(4, 32, False, act_order, 0.01))
    assert f.dead == len(dead)
    s = solve(weight, f)
    place = torch.arange(160) if s.perm is None else torch.argsort(s.perm)
    for column in dead:
        i = int(place[column])
        scale, zero = s.scale[:, i // 32].float(), s.zero_point[:, i // 32].float()
        assert torch.equal(s.codes[:, i].float(), round_to_grid(weight[:, column], scale, zero, 4))
    assert (s.dequantize()[:, dead] != 0).double().mean() > 0.8
    if act_order == "static":
        assert torch.equal(s.codes[:, dead], round_to_nearest(weight, Recipe(4, 32, False)).codes[:, dead])


@orders
def test_dead_columns_change_nothing_for_the_others(act_order: str) -> None:
    dead = list(range(64, 96))
    live = [c for c in range(160) if c not in dead]
    weight, hessian = random(24, 160, seed=5), with_dead_columns(160, dead)
    s = quantize(weight, hessian, 0.01, 4, 32, True, act_order)
    alone = Hessian(hessian.matrix[live][:, live], hessian.rows)
    t = quantize(weight[:, live], alone, 0.01, 4, 32, True, act_order)
    # The same numbers in other places of matrix products: equal up to near-ties.
    assert (s.dequantize()[:, live] == t.dequantize()).double().mean() >= 0.999


@orders
def test_all_columns_dead(act_order: str) -> None:
    weight = random(9, 96)
    f = factor(Hessian(torch.zeros(96, 96), 0), Recipe(3, 32, act_order=act_order))
    assert f.dead == 96
    s = solve(weight, f)
    nearest = round_to_nearest(weight, Recipe(3, 32, True))
    assert torch.equal(s.dequantize(), nearest.dequantize())


@pytest.mark.parametrize(
    ("rows", "damp"), [(0, 1.0), (1, 1.0), (40, 1.0), (50, 0.8), (400, 0.1), (4000, 0.01), (100_000, 0.01)]
)
def test_default_damping_follows_the_amount_of_data(rows: int, damp: float) -> None:
    hessian = dataclasses.replace(make_hessian("random", 40), rows=rows)
    assert factor(hessian, Recipe()).damp == pytest.approx(damp)
    assert factor(hessian, Recipe(damp_percent=0.3)).damp == 0.3


@pytest.mark.parametrize("dead", [[], [3, 17]], ids=["live", "dead"])
@orders
def test_factor_is_that_of_the_damped_hessian(act_order: str, dead: list[int]) -> None:
    hessian = with_dead_columns(40, dead)
    f = factor(hessian, Recipe(4, 20, True, act_order, 0.05))
    diagonal = hessian.matrix.diagonal()
    mean = diagonal[diagonal > 0].mean().item()
    damped = hessian.matrix.double()
    damped.diagonal()[dead] = mean
    damped.diagonal().add_(0.05 * mean)
    order = torch.arange(40) if f.order is None else f.order
    assert (f.order is None) == (act_order == "none")
    assert torch.equal(order, solving_order(diagonal, act_order, 20))
    A, D = f.unit.double(), f.pivots.double()
    assert torch.equal(A, A.triu())
    assert (A.diagonal() == 1).all()
    assert f.added == pytest.approx(0.05 * mean)
    # A and the pivots are rounded to fp32 once: three factors, each within 2^-24.
    bound = 3.01 * 2.0**-24 * (A.abs() * D @ A.abs().T)
    assert (((A * D) @ A.T - damped[order][:, order]).abs() <= bound).all()


def indefinite(coupling: float) -> Hessian:
    """Eigenvalues 1 ± coupling: positive definite with more than `coupling - 1` of the mean diagonal, 1, added."""
    return Hessian(torch.eye(6) + coupling * torch.eye(6).flip(0), 1000)


def test_damping_is_tripled_until_the_factor_exists() -> None:
    hessian = indefinite(1.5)
    before = hessian.matrix.clone()
    f = factor(hessian, Recipe())
    assert f.damp == pytest.approx(0.01 * 3**4)  # 0.27 is too little for 0.5, 0.81 is enough
    damped = before.double() + f.damp * torch.eye(6)
    A, D = f.unit.double(), f.pivots.double()
    assert torch.allclose((A * D) @ A.T, damped, rtol=1e-6, atol=1e-6)
    assert torch.equal(hessian.matrix, before)
    assert factor(hessian, Recipe(damp_percent=0.6)).damp == 0.6


def test_hopeless_hessian() -> None:
    message = r"the Hessian \[6, 6\] of 1000 rows is not positive definite even with 1\.77e\+03 of its mean diagonal"
    with pytest.raises(SolverError, match=message):
        factor(indefinite(1e6), Recipe())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [(1, 1), (0, 2)], ids=["diagonal", "off-diagonal"])
def test_non_finite_hessian(where: tuple[int, int], value: float) -> None:
    matrix = torch.eye(4)
    matrix[where] = value
    with pytest.raises(NonFiniteError, match=r"the Hessian \[4, 4\] holds NaN or infinity"):
        factor(Hessian(matrix, 10), Recipe())


def test_fp32_factor_of_a_large_hessian_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = random(64, 160, seed=5), make_hessian("correlated", 160)
    precise = quantize(weight, hessian, 0.01, 4, 32, True, "static")
    monkeypatch.setattr(factor_module, "LARGEST_FP64", 100)
    coarse = quantize(weight, hessian, 0.01, 4, 32, True, "static")
    assert (precise.codes == coarse.codes).double().mean() >= 0.99
    errors = [relative_error(weight, s.dequantize(), hessian) for s in (precise, coarse)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
    before = hessian.matrix.clone()
    factor(hessian, Recipe())
    assert torch.equal(hessian.matrix, before)


@orders
def test_arguments_are_unchanged(act_order: str) -> None:
    weight, hessian = random(12, 160, seed=5), with_dead_columns(160, [7])
    arguments = [weight, hessian.matrix]
    before = [t.clone() for t in arguments]
    f = factor(hessian, Recipe(4, 32, False, act_order))
    factored = [f.unit.clone(), f.pivots.clone()]
    solve(weight, f)
    round_to_nearest(weight, Recipe(4, 32, False))
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
    assert torch.equal(f.unit, factored[0])
    assert torch.equal(f.pivots, factored[1])


def same(a: Solution, b: Solution) -> bool:
    perms = a.perm is b.perm if a.perm is None or b.perm is None else torch.equal(a.perm, b.perm)
    return perms and all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("codes", "scale", "zero_point"))


@orders
def test_same_input_same_bytes(act_order: str) -> None:
    weight = random(24, 160, seed=5)
    first, second = (quantize(weight, make_hessian("correlated", 160), 0.01, 4, 32, False, act_order) for _ in "ab")
    assert same(first, second)


@orders
def test_weights_of_other_dtype_and_strides(act_order: str) -> None:
    hessian = make_hessian("correlated", 160)
    weight = random(24, 160, seed=5).bfloat16()
    expected = quantize(weight.float(), hessian, 0.01, 4, 32, False, act_order)
    assert same(quantize(weight, hessian, 0.01, 4, 32, False, act_order), expected)
    assert same(quantize(weight.T.contiguous().T, hessian, 0.01, 4, 32, False, act_order), expected)
    wide = torch.cat([weight.float()] * 2, 1)
    assert same(quantize(wide[:, 160:], hessian, 0.01, 4, 32, False, act_order), expected)


@orders
def test_autocast_does_not_matter(act_order: str) -> None:
    weight, hessian = random(24, 160, seed=5), make_hessian("correlated", 160)
    expected = quantize(weight, hessian, 0.01, 4, 32, False, act_order)
    error = relative_error(weight, expected.dequantize(), hessian)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(quantize(weight, hessian, 0.01, 4, 32, False, act_order), expected)
        assert relative_error(weight, expected.dequantize(), hessian) == error


def test_weight_may_be_a_parameter() -> None:
    weight, hessian = random(24, 160, seed=5), make_hessian("correlated", 160)
    parameter = torch.nn.Parameter(weight.clone())
    solution = quantize(parameter, hessian, 0.01, 4, 32, False, "static")
    assert same(solution, quantize(weight, hessian, 0.01, 4, 32, False, "static"))
    assert not solution.dequantize().requires_grad


@orders
@pytest.mark.parametrize("k", [96, 320])
def test_rows_are_independent(k: int, act_order: str) -> None:
    sizes, hessian = [5, 1, 18], make_hessian("correlated", k)
    weights = [random(n, k, seed=n) for n in sizes]
    stacked = quantize(torch.cat(weights), hessian, 0.01, 4, 32, False, act_order).split(sizes)
    for weight, part in zip(weights, stacked, strict=True):
        alone = quantize(weight, hessian, 0.01, 4, 32, False, act_order)
        assert part.codes.shape == weight.shape
        if k <= MAX_COLUMNS:  # beyond a block, matrix products of another height may sum in another order
            assert same(alone, part)
        else:
            assert (alone.dequantize() - part.dequantize()).abs().max() <= 2 * alone.scale.max()
            assert (alone.codes == part.codes).double().mean() >= 0.99


def test_solution_shapes() -> None:
    for order in ("static", "none", "group", "group_aware"):
        s = quantize(random(7, 96), make_hessian("random", 96), 0.01, 3, 48, True, order)
        assert (s.codes.dtype, s.scale.dtype, s.zero_point.dtype) == (torch.uint8, torch.float16, torch.uint8)
        assert (s.codes.shape, s.scale.shape, s.zero_point.shape) == ((7, 96), (7, 2), (7, 2))
        assert all(t.is_contiguous() for t in (s.codes, s.scale, s.zero_point))
        assert s.codes.max() <= 7
        assert (s.perm is None) == (order != "group")


@pytest.mark.parametrize("act_order", ["static", "none", "group_aware"])
def test_groups_are_neighbouring_columns(act_order: str) -> None:
    weight = random(12, 160, seed=5)
    s = quantize(weight, make_hessian("correlated", 160), 0.01, 4, 32, False, act_order)
    dense = s.dequantize()
    for j in range(160):
        step, origin = s.scale[:, j // 32].float(), s.zero_point[:, j // 32].float()
        assert torch.equal(dense[:, j], (s.codes[:, j].float() - origin) * step)
    assert (dense - weight).abs().mean() < 0.3 * weight.abs().mean()


def test_groups_follow_the_permutation_of_act_order_group() -> None:
    weight, hessian = random(12, 160, seed=5), make_hessian("ill-conditioned", 160)
    s = quantize(weight, hessian, 0.01, 4, 32, False, "group")
    assert s.perm is not None
    assert s.perm.dtype == torch.int32
    assert torch.equal(s.perm.long(), torch.argsort(hessian.matrix.diagonal(), descending=True, stable=True))
    dense = s.dequantize()
    for i, column in enumerate(s.perm.tolist()):
        step, origin = s.scale[:, i // 32].float(), s.zero_point[:, i // 32].float()
        assert torch.equal(dense[:, column], (s.codes[:, i].float() - origin) * step)
    assert (dense - weight).abs().mean() < 0.3 * weight.abs().mean()


def test_later_grids_come_from_updated_weights() -> None:
    weight, hessian = random(24, 96, seed=5), make_hessian("correlated", 96)
    original = choose_grid(weight, 32, 3, sym=False)
    left_to_right = quantize(weight, hessian, 0.01, 3, 32, False, "none")
    assert torch.equal(left_to_right.scale[:, 0], original[0][:, 0])
    assert (left_to_right.scale[:, 1:] != original[0][:, 1:]).double().mean() > 0.9
    static = quantize(weight, hessian, 0.01, 3, 32, False, "static")
    assert torch.equal(static.scale, original[0])
    assert torch.equal(static.zero_point, original[1])


@pytest.mark.parametrize("shape", [(9, 96), (3, 5, 64)], ids=["9x96", "3x5x64"])
def test_round_to_nearest(shape: tuple[int, ...]) -> None:
    weight = random(*shape)
    s = round_to_nearest(weight.bfloat16(), Recipe(3, 32, False))
    scale, zero = choose_grid(weight.bfloat16(), 32, 3, sym=False)
    assert torch.equal(s.scale, scale)
    assert torch.equal(s.zero_point, zero)
    assert s.codes.shape == shape
    groups = weight.bfloat16().double().unflatten(-1, (-1, 32))
    place = groups / scale.double().unsqueeze(-1) + zero.unsqueeze(-1)
    # The quotient is rounded to fp32: 8 steps at most, and so is its sum with the zero point.
    distance = (place.clamp(0, 7) - s.codes.unflatten(-1, (-1, 32))).abs()
    assert (distance <= 0.5 + 8 * 2.0**-23).all()


def test_relative_error() -> None:
    weight, noise, hessian = random(12, 96), 0.05 * random(12, 96, seed=1), make_hessian("correlated", 96)
    H, E, W = hessian.matrix.double(), (weight - (weight + noise)).double(), weight.double()
    (changed, energy), (sizes_changed, sizes) = (
        [((m @ h) * m).sum().item() for m in pair] for h, pair in ((H, (E, W)), (H.abs(), (E.abs(), W.abs())))
    )
    # Numerator and denominator are sums of 96 fp32 products, within 2^-24 each of the sum of magnitudes.
    rounding = 98 * 2.0**-24 * (sizes_changed / changed + sizes / energy)
    assert rounding < 1e-3
    error = relative_error(weight, weight + noise, hessian)
    assert error == pytest.approx(changed / energy, rel=rounding)
    assert relative_error(weight, weight, hessian) == 0
    assert relative_error(weight.bfloat16(), weight.bfloat16().float(), hessian) == 0
    assert relative_error(weight, torch.zeros_like(weight), hessian) == pytest.approx(1)


def test_relative_error_of_a_zero_weight() -> None:
    assert relative_error(torch.zeros(3, 8), torch.zeros(3, 8), Hessian(torch.eye(8), 1)) == 0
