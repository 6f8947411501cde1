"""What a step of decoding computes beside its products: in the interpreter, compiled ahead of time, and on a GPU."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from gptq_ao.kernels import cuda_decoding, decoding, ops, reference
from gptq_ao.kernels.tuning.heuristics import choose
from tests.kernels.test_linear_kernels import BLOCK, SLICED, WEIGHTS, Product, split

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclasses.dataclass(frozen=True)
class Attention:
    """One new token for each of `batch` sequences."""

    batch: int
    heads: int
    shared: int  # heads of keys and values
    positions: int
    dim: int = 32
    mask: str = ""  # "bool", "added", or none
    dtype: torch.dtype = FP16

    def inputs(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v in the layouts of Transformers' models and caches, and the mask; what is masked is no number."""
        generator = torch.Generator().manual_seed(self.positions)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        q = random(self.batch, 1, self.heads, self.dim).transpose(1, 2)
        k = random(self.batch, self.shared, self.positions, self.dim)
        v = random(self.batch, self.positions, self.shared, self.dim).transpose(1, 2)
        if not self.mask:
            return q.to(device), k.to(device), v.to(device), None
        seen = torch.rand(self.batch, 1, 1, self.positions, generator=generator) < 0.6
        seen[..., self.positions // 2 :] = False  # whole blocks, as of a cache that is not full yet
        seen[..., 0] = True
        k[~seen.expand(-1, self.shared, 1, -1)[:, :, 0]] = torch.nan
        v.masked_fill_(~seen.mT, torch.nan)
        mask = seen
        if self.mask == "added":
            mask = torch.where(seen, random(*seen.shape), -torch.inf).to(self.dtype)
        return q.to(device), k.to(device), v.to(device), mask.to(device)

    def check(self, y: Tensor) -> None:
        q, k, v, mask = (None if t is None else t.cpu() for t in self.inputs())
        assert q is not None
        assert k is not None
        assert v is not None
        k, v = k.double().nan_to_num(), v.double().nan_to_num()
        added = mask if mask is None or mask.dtype == torch.bool else mask.double()
        exact = F.scaled_dot_product_attention(q.double(), k, v, added, scale=0.2, enable_gqa=True)
        assert y.dtype == self.dtype
        assert y.shape == exact.shape
        # Weights and the result are rounded, and a weighted mean is no larger than the largest value.
        assert ((y.double() - exact).abs() <= 1.01 * torch.finfo(self.dtype).eps * v.abs().max()).all()


ATTENTIONS = [
    Attention(1, 4, 2, 200, mask="bool"),
    Attention(3, 8, 1, 65, dim=64),  # one block, and one position of the next
    Attention(2, 6, 2, 300, mask="added"),  # three heads share one: the matrix instruction takes sixteen
    Attention(1, 1, 1, 1),
    Attention(2, 4, 4, 64, dim=128, mask="bool"),  # no split
    Attention(1, 32, 1, 130, mask="bool"),
]
SUMS = {
    "one": (Product(4, 128, 3, 40, 640, bias=True), BLOCK),
    "split": (Product(4, 128, 3, 40, 640), split(BLOCK, 2)),
    "second kernel": (Product(4, 32, 9, 33, 640, bias=True), split(WEIGHTS, 3, last_adds=False)),
    "slices": (Product(8, 128, 1, 17, 640, bias=True), split(SLICED, 2)),
}
SIZES = [(1, 96), (3, 33), (2, 1030)]  # rows, columns
ACTIVATIONS = list(reference.ACTIVATIONS)


def of_rows(rows: int, columns: int, dtype: torch.dtype = FP16) -> tuple[Tensor, Tensor, Tensor]:
    """Two halves of one product, and a weight."""
    generator = torch.Generator().manual_seed(columns)
    both = (3 * torch.randn(rows, 2 * columns, generator=generator)).to(dtype)
    return both[:, :columns], both[:, columns:], torch.randn(columns, generator=generator).to(dtype)


def residual(p: Product) -> Tensor:
    shape = (p.rows, p.out_features)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(p.dtype)


def interpret(folder: Path) -> None:
    """In a process of its own: run the kernels on the CPU."""
    from gptq_ao.kernels.triton import self_check
    from gptq_ao.kernels.triton.launch import prepared
    from gptq_ao.kernels.triton.launch_around import launch_gated, launch_rms_norm
    from gptq_ao.kernels.triton.launch_attention import launch_attention

    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    results = {}
    for i, a in enumerate(ATTENTIONS):
        q, k, v, mask = a.inputs()
        results[f"attention {i}"] = launch_attention(q, k, v, None if mask is None else mask[:, 0, 0], 0.2)
    q, k, v, mask = ATTENTIONS[0].inputs()
    assert mask is not None
    results["nothing seen"] = launch_attention(q, k, v, torch.zeros_like(mask[:, 0, 0]), 0.2)
    for rows, columns in SIZES:
        gate, x, weight = of_rows(rows, columns)
        for offset in (0.0, 1.0):
            results[f"norm {columns} {offset}"] = launch_rms_norm(x, weight, 1e-3, offset)
        for activation in ACTIVATIONS:
            results[f"{activation} {columns}"] = launch_gated(gate, x, activation)
    for name, (p, c) in SUMS.items():
        call = prepared(c, p.bits, p.group, p.out_features, p.in_features, 1, p.dtype, -1)
        results[name] = call(p.x()[0], p.packed().expert(0), p.bias_values(), residual=residual(p))
    results["self check"] = torch.tensor(self_check.decoding_same(torch.device("cpu"), FP16))
    for name in ("launch_rms_norm", "launch_gated", "launch_attention"):
        right = getattr(self_check, name)
        setattr(self_check, name, lambda *a, right=right: right(*a) * (1 + 2**-4))
        results[f"wrong {name}"] = torch.tensor(self_check.decoding_same(torch.device("cpu"), FP16))
        setattr(self_check, name, right)
    save_file({name: t.contiguous() for name, t in results.items()}, folder / "results.safetensors")


@pytest.mark.parametrize("number", range(len(ATTENTIONS)))
def test_attention_in_the_interpreter(interpreted: dict[str, Tensor], number: int) -> None:
    ATTENTIONS[number].check(interpreted[f"attention {number}"])


def test_who_sees_nothing_gets_zeros(interpreted: dict[str, Tensor]) -> None:
    assert torch.equal(interpreted["nothing seen"], torch.zeros(1, 4, 1, 32, dtype=FP16))


def test_the_check_on_an_unknown_gpu(interpreted: dict[str, Tensor]) -> None:
    assert interpreted["self check"]
    assert not any(interpreted[f"wrong launch_{name}"] for name in ("rms_norm", "gated", "attention"))


def near(y: Tensor, exact: Tensor, terms: Tensor | float = 0.0) -> None:
    """Rounded once, but for what fp32 is off by: `terms`, which may cancel, are."""
    bound = 0.502 * torch.finfo(y.dtype).eps * exact.abs() + 2.0**-24 + 2.0**-22 * terms
    assert ((y.double() - exact).abs() <= bound).all()


def exact_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (offset + weight)


def exact_gate(gate: Tensor, x: Tensor, activation: str) -> Tensor:
    return reference.ACTIVATIONS[activation](gate.double()) * x.double()


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_norms_and_gates_in_the_interpreter(interpreted: dict[str, Tensor], rows: int, columns: int) -> None:
    gate, x, weight = of_rows(rows, columns)
    for offset in (0.0, 1.0):
        near(interpreted[f"norm {columns} {offset}"], exact_norm(x, weight, 1e-3, offset))
    for activation in ACTIVATIONS:
        near(
            interpreted[f"{activation} {columns}"], exact_gate(gate, x, activation), (gate.double() * x.double()).abs()
        )


@pytest.mark.parametrize("name", SUMS)
def test_a_product_adds_a_residual_in_the_interpreter(interpreted: dict[str, Tensor], name: str) -> None:
    p, c = SUMS[name]
    before, added = p.x()[0].double() @ p.weight()[0].T, residual(p).double()
    bias = p.bias_values()
    exact = before + added + (0 if bias is None else bias.double())
    magnitude = p.x()[0].double().abs() @ p.weight()[0].abs().T + added.abs() + exact.abs()
    u = torch.finfo(p.dtype).eps
    rounded = 0 if c.scale_sum else 1.01 * u  # scales and weights are
    bound = magnitude * (rounded + (p.in_features + 8) * 2.0**-24) + u * exact.abs()
    assert ((interpreted[name].double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_operators_elsewhere_than_on_a_gpu_are_the_reference(dtype: torch.dtype) -> None:
    gate, x, weight = of_rows(3, 64, dtype)
    exact = exact_norm(x, weight, 1e-3, 1.0)
    bound = (2.0**-22 if dtype == FP32 else 2.0**-8) * exact.abs()
    assert ((decoding.rms_norm(x, weight, 1e-3, 1.0) - exact).abs() <= bound).all()
    assert torch.equal(decoding.gated(gate, x, "gelu"), reference.gated(gate, x, "gelu"))
    p = Product(4, 32, 3, 40, 64, dtype, bias=True)
    packed, bias, added = p.packed().expert(0), p.bias_values(), residual(p)
    y = decoding.linear_add(p.x()[0], *packed, bias, added)
    assert torch.equal(y, ops.linear(p.x()[0], *packed, bias) + added)
    torch.testing.assert_close(y, reference.linear_add(p.x()[0], packed, bias, added), rtol=2**-7, atol=1.0)
    inputs: list[Any] = [None if t is None else t.to(dtype) for t in Attention(2, 4, 2, 30).inputs()]
    q, k, v, mask = inputs
    whole = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    expected = F.scaled_dot_product_attention(q, *whole, scale=0.2)
    torch.testing.assert_close(decoding.attend_once(q, k, v, mask, 0.2), expected, rtol=2**-7, atol=2**-7)


def test_operators_are_well_formed() -> None:
    gate, x, weight = of_rows(3, 64, FP32)
    torch.library.opcheck(decoding.rms_norm, (x, weight, 1e-3, 0.0))
    torch.library.opcheck(decoding.gated, (gate, x, "silu"))
    p = Product(4, 32, 3, 40, 64, FP32)
    torch.library.opcheck(decoding.linear_add, (p.x()[0], *p.packed().expert(0), None, residual(p)))


def test_what_attention_is_computed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only shapes, strides, dtypes and devices are asked."""
    monkeypatch.setattr(cuda_decoding, "_usable", lambda *_: True)

    def tensor(*shape: int, dtype: torch.dtype = BF16) -> Any:
        return torch.empty(shape, dtype=dtype, device="meta")

    class OnCuda:
        """A tensor that says it were there."""

        device = torch.device("cuda", 0)

        def __init__(self, of: Tensor) -> None:
            self.of = of

        def __getattr__(self, name: str) -> Any:
            return getattr(self.of, name)

        def __len__(self) -> int:
            return len(self.of)

    def asked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> bool:
        there: list[Any] = [None if t is None else OnCuda(t) for t in (q, k, v, mask)]
        return cuda_decoding.attends(*there)

    q, k = tensor(2, 8, 1, 64), tensor(2, 4, 50, 64)
    assert asked(q, k, k)
    assert asked(q, k, k, tensor(1, 1, 1, 50, dtype=torch.bool))
    assert asked(q, k, k, tensor(2, 1, 1, 50))
    wrong: Iterator[Any] = iter([
        (tensor(2, 8, 2, 64), k, k),  # two positions
        (tensor(2, 6, 1, 64), k, k),  # heads that cannot be shared out
        (tensor(2, 8, 1, 80), tensor(2, 4, 50, 80), tensor(2, 4, 50, 80)),
        (q, tensor(2, 4, 0, 64), tensor(2, 4, 0, 64)),
        (q, k.float(), k),
        (q, k.mT.contiguous().mT, k),  # heads whose numbers are apart
        (q, k, k, tensor(2, 8, 1, 50)),  # a mask for each head
        (q, k, k, tensor(2, 1, 1, 49, dtype=torch.bool)),
        (q, k, k, tensor(2, 1, 1, 50, dtype=FP32)),
        (tensor(1, 8, 1, 64), tensor(1, 4, 2**23 + 1, 64), tensor(1, 4, 2**23 + 1, 64)),  # the kernel counts to 2³¹
        (tensor(2**16, 8, 1, 64), tensor(2**16, 4, 50, 64), tensor(2**16, 4, 50, 64)),
    ])  # fmt: skip
    assert not any(asked(*tensors) for tensors in wrong)
    assert not cuda_decoding.attends(q, k, k, None)  # not on a GPU


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("dim", "share", "mask"), [(128, 4, "*i1"), (256, 2, "*bf16"), (64, 8, ""), (128, 32, "*i1")])
def test_attention_compiles_without_spilling(
    dim: int, share: int, mask: str, architecture: int, compile_ahead: Callable[..., Any]
) -> None:
    from gptq_ao.kernels.triton.attention import attention_kernel
    from gptq_ao.kernels.triton.launch_attention import constants

    cache = (8 * 320 * dim, 320 * dim, dim)
    strides = ((8 * share * dim, dim), cache, cache, (0, 1))
    values, options = constants(8, share, dim, 5, dim**-0.5, strides, architecture == 90)
    values |= {} if mask else {"mask": None}
    types = {"mask": mask, "partial": "*fp32", "counters": "*i32", "S": "i32"}
    _, usage = compile_ahead(attention_kernel, values, types, "*bf16", options, architecture)
    assert (usage["STACK"], usage["LOCAL"]) == ("0", "0")


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("rows", [1, 64])
def test_products_that_add_compile_without_spilling(
    rows: int, architecture: int, compile_ahead: Callable[..., Any]
) -> None:
    from gptq_ao.kernels.triton.launch import constants
    from gptq_ao.kernels.triton.linear import linear_kernel

    chosen = choose(rows, 4096, 14336, 4, 128, 1, 132, architecture // 10)
    assert chosen is not None
    values, options = constants(chosen, 4, 128, 14336, BF16, architecture // 10, fast=True)
    values |= {"bias": None, "offsets": None, "high": None}
    numbers = dict.fromkeys(("M", "N", "K", "groups"), "i32")
    types = {"x": "*bf16", "y": "*bf16", "residual": "*bf16", "partial": "*fp32", **numbers}
    _, usage = compile_ahead(linear_kernel, values, types, "*i32", options, architecture, ("N", "K"))
    assert int(usage["STACK"]) <= 8
    assert usage["LOCAL"] == "0"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("number", range(len(ATTENTIONS)))
def test_attention_on_a_gpu(number: int, dtype: torch.dtype) -> None:
    a = dataclasses.replace(ATTENTIONS[number], dtype=dtype)
    q, k, v, mask = a.inputs("cuda")
    assert cuda_decoding.attends(q, k, v, mask)
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        first, second = (decoding.attend_once(q, k, v, mask, 0.2) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    a.check(first.cpu())
    assert torch.equal(first, second)


@pytest.mark.gpu
def test_one_after_the_other_in_a_graph() -> None:
    """Kernels that start before the one before them is done wait for its results, replay after replay."""
    p = Product(4, 128, 1, 2048, 2048, BF16)
    packed = p.packed("cuda").expert(0)
    packed = packed._replace(scale_zero=packed.scale_zero & ~0xFFFF | 0x1800)  # scales of 2⁻⁹: nothing grows
    gate, x, weight = (t.cuda() for t in of_rows(1, 2048, BF16))

    def step(x: Tensor) -> Tensor:
        for _ in range(20):
            y = decoding.gated(gate, decoding.rms_norm(x, weight, 1e-5, 0.0), "silu")
            x = decoding.linear_add(y, *packed, None, x)
        return x

    expected = step(x.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(x)
    for _ in range(50):
        found.fill_(torch.nan)
        graph.replay()
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("rows", "columns"), [*SIZES, (64, 14336), (65, 64), (1, 2**14 + 8)])
def test_norms_and_gates_on_a_gpu(rows: int, columns: int, dtype: torch.dtype) -> None:
    gate, x, weight = (t.cuda() for t in of_rows(rows, columns, dtype))
    assert cuda_decoding.runs(x) == (rows <= 64 and columns <= 2**14)
    near(decoding.rms_norm(x, weight, 1e-3, 1.0), exact_norm(x, weight, 1e-3, 1.0))
    for activation in ACTIVATIONS:
        near(decoding.gated(gate, x, activation), exact_gate(gate, x, activation), (gate.double() * x.double()).abs())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 64, 65])
def test_a_product_adds_a_residual_on_a_gpu(rows: int) -> None:
    for bits, group in ((4, 128), (3, 64), (8, 640)):
        p = Product(bits, group, rows, 136, 640, BF16, bias=True)
        packed, bias, added = p.packed("cuda").expert(0), p.bias_values(), residual(p).cuda()
        assert bias is not None
        x = p.x()[0].cuda()
        y = decoding.linear_add(x, *packed, bias.cuda(), added)
        assert torch.equal(y, decoding.linear_add(x, *packed, bias.cuda(), added))
        exact = p.x()[0].double() @ p.weight()[0].T + bias.double() + added.cpu().double()
        magnitude = p.x()[0].double().abs() @ p.weight()[0].abs().T + exact.abs() + added.cpu().double().abs()
        assert ((y.cpu().double() - exact).abs() <= 2.0**-7 * magnitude).all()
