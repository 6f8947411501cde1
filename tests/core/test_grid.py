import pytest
import torch

from gptq_ao.errors import NonFiniteError
from gptq_ao.grid import choose_grid, dequantize, group_columns, max_code, round_to_grid

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
