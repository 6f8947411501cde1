import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_ao.codes.tiles import pack_codes, pack_scale_zero
from gptq_ao.kernels import cpu, ops, reference
from gptq_ao.kernels.packed import Packed

BF16, FP32 = torch.bfloat16, torch.float32
U = 2.0**-8  # unit roundoff of bf16


@dataclasses.dataclass
class Example:
    """Operator arguments after x, and what they mean."""

    arguments: Packed
    codes: Tensor
    zero_point: Tensor  # of each code
    scale: Tensor  # of each code, fp64
    perm: Tensor

    def dense(self) -> Tensor:
        """fp64, columns in natural order."""
        return self.natural((self.codes.double() - self.zero_point) * self.scale)

    def steps_from_eight(self) -> Tensor:
        """(|code - 8| + |8 - zero|)·scale: the magnitude of the two terms that the CPU's 4-bit kernel adds up, each of
        which has a factor that is rounded to bf16."""
        steps = (self.codes.double() - 8).abs() + (self.zero_point.double() - 8).abs()
        return self.natural(steps * self.scale)

    def natural(self, columns: Tensor) -> Tensor:
        out = torch.empty_like(columns)
        out[..., self.perm] = columns
        return out


def pack(*shape: int, bits: int, group: int, permuted: bool = False, seed: int = 0) -> Example:
    generator = torch.Generator().manual_seed(seed)
    *lead, n, k = shape
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
    zero = torch.randint(0, 2**bits, (*lead, n, k // group), dtype=torch.uint8, generator=generator)
    scale = torch.rand(zero.shape, generator=generator).add(0.1).half()
    perm = torch.randperm(k, generator=generator)
    qdata, high = pack_codes(codes, bits)
    stored = perm.int() if permuted else None
    arguments = Packed(qdata, pack_scale_zero(scale, zero), high, stored, bits, group, n, k)
    wide_zero, wide_scale = (t.repeat_interleave(group, -1) for t in (zero, scale.double()))
    return Example(arguments, codes, wide_zero, wide_scale, perm if permuted else torch.arange(k))


def random(*shape: int, dtype: torch.dtype = FP32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


CASES = [
    # x, weight, group, permuted
    ((5, 96), (40, 96), 32, False),
    ((64,), (16, 64), 64, False),
    ((2, 3, 130), (19, 130), 26, True),
    ((1, 48), (1, 48), 48, True),
    ((3, 5, 64), (3, 7, 64), 32, False),
    ((2, 4, 96), (2, 33, 96), 96, True),
]
cases = pytest.mark.parametrize(
    ("x_shape", "shape", "group", "permuted"),
    CASES,
    ids=["-by-".join("x".join(map(str, s)) for s in (x, w)) + f"g{g}" + "-perm" * p for x, w, g, p in CASES],
)
KINDS = [(2, BF16), (3, FP32), (4, BF16), (4, FP32), (8, FP32), (3, BF16)]
KIND_NAMES = [f"{b}bit-{'bf16' if d == BF16 else 'fp32'}" for b, d in KINDS]
kinds = pytest.mark.parametrize(("bits", "dtype"), KINDS, ids=KIND_NAMES)
some_kinds = pytest.mark.parametrize(("bits", "dtype"), KINDS[:-1:2], ids=KIND_NAMES[:-1:2])


@some_kinds
@cases
def test_linear_is_a_well_formed_operator(
    x_shape: tuple[int, ...], shape: tuple[int, ...], group: int, permuted: bool, bits: int, dtype: torch.dtype
) -> None:
    x = random(*x_shape, dtype=dtype).requires_grad_()
    torch.library.opcheck(ops.linear, (x, *pack(*shape, bits=bits, group=group, permuted=permuted).arguments))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("lead", "bits"), [((), 3), ((), 4), ((3,), 2), ((3,), 8)], ids=["3", "4", "2x3", "8x3"])
def test_dequantize_is_a_well_formed_operator(lead: tuple[int, ...], bits: int, dtype: torch.dtype) -> None:
    packed = pack(*lead, 19, 130, bits=bits, group=26, permuted=True)
    torch.library.opcheck(ops.dequantize, (*packed.arguments, dtype))


@kinds
@cases
def test_linear_is_the_dense_product(
    x_shape: tuple[int, ...], shape: tuple[int, ...], group: int, permuted: bool, bits: int, dtype: torch.dtype
) -> None:
    packed, x = pack(*shape, bits=bits, group=group, permuted=permuted), random(*x_shape, dtype=dtype)
    y = ops.linear(x, *packed.arguments)
    W, k = packed.dense(), shape[-1]
    exact = x.double() @ W.mT
    assert y.dtype == dtype
    assert y.shape == exact.shape
    # Weights (or the two terms of each) are rounded to the dtype, their sum maybe too; products are added up in fp32
    # and rounded to the dtype.
    u = U if dtype == BF16 else 2.0**-24
    magnitude = packed.steps_from_eight() if bits == 4 and dtype == BF16 else W.abs()
    bound = x.double().abs() @ magnitude.mT * (2 * u + k * 2.0**-23) + 1.01 * u * exact.abs()
    assert ((y.double() - exact).abs() <= bound).all()


@kinds
@cases
def test_dequantize_is_exact_and_rounded_once(
    x_shape: tuple[int, ...], shape: tuple[int, ...], group: int, permuted: bool, bits: int, dtype: torch.dtype
) -> None:
    packed = pack(*shape, bits=bits, group=group, permuted=permuted)
    weight = ops.dequantize(*packed.arguments, dtype)
    assert torch.equal(weight, packed.dense().to(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_strides_of_x_do_not_matter(bits: int) -> None:
    packed = pack(19, 64, bits=bits, group=32)
    for dtype in (BF16, FP32):
        x = random(5, 64, 6, dtype=dtype).transpose(1, 2)[:, ::2]
        # A BLAS may sum in another order for another alignment: twice the bound on the rounding of 64 products,
        # and of the result.
        weight = ops.dequantize(*packed.arguments, torch.float64)
        bound = (x.double().abs() @ weight.T.abs()) * 2 * (64 * 2**-24 + torch.finfo(dtype).eps)
        strided, plain = (ops.linear(t, *packed.arguments).double() for t in (x, x.contiguous()))
        assert ((strided - plain).abs() <= bound).all()
        torch.library.opcheck(ops.linear, (x, *packed.arguments), test_utils="test_faketensor")


@pytest.mark.parametrize("dtype", [BF16, FP32, torch.float16], ids=["bf16", "fp32", "fp16"])
def test_no_rows(dtype: torch.dtype) -> None:
    packed = pack(19, 64, bits=4, group=32)
    assert ops.linear(random(0, 64, dtype=dtype), *packed.arguments).shape == (0, 19)
    assert ops.linear(random(2, 0, 64, dtype=dtype), *packed.arguments).shape == (2, 0, 19)


def test_shapes_without_data() -> None:
    packed = pack(19, 64, bits=3, group=32)
    meta = [t.to("meta") if isinstance(t, Tensor) else t for t in packed.arguments]
    y = ops.linear(torch.empty(2, 5, 64, dtype=BF16, device="meta"), *meta)
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, 19), BF16, "meta")
    weight = ops.dequantize(*meta, FP32)
    assert (weight.shape, weight.dtype, weight.device.type) == ((19, 64), FP32, "meta")
    with pytest.raises(RuntimeError, match=r"x \(5, 63\) does not end in 64 features"):
        ops.linear(torch.empty(5, 63, device="meta"), *meta)


@cases
def test_input_gradient(x_shape: tuple[int, ...], shape: tuple[int, ...], group: int, permuted: bool) -> None:
    packed = pack(*shape, bits=4, group=group, permuted=permuted)
    x = random(*x_shape).double().requires_grad_()
    y = ops.linear(x, *packed.arguments)
    weight = random(*y.shape, seed=2).double()
    (gradient,) = torch.autograd.grad((y * weight).sum(), x)
    # fp64 sums of at most 40 products of up to about 50: some 1e-12.
    assert (gradient - weight @ packed.dense()).abs().max() <= 1e-11


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_input_gradient_in_bf16_is_the_dense_one(bits: int) -> None:
    packed = pack(40, 96, bits=bits, group=32, permuted=True)
    x, grad = random(5, 96, dtype=BF16).requires_grad_(), random(5, 40, dtype=BF16, seed=2)
    ops.linear(x, *packed.arguments).backward(grad)
    assert x.grad is not None
    exact = grad.double() @ packed.dense()
    # W and the result are rounded to bf16, the sum of 40 products is formed in fp32.
    bound = grad.double().abs() @ packed.dense().abs() * (U + 40 * 2.0**-23) + 1.01 * U * exact.abs()
    assert ((x.grad.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_the_bias_is_added_before_the_result_is_rounded(dtype: torch.dtype) -> None:
    packed = pack(40, 96, bits=4, group=24)  # a group size for which there is no kernel: dequantize and multiply
    x, bias = random(34, 96, dtype=dtype).requires_grad_(), random(40, dtype=dtype, seed=3).requires_grad_()
    y = ops.linear(x, *packed.arguments, bias)
    assert torch.equal(y, torch.nn.functional.linear(x, packed.dense().to(dtype), bias))
    torch.library.opcheck(ops.linear, (x, *packed.arguments, bias))
    grad = random(34, 40, dtype=dtype, seed=4)
    assert torch.equal(torch.autograd.grad(y, bias, grad)[0], grad.sum(0))


def test_result_requires_a_gradient_only_if_x_does() -> None:
    packed = pack(19, 64, bits=3, group=32, permuted=True)
    y = ops.linear(random(5, 64).requires_grad_(), *packed.arguments)
    assert y.requires_grad
    assert not ops.linear(random(5, 64), *packed.arguments).requires_grad


@pytest.fixture
def cpu_calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs that took the CPU's own 4-bit kernel."""
    calls: list[Tensor] = []
    linear = cpu.linear

    def spy(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        calls.append(x)
        return linear(x, *arguments, **named)

    monkeypatch.setattr(cpu, "linear", spy)
    return calls


EXPERTS = [
    # counts of rows, rows beyond, N, K, group, permuted
    ((3, 0, 4), 0, 40, 96, 32, False),
    ((0, 5), 2, 19, 130, 26, True),
    ((6,), 0, 16, 64, 64, True),
    ((0, 0, 0), 4, 16, 64, 32, False),
    ((0, 0), 0, 16, 64, 32, False),
]
expert_cases = pytest.mark.parametrize(
    ("counts", "beyond", "n", "k", "group", "permuted"),
    EXPERTS,
    ids=["empty-between", "beyond", "one-expert", "all-beyond", "no-rows"],
)


def by_expert(x: Tensor, weight: Tensor, counts: tuple[int, ...]) -> Tensor:
    """The meaning of `grouped_linear` with dense weights [E, N, K]."""
    each = x[: sum(counts)].split(list(counts))
    beyond = x.new_zeros(len(x) - sum(counts), weight.shape[1])
    return torch.cat([*(rows @ w.T for rows, w in zip(each, weight, strict=True)), beyond])


def offsets(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


@kinds
@expert_cases
def test_grouped_linear_is_each_expert_s_product(
    counts: tuple[int, ...], beyond: int, n: int, k: int, group: int, permuted: bool, bits: int, dtype: torch.dtype
) -> None:
    packed = pack(len(counts), n, k, bits=bits, group=group, permuted=permuted)
    x = random(sum(counts) + beyond, k, dtype=dtype)
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        y = ops.grouped_linear(x, *packed.arguments, offsets(counts))
    finally:
        torch.use_deterministic_algorithms(False)
    exact = by_expert(x.double(), packed.dense(), counts)
    # As in test_linear_is_the_dense_product.
    u = U if dtype == BF16 else 2.0**-24
    magnitude = packed.steps_from_eight() if bits == 4 and dtype == BF16 else packed.dense().abs()
    bound = by_expert(x.double().abs(), magnitude, counts) * (2 * u + k * 2.0**-23) + 1.01 * u * exact.abs()
    assert y.dtype == dtype
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= bound).all()


@some_kinds
@expert_cases
def test_grouped_linear_is_a_well_formed_operator(
    counts: tuple[int, ...], beyond: int, n: int, k: int, group: int, permuted: bool, bits: int, dtype: torch.dtype
) -> None:
    packed = pack(len(counts), n, k, bits=bits, group=group, permuted=permuted)
    x = random(sum(counts) + beyond, k, dtype=dtype)
    torch.library.opcheck(ops.grouped_linear, (x.requires_grad_(), *packed.arguments, offsets(counts)))
    grad = random(len(x), n, dtype=dtype)
    torch.library.opcheck(ops.grouped_linear_backward, (grad, *packed.arguments, offsets(counts)))


@expert_cases
def test_input_gradient_of_grouped_linear(
    counts: tuple[int, ...], beyond: int, n: int, k: int, group: int, permuted: bool
) -> None:
    packed = pack(len(counts), n, k, bits=4, group=group, permuted=permuted)
    x = random(sum(counts) + beyond, k).double().requires_grad_()
    y = ops.grouped_linear(x, *packed.arguments, offsets(counts))
    weight = random(*y.shape, seed=2).double()
    (gradient,) = torch.autograd.grad((y * weight).sum(), x)
    expected = by_expert(weight, packed.dense().mT, counts)
    assert (gradient - expected).abs().max() <= 1e-11 if len(x) else gradient.shape == x.shape
    assert not ops.grouped_linear(x.detach(), *packed.arguments, offsets(counts)).requires_grad


def test_grouped_linear_takes_sizes_that_are_not_known_yet() -> None:
    packed = pack(3, 16, 64, bits=4, group=32)

    def some_rows(x: Tensor, mask: Tensor, ends: Tensor) -> Tensor:
        return ops.grouped_linear(x[mask], *packed.arguments, ends)

    x, mask = random(6, 64), torch.tensor([True, False, True, True, False, True])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(some_rows, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, mask, offsets((1, 0, 3))), some_rows(x, mask, offsets((1, 0, 3))))


def test_grouped_linear_says_what_does_not_fit() -> None:
    packed = pack(3, 16, 64, bits=4, group=32)
    for x, ends, message in (
        (random(5, 63), offsets((1, 2, 2)), r"x \(5, 63\) is not \[rows, 64\]"),
        (random(3, 5, 64), offsets((1, 2, 2)), r"x \(3, 5, 64\) is not \[rows, 64\]"),
        (random(5, 64), offsets((1, 4)), r"offsets torch.int32 \(2,\) do not give integers for 3 experts"),
        (random(5, 64), offsets((1, 2, 2)).float(), r"offsets torch.float32 \(3,\)"),
    ):
        for device in ("cpu", "meta"):
            there = [t.to(device) if isinstance(t, Tensor) else t for t in (x, *packed.arguments, ends)]
            with pytest.raises(RuntimeError, match=message):
                ops.grouped_linear(*there)


def test_grouped_linear_converts_each_expert_that_has_rows_once(
    monkeypatch: pytest.MonkeyPatch, cpu_calls: list[Tensor]
) -> None:
    conversions: list[Tensor] = []
    unpack = cpu.unpack_codes

    def spy(qdata: Tensor, *arguments: Any) -> Tensor:
        conversions.append(qdata)
        return unpack(qdata, *arguments)

    monkeypatch.setattr(cpu, "unpack_codes", spy)
    packed = pack(4, 19, 64, bits=4, group=32)
    counts = (2, 0, 300, 1)  # 300 rows are too many for the CPU's own kernel
    x = random(303, 64, dtype=BF16)
    results = [ops.grouped_linear(x, *packed.arguments, offsets(counts)) for _ in range(3)]
    assert [len(rows) for rows in cpu_calls] == [2, 1] * 3
    assert len(conversions) == 2
    assert all(torch.equal(y, results[0]) for y in results)
    packed.arguments.qdata.copy_(pack(4, 19, 64, bits=4, group=32, seed=9).arguments.qdata)
    changed = ops.grouped_linear(x, *packed.arguments, offsets(counts))
    fresh = [t.clone() if isinstance(t, Tensor) else t for t in packed.arguments]
    assert torch.equal(changed, ops.grouped_linear(x, *fresh, offsets(counts)))
    assert not torch.equal(changed, results[0])


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [1, 7, 65, 256])
@pytest.mark.parametrize("n", [16, 19, 160])
def test_cpu_kernel_is_taken_and_right(n: int, rows: int, group: int, cpu_calls: list[Tensor]) -> None:
    packed = pack(n, 512, bits=4, group=group, permuted=rows == 7)
    x = random(rows, 512, dtype=BF16)
    y = ops.linear(x, *packed.arguments)
    assert len(cpu_calls) == 1
    W = packed.dense()
    exact = x.double() @ W.mT
    # As in test_linear_is_the_dense_product, for each of the two ways to compute it.
    rounded, summed, written = 2 * U, 512 * 2.0**-23, 1.01 * U * exact.abs()
    bound = x.double().abs() @ packed.steps_from_eight().mT * (rounded + summed) + written
    assert ((y.double() - exact).abs() <= bound).all()
    baseline = reference.linear(x, packed.arguments)
    plain = x.double().abs() @ W.abs().mT * (U + summed) + written
    assert ((y.double() - baseline.double()).abs() <= bound + plain).all()


@pytest.mark.parametrize("permuted", [False, True], ids=["natural", "perm"])
def test_cpu_kernel_weight_by_weight(permuted: bool, cpu_calls: list[Tensor]) -> None:
    packed = pack(21, 96, bits=4, group=32, permuted=permuted)
    transposed = ops.linear(torch.eye(96, dtype=BF16), *packed.arguments)
    assert len(cpu_calls) == 1
    bound = packed.steps_from_eight() * U + packed.dense().abs() * 2 * U  # two factors, their sum, the result
    assert ((transposed.mT.double() - packed.dense()).abs() <= bound).all()


@pytest.mark.parametrize(
    ("x_shape", "shape", "bits", "group", "dtype"),
    [
        ((257, 64), (19, 64), 4, 32, BF16),
        ((2, 129, 64), (19, 64), 4, 32, BF16),
        ((5, 48), (19, 48), 4, 48, BF16),
        ((5, 512), (19, 512), 4, 512, BF16),
        ((5, 64), (19, 64), 4, 16, BF16),
        ((5, 128), (19, 128), 2, 32, BF16),
        ((5, 128), (19, 128), 3, 32, BF16),
        ((5, 64), (19, 64), 8, 32, BF16),
        ((5, 64), (19, 64), 4, 32, FP32),
        ((5, 64), (19, 64), 4, 32, torch.float16),
        ((2, 5, 64), (2, 19, 64), 4, 32, BF16),
        ((0, 64), (19, 64), 4, 32, BF16),
    ],
    ids=["257rows", "2x129rows", "g48", "g512", "g16", "2bit", "3bit", "8bit", "fp32", "fp16", "stack", "0rows"],
)
def test_cpu_kernel_is_left_alone(
    x_shape: tuple[int, ...],
    shape: tuple[int, ...],
    bits: int,
    group: int,
    dtype: torch.dtype,
    cpu_calls: list[Tensor],
) -> None:
    packed = pack(*shape, bits=bits, group=group)
    ops.linear(random(*x_shape, dtype=dtype), *packed.arguments)
    assert not cpu_calls


def test_cpu_kernel_is_left_alone_for_inference_tensors(cpu_calls: list[Tensor]) -> None:
    with torch.inference_mode():
        packed = pack(19, 64, bits=4, group=32)
        y = ops.linear(torch.eye(64, dtype=BF16), *packed.arguments)
        packed.arguments.qdata.zero_()  # no version tells of this
        zeros = ops.linear(torch.eye(64, dtype=BF16), *packed.arguments)
    assert torch.equal(y.mT, packed.dense().bfloat16())
    assert not cpu_calls
    assert not torch.equal(y, zeros)


def test_cpu_kernel_converts_once(monkeypatch: pytest.MonkeyPatch, cpu_calls: list[Tensor]) -> None:
    conversions: list[Tensor] = []
    unpack = cpu.unpack_codes

    def spy(qdata: Tensor, *arguments: Any) -> Tensor:
        conversions.append(qdata)
        return unpack(qdata, *arguments)

    monkeypatch.setattr(cpu, "unpack_codes", spy)
    packed = pack(19, 64, bits=4, group=32)
    results = [ops.linear(random(5, 64, dtype=BF16), *packed.arguments) for _ in range(3)]
    assert len(cpu_calls) == 3
    assert len(conversions) == 1
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("changed", ["qdata", "scale_zero"])
def test_cpu_kernel_follows_changes_in_place(changed: str, cpu_calls: list[Tensor]) -> None:
    packed, other = pack(19, 64, bits=4, group=32), pack(19, 64, bits=4, group=32, seed=9)
    x = random(5, 64, dtype=BF16)
    before = ops.linear(x, *packed.arguments)
    getattr(packed.arguments, changed).copy_(getattr(other.arguments, changed))
    after = ops.linear(x, *packed.arguments)
    fresh = [t.clone() if isinstance(t, Tensor) else t for t in packed.arguments]
    assert len(cpu_calls) == 2
    assert not torch.equal(before, after)
    assert torch.equal(after, ops.linear(x, *fresh))


def test_cpu_kernel_follows_another_scale_zero(cpu_calls: list[Tensor]) -> None:
    packed, other = pack(19, 64, bits=4, group=32), pack(19, 64, bits=4, group=32, seed=9)
    x = random(5, 64, dtype=BF16)
    ops.linear(x, *packed.arguments)
    mixed = packed.arguments._replace(scale_zero=other.arguments.scale_zero)
    y = ops.linear(x, *mixed)
    assert len(cpu_calls) == 2
    assert torch.equal(y, ops.linear(x, *mixed._replace(qdata=mixed.qdata.clone())))


def test_cpu_kernel_keeps_no_memory_alive() -> None:
    gc.collect()
    kept = len(cpu._converted)
    packed = pack(19, 64, bits=4, group=32)
    ops.linear(random(5, 64, dtype=BF16), *packed.arguments)
    assert len(cpu._converted) == kept + 1
    converted = [*cpu._converted[packed.arguments.qdata][2][None]]
    alive = [weakref.ref(t) for t in (packed.arguments.qdata, *converted)]
    del packed, converted
    gc.collect()
    assert len(alive) == 3
    assert all(r() is None for r in alive)
    assert len(cpu._converted) == kept


@pytest.mark.parametrize(
    ("bits", "stacked", "expected"),
    [
        (4, False, "cpu int4 up to 256 rows, else dequantize + matmul"),
        (4, True, "cpu int4 up to 256 rows per expert, else dequantize + matmul"),
        (3, True, "dequantize + matmul"),
    ],
)
def test_kernels_have_names(bits: int, stacked: bool, expected: str) -> None:
    assert ops.kernel_name(torch.device("cpu"), BF16, bits, 32, 64, stacked) == expected
