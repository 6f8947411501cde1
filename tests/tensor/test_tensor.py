import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from gptq_ao.codes.bit_stream import codes_to_words
from gptq_ao.errors import ConfigError, NonFiniteError
from gptq_ao.tensor import GroupTensor, Int2GroupTensor, Int3GroupTensor, Int4GroupTensor, Int8GroupTensor, tensor_class

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CLASSES = {2: Int2GroupTensor, 3: Int3GroupTensor, 4: Int4GroupTensor, 8: Int8GroupTensor}
N, K, GROUP = 40, 96, 32
every_bits = pytest.mark.parametrize("bits", CLASSES, ids=lambda b: f"{b}bit")
Function = Callable[[Any, Any], Tensor]


def random(*shape: int, dtype: torch.dtype = FP32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def parts(*shape: int, bits: int = 4, group: int = GROUP, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    *lead, n, k = shape
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
    zero = torch.randint(0, 2**bits, (*lead, n, k // group), dtype=torch.uint8, generator=generator)
    scale = torch.randn(zero.shape, generator=generator).half()  # negative ones too
    return codes, scale, zero


def make(
    *shape: int, bits: int = 4, dtype: torch.dtype = FP32, permuted: bool = False, seed: int = 0, **options: Any
) -> GroupTensor:
    shape = shape or (N, K)
    perm = torch.randperm(shape[-1], generator=torch.Generator().manual_seed(seed)) if permuted else None
    group = options.pop("group", GROUP)
    numbers = parts(*shape, bits=bits, group=group, seed=seed)
    return CLASSES[bits].from_codes(*numbers, dtype=dtype, perm=perm, **options)


def linear_of(weight: GroupTensor, bias: bool = True) -> nn.Linear:
    n, k = weight.shape
    module = nn.Linear(k, n, bias=bias, dtype=weight.dtype)
    if bias:
        module.bias.data = random(n, dtype=weight.dtype, seed=7)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def weight_of(module: nn.Linear) -> GroupTensor:
    assert isinstance(module.weight, GroupTensor)
    return module.weight


@every_bits
@pytest.mark.parametrize("shape", [(1, 32), (19, 96), (3, 33, 64), (2, 2, 5, 32)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("permuted", [False, True], ids=["natural", "perm"])
def test_from_codes_round_trip(permuted: bool, transposed: bool, shape: tuple[int, ...], bits: int) -> None:
    codes, scale, zero = parts(*shape, bits=bits)
    weight = make(*shape, bits=bits, permuted=permuted, transposed=transposed, dtype=BF16)
    assert type(weight) is CLASSES[bits]
    assert torch.equal(weight.codes(), codes)
    assert torch.equal(weight.scale, scale)
    assert torch.equal(weight.zero_point, zero)
    assert weight.group_size == GROUP

    columns = (codes.double() - zero.repeat_interleave(GROUP, -1)) * scale.double().repeat_interleave(GROUP, -1)
    dense = torch.empty_like(columns)
    dense[..., slice(None) if weight.perm is None else weight.perm.long()] = columns
    dense = dense.mT if transposed else dense
    assert (weight.shape, weight.stride()) == (
        dense.shape,
        (dense.mT.contiguous().mT if transposed else dense).stride(),
    )
    assert (weight.dtype, weight.device, weight.requires_grad) == (BF16, codes.device, False)
    assert torch.equal(weight.dequantize(), dense.bfloat16())
    assert torch.equal(weight.dequantize(FP32), dense.float())


def test_largest_values() -> None:
    codes = torch.full((1, 32), 255, dtype=torch.uint8)
    scale = torch.tensor([[-65504.0]], dtype=FP16)
    for zero in (0, 255):
        w = Int8GroupTensor.from_codes(codes, scale, torch.full((1, 1), zero, dtype=torch.uint8), dtype=FP32)
        assert (w.dequantize() == (255 - zero) * -65504.0).all()


def test_from_codes_copies() -> None:
    codes, scale, zero = parts(N, K)
    weight = Int4GroupTensor.from_codes(codes, scale, zero, dtype=FP32)
    before = weight.dequantize()
    for t in (codes, scale, zero):
        t.zero_()
    assert torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": lambda t: t.int()}, r"takes codes as uint8, got torch\.int32"),
        ({"scale": lambda t: t.float()}, r"scale as float16, got torch\.uint8, torch\.float32"),
        ({"zero": lambda t: t.to(torch.int8)}, r"zero_point as uint8 .* got torch\.int8, torch\.float16"),
        ({"codes": lambda t: t[0]}, r"takes codes \[\.\.\., N, K\] .* got codes \(96,\), scale \(40, 3\)"),
        ({"codes": lambda t: t[:39]}, r"got codes \(39, 96\), scale \(40, 3\), zero_point \(40, 3\)"),
        ({"scale": lambda t: t[:, :2]}, r"got codes \(40, 96\), scale \(40, 2\), zero_point \(40, 3\)"),
        ({"codes": lambda t: t[None]}, r"got codes \(1, 40, 96\), scale \(40, 3\)"),
        ({"codes": lambda t: t[:, :95]}, r"a whole, positive number of columns per group, got codes \(40, 95\)"),
        ({"codes": lambda t: t[:, :0]}, r"a whole, positive number of columns per group, got codes \(40, 0\)"),
        ({"scale": lambda t: t[:, :0], "zero": lambda t: t[:, :0]}, r"a whole, positive number .* scale \(40, 0\)"),
        ({"codes": lambda t: t + 1}, r"codes reach 16, 4 bits hold at most 15"),
        ({"zero": lambda t: t + 1}, r"zero_point reach 16, 4 bits hold at most 15"),
        ({"perm": lambda _: torch.zeros(96, dtype=torch.int64)}, r"perm is not a permutation of the 96 input fea"),
        ({"perm": lambda _: torch.arange(95)}, r"perm is not a permutation of the 96 input features"),
        ({"perm": lambda _: torch.arange(1, 97)}, r"perm is not a permutation of the 96 input features"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_from_codes_of_wrong_parts(change: dict[str, Callable[[Any], Tensor]], message: str) -> None:
    numbers: dict[str, Any] = dict(zip(("codes", "scale", "zero"), parts(N, K), strict=True), perm=None)
    numbers |= {name: f(numbers[name]) for name, f in change.items()}
    with pytest.raises(ConfigError, match=f"Int4GroupTensor.*{message}"):
        Int4GroupTensor.from_codes(*list(numbers.values())[:3], dtype=FP32, perm=numbers["perm"])


@pytest.mark.parametrize("bits", CLASSES)
def test_from_words_is_from_codes(bits: int) -> None:
    codes, scale, zero = parts(N, K, bits=bits)
    perm = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    expected = CLASSES[bits].from_codes(codes, scale, zero, dtype=FP32, perm=perm, transposed=True)
    words = codes_to_words(codes, bits)
    before = words.clone()
    weight = CLASSES[bits].from_words(words, K, scale, zero, dtype=FP32, perm=perm, transposed=True)
    assert torch.equal(words, before)
    words.zero_()
    assert weight.__tensor_flatten__()[1] == expected.__tensor_flatten__()[1]
    for name in weight.__tensor_flatten__()[0]:
        assert torch.equal(getattr(weight, name), getattr(expected, name))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (torch.zeros(N, K // 8), r"takes 96 codes as int32 words \[\.\.\., N, 12\], got torch\.float32 \(40, 12\)"),
        (torch.zeros(N, K // 8 - 1, dtype=torch.int32), r"got torch\.int32 \(40, 11\)"),
        (torch.zeros(K // 8, dtype=torch.int32), r"got torch\.int32 \(12,\)"),
        (torch.zeros(N - 1, K // 8, dtype=torch.int32), r"got codes \(39, 96\), scale \(40, 3\)"),
    ],
    ids=["dtype", "width", "row", "rows"],
)
def test_from_words_of_wrong_words(words: Tensor, message: str) -> None:
    _, scale, zero = parts(N, K)
    with pytest.raises(ConfigError, match=f"Int4GroupTensor.*{message}"):
        Int4GroupTensor.from_words(words, K, scale, zero, dtype=FP32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_from_codes_of_a_scale_that_is_not_finite(value: float) -> None:
    codes, scale, zero = parts(N, K)
    scale[3, 1] = value
    with pytest.raises(NonFiniteError, match="Int4GroupTensor: a scale is NaN or infinite"):
        Int4GroupTensor.from_codes(codes, scale, zero, dtype=FP32)


def test_repr() -> None:
    expected = "Int3GroupTensor(shape=(40, 96), group_size=32, dtype=torch.bfloat16, device='cpu')"
    assert repr(make(bits=3, dtype=BF16)) == expected
    assert "(96, 40)" in repr(make(transposed=True))


def test_class_of_bits() -> None:
    assert {bits: tensor_class(bits) for bits in CLASSES} == CLASSES
    assert all(c.bits == bits for bits, c in CLASSES.items())


def test_hash_for_caching_tells_kinds_apart() -> None:
    kinds = [
        make(),
        make(bits=8),
        make(group=48),
        make(dtype=BF16),
        make(permuted=True),
        make(N, N, group=20),
        make(N, N, group=20, transposed=True),
    ]
    assert len({w._stable_hash_for_caching() for w in kinds}) == len(kinds)
    assert make()._stable_hash_for_caching() == make(seed=5)._stable_hash_for_caching()


class Kept(nn.Module):
    """Applies a function to a weight that it holds."""

    def __init__(self, function: Function, weight: Any) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def bias_like(x: Tensor, n: int = N) -> Tensor:
    return torch.linspace(0.1, 1, n, dtype=x.dtype)


# Each is also what the exact result and its error bound are computed with, from the dense weight.
PRODUCTS: dict[str, tuple[Function, tuple[int, ...], dict[str, Any]]] = {
    "linear": (lambda x, w: F.linear(x, w), (5, K), {}),
    "linear-1d": (lambda x, w: F.linear(x, w), (K,), {}),
    "linear-3d": (lambda x, w: F.linear(x, w), (2, 3, K), {}),
    "linear-bias": (lambda x, w: F.linear(x, w, bias_like(x)), (5, K), {}),
    "linear-bias=": (lambda x, w: F.linear(x, w, bias=bias_like(x)), (5, K), {}),
    "linear-keywords": (lambda x, w: F.linear(input=x, weight=w), (5, K), {}),
    "linear-perm": (lambda x, w: F.linear(x, w), (5, K), {"permuted": True}),
    "linear-transposed": (lambda x, w: F.linear(x, w, bias_like(x, K)), (5, N), {"transposed": True}),
    "linear-of-t": (lambda x, w: F.linear(x, w.t()), (5, N), {}),
    "linear-of-t-transposed": (lambda x, w: F.linear(x, w.t()), (5, K), {"transposed": True}),
    "aten.linear": (lambda x, w: torch.ops.aten.linear.default(x, w, bias_like(x)), (5, K), {}),
    "x@w.t()": (lambda x, w: x @ w.t(), (5, K), {}),
    "x@w.T": (lambda x, w: x @ w.T, (5, K), {"permuted": True}),
    "x@w.mT-1d": (lambda x, w: x @ w.mT, (K,), {}),
    "x@w.t()-3d": (lambda x, w: x @ w.t(), (2, 3, K), {}),
    "x@w.t()-strided": (lambda x, w: x.transpose(0, 1) @ w.t(), (3, 2, K), {}),
    "x@w-transposed": (lambda x, w: x @ w, (5, K), {"transposed": True}),
    "x@w-transposed-perm": (lambda x, w: x @ w, (2, 3, K), {"transposed": True, "permuted": True}),
    "x@w": (lambda x, w: x @ w, (5, N), {}),
    "w@x": (lambda x, w: w @ x, (K, 5), {}),
    "mm": (lambda x, w: torch.mm(x, w.t()), (5, K), {}),
    "addmm": (lambda x, w: torch.addmm(bias_like(x), x, w.t()), (5, K), {}),
    "addmm-scaled": (lambda x, w: torch.addmm(bias_like(x), x, w, beta=0.5, alpha=2), (5, K), {"transposed": True}),
    "bmm-transpose": (lambda x, w: torch.bmm(x, w.transpose(1, 2)), (3, 5, K), {"lead": 3}),
    "bmm-mT-perm": (lambda x, w: torch.bmm(x, w.mT), (3, 5, K), {"lead": 3, "permuted": True}),
    "bmm-permute": (lambda x, w: torch.bmm(x, w.permute(0, 2, 1)), (3, 5, K), {"lead": 3}),
    "bmm-transposed": (lambda x, w: torch.bmm(x, w), (3, 5, K), {"lead": 3, "transposed": True}),
    "stack@stack.mT": (lambda x, w: x @ w.mT, (3, 5, K), {"lead": 3}),
    "bmm-w-first": (lambda x, w: torch.bmm(w, x), (3, K, 5), {"lead": 3}),
}


def product(name: str, bits: int = 4) -> tuple[Function, Tensor, GroupTensor]:
    function, x_shape, options = PRODUCTS[name]
    options = dict(options)
    shape = (options.pop("lead"), N, K) if "lead" in options else (N, K)
    return function, random(*x_shape), make(*shape, bits=bits, **options)


def check(actual: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    # fp32 sums of at most K products, each within 2^-24 of the sum of magnitudes, then a scaling and a bias.
    assert actual.shape == exact.shape
    assert ((actual.double() - exact).abs() <= (K + 3) * 2.0**-24 * magnitude).all()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


compiles = pytest.mark.usefixtures("fresh_compiler")
every_product = pytest.mark.parametrize("name", PRODUCTS)


@pytest.mark.parametrize("bits", [3, 4])
@every_product
def test_product_is_the_dense_one(name: str, bits: int) -> None:
    function, x, weight = product(name, bits)
    dense = weight.dequantize().double()
    y = function(x, weight)
    assert type(y) is Tensor
    assert y.dtype == FP32
    check(y, function(x.double(), dense), function(x.double().abs(), dense.abs()))


@every_product
def test_product_has_the_dense_gradient(name: str) -> None:
    function, x, weight = product(name)
    x.requires_grad_()
    y = function(x, weight)
    up = random(*y.shape, seed=3)
    (gradient,) = torch.autograd.grad(y, x, up)

    def dense_gradient(x: Tensor, up: Tensor, dense: Tensor) -> Tensor:
        x = x.detach().double().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x, dense), x, up.double())
        return gradient

    dense = weight.dequantize().double()
    check(gradient, dense_gradient(x, up, dense), dense_gradient(x.abs(), up.abs(), dense.abs()))


@every_product
def test_product_under_inference_mode(name: str) -> None:
    function, x, weight = product(name)
    expected = function(x, weight)
    with torch.inference_mode():
        assert torch.equal(function(x, weight), expected)


@every_product
def test_product_under_autocast(name: str) -> None:
    function, x, weight = product(name, bits=8)
    for dtype in (BF16, FP16):
        with torch.autocast("cpu", dtype=dtype):
            y = function(x, weight)
        assert y.dtype == dtype
        dense, wide = weight.dequantize(dtype).double(), x.to(dtype).double()
        exact, magnitude = function(wide, dense), function(wide.abs(), dense.abs())
        # One rounding of the product and one of its sum with the bias, on top of the fp32 sum.
        u = 2.0**-8 if dtype == BF16 else 2.0**-11
        assert ((y.double() - exact).abs() <= (2 * u + (K + 3) * 2.0**-24) * magnitude).all()


@compiles
@every_product
def test_product_compiles_to_the_same(name: str) -> None:
    function, x, weight = product(name)
    compiled = torch.compile(Kept(function, weight), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), function(x, weight))


@pytest.mark.parametrize(("x_dtype", "dtype"), [(FP16, BF16), (BF16, FP32), (FP32, BF16)], ids=str)
def test_x_may_be_of_another_dtype_than_the_weight(x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    weight, x, bias = make(bits=8, dtype=dtype), random(5, K, dtype=x_dtype), random(N, dtype=dtype)
    same = weight.to(x_dtype)
    assert torch.equal(F.linear(x, weight, bias), F.linear(x, same, bias.to(x_dtype)))
    assert torch.equal(x @ weight.t(), F.linear(x, same))
    assert torch.equal(F.linear(x[:, :N], weight.t()), F.linear(x[:, :N], same.t()))
    assert torch.equal(torch.addmm(bias.to(x_dtype), x, weight.t()), torch.addmm(bias.to(x_dtype), x, same.t()))


@pytest.mark.parametrize(
    "function", [F.linear, lambda x, w: x @ w.t(), lambda x, w: (w @ x.t()).t()], ids=["linear", "mm", "w@x"]
)
def test_gradient_for_x_of_another_dtype(function: Function) -> None:
    weight, x = make(dtype=BF16), random(5, K, dtype=FP16).requires_grad_()
    (gradient,) = torch.autograd.grad(function(x, weight).sum(), x)
    exact = weight.dequantize(FP16).double().sum(0).expand(5, K)
    assert gradient.dtype == FP16
    # The weights may be rounded to bf16 on their way; their sum is formed in fp32 and rounded to fp16.
    bound = (2.0**-8 + N * 2.0**-24) * weight.dequantize(FP16).double().abs().sum(0) + 2.0**-11 * exact.abs()
    assert ((gradient.double() - exact).abs() <= bound).all()


def test_transposing_twice_and_to_nothing() -> None:
    weight, stack = make(), make(3, N, K)
    assert weight.t().shape == (K, N)
    assert weight.t().stride() == (1, K)
    assert torch.equal(weight.t().dequantize(), weight.dequantize().t())
    assert torch.equal(weight.T.T.dequantize(), weight.dequantize())
    assert weight.transpose(0, 0).shape == (N, K)
    assert stack.transpose(-2, -1).shape == stack.permute(0, -1, 1).shape == (3, K, N)
    assert stack.permute(0, 1, 2).shape == (3, N, K)


def test_view_made_under_inference_mode_can_be_trained_through() -> None:
    weight, x = make(), random(5, K).requires_grad_()
    with torch.inference_mode():
        view = weight.t()
    (gradient,) = torch.autograd.grad((x @ view).sum(), x)
    check(gradient, weight.dequantize().double().sum(0).expand(5, K), weight.dequantize().double().abs().sum(0))


def test_linear_with_a_stack() -> None:
    message = r"linear: x \(3, 5, 96\) and weight \(3, 40, 96\) do not fit"
    with pytest.raises(ValueError, match=message):
        F.linear(random(3, 5, K), make(3, N, K))


def test_linear_with_other_features() -> None:
    with pytest.raises(ValueError, match=r"linear: x \(5, 95\) and weight \(40, 96\) do not fit"):
        F.linear(random(5, 95), make())
    with pytest.raises(ValueError, match=r"linear: x \(5, 96\) and weight \(96, 40\) do not fit"):
        F.linear(random(5, K), make(transposed=True))


def test_linear_of_a_quantized_input() -> None:
    with pytest.raises(NotImplementedError, match=r"linear takes a quantized weight only, got \('Int4GroupTensor', 'T"):
        F.linear(make(), random(5, K))
    with pytest.raises(NotImplementedError, match=r"linear takes a quantized weight only, got \('Tensor', 'Int4Group"):
        F.linear(random(5, K), make(), make(1, N, group=N))


@every_bits
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_to_dtype(mode: Callable[[], Any], bits: int) -> None:
    weight = make(bits=bits, permuted=True)
    with mode():
        moved = [weight.to(BF16), weight.to("cpu", BF16), weight.to(random(1, dtype=BF16)), weight.bfloat16()]
    for w in moved:
        assert type(w) is type(weight)
        assert w.dtype == BF16
        assert torch.equal(w.dequantize(), weight.dequantize().bfloat16())
    assert weight.dtype == FP32
    assert torch.equal(moved[0].to(FP32).dequantize(), weight.dequantize())  # nothing is lost in between


def test_to_the_same_is_itself() -> None:
    weight = make()
    assert weight.to(FP32) is weight
    assert weight.to("cpu") is weight


def test_to_keeps_the_transposition() -> None:
    weight = make(transposed=True)
    assert torch.equal(weight.half().dequantize(), weight.dequantize().half())
    assert weight.t().half().shape == (N, K)


@every_bits
def test_to_meta(bits: int) -> None:
    weight = make(bits=bits, permuted=True, dtype=BF16).to("meta")
    assert (weight.device.type, weight.dtype, weight.shape) == ("meta", BF16, (N, K))
    assert all(getattr(weight, name).is_meta for name in weight.__tensor_flatten__()[0])
    y = F.linear(torch.empty(2, 3, K, dtype=BF16, device="meta"), weight)
    assert (y.device.type, y.dtype, y.shape) == ("meta", BF16, (2, 3, N))


def test_detach_shares_and_clone_copies() -> None:
    weight = make(bits=3, permuted=True)
    dense = weight.dequantize()
    shared, copied = weight.detach(), weight.clone()
    copies = [copied, copy.deepcopy(weight), copy.deepcopy(nn.Parameter(weight, requires_grad=False))]
    for name in ("qdata", "scale_zero", "high_plane", "perm"):
        assert getattr(shared, name).data_ptr() == getattr(weight, name).data_ptr()
        assert all(getattr(c, name).data_ptr() != getattr(weight, name).data_ptr() for c in copies)
    weight.qdata.zero_()
    assert not torch.equal(shared.dequantize(), dense)
    for c in copies:
        assert isinstance(c, Int3GroupTensor)
        assert torch.equal(c.dequantize(), dense)


def test_copy_in_place() -> None:
    weight, other = make(bits=3), make(bits=3, seed=4)
    with torch.no_grad():
        weight.copy_(other)
    assert torch.equal(weight.dequantize(), other.dequantize())
    assert weight.qdata.data_ptr() != other.qdata.data_ptr()


@pytest.mark.parametrize(
    "other",
    [{"group": 48}, {"bits": 8}, {"permuted": True}, {"dtype": BF16}],
    ids=["group", "bits", "perm", "dtype"],
)
def test_copy_of_another_kind(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="takes one of the same kind"), torch.no_grad():
        make().copy_(make(**other))


def test_weight_needs_no_gradient() -> None:
    assert not make().requires_grad
    assert not linear_of(make()).weight.requires_grad


@every_bits
def test_module(bits: int) -> None:
    module, x = linear_of(make(bits=bits)), random(2, 5, K)
    dense = module.weight.dequantize()
    magnitude = F.linear(x.abs().double(), dense.abs().double(), module.bias.abs().double())
    check(module(x), F.linear(x.double(), dense.double(), module.bias.double()), magnitude)


@every_bits
def test_module_to_dtype(bits: int) -> None:
    module = linear_of(make(bits=bits))
    dense = module.weight.dequantize()
    module.to(BF16)
    assert isinstance(module.weight, CLASSES[bits])
    assert isinstance(module.weight, nn.Parameter)
    assert not module.weight.requires_grad
    assert (module.weight.dtype, module.bias.dtype) == (BF16, BF16)
    assert torch.equal(module.weight.dequantize(), dense.bfloat16())
    assert module(random(5, K, dtype=BF16)).dtype == BF16


def test_module_to_meta() -> None:
    module = linear_of(make()).to("meta")
    assert isinstance(module.weight, Int4GroupTensor)
    assert module(torch.empty(5, K, device="meta")).shape == (5, N)


@every_bits
@pytest.mark.parametrize("permuted", [False, True], ids=["natural", "perm"])
def test_state_dict(permuted: bool, bits: int) -> None:
    source, target = (linear_of(make(bits=bits, permuted=permuted)) for _ in range(2))
    weight_of(target).qdata.zero_()
    target.bias.data.zero_()
    assert not target.load_state_dict(source.state_dict(), strict=True).missing_keys
    assert torch.equal(target.weight.dequantize(), source.weight.dequantize())
    assert weight_of(target).qdata.data_ptr() != weight_of(source).qdata.data_ptr()
    x = random(5, K)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("other", [{"group": 48}, {"bits": 8}, {"permuted": True}], ids=["group", "bits", "perm"])
def test_state_dict_of_another_kind(other: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r'parameter named "weight"(.|\n)*takes one of the same kind'):
        linear_of(make()).load_state_dict(linear_of(make(**other)).state_dict())


@every_bits
def test_state_dict_loaded_between_two_calls(bits: int) -> None:
    module, other = (linear_of(make(bits=bits, dtype=BF16, seed=seed)) for seed in (0, 9))
    x = random(5, K, dtype=BF16)
    before = module(x)  # bf16 and 4 bits: the weight is now converted for the CPU's kernel
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), other(x))
    assert not torch.equal(module(x), before)


ALIASES: dict[str, Any] = {
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "view_as": lambda w: w.view_as(w),
    "alias": lambda w: torch.ops.aten.alias(w),
    "rows": lambda w: w[: N // 16 * 16],
    "transposed twice": lambda w: w.t().t(),
    "itself": lambda w: w,
}


@pytest.mark.parametrize("alias", ALIASES)
@every_bits
def test_written_through_an_alias_between_two_calls(bits: int, alias: str) -> None:
    """Below autograd, aliases do not share the versions by which a kernel knows that what it converted is old."""
    module, other = (linear_of(make(bits=bits, dtype=BF16, seed=seed)) for seed in (0, 9))
    x = random(5, K, dtype=BF16)
    before = module(x)
    with torch.no_grad():
        ALIASES[alias](module.weight).copy_(ALIASES[alias](other.weight))
    expected = linear_of(weight_of(module).clone())(x)
    assert torch.equal(module(x), expected)
    assert not torch.equal(expected, before)


def test_state_dict_assigned_to_a_dense_module() -> None:
    source, target = linear_of(make()), nn.Linear(K, N)
    target.load_state_dict(source.state_dict(), assign=True)
    assert isinstance(target.weight, Int4GroupTensor)
    x = random(5, K)
    assert torch.equal(target(x), source(x))


def test_module_deepcopy_is_independent() -> None:
    module, x = linear_of(make()), random(5, K)
    y = module(x)
    duplicate = copy.deepcopy(module)
    weight_of(module).qdata.zero_()
    assert torch.equal(duplicate(x), y)
    assert not torch.equal(module(x), y)


def test_module_under_inference_mode() -> None:
    module, target, x = linear_of(make()), linear_of(make(seed=9)), random(5, K)
    expected = module(x)
    with torch.inference_mode():
        assert torch.equal(module(x), expected)
        duplicate = copy.deepcopy(module).to(BF16)
        assert duplicate(x.bfloat16()).dtype == BF16
        target.load_state_dict(module.state_dict())
    assert torch.equal(target(x), expected)


@compiles
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [(2, FP32), (3, BF16), (4, BF16), (8, FP32)],
    ids=["2bit-fp32", "3bit-bf16", "4bit-bf16", "8bit-fp32"],
)
def test_compiled_module_trains_and_recompiles_little(bits: int, dtype: torch.dtype) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    module = linear_of(make(bits=bits, dtype=dtype, permuted=bits == 8))
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for rows in (5, 6, 7, 96, 97, 200, 1):
        x = random(rows, K, dtype=dtype).requires_grad_()
        up = random(rows, N, dtype=dtype, seed=2)
        results = [(y, *torch.autograd.grad(y, (x, module.bias), up)) for y in (compiled(x), module(x))]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # One static batch size, one for all sizes, and one for the size 1.
    assert counter.frame_count <= 3


@compiles
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_compiled_without_gradients(mode: Callable[[], Any]) -> None:
    module, x = linear_of(make(dtype=BF16)), random(5, K, dtype=BF16)
    with mode():
        assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


@compiles
def test_compiled_under_autocast() -> None:
    module, x = linear_of(make()), random(5, K)
    with torch.autocast("cpu", dtype=BF16):
        y = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
        assert y.dtype == BF16
        assert torch.equal(y, module(x))


@compiles
def test_compiled_weight_may_change_in_place() -> None:
    module, x = linear_of(make(dtype=BF16), bias=False), random(5, K, dtype=BF16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    module.load_state_dict(linear_of(make(dtype=BF16, seed=9), bias=False).state_dict())
    assert torch.equal(compiled(x), module(x))
    assert not torch.equal(compiled(x), before)


def test_a_dense_state_dict_does_not_go_into_a_quantized_weight() -> None:
    with (
        pytest.raises(ValueError, match=r"cannot copy a torch.float32 tensor \(40, 96\) into Int4GroupTensor"),
        torch.no_grad(),
    ):
        make().copy_(torch.ones(40, 96))
    dense = torch.zeros(40, 96)
    dense.copy_(make())
    assert torch.equal(dense, make().dequantize(torch.float32))


def test_products_that_cannot_be() -> None:
    weight = make()
    with pytest.raises(ValueError, match=r"cannot take torch.int64 \(3, 96\)"):
        F.linear(torch.ones(3, 96, dtype=torch.long), weight)
    with pytest.raises(ValueError, match=r"cannot take torch.float32 \(3, 95\)"):
        torch.mm(torch.ones(3, 95), weight.t())


def test_strided_batches_of_more_dimensions() -> None:
    weight = make(dtype=torch.float32)
    x = torch.randn(2, 3, 5, 96, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    assert torch.allclose(x @ weight.t(), x @ weight.dequantize().t(), atol=1e-5)


def test_a_copy_has_its_own_memory() -> None:
    weight = make()
    assert weight.to(torch.float16).qdata.data_ptr() != weight.qdata.data_ptr()


def test_addmm_without_its_bias_ignores_what_is_in_it() -> None:
    weight = make(dtype=torch.float32)
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    y = torch.addmm(torch.full((40,), float("nan")), x, weight.t(), beta=0, alpha=2)
    assert torch.equal(y, (x @ weight.t()) * 2)


def test_a_stack_of_another_size_is_not_broadcast() -> None:
    one, three = make().expanded((1,)), make().expanded((3,))
    with pytest.raises(ValueError, match="takes one of the same kind"), torch.no_grad():
        three.copy_(one)


PARTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Any], bool]] = {
    # shape, what is taken, and whether the parts are still packed
    "rows": ((N, K), lambda w: [w[:16], w[16:32], w[32:], w[-8:]], False),
    "whole tiles": ((48, K), lambda w: [*w.chunk(3), *w.split([16, 32]), w.narrow(0, 32, 16)], True),
    "all": ((N, K), lambda w: [w[:], w[0:N], w.view(N, K), w.view(-1, K)], True),
    "odd rows": ((N, K), lambda w: [*w.split(7), w[3:], w[::2], w[5:5]], False),
    "columns": ((N, K), lambda w: [w[:, 32:64], *w.chunk(3, dim=1), w.select(1, 5), w[7]], False),
    "outputs of a transposed one": ((48, K), lambda w: [w.t()[:, 16:32], *w.t().chunk(3, dim=-1)], True),
    "inputs of a transposed one": ((N, K), lambda w: [w.t()[:32], w.t()[5]], False),
    "experts": (
        (4, 32, K),
        lambda w: [w[1], w[1:3], *w.unbind(), w[torch.tensor([3, 0, 3])], w[torch.tensor(2)]],
        True,
    ),
    "rows of every expert": ((3, 32, K), lambda w: [w[:, :16], w.transpose(1, 2)[..., 16:], w[-1, 16:]], True),
    "elements": ((3, 32, K), lambda w: [w[torch.tensor([True, False, True])], w[:, torch.tensor([2, 1])]], False),
    "heads": ((64, K), lambda w: [w.view(2, 32, K), w.unflatten(0, (4, 16)), w.view(2, 32, K).reshape(64, K)], True),
    "odd heads": ((N, K), lambda w: [w.view(8, 5, K), w.view(2, -1, K)], False),
}


@every_bits
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_parts_are_those_of_the_dense_weight(mode: Callable[[], Any], name: str, bits: int) -> None:
    shape, take, packed = PARTS[name]
    weight = make(*shape, bits=bits)
    with mode():
        found, expected = take(weight), take(weight.dequantize())
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a.dequantize() if isinstance(a, GroupTensor) else a, b)
        if packed:
            assert type(a) is CLASSES[bits]


ON_DENSE: dict[str, tuple[dict[str, Any], Callable[[Tensor, Any], Tensor], tuple[int, ...]]] = {
    "conv1d": ({"view_shape": (N, 32, 3)}, lambda x, w: F.conv1d(x, w, padding=1, stride=2), (2, 32, 11)),
    "conv2d": ({"view_shape": (N, 24, 2, 2)}, lambda x, w: F.conv2d(x, w, dilation=2), (2, 24, 7, 8)),
    "conv2d in groups": ({"view_shape": (N, 24, 2, 2)}, lambda x, w: F.conv2d(x, w, groups=2), (2, 48, 7, 8)),
    "conv3d": ({"view_shape": (N, 12, 2, 2, 2)}, lambda x, w: F.conv3d(x, w), (1, 12, 3, 4, 5)),
    "conv_transpose1d": (
        {"view_shape": (K, 8, 5), "transposed": True},
        lambda x, w: F.conv_transpose1d(x, w, stride=2),
        (2, K, 6),
    ),
    "einsum": ({}, lambda x, w: torch.einsum("bk,nk->nb", x, w), (5, K)),
    "einsum of three axes": ({"view_shape": (N, 8, 12)}, lambda x, w: torch.einsum("bhk,nhk->bn", x, w), (5, 8, 12)),
    "left": ({}, lambda x, w: w @ x, (K, 5)),
    "matrix by vector": ({}, lambda x, w: w @ x, (K,)),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ON_DENSE)
def test_other_operators_work_on_the_dense_weight(name: str) -> None:
    options, function, shape = ON_DENSE[name]
    weight = make(**options)
    assert weight.shape == options.get("view_shape", (N, K))
    x = random(*shape).requires_grad_()
    dense = weight.dequantize()
    assert dense.shape == weight.shape
    y, exact = function(x, weight), function(x, dense)
    assert torch.equal(y, exact)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(gradient, torch.autograd.grad(exact.square().sum(), x)[0])
    with torch.no_grad():
        compiled = torch.compile(lambda t: function(t, weight), fullgraph=True)(x)
        # Other kernels, another order of the sum: at most 96 terms, sized magnitude in sum.
        magnitude = function(x.abs(), dense.abs())
        assert ((compiled - exact).abs() <= 2 * 200 * 2**-24 * magnitude).all()
        assert ((function(x, weight.to(BF16).to(FP32)) - exact).abs() <= 2 * 200 * 2**-24 * magnitude).all()


def test_a_view_has_as_many_elements() -> None:
    with pytest.raises(ConfigError, match=r"Int4GroupTensor: codes \(40, 96\) cannot be viewed as \(40, 32, 2\)"):
        make(view_shape=(40, 32, 2))


def test_an_encoder_decoder_attention_slices_its_weight() -> None:
    module = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    weight = make(192, 64)
    dense = copy.deepcopy(module)
    module.in_proj_weight = nn.Parameter(weight, requires_grad=False)
    dense.in_proj_weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    x, memory = random(2, 5, 64), random(2, 7, 64, seed=3)
    with torch.no_grad():
        expected = dense(x, memory, memory, need_weights=False)[0]
        assert torch.equal(module(x, memory, memory, need_weights=False)[0], expected)
        compiled = torch.compile(module, fullgraph=True)(x, memory, memory, need_weights=False)[0]
    assert torch.allclose(compiled, expected, atol=1e-5)
