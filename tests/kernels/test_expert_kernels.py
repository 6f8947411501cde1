"""Products of rows that are sorted by expert with a stack of packed weights: in Triton's interpreter, compiled ahead of
time, and on a GPU."""

import dataclasses
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gptq_ao.codes.tiles import pack_codes, pack_scale_zero
from gptq_ao.kernels import ops
from gptq_ao.kernels.packed import Packed
from gptq_ao.kernels.triton.launch_experts import launch_experts, most_blocks
from gptq_ao.kernels.tuning.heuristics import FUSED_ROWS, LinearConfig, choose_experts

BF16, FP16 = torch.bfloat16, torch.float16


@dataclasses.dataclass(frozen=True)
class ByExpert:
    """x [sum of counts + beyond, K] by one packed weight for each count; rows beyond are nobody's."""

    bits: int
    group: int
    counts: tuple[int, ...]
    out_features: int
    in_features: int
    dtype: torch.dtype = FP16
    beyond: int = 0

    @property
    def rows(self) -> int:
        return sum(self.counts) + self.beyond

    def offsets(self) -> Tensor:
        return torch.tensor(self.counts).cumsum(0).to(torch.int32)

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.bits + self.rows)
        shape = (len(self.counts), self.out_features, self.in_features)
        codes = torch.randint(0, 2**self.bits, shape, dtype=torch.uint8, generator=generator)
        each = (*shape[:-1], self.in_features // self.group)
        zero = torch.randint(0, 2**self.bits, each, dtype=torch.uint8, generator=generator)
        return codes, torch.randn(each, generator=generator).half(), zero

    def packed(self, device: str = "cpu") -> Packed:
        codes, scale, zero = self.codes()
        qdata, high = pack_codes(codes, self.bits)
        numbers = (self.bits, self.group, self.out_features, self.in_features)
        return Packed(qdata, pack_scale_zero(scale, zero), high, None, *numbers).each(lambda t: t.to(device))

    def arguments(self, device: str = "cpu", perm: Tensor | None = None) -> tuple[Any, ...]:
        """Of the operator, after x."""
        return (*self.packed(device)._replace(perm=perm), self.offsets().to(device))

    def x(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.rows)
        return torch.randn((self.rows, self.in_features), generator=generator).to(self.dtype)

    def weight(self) -> Tensor:
        """fp64"""
        codes, scale, zero = (t.double() for t in self.codes())
        return (codes - zero.repeat_interleave(self.group, -1)) * scale.repeat_interleave(self.group, -1)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        each = x.split([*self.counts, self.beyond])
        parts = [rows @ w.T for rows, w in zip(each, weight, strict=False)]
        return torch.cat([*parts, x.new_zeros(self.beyond, self.out_features)])

    def check(self, y: Tensor, rounding: float | None = None, rounded_weights: bool = True) -> None:
        x, w = self.x().double(), self.weight()
        exact = self.product(x, w)
        u = torch.finfo(self.dtype).eps if rounding is None else rounding
        # Sums in fp32; weights are rounded to the dtype, unless sums are scaled; the result is rounded.
        magnitude = self.product(x.abs(), w.abs()) + exact.abs()
        relative = 1.01 * u * rounded_weights + (self.in_features + 8) * 2.0**-24
        assert y.dtype == self.dtype
        assert y.shape == exact.shape
        assert ((y.double() - exact).abs() <= magnitude * relative + u * exact.abs()).all()


BLOCK = LinearConfig(block_m=8, block_n=32, block_k=128, warps=4, stages=2)
WEIGHTS = dataclasses.replace(BLOCK, scale_sum=False)  # scales weights, not sums
SLICED = dataclasses.replace(BLOCK, block_n=16, slices=4)
WIDE = dataclasses.replace(BLOCK, block_m=16)

# Between them: all widths; experts with no rows at the beginning, in the middle and at the end, with one row, a block,
# a block and a row; N and K that fill no tile; rows that are nobody's; more experts than rows.
CASES: dict[str, tuple[ByExpert, LinearConfig]] = {
    "4-g128": (ByExpert(4, 128, (3, 0, 8, 9, 0, 17), 40, 384), BLOCK),
    "4-g32": (ByExpert(4, 32, (0, 0, 5, 1), 33, 160, BF16), WEIGHTS),
    "4-one-expert": (ByExpert(4, 64, (19,), 16, 192), WEIGHTS),
    "4-all-in-one": (ByExpert(4, 128, (0, 0, 25, 0), 40, 256), WIDE),
    "4-many-experts": (ByExpert(4, 128, (0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0), 17, 128), BLOCK),
    "4-beyond": (ByExpert(4, 128, (2, 9), 40, 256, beyond=11), BLOCK),
    "4-all-beyond": (ByExpert(4, 128, (0, 0, 0), 40, 256, BF16, beyond=3), BLOCK),
    "4-row": (ByExpert(4, 130, (2, 3), 19, 130), dataclasses.replace(BLOCK, block_k=64)),
    "4-sliced": (ByExpert(4, 128, (1, 0, 2), 40, 640), SLICED),
    "2-g128": (ByExpert(2, 128, (9, 0, 1), 40, 256, BF16), BLOCK),
    "2-g32": (ByExpert(2, 32, (4, 13), 33, 96), dataclasses.replace(WIDE, scale_sum=False)),
    "3-g128": (ByExpert(3, 128, (1, 0, 9), 40, 640, beyond=1), BLOCK),
    "3-sliced": (ByExpert(3, 300, (0, 3, 1), 16, 300), SLICED),
    "8-g32": (ByExpert(8, 32, (3, 8, 0), 16, 96), dataclasses.replace(BLOCK, block_k=32)),
    "8-row": (ByExpert(8, 33, (0, 10), 40, 33, BF16), BLOCK),
}


def run(p: ByExpert, c: LinearConfig, device: str = "cpu", fast: bool | None = None) -> Tensor:
    offsets = p.offsets().to(device)
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        return launch_experts(p.x().to(device), p.packed(device), offsets, c, fast).cpu()
    finally:
        torch.use_deterministic_algorithms(False)


def interpret(folder: Path) -> None:
    """In a process of its own: run the kernel on the CPU."""
    runpy.run_path(str(Path(__file__).with_name("ptx_in_numpy.py")))["install"]()
    results = {}
    for name, (p, c) in CASES.items():
        results[name] = run(p, c)
    p, c = CASES["4-g128"]
    results["pairs"] = run(p, c, fast=True)
    results["no rows"] = run(dataclasses.replace(p, counts=(0, 0)), c)
    save_file(results, folder / "results.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_in_the_interpreter(interpreted: dict[str, Tensor], name: str) -> None:
    p, c = CASES[name]
    # The interpreter cuts off what does not fit into bf16.
    p.check(interpreted[name], 2.0**-7 if p.dtype == BF16 else None, not c.scale_sum)
    assert not interpreted[name][sum(p.counts) :].any()


def test_codes_cut_out_in_pairs_in_the_interpreter(interpreted: dict[str, Tensor]) -> None:
    assert torch.equal(interpreted["pairs"], interpreted["4-g128"])


def test_no_rows(interpreted: dict[str, Tensor]) -> None:
    assert interpreted["no rows"].shape == (0, 40)


@pytest.mark.parametrize("block", [8, 16, 128])
def test_as_many_programs_as_the_worst_offsets_need(block: int) -> None:
    for experts in (1, 3, 8):
        for rows in range(60):
            # The worst: as many as possible own one row, and one of them all the rest.
            owners = min(rows, experts + 1)
            needed = owners - 1 + -(-(rows - owners + 1) // block) if rows else 0
            assert needed <= most_blocks(rows, experts, block) <= needed + 1


# bits, group, rows, experts, capability: what is chosen for them, on as many multiprocessors as an A100 or H100 has.
SHIPPED = [(4, 128, 8, 128, 90), (4, 128, 2, 8, 90), (4, 128, 120, 8, 90), (4, 128, 512, 8, 90), (4, 128, 2048, 8, 90)]
SHIPPED += [(4, 32, 8, 60, 90), (2, 128, 8, 8, 90), (3, 128, 8, 8, 90), (8, 128, 2048, 8, 90)]
SHIPPED += [(4, 128, 8, 128, 80), (4, 128, 512, 8, 80), (3, 128, 256, 8, 80)]


@pytest.mark.parametrize(("bits", "group", "rows", "experts", "architecture"), SHIPPED)
def test_chosen_kernels_compile_without_spilling(
    bits: int, group: int, rows: int, experts: int, architecture: int, compile_ahead: Callable[..., Any]
) -> None:
    from gptq_ao.kernels.triton.launch import constants
    from gptq_ao.kernels.triton.linear import linear_kernel

    sms = 132 if architecture == 90 else 108
    chosen = choose_experts(rows, 4096, 4096, bits, group, experts, sms, architecture // 10)
    assert chosen is not None
    values, options = constants(chosen, bits, group, 4096, BF16, architecture // 10, True, experts)
    values |= dict.fromkeys(("bias", "residual", "partial", "counters")) | ({} if bits == 3 else {"high": None})
    types = {"x": "*bf16", "y": "*bf16", "M": "i32", "N": "i32", "K": "i32", "groups": "i32"}
    compiled, usage = compile_ahead(linear_kernel, values, types, "*i32", options, architecture, ("N", "K"))
    assert set(re.findall(r"pendings = (\d+)", compiled.asm["ttgir"])) <= {"0"}  # see `_settled`
    assert "async_copy" in compiled.asm["ttgir"]  # programs that end early do not keep the loop from being pipelined
    # As for single weights: two registers on the stack, outside of the loop.
    assert int(usage["STACK"]) <= 8
    assert usage["LOCAL"] == "0"


def test_many_rows_are_left_to_a_dense_product() -> None:
    for capability, most in FUSED_ROWS.items():
        assert choose_experts(8 * most, 4096, 4096, 4, 128, 8, 108, capability) is not None
        assert choose_experts(8 * most + 1, 4096, 4096, 4, 128, 8, 108, capability) is None
    assert choose_experts(8, 4096, 4096, 4, 16, 8, 108, 9) is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_on_cuda(name: str, dtype: torch.dtype) -> None:
    p, c = CASES[name]
    p = dataclasses.replace(p, dtype=dtype)
    y = run(p, c, "cuda")
    p.check(y, rounded_weights=not c.scale_sum)
    assert not y[sum(p.counts) :].any()
    assert torch.equal(y, run(p, c, "cuda"))
    p.check(run(p, c, "cuda", fast=False), rounded_weights=not c.scale_sum)


COUNTS = [(1, 0, 0, 1, 0, 0, 0, 0), (5, 0, 90, 33, 64, 0, 1, 7), (0, 500, 0, 0, 30, 0, 0, 0), (300,) * 8]


@pytest.mark.gpu
@pytest.mark.parametrize("counts", COUNTS, ids=["2", "200", "530", "2400"])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (4, 1024), (2, 64), (3, 128), (8, 128)])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_what_is_chosen_on_cuda(bits: int, group: int, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    p = ByExpert(bits, group, counts, 400, 1024, dtype, beyond=3)
    y = ops.grouped_linear(p.x().cuda(), *p.arguments("cuda")).cpu()
    p.check(y)
    assert not y[sum(p.counts) :].any()


@pytest.mark.gpu
def test_parts_of_a_stack_that_is_too_large_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptq_ao.kernels import cuda

    p = ByExpert(3, 96, (700, 0, 900), 200, 768, BF16, beyond=5)
    monkeypatch.setattr(cuda, "SCRATCH", 3 * 50 * 768 * 2)
    p.check(ops.grouped_linear(p.x().cuda(), *p.arguments("cuda")).cpu())


@pytest.mark.gpu
def test_a_graph_follows_offsets_that_change() -> None:
    first = ByExpert(4, 128, (3, 0, 20, 1), 512, 1024, BF16, beyond=8)
    x, arguments = first.x().cuda(), first.arguments("cuda")
    ops.grouped_linear(x, *arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.grouped_linear(x, *arguments)
    for counts in ((3, 0, 20, 1), (32, 0, 0, 0), (0, 0, 0, 31), (8, 8, 8, 8), (0, 0, 0, 0)):
        each = dataclasses.replace(first, counts=counts, beyond=32 - sum(counts))
        arguments[-1].copy_(each.offsets())
        y.fill_(torch.nan)
        graph.replay()
        each.check(y.cpu())  # codes and x depend on the number of rows alone
        assert not y[sum(counts) :].any()


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_well_formed_on_cuda(bits: int) -> None:
    p = ByExpert(bits, 128, (3, 0, 4), 40, 256, BF16, beyond=1)
    perm = torch.randperm(256).int().cuda()
    x = p.x().cuda()
    torch.library.opcheck(ops.grouped_linear, (x.clone().requires_grad_(), *p.arguments("cuda", perm)))
    assert torch.equal(
        ops.grouped_linear(x, *p.arguments("cuda", perm)), ops.grouped_linear(x[:, perm], *p.arguments("cuda"))
    )
