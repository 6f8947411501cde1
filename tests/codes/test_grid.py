import pytest
import torch

from gptq_ao.codes.grid import (
    NARROWEST,
    SMALLEST_SCALE,
    candidate_grids,
    choose_grid,
    dequantize,
    group_columns,
    max_code,
    round_to_grid,
)
from gptq_ao.errors import NonFiniteError

BITS = (2, 3, 4, 8)
# Shapes [N, K] and group sizes: awkward, one row, one scale per row.
SHAPES = [(7, 96, 32), (1, 144, 48), (5, 130, -1), (3, 64, 2)]
shapes = pytest.mark.parametrize(("n", "k", "group"), SHAPES, ids=[f"{n}x{k}g{g}" for n, k, g in SHAPES])
every_bits = pytest.mark.parametrize("bits", BITS, ids=[f"{b}bit" for b in BITS])
both_grids = pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])


def weights(n: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator)


def quantize(weight: torch.Tensor, group: int, bits: int, sym: bool) -> tuple[torch.Tensor, ...]:
    """Weights [N, G, C] in groups, their codes, scale and zero point [N, G, 1], and what they stand for; in fp64."""
    scale, zero = (t.unsqueeze(-1) for t in choose_grid(weight, group, bits, sym))
    groups = weight.float().reshape(*scale.shape[:-1], -1)
    codes = round_to_grid(groups, scale.float(), zero.float(), bits)
    return groups.double(), codes, scale.double(), zero.double(), (codes.double() - zero) * scale.double()


@pytest.mark.parametrize(("bits", "levels"), [(2, 3), (3, 7), (4, 15), (8, 255)])
def test_max_code(bits: int, levels: int) -> None:
    assert max_code(bits) == levels


def test_group_columns() -> None:
    assert group_columns(96, 32) == 32
    assert group_columns(96, -1) == 96


@every_bits
@shapes
def test_symmetric_formula(n: int, k: int, group: int, bits: int) -> None:
    weight = weights(n, k)
    scale, zero = choose_grid(weight, group, bits, sym=True)
    absmax = weight.reshape(n, -1, k if group == -1 else group).abs().amax(-1)
    assert scale.shape == zero.shape == absmax.shape
    assert torch.equal(scale, (absmax * 2 / (2**bits - 1)).half())
    assert zero.dtype == torch.uint8
    assert (zero == 2 ** (bits - 1)).all()


@every_bits
@shapes
def test_asymmetric_formula(n: int, k: int, group: int, bits: int) -> None:
    weight = weights(n, k) + 0.5
    scale, zero = choose_grid(weight, group, bits, sym=False)
    groups = weight.reshape(n, -1, k if group == -1 else group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    assert torch.equal(scale, ((high - low) / (2**bits - 1)).half())
    assert torch.equal(zero, (-low / scale.float()).round().to(torch.uint8))


@both_grids
@every_bits
@shapes
def test_every_weight_is_within_half_a_step(n: int, k: int, group: int, bits: int, sym: bool) -> None:
    weight, codes, scale, zero, quantized = quantize(weights(n, k), group, bits, sym)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    steps = (weight - quantized).abs() / scale
    # The quotient w/s, at most 2^bits, is rounded to fp32 before it is rounded to a code.
    division = 2.0 ** (bits - 24)
    inside = (weight >= -zero * scale) & (weight <= (2**bits - 1 - zero) * scale)
    assert inside.any()
    assert steps[inside].max() <= 0.5 + division
    # Outside, the grid misses half a step by construction (an even number of codes around 0, a rounded zero point) and
    # what its width loses by the scale's rounding to fp16: half an ulp, 2^-11, of up to 2^bits steps.
    assert steps.max() <= 0.5 + division + 2.0 ** (bits - 11)


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@every_bits
def test_asymmetric_grid_of_one_sign_keeps_zero(bits: int, sign: int) -> None:
    weight = sign * (weights(3, 64).abs() + 0.1)
    groups, _, scale, zero, quantized = quantize(weight, 32, bits, sym=False)
    assert (zero == (0 if sign > 0 else 2**bits - 1)).all()
    # The grid spans [0, max|w|], not [min|w|, max|w|].
    expected = groups.abs().amax(-1, keepdim=True) / (2**bits - 1)
    assert ((scale - expected).abs() <= expected * 2.0**-11 * 1.001).all()
    assert ((groups - quantized).abs() <= scale * (0.5 + 2.0 ** (bits - 11))).all()


@both_grids
@every_bits
def test_zero_group_is_exactly_zero(bits: int, sym: bool) -> None:
    weight = weights(2, 64)
    weight[0, :32] = 0
    _, _, scale, _, quantized = quantize(weight, 32, bits, sym)
    assert scale[0, 0] > 0
    assert (quantized[0, 0] == 0).all()
    assert (quantized[0, 1] != 0).any()


@pytest.mark.parametrize("value", [0.75, -0.013])
@every_bits
def test_constant_group_is_exact_up_to_fp16_if_asymmetric(bits: int, value: float) -> None:
    *_, quantized = quantize(torch.full((2, 48), value), 48, bits, sym=False)
    # One code holds the value, (2^bits - 1) steps from zero; each step is off by half an ulp of fp16 at most.
    assert ((quantized / value - 1).abs() <= 2.0**-11 * 1.001).all()


@pytest.mark.parametrize("value", [0.75, -0.013])
@every_bits
def test_constant_group_is_within_half_a_step_if_symmetric(bits: int, value: float) -> None:
    weight, _, scale, _, quantized = quantize(torch.full((2, 48), value), 48, bits, sym=True)
    assert ((weight - quantized).abs() <= scale * (0.5 + 2.0 ** (bits - 11))).all()


def test_scale_is_rounded_to_fp16_before_the_zero_point() -> None:
    weight = weights(4000, 32)
    scale, zero = choose_grid(weight, 32, 8, sym=False)
    low, high = (t.double() for t in weight.aminmax(dim=-1, keepdim=True))
    unrounded = (high - low) / 255
    assert torch.equal(zero.double(), (-low / scale.double()).round().clamp(0, 255))
    assert not torch.equal(zero.double(), (-low / unrounded).round().clamp(0, 255))  # the case does tell them apart


def test_ties_go_to_the_even_code_distance() -> None:
    weight = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    codes = round_to_grid(weight, torch.tensor(1.0), torch.tensor(8.0), 4)
    assert codes.tolist() == [8, 10, 10, 8, 6, 6]


def test_round_clamps_and_leaves_its_input_alone() -> None:
    weight = torch.tensor([-100.0, -8.6, 6.9, 7.6, 100.0])
    before = weight.clone()
    codes = round_to_grid(weight, torch.tensor(1.0), torch.tensor(8.0), 4)
    assert codes.tolist() == [0, 0, 15, 15, 15]
    assert torch.equal(weight, before)


def test_one_group_per_row() -> None:
    weight = weights(6, 130)
    for sym in (True, False):
        per_row, whole = choose_grid(weight, -1, 4, sym), choose_grid(weight, 130, 4, sym)
        assert per_row[0].shape == (6, 1)
        assert all(torch.equal(a, b) for a, b in zip(per_row, whole, strict=True))


def test_stack_of_weights_is_each_of_them() -> None:
    stack = torch.stack([weights(5, 64, seed) for seed in range(3)])
    scale, zero = choose_grid(stack, 32, 4, sym=False)
    for i in range(3):
        alone = choose_grid(stack[i], 32, 4, sym=False)
        assert torch.equal(scale[i], alone[0])
        assert torch.equal(zero[i], alone[1])


@pytest.mark.parametrize(
    ("value", "shown"),
    [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "inf"), (1e8, r"1e\+08"), (3e38, r"3e\+38")],
)
@both_grids
def test_weights_without_a_finite_scale(value: float, shown: str, sym: bool) -> None:
    weight = weights(3, 64)
    weight[1, 40] = value
    message = rf"the weights reach {shown}: a scale for them is not a finite fp16 number"
    with pytest.raises(NonFiniteError, match=message):
        choose_grid(weight, 32, 4, sym)


@pytest.mark.parametrize("magnitude", [1e-9, 3e-7, 1e-5])
@both_grids
@every_bits
def test_tiny_weights(bits: int, sym: bool, magnitude: float) -> None:
    tiny = magnitude * weights(4, 64)
    weight, codes, scale, _, quantized = quantize(tiny, 32, bits, sym)
    assert codes.isfinite().all()
    assert scale.min() >= 2.0**-24
    # Scales are multiples of 2^-24 here: each of 2^bits steps may be too narrow by half of that.
    assert ((weight - quantized).abs() <= scale * (0.5 + 2.0 ** (bits - 11)) + 2.0 ** (bits - 25)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_dequantize_rounds_the_exact_value_once(dtype: torch.dtype) -> None:
    finite = torch.arange(-(2**15), 2**15, 23, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = finite[finite.isfinite()]
    codes = torch.arange(256, dtype=torch.uint8).expand(len(finite), 256)
    for zero_point in (0, 100, 255):
        zero = torch.full((len(finite), 1), zero_point, dtype=torch.uint8)
        exact = (codes.double() - zero_point) * finite.double().unsqueeze(1)  # 9 by 11 bits: exact in fp64
        weight = dequantize(codes, finite.unsqueeze(1), zero, dtype)
        assert weight.dtype == dtype
        assert torch.equal(weight, exact.to(dtype))


def test_dequantize_uses_the_scale_of_the_columns_group() -> None:
    codes = torch.tensor([[[1, 2, 3, 4], [5, 6, 7, 0]]], dtype=torch.uint8)
    scale = torch.tensor([[[1.0, 10.0], [-0.5, 2.0]]], dtype=torch.float16)
    zero = torch.tensor([[[1, 2], [4, 7]]], dtype=torch.uint8)
    expected = torch.tensor([[[0.0, 1, 10, 20], [-0.5, -1, 0, -14]]])
    assert torch.equal(dequantize(codes, scale, zero, torch.float32), expected)
    assert codes.tolist() == [[[1, 2, 3, 4], [5, 6, 7, 0]]]


def quantize_signed(weight: torch.Tensor, group: int, bits: int) -> tuple[torch.Tensor, ...]:
    """As `quantize`."""
    scale, zero = (t.unsqueeze(-1) for t in choose_grid(weight, group, bits, sym=True, signed=True))
    groups = weight.float().reshape(*scale.shape[:-1], -1)
    codes = round_to_grid(groups, scale.float(), zero.float(), bits)
    return groups.double(), codes, scale.double(), zero.double(), (codes.double() - zero) * scale.double()


@every_bits
@shapes
def test_a_signed_grid_holds_the_largest_weight_of_either_sign(n: int, k: int, group: int, bits: int) -> None:
    groups, codes, scale, zero, quantized = quantize_signed(weights(n, k), group, bits)
    half = 2 ** (bits - 1)
    assert (zero == half).all()
    assert codes.min() >= 0
    assert codes.max() <= 2 * half - 1
    largest = groups.abs().argmax(-1, keepdim=True)
    w, code, q = (t.gather(-1, largest) for t in (groups, codes, quantized))
    assert (code == 0).all()  # the one without a counterpart
    assert ((scale < 0) == (w > 0)).all()
    assert ((q - w).abs() <= w.abs() * 2.0**-11 * 1.001).all()  # fp16 has 11 bits
    # The others are within half a step, but for those beyond the last code of the other side: a full step.
    steps = (groups - quantized).abs() / scale.abs()
    allowed = 0.5 + 2.0 ** (bits - 11)
    same_side = groups * w > 0
    assert steps[same_side].max() <= allowed
    assert steps.max() <= 0.5 + allowed
    # Steps are narrower than those of an unsigned grid: (2^bits - 1) / 2 of them make up max|w|, not 2^(bits - 1).
    unsigned = choose_grid(weights(n, k), group, bits, sym=True)[0].unsqueeze(-1).double()
    assert torch.allclose(scale.abs() / unsigned, torch.tensor((2 * half - 1) / (2 * half)).double(), rtol=2**-9)


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@every_bits
def test_a_signed_grid_of_one_sign(bits: int, sign: int) -> None:
    weight = sign * (weights(3, 64).abs() + 0.1)
    groups, codes, scale, _, quantized = quantize_signed(weight, 32, bits)
    assert (scale * sign < 0).all()
    assert codes.max() <= 2 ** (bits - 1)  # none has the other sign
    assert ((groups - quantized).abs() <= scale.abs() * (0.5 + 2.0 ** (bits - 11))).all()


@every_bits
def test_two_largest_weights_of_opposite_signs(bits: int) -> None:
    """Either may be the one that is exact; the other is a step off, and takes the last code."""
    weight = torch.tensor([[0.5, -0.5, 0.25, 0.0], [-0.5, 0.5, 0.25, 0.0]])
    _, codes, scale, _, quantized = quantize_signed(weight, -1, bits)
    assert torch.equal(scale[0], scale[1])
    assert codes[:, 0, :2].sort(dim=1).values.tolist() == [[0, 2**bits - 1]] * 2
    assert torch.equal(quantized[:, 0, 3], torch.zeros(2).double())
    assert (quantized[:, 0, :2].abs().sum(1) == 1 - scale[:, 0, 0].abs()).all()


def test_ties_on_a_signed_grid_go_to_the_even_code_distance() -> None:
    weight = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    for scale in (1.0, -1.0):
        codes = round_to_grid(weight, torch.tensor(scale), torch.tensor(8.0), 4)
        assert ((codes - 8) * scale).tolist() == [0, 2, 2, 0, -2, -2]


ZEROS = [torch.zeros(5), -torch.zeros(5), torch.tensor([0.0, -0.0, 0.0]), torch.tensor([-0.0, 0.0]), torch.zeros(64)]


@pytest.mark.parametrize("zeros", ZEROS, ids=["0", "-0", "0-00", "-00", "many"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@every_bits
def test_zeros_of_either_sign_give_the_smallest_positive_scale(bits: int, sym: bool, zeros: torch.Tensor) -> None:
    for n in (1, 7, 64):
        weight = zeros.expand(n, -1).contiguous()
        scale, zero = choose_grid(weight, -1, bits, sym)
        assert (scale == SMALLEST_SCALE).all()
        assert (round_to_grid(weight, scale.float(), zero.float(), bits) == zero).all()
        scale, _ = candidate_grids(weight.T.contiguous(), bits, sym, signed=False, count=3)
        assert (scale == SMALLEST_SCALE).all()
        scale, zero = choose_grid(weight, -1, bits, sym=True, signed=True)
        assert (scale.abs() == SMALLEST_SCALE).all()
        assert (round_to_grid(weight, scale.float(), zero.float(), bits) == zero).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e8])
def test_weights_without_a_finite_signed_scale(value: float) -> None:
    weight = weights(3, 64)
    weight[1, 40] = value
    with pytest.raises(NonFiniteError, match=r"the weights reach .*: a scale for them is not a finite fp16 number"):
        choose_grid(weight, 32, 4, sym=True, signed=True)


KINDS = [(True, True), (True, False), (False, False)]
kinds = pytest.mark.parametrize(("sym", "signed"), KINDS, ids=["signed", "sym", "asym"])


@kinds
@every_bits
@pytest.mark.parametrize("count", [1, 2, 7])
def test_candidates(count: int, bits: int, sym: bool, signed: bool) -> None:
    group = weights(5, 48).T.contiguous()
    before = group.clone()
    scale, zero = candidate_grids(group, bits, sym, signed, count)
    assert torch.equal(group, before)
    assert scale.dtype == torch.float16
    assert zero.dtype == torch.uint8
    assert scale.shape == zero.shape == (count if sym and not signed else 2 * count, 5)
    assert zero.max() <= 2**bits - 1
    shares = torch.linspace(1, NARROWEST[bits], count).unsqueeze(1)
    full, origin = choose_grid(group.T, -1, bits, sym)
    halves = scale.float().split(count)
    # From the full range down, in even steps; fp16 rounds each.
    assert torch.allclose(halves[0], shares * full.float().T, rtol=2.0**-10)
    if sym:
        assert (zero == 2 ** (bits - 1)).all()
        assert torch.equal(scale[:1], full.T)
    if signed:
        assert torch.equal(halves[1], -halves[0])
    if not sym:
        # The first grids are those beside the one of the full range, which is one of them.
        assert torch.equal(halves[1], halves[0])
        assert torch.equal(scale[:1], full.T)
        low, high = zero.long().split(count)
        assert ((high - low) >= 0).all()
        assert ((high - low) <= 1).all()
        assert ((low[0] == origin.T) | (high[0] == origin.T)).all()
        # Each candidate's grid cuts off the same share of both ends, to within a step.
        wanted = shares * -group.amin(0).clamp(max=0)
        assert (low * halves[0] <= wanted * (1 + 1e-6)).all()
        assert (high * halves[0] >= wanted * (1 - 1e-6))[high < 2**bits - 1].all()


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@every_bits
def test_asymmetric_candidates_of_one_sign_have_their_zero_at_the_end(bits: int, sign: int) -> None:
    group = sign * (weights(5, 48).abs() + 0.1).T.contiguous()
    scale, zero = candidate_grids(group, bits, False, False, 5)
    assert (scale > 0).all()
    end = 0 if sign > 0 else 2**bits - 1
    # Scales are rounded to fp16: the quotient need not be the whole number that it stands for.
    assert ((zero.long() - end).abs() <= 1).all()
    assert (zero == end).any(0).all()


@kinds
def test_candidates_may_be_infinite_but_never_wrong(sym: bool, signed: bool) -> None:
    """Weights that only a narrower grid has a scale for."""
    group = weights(3, 32).T.contiguous()
    group[4, 1] = 4e5 if sym and not signed else 6e5  # the largest fp16 is 65504
    if not sym:
        group[4, 1] = 1.2e6
    scale, _ = candidate_grids(group, 4, sym, signed, 8)
    assert not scale.isnan().any()
    assert scale[:, [0, 2]].isfinite().all()
    infinite = scale[:, 1].isinf()
    assert infinite.any() == (not sym or signed)
    assert not infinite.all()
    group[4, 1] = torch.inf
    scale, _ = candidate_grids(group, 4, sym, signed, 8)
    assert scale[:, 1].isinf().all()


@kinds
@every_bits
def test_candidates_of_tiny_weights_are_no_nearer_to_zero_than_fp16_can_be(bits: int, sym: bool, signed: bool) -> None:
    scale, zero = candidate_grids(1e-9 * weights(5, 48).T.contiguous(), bits, sym, signed, 4)
    assert (scale.abs() == SMALLEST_SCALE).all()
    assert ((scale < 0).sum(0) == (4 if signed else 0)).all()
    assert zero.max() <= 2**bits - 1
