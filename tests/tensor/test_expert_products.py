"""Functions that multiply rows, sorted by expert, by a stack: with a packed stack, and no dense copy of it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401 - registers its operator
from torch import Tensor, nn

from gptq_ao.kernels import cpu, reference
from gptq_ao.kernels.packed import Packed
from gptq_ao.tensor import GroupTensor, tensor_class

E, N, K = 4, 48, 64
OFFSETS = torch.tensor([3, 3, 10, 12], dtype=torch.int32)
Function = Callable[[Tensor, Any, Tensor], Tensor]


def fallback(x: Tensor, weight: Any, offsets: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, weight, offs=offsets)


FUNCTIONS: dict[str, Function] = {
    "grouped_mm": lambda x, w, offsets: F.grouped_mm(x, w, offs=offsets),
    "by name": lambda x, w, offsets: F.grouped_mm(mat_a=x, mat_b=w, offs=offsets, bias=None, out_dtype=None),
    "aten": lambda x, w, offsets: torch.ops.aten._grouped_mm.default(x, w, offsets),
    "transformers": fallback,
    "transformers, in a graph": lambda x, w, o: torch.ops.transformers.grouped_mm_fallback.default(x, w, o),
}
functions = pytest.mark.parametrize("name", FUNCTIONS)


def stack(transposed: bool, bits: int = 3, dtype: torch.dtype = torch.float32) -> GroupTensor:
    """[E, K, N], packed along K: as it is stored, or a view of [E, N, K]."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (E, N, K), dtype=torch.uint8, generator=generator)
    zero = torch.randint(0, 2**bits, (E, N, K // 32), dtype=torch.uint8, generator=generator)
    scale = torch.randn(zero.shape, generator=generator).half()
    weight = tensor_class(bits).from_codes(codes, scale, zero, dtype=dtype, transposed=transposed)
    view = weight if transposed else weight.transpose(-2, -1)
    assert isinstance(view, GroupTensor)
    return view


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(12, K, generator=torch.Generator().manual_seed(0)).to(dtype)


class Ran:
    """Calls of the kernel for experts, and how many experts were dequantized at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.dequantized = 0, list[int]()
        linear, dequantize = cpu.linear_experts, reference.dequantize

        def count_calls(*arguments: Any) -> Tensor:
            self.calls += 1
            return linear(*arguments)

        def count_experts(packed: Packed, dtype: torch.dtype) -> Tensor:
            self.dequantized.append(packed.qdata.shape[:-3].numel())
            return dequantize(packed, dtype)

        monkeypatch.setattr(cpu, "linear_experts", count_calls)
        monkeypatch.setattr(reference, "dequantize", count_experts)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    return Ran(monkeypatch)


@functions
@pytest.mark.parametrize("transposed", [True, False], ids=["stored", "view"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_equals_the_dense_product_expert_by_expert(
    mode: Callable[[], Any], transposed: bool, name: str, ran: Ran
) -> None:
    weight, x = stack(transposed), rows()
    with mode():
        y = FUNCTIONS[name](x, weight, OFFSETS)
        assert ran.calls == 1
        assert ran.dequantized == [1, 1, 1]  # the second expert has no rows
        assert torch.equal(y, FUNCTIONS[name](x, weight.dequantize(), OFFSETS))


@functions
def test_gradient_of_the_rows(name: str, ran: Ran) -> None:
    weight = stack(transposed=False)
    x, dense_x = rows().requires_grad_(), rows().requires_grad_()
    FUNCTIONS[name](x, weight, OFFSETS).square().sum().backward()
    assert ran.dequantized == [1] * 6
    fallback(dense_x, weight.dequantize(), OFFSETS).square().sum().backward()
    assert x.grad is not None
    assert dense_x.grad is not None
    assert torch.allclose(x.grad, dense_x.grad, rtol=1e-5, atol=1e-4)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Layer(nn.Module):
    def __init__(self, weight: GroupTensor, name: str) -> None:
        super().__init__()
        self.weight, self.name = nn.Parameter(weight, requires_grad=False), name

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return FUNCTIONS[self.name](x, self.weight.transpose(-2, -1), offsets)


@functions
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_to_the_same_with_a_gradient(name: str) -> None:
    weight = stack(transposed=False).transpose(-2, -1)
    assert isinstance(weight, GroupTensor)
    layer = Layer(weight, name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, again = rows().requires_grad_(), rows().requires_grad_()
    y, expected = compiled(x, OFFSETS), layer(again, OFFSETS)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert x.grad is not None
    assert again.grad is not None
    assert torch.equal(x.grad, again.grad)


OTHERS: dict[str, tuple[GroupTensor, Function]] = {
    # [E, N, K] as the right operand: rows of N numbers, across the groups
    "across groups": (stack(transposed=False), lambda x, w, o: F.grouped_mm(x[:, :N], w.transpose(-2, -1), offs=o)),
    "batch": (stack(transposed=True), lambda x, w, o: F.grouped_mm(x.view(E, 3, K), w)),
    "across groups, transformers": (
        stack(transposed=False),
        lambda x, w, o: fallback(x[:, :N], w.transpose(-2, -1), o),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_products_take_the_dense_weight(name: str) -> None:
    weight, function = OTHERS[name]
    with torch.no_grad():
        assert torch.equal(function(rows(), weight, OFFSETS), function(rows(), weight.dequantize(), OFFSETS))


def test_rows_of_nobody_are_zeros() -> None:
    y = F.grouped_mm(rows(), stack(transposed=True), offs=OFFSETS.clamp(max=5))
    assert y[:5].all(dim=1).all()
    assert not y[5:].any()
