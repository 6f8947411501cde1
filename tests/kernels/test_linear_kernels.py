"""The Triton kernels that read packed codes: in the interpreter, compiled ahead of time, and on a GPU."""

import dataclasses
import re
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gptq_ao.codes.tiles import pack_codes, pack_scale_zero
from gptq_ao.kernels import reference
from gptq_ao.kernels.packed import Packed
from gptq_ao.kernels.tuning.heuristics import LinearConfig, choose

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclasses.dataclass(frozen=True)
class Product:
    """x [experts, rows, in_features] by as many packed weights."""

    bits: int
    group: int
    rows: int
    out_features: int
    in_features: int
    dtype: torch.dtype = FP16
    experts: int = 1
    bias: bool = False
    seed: int | None = None  # of the weights; None: others for each number of rows

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.bits + (self.rows if self.seed is None else self.seed))
        shape = (self.experts, self.out_features, self.in_features)
        codes = torch.randint(0, 2**self.bits, shape, dtype=torch.uint8, generator=generator)
        each = (*shape[:-1], self.in_features // self.group)
        zero = torch.randint(0, 2**self.bits, each, dtype=torch.uint8, generator=generator)
        scale = torch.randn(each, generator=generator).half()
        scale[..., ::5, :] = 0
        return codes, scale, zero

    def packed(self, device: str = "cpu") -> Packed:
        codes, scale, zero = self.codes()
        qdata, high = pack_codes(codes, self.bits)
        numbers = (self.bits, self.group, self.out_features, self.in_features)
        return Packed(qdata, pack_scale_zero(scale, zero), high, None, *numbers).each(lambda t: t.to(device))

    def weight(self) -> Tensor:
        """fp64"""
        codes, scale, zero = (t.double() for t in self.codes())
        return (codes - zero.repeat_interleave(self.group, -1)) * scale.repeat_interleave(self.group, -1)

    def x(self) -> Tensor:
        shape = (self.experts, self.rows, self.in_features)
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.rows)).to(self.dtype)

    def bias_values(self) -> Tensor | None:
        return torch.linspace(-9, 9, self.out_features).to(self.dtype) if self.bias else None

    def check(self, y: Tensor, scale_sum: bool, rounding: float | None = None) -> None:
        x, w, bias = self.x().double(), self.weight(), self.bias_values()
        exact = x @ w.mT + (0 if bias is None else bias.double())
        u = torch.finfo(self.dtype).eps if rounding is None else rounding
        # Sums in fp32; scales and weights are rounded to the dtype, unless sums are scaled; the result is rounded.
        magnitude = x.abs() @ w.abs().mT + exact.abs()
        bound = magnitude * ((0 if scale_sum else 1.01 * u) + (self.in_features + 8) * 2.0**-24) + u * exact.abs()
        assert y.dtype == self.dtype
        assert y.shape == exact.shape
        assert ((y.double() - exact).abs() <= bound).all()


BLOCK = LinearConfig(block_m=8, block_n=32, block_k=128, warps=4, stages=2)
WEIGHTS = dataclasses.replace(BLOCK, scale_sum=False)  # scales weights, not sums
SLICED = dataclasses.replace(BLOCK, block_n=16, slices=4)


def split(c: LinearConfig, parts: int, last_adds: bool = True) -> LinearConfig:
    return dataclasses.replace(c, split=parts, last_adds=last_adds)


# Between them: all widths, groups that are part of a block, a block, more, the whole row; N and K that fill no tile, no
# block, or an odd number of steps per split; one row, full and half-full blocks of rows; every way through the kernel.
CASES: dict[str, tuple[Product, LinearConfig]] = {
    "4-g128": (Product(4, 128, 1, 40, 384), BLOCK),
    "4-g32": (Product(4, 32, 3, 33, 160, bias=True), WEIGHTS),
    "4-g64": (Product(4, 64, 17, 16, 192, BF16), WEIGHTS),
    "4-row": (Product(4, 130, 3, 19, 130, bias=True), split(dataclasses.replace(BLOCK, block_k=64), 2)),
    "4-uneven": (Product(4, 128, 3, 40, 640, bias=True), split(BLOCK, 3)),
    "4-sliced": (Product(4, 128, 3, 40, 640), SLICED),
    "4-sliced-g256": (Product(4, 256, 9, 17, 1024, BF16), SLICED),
    "4-experts": (Product(4, 128, 3, 40, 256, experts=3), split(BLOCK, 2)),
    "4-experts-add": (Product(4, 32, 9, 40, 256, experts=2), split(WEIGHTS, 2, last_adds=False)),
    "2-g128": (Product(2, 128, 3, 40, 256), BLOCK),
    "2-g32": (Product(2, 32, 9, 33, 96), WEIGHTS),
    "2-sliced": (Product(2, 64, 1, 16, 640), split(dataclasses.replace(SLICED, scale_sum=False), 2)),
    "3-g128": (Product(3, 128, 3, 40, 640), split(BLOCK, 2, last_adds=False)),
    "3-g32": (Product(3, 32, 1, 33, 160, bias=True), WEIGHTS),
    "3-sliced": (Product(3, 300, 3, 16, 300), SLICED),
    "3-experts": (Product(3, 128, 3, 40, 256, experts=2), BLOCK),
    "8-g128": (Product(8, 128, 64, 33, 256), dataclasses.replace(BLOCK, block_m=64)),
    "8-g32": (Product(8, 32, 3, 16, 96), dataclasses.replace(BLOCK, block_k=32)),
    "8-sliced": (Product(8, 128, 3, 40, 640, BF16), SLICED),
    "8-row": (Product(8, 33, 3, 40, 33), BLOCK),
}
# Codes in pairs: bf16 differs from fp16 in a constant only, but for 8 bits, where fp32 takes the same way.
IN_PAIRS = ["4-g128", "4-g32", "2-g32", "2-sliced", "3-g32", "3-sliced", "3-g128", "8-g32", "8-row"]
PAIRS_OF_FP32 = (Product(8, 64, 3, 33, 256, FP32), dataclasses.replace(BLOCK, block_k=64))
DENSE = [(2, 32, 40, 96), (3, 96, 33, 288), (4, 8, 16, 72), (4, 128, 50, 640), (8, 130, 33, 130)]  # bits, group, N, K


def interpret(folder: Path) -> None:
    """In a process of its own: run the kernels on the CPU."""
    from gptq_ao.kernels.triton import self_check
    from gptq_ao.kernels.triton.dequantize import dequantize
    from gptq_ao.kernels.triton.launch import launch
    from gptq_ao.kernels.triton.self_check import same_as_reference

    runpy.run_path(str(Path(__file__).with_name("ptx_in_numpy.py")))["install"]()
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    results = {}

    def run(p: Product, c: LinearConfig, fast: bool, x: Tensor | None = None) -> Tensor:
        x = p.x() if x is None else x
        return launch(x, p.packed(), p.bias_values(), c, fast)

    for name, (p, c) in CASES.items():
        results[name] = run(p, c, fast=False)
        if name in IN_PAIRS:
            results[f"{name} pairs"] = run(p, c, fast=True)
    results["fp32 pairs"] = run(*PAIRS_OF_FP32, fast=True)
    p, c = CASES["4-g32"]
    for name, value in (("nan", torch.nan), ("inf", torch.inf)):
        x = p.x()
        x[:, 1, 5] = value
        results[name] = run(p, c, False, x)
    results["no rows"] = run(dataclasses.replace(p, rows=0), c, fast=False)
    for bits, group, n, k in DENSE:
        p = Product(bits, group, 1, n, k, experts=2)
        for dtype in (FP16, FP32):
            for fast in (False, True) if bits == 8 else (False,):
                dense = dequantize(p.packed(), dtype, fast)
                results[f"{bits}-{group} {dtype} {fast}"] = dense
    for bits in (2, 3, 4, 8):
        same = [same_as_reference(torch.device("cpu"), bits, FP16, capability) for capability in (8, 9)]
        results[f"{bits} self check"] = torch.tensor(same)
    right = self_check.launch
    self_check.launch = lambda *arguments: right(*arguments) * (1 + 2**-3)
    results["wrong self check"] = torch.tensor(same_as_reference(torch.device("cpu"), 4, FP16, 8))
    save_file(results, folder / "results.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_linear_in_the_interpreter(interpreted: dict[str, Tensor], name: str) -> None:
    p, c = CASES[name]
    # The interpreter cuts off what does not fit into bf16.
    p.check(interpreted[name], c.scale_sum, rounding=2.0**-7 if p.dtype == BF16 else None)


@pytest.mark.parametrize("name", IN_PAIRS)
def test_codes_cut_out_in_pairs_in_the_interpreter(interpreted: dict[str, Tensor], name: str) -> None:
    p, c = CASES[name]
    p.check(interpreted[f"{name} pairs"], c.scale_sum)
    if c.scale_sum:  # the same integers times the same x, in the same order
        assert torch.equal(interpreted[f"{name} pairs"], interpreted[name])


def test_codes_cut_out_into_fp32_in_the_interpreter(interpreted: dict[str, Tensor]) -> None:
    PAIRS_OF_FP32[0].check(interpreted["fp32 pairs"], scale_sum=True)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_row_that_is_not_finite_leaves_others_alone(interpreted: dict[str, Tensor], value: str) -> None:
    y, clean = interpreted[value], interpreted["4-g32"]
    assert torch.equal(y[:, [0, 2]], clean[:, [0, 2]])
    assert not y[:, 1].isfinite().any()


def test_the_check_on_an_unknown_gpu(interpreted: dict[str, Tensor]) -> None:
    assert all(interpreted[f"{bits} self check"].all() for bits in (2, 3, 4, 8))
    assert not interpreted["wrong self check"]


def test_no_rows(interpreted: dict[str, Tensor]) -> None:
    assert interpreted["no rows"].shape == (1, 0, 33)


@pytest.mark.parametrize(("bits", "group", "n", "k"), DENSE, ids=[f"{b}-g{g}" for b, g, _, _ in DENSE])
def test_dequantize_in_the_interpreter_is_the_reference(
    interpreted: dict[str, Tensor], bits: int, group: int, n: int, k: int
) -> None:
    p = Product(bits, group, 1, n, k, experts=2)
    for dtype in (FP16, FP32):
        expected = reference.dequantize(p.packed(), dtype)
        found = [t for name, t in interpreted.items() if name.startswith(f"{bits}-{group} {dtype}")]
        assert len(found) == (2 if bits == 8 else 1)
        assert all(torch.equal(t, expected) for t in found)


def test_constants_are_in_the_order_of_the_kernel() -> None:
    """Kernels that are compiled already are launched with all arguments by position."""
    from gptq_ao.kernels.triton.launch import constants
    from gptq_ao.kernels.triton.linear import add_splits_kernel, linear_kernel

    values, _ = constants(BLOCK, 4, 128, 4096, BF16, 9, fast=True)
    assert linear_kernel.arg_names[14:] == list(values)
    assert add_splits_kernel.arg_names[6:] == ["SPLIT", "BLOCK", "AHEAD"]


def test_more_shared_memory_is_taken_only_where_it_is_known_how_much_there_is() -> None:
    from gptq_ao.kernels.triton.launch import constants

    c = dataclasses.replace(BLOCK, ahead=128, per_sm=2)
    found = [constants(c, 4, 128, 4096, BF16, capability, fast=True)[0]["SHARED"] for capability in (8, 9, 10, 12)]
    assert found == [0, 77568, 77568, 0]  # more than a third of 227 KB
    for free in (dataclasses.replace(c, per_sm=0), dataclasses.replace(c, ahead=0)):
        assert constants(free, 4, 128, 4096, BF16, 9, fast=True)[0]["SHARED"] == 0


class Metadata(NamedTuple):
    """What Triton has written down about a kernel."""

    target: Any = None
    num_warps: int = 4
    num_ctas: int = 1
    shared: int = 1000


class Compiled:
    """In place of a kernel that Triton has compiled: what it was called with."""

    function, packed_metadata, metadata = 7, (4, 1, 1000), Metadata()

    def __init__(self) -> None:
        self.direct: list[tuple[Any, ...]] = []
        self.by_triton: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.direct.append(arguments)

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.by_triton.append((grid, *arguments))


class Source:
    """In place of a kernel that Triton has to compile."""

    def __init__(self) -> None:
        self.compiled: list[tuple[Compiled, tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def compile_and_launch(*arguments: Any, **constants: Any) -> Compiled:
            self.compiled.append((Compiled(), arguments, constants))
            return self.compiled[-1][0]

        return compile_and_launch

    def warmup(self, *arguments: Any, grid: tuple[int, int, int], **constants: Any) -> Compiled:
        compiled: Compiled = self[grid](*arguments, **constants)
        return compiled


def test_a_kernel_is_compiled_once_for_each_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptq_ao.kernels.triton import launch

    monkeypatch.setattr(launch, "DIRECT", True)
    source = Source()
    kernel = launch.Kernel(source, {"BM": 8}, {"num_warps": 4})
    x, bias = torch.zeros(64), torch.zeros(64)
    for _ in range(3):
        kernel((2, 1, 1), 5, (x, bias), (3,))
    ((compiled, first, constants),) = source.compiled
    assert first[0] is x  # Triton reads the dtypes
    assert constants == {"BM": 8, "num_warps": 4}
    again = (2, 1, 1, 5, 7, (4, 1, 1000), None, None, None, x.data_ptr(), bias.data_ptr(), 3, 8)
    assert compiled.direct == [again] * 2
    # Loads of a kernel for aligned tensors would fail on others; which of them is not aligned matters too.
    for tensors in ((x[1:], bias), (x, bias[1:]), (x, None), (x[4:], bias[8:])):
        kernel((2, 1, 1), 5, tensors, (3,))
    assert len(source.compiled) == 4
    assert compiled.direct[-1][9:11] == (x[4:].data_ptr(), bias[8:].data_ptr())


@pytest.mark.parametrize(("shared", "taken"), [(77568, 77568), (900, 1000)])
def test_shared_memory_is_taken_before_the_first_launch(
    shared: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget

    from gptq_ao.kernels.triton import launch

    monkeypatch.setattr(launch, "DIRECT", True)
    monkeypatch.setattr(Compiled, "metadata", Metadata(GPUTarget("cuda", 90, 32)))
    seen = []

    def first(compiled: Compiled, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: seen.append((compiled.metadata.shared, compiled.packed_metadata, grid, *arguments))

    monkeypatch.setattr(Compiled, "__getitem__", first)
    source, x = Source(), torch.zeros(4)
    kernel = launch.Kernel(source, {"SHARED": shared}, {})
    for _ in range(2):
        kernel((2, 1, 1), 5, (x,), (3,))
    assert seen == [(taken, (4, 1, taken), (2, 1, 1), x.data_ptr(), 3, shared)]
    ((compiled, *_),) = source.compiled
    assert compiled.direct == [(2, 1, 1, 5, 7, (4, 1, taken), None, None, None, x.data_ptr(), 3, shared)]


@pytest.mark.parametrize("why", ["a hook", "another Triton"])
def test_triton_launches_where_it_must(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    from gptq_ao.kernels.triton import launch

    monkeypatch.setattr(launch, "DIRECT", why == "a hook")
    if why == "a hook":  # of a profiler
        monkeypatch.setattr(triton.knobs.runtime.launch_exit_hook, "calls", [print])
    source, x = Source(), torch.zeros(4)
    kernel = launch.Kernel(source, {"BM": 8} if why == "a hook" else {"SHARED": 8}, {})
    for _ in range(2):
        kernel((2, 1, 1), 5, (x,), (3,))
    ((compiled, *_),) = source.compiled
    assert compiled.by_triton == [((2, 1, 1), x.data_ptr(), 3, 8)]  # and the first by the source
    assert not compiled.direct


def test_without_counters_a_second_kernel_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptq_ao.kernels.triton import launch

    sources = Source(), Source()
    monkeypatch.setattr(launch, "linear_kernel", sources[0])
    monkeypatch.setattr(launch, "add_splits_kernel", sources[1])
    monkeypatch.setattr(launch.LinearLaunch, "_counters", lambda *_: None)  # a graph is captured, the supply is used up
    p = Product(4, 128, 3, 48, 512)
    call = launch.LinearLaunch(split(BLOCK, 2), 4, 128, 48, 512, 1, FP16, -1)
    y = call(p.x(), p.packed())
    (_, product, constants), (_, added, _) = (s.compiled[0] for s in sources)
    *_, partial, counters = product[:8]
    assert counters is None
    assert not constants["LAST_ADDS"]
    assert partial.shape == (1, 2, 3, 48)
    assert (added[0] is partial, added[2], added[3] is y) == (True, None, True)
    call(p.x(), p.packed(), counters=torch.zeros(8, dtype=torch.int32))
    assert sources[0].compiled[1][2]["LAST_ADDS"]
    assert len(sources[1].compiled) == 1


# bits, group, rows, capability, and in_features below: what is chosen for them and 4096 out_features, on as many
# multiprocessors as an A100 or H100 has.
SHIPPED = [(4, 128, 1, 90), (4, 128, 16, 90), (4, 128, 64, 90), (4, 128, 256, 90), (4, 32, 1, 90), (4, 4096, 1, 90)]
SHIPPED += [(2, 128, 1, 90), (3, 128, 1, 90), (8, 128, 1, 90), (3, 128, 16, 90), (8, 128, 16, 90)]
SHIPPED += [(3, 128, 256, 90), (8, 128, 256, 90)]
SHIPPED += [(4, 128, 1, 80), (4, 128, 64, 80)]
PRODUCTS = [(*shipped, 4096) for shipped in SHIPPED] + [(4, 128, 16, 90, 14336), (4, 128, 64, 90, 14336)]


@pytest.mark.parametrize(("bits", "group", "rows", "architecture", "in_features"), PRODUCTS)
def test_chosen_kernels_compile_without_spilling(
    bits: int,
    group: int,
    rows: int,
    architecture: int,
    in_features: int,
    tmp_path: Path,
    compile_ahead: Callable[..., Any],
) -> None:
    import triton

    from gptq_ao.kernels.triton.launch import constants, take_shared_memory
    from gptq_ao.kernels.triton.linear import linear_kernel

    chosen = choose(rows, 4096, in_features, bits, group, 1, 132 if architecture == 90 else 108, architecture // 10)
    assert chosen is not None
    values, options = constants(chosen, bits, group, in_features, BF16, architecture // 10, fast=True)
    values |= {"bias": None, "offsets": None, "residual": None} | ({} if bits == 3 else {"high": None})
    if chosen.split == 1:
        values |= {"partial": None, "counters": None}
    types = {"x": "*bf16", "y": "*bf16", "partial": "*fp32", "M": "i32", "N": "i32", "K": "i32", "groups": "i32"}
    compiled, usage = compile_ahead(linear_kernel, values, types, "*i32", options, architecture, ("N", "K"))
    # No product is still running when its operands' registers are written again, see `_settled`.
    assert set(re.findall(r"pendings = (\d+)", compiled.asm["ttgir"])) <= {"0"}
    if values["AHEAD"] and chosen.per_sm:  # so many programs fit into a multiprocessor, and no more
        take_shared_memory(compiled, values["SHARED"])
        assert compiled.metadata.shared in compiled.packed_metadata
        taken = compiled.metadata.shared + 2**10  # CUDA takes 1 KB for itself, of 228
        assert chosen.per_sm * taken <= 228 * 2**10 < (chosen.per_sm + 1) * taken
    # What does not fit goes to the stack, in local memory: allow two registers there, outside of the loop.
    assert int(usage["STACK"]) <= 8
    assert usage["LOCAL"] == "0"
    if architecture == 90:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        command = [str(tool), "-c", str(tmp_path / "cubin")]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # Codes reach the matrix instruction in the lane that loaded them. A split's last program may shuffle, and warps
        # exchange the sums of slices at the end.
        assert code.count("SHFL") <= 1 or chosen.slices > 1
        assert "MMA" in code


def on_gpu(p: Product, c: LinearConfig, fast: bool = True) -> Tensor:
    from gptq_ao.kernels.triton.launch import launch

    bias = p.bias_values()
    bias = None if bias is None else bias.cuda()
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        return launch(p.x().cuda(), p.packed("cuda"), bias, c, fast).cpu()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_linear_on_cuda(name: str, dtype: torch.dtype) -> None:
    p, c = CASES[name]
    p = dataclasses.replace(p, dtype=dtype)
    y = on_gpu(p, c)
    p.check(y, c.scale_sum)
    assert torch.equal(y, on_gpu(p, c))
    p.check(on_gpu(p, c, fast=False), c.scale_sum)


@pytest.mark.gpu
@pytest.mark.parametrize("last_adds", [False, True])
@pytest.mark.parametrize("stages", [1, 4])
@pytest.mark.parametrize("ahead", [0, 512])
def test_a_split_changes_only_the_order_of_the_sum(last_adds: bool, stages: int, ahead: int) -> None:
    if ahead and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("programmatic dependent launch came with compute capability 9.0")
    p = Product(4, 128, 16, 1008, 4096, BF16, bias=True)
    c = LinearConfig(16, 64, 128, warps=4, stages=stages, split=8, last_adds=last_adds, ahead=ahead)
    y = on_gpu(p, c)
    p.check(y, scale_sum=True)
    assert all(torch.equal(y, on_gpu(p, c)) for _ in range(20))  # whoever comes last


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_how_many_programs_are_let_in_changes_nothing(rows: int) -> None:
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("programs of two kernels meet with programmatic dependent launch, from compute capability 9.0 on")
    p = Product(4, 128, rows, 1008, 8192, BF16, bias=True)
    c = LinearConfig(max(8, rows), 128, 128, warps=4, split=8, last_adds=rows < 64, ahead=128)
    y = on_gpu(p, c)
    p.check(y, scale_sum=True)
    for per_sm in (1, 2, 3, 8):
        assert torch.equal(y, on_gpu(p, dataclasses.replace(c, per_sm=per_sm)))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 33, 64, 100, 256, 700])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (4, 4096), (2, 64), (3, 128), (8, 128)])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_what_is_chosen_on_cuda(bits: int, group: int, rows: int, dtype: torch.dtype) -> None:
    from gptq_ao.kernels import cuda

    p = Product(bits, group, rows, 1000, 4096, dtype, bias=True)
    bias = p.bias_values()
    assert bias is not None
    y = cuda.linear(p.x()[0].cuda(), p.packed("cuda").expert(0), bias.cuda())
    p.check(y.cpu().unsqueeze(0), scale_sum=False)


@pytest.mark.gpu
def test_parts_of_a_weight_that_is_too_large_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptq_ao.kernels import cuda

    for bias in (False, True):
        p = Product(3, 96, 300, 200, 768, BF16, bias=bias)
        values = p.bias_values()
        values = None if values is None else values.cuda()
        monkeypatch.setattr(cuda, "SCRATCH", 50 * 768 * 2)
        parts = cuda.linear(p.x()[0].cuda(), p.packed("cuda").expert(0), values)
        p.check(parts.cpu().unsqueeze(0), scale_sum=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_dequantize_on_cuda_is_the_reference(dtype: torch.dtype) -> None:
    from gptq_ao.kernels.triton.dequantize import dequantize

    for bits, group, n, k in [*DENSE, (4, 128, 3000, 4096), (8, 64, 70, 1024), (3, 32, 40, 4096)]:
        p = Product(bits, group, 1, n, k, experts=2)
        expected = reference.dequantize(p.packed(), dtype)
        for fast in (False, True):
            assert torch.equal(dequantize(p.packed("cuda"), dtype, fast).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("last_adds", [False, True])
def test_a_kernel_that_begins_early_waits_for_what_it_reads(last_adds: bool, captured: bool) -> None:
    """Products of what the product before, on this stream or another, has just written, by weights that a copy has."""
    from gptq_ao.kernels.triton.launch import launch

    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("programmatic dependent launch came with compute capability 9.0")
    size = 2048
    p = Product(4, 128, 8, size, size, BF16)
    sources = [p.packed("cuda"), dataclasses.replace(p, rows=9).packed("cuda")]
    target = sources[0].each(torch.empty_like)
    x, side, kept = p.x().cuda(), torch.cuda.Stream(), []

    def chain(c: LinearConfig) -> Tensor:
        def product(t: Tensor) -> Tensor:
            kept.append(launch(t, target, None, c))
            return kept[-1]

        y, main = x, torch.cuda.current_stream()
        for i in range(12):
            target.qdata.copy_(sources[i % 2].qdata)
            target.scale_zero.copy_(sources[i % 2].scale_zero)
            y = product(product(y) * 2.0**-8)
            side.wait_stream(main)
            with torch.cuda.stream(side):
                z = product(y)
            y = product(y)
            main.wait_stream(side)
            y = product(z) * 2.0**-18 + y * 2.0**-9
        return y

    c = LinearConfig(8, 64, 128, warps=4, split=4, last_adds=last_adds)
    expected = chain(c)
    assert expected.isfinite().all()
    assert len(expected.unique()) > 1000
    for ahead in (128, 1024):
        early = dataclasses.replace(c, ahead=ahead)
        if not captured:
            assert all(torch.equal(chain(early), expected) for _ in range(20))
            continue
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain(early)
        for _ in range(20):
            graph.replay()
            assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [0, 256])
@pytest.mark.parametrize("last_adds", [False, True])
def test_graphs_and_streams_do_not_disturb_each_other(last_adds: bool, ahead: int) -> None:
    """Two graphs captured on one stream and replayed on two at the same time, beside launches on a third."""
    from gptq_ao.kernels.triton.launch import launch

    p = Product(4, 128, 8, 4096, 4096, BF16)
    packed = p.packed("cuda")
    c = LinearConfig(8, 64, 128, warps=4, split=8, last_adds=last_adds, ahead=ahead)
    inputs = [p.x().cuda() * (i + 1) for i in range(3)]

    def run(x: Tensor) -> Tensor:
        return launch(x, packed, None, c)

    expected = [run(x) for x in inputs]
    torch.cuda.synchronize()
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    outputs = []
    for graph, x in zip(graphs, inputs, strict=False):
        with torch.cuda.graph(graph):
            outputs.append([run(x) for _ in range(10)])
    streams = [torch.cuda.Stream() for _ in range(3)]
    eager = []
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            eager += [run(inputs[2]) for _ in range(10)]
    torch.cuda.synchronize()
    for each, y in zip([*outputs, eager], expected, strict=True):
        assert all(torch.equal(t, y) for t in each)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_with_changing_numbers_of_rows(mode: str | None) -> None:
    from gptq_ao.tensor import tensor_class

    p = Product(4, 128, 1, 512, 1024, BF16, seed=1)
    codes, scale, zero = (t[0] for t in p.codes())
    weight = tensor_class(4).from_codes(codes, scale, zero, dtype=BF16).cuda()
    layer = torch.nn.Linear(1024, 512, bias=False, device="cuda", dtype=BF16)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    compiled = torch.compile(layer, fullgraph=True, dynamic=mode is None, mode=mode)
    with torch.no_grad():
        for rows in (1, 7, 64, 65, 300, 1, 7):
            for _ in range(3):
                each = dataclasses.replace(p, rows=rows)
                y = compiled(each.x()[0].cuda())
                each.check(y.cpu().unsqueeze(0), scale_sum=False)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_well_formed_operators_on_cuda(bits: int) -> None:
    from gptq_ao.kernels import ops

    p = Product(bits, 128, 5, 40, 256, BF16)
    arguments = p.packed("cuda").expert(0)._replace(perm=torch.randperm(256).int().cuda())
    for x in (p.x()[0].cuda(), p.x().cuda()[:, ::2], torch.zeros(2, 0, 256, device="cuda", dtype=BF16)):
        torch.library.opcheck(ops.linear, (x.clone().requires_grad_(), *arguments))
        torch.library.opcheck(ops.linear, (x, *arguments), test_utils="test_faketensor")
        y = ops.linear(x, *arguments)
        expected = x.double() @ ops.dequantize(*arguments, torch.float64).T
        bound = 2**-8 * (x.double().abs() @ ops.dequantize(*arguments, torch.float64).abs().T) + expected.abs() * 2**-8
        assert ((y.double() - expected).abs() <= bound).all()
    torch.library.opcheck(ops.dequantize, (*arguments, BF16))


@pytest.mark.gpu
def test_an_unknown_gpu_is_checked_and_believed_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptq_ao.kernels import cuda
    from gptq_ao.kernels.triton import dequantize

    device = torch.device("cuda", 0)
    monkeypatch.setattr(cuda, "TESTED", set())
    cuda.usable.cache_clear()
    cuda.forget()
    assert all(cuda.usable(device, bits) for bits in (2, 3, 4, 8))
    cuda.usable.cache_clear()
    right = dequantize.dequantize
    monkeypatch.setattr(dequantize, "dequantize", lambda *a: right(*a) + 1)
    with pytest.warns(UserWarning, match="4-bit Triton kernels disagree with the reference on"):
        assert not cuda.usable(device, 4)
    assert not cuda.usable(device, 4)  # known, and said once
    cuda.usable.cache_clear()
    cuda.forget()
