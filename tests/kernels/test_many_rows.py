"""Products with many rows on Hopper: how they are cut, what is unpacked, compiled ahead of time, and on a GPU."""

import itertools
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gptq_ao.codes.tiles import pack_codes, pack_scale_zero, tile_columns
from gptq_ao.kernels import ops, reference
from gptq_ao.kernels.packed import Packed
from gptq_ao.kernels.tuning.many_rows import FEWEST_ROWS, ManyRowsConfig, candidates, choose, computes

from .ptx_in_numpy import _run

BF16, FP16 = torch.bfloat16, torch.float16
SMS = 132


# How a product is cut.


@pytest.mark.parametrize(("rows", "n", "k"), [(65, 8, 8), (128, 4096, 4096), (300, 6144, 14336), (5000, 136, 1056)])
def test_programs_together_take_every_step_of_every_tile_once(rows: int, n: int, k: int) -> None:
    from gptq_ao.kernels.gluon import many_rows

    steps = -(-k // 64)
    for c in candidates(rows, n, k, SMS):
        tiles_m = -(-rows // c.block_m)
        work = tiles_m * -(-n // 128) * c.split
        seen: dict[tuple[int, int], list[int]] = {}
        for first in range(min(SMS, work)):
            for w in range(first, work, SMS):
                last = max(rows - c.block_m, 0)
                m, row, start, end = many_rows._piece.fn(w, tiles_m, last, steps, 128, c.block_m, c.split)
                assert start % 2 == end % 2 == 0
                assert end > start  # or the pipeline would wait for steps that nobody asks for
                seen.setdefault((m, row), []).extend(range(start, end))
        # No tile reaches beyond the last row, unless there are fewer rows than it has.
        tiles = {min(m, max(rows - c.block_m, 0)) for m in range(0, rows, c.block_m)}
        assert seen.keys() == set(itertools.product(tiles, range(0, -(-n // 16), 8)))
        assert set(range(rows)) == {m + i for m in tiles for i in range(c.block_m) if m + i < rows}
        assert all(sorted(found) == list(range((steps + 1) // 2 * 2)) for found in seen.values())


def test_a_split_is_for_few_tiles() -> None:
    assert choose(128, 4096, 14336, 4, SMS).split == 4
    assert choose(2048, 28672, 4096, 4, SMS) == ManyRowsConfig(256, 1)
    # Where tiles of 128 rows of x would take as many waves, what takes long to unpack is unpacked less often.
    assert [choose(1024, 6144, 4096, bits, SMS).block_m for bits in (4, 3)] == [128, 256]
    assert {c.split for c in candidates(100, 8192, 4096, SMS)} == {1, 2}  # 64 tiles
    assert {c.split for c in candidates(100, 128, 1024, SMS)} == {1, 2}  # a part has eight steps at least


def test_what_is_on_its_way_fits_into_shared_memory() -> None:
    for block_m, bits in itertools.product((128, 256), (2, 3, 4, 8)):
        c = ManyRowsConfig(block_m, 1)
        stored = 2 * 64 * 64 * 2
        assert c.stages(bits) * c.at_once(bits) >= 5
        assert c.stages(bits) * c.at_once(bits) * 64 * (2 * block_m + 16 * bits) + stored + 500 <= 227 * 2**10


@pytest.mark.parametrize(
    ("bits", "group", "n", "k", "right"),
    [
        (4, 32, 8, 64, True),
        (4, 64, 4096, 4096, True),
        (4, 384, 64, 768, True),
        (4, 200, 64, 200, True),  # one group a row
        (4, 96, 64, 192, False),  # a step would lie in three groups
        (4, 128, 4100, 4096, False),  # a row of y would not begin at 16 bytes
        (4, 100, 64, 100, False),
        (3, 128, 64, 128, True),
        (8, 64, 64, 128, True),
    ],
)
def test_what_is_computed(bits: int, group: int, n: int, k: int, right: bool) -> None:
    assert computes(bits, group, n, k) is right


# What is unpacked.


# The columns of the halves of a register, of each result of two words, less 2·t and where the words' columns begin.
PAIRS = {
    2: [32 * word + 16 * step + 8 * k_half for word in (0, 1) for step in (0, 1) for k_half in (0, 1)],
    4: [16 * word + 8 * k_half for word in (0, 1) for k_half in (0, 1)],
    8: [8 * word for word in (0, 1)],
}


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_become_the_weights_of_a_thread(bits: int, dtype: torch.dtype) -> None:
    """As wgmma has operand A: of a step of 16 columns, a thread 4·g + t has columns 2·t, 2·t + 1 of row g, then of row
    g + 8, and then the same eight columns further."""
    from gptq_ao.kernels.gluon import operands

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (16, tile_columns(bits)), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (16,), generator=generator)
    scale = torch.randn(16, generator=generator).half()
    low, high_plane = pack_codes(codes, bits)
    words = low.view(32, 4).numpy().view(np.uint32)
    high = None if high_plane is None else high_plane.view(32, 2).numpy().view(np.uint32)
    kept = scale if bits == 8 and dtype == BF16 else scale.to(dtype)  # as fp32, or else rounded first
    exact = ((codes - zero.unsqueeze(1)).float() * kept.float().unsqueeze(1)).to(dtype)

    def grid(row: int) -> tuple[Any, Any]:
        if bits == 8 and dtype == BF16:
            return np.uint32(0x4B000000 | int(zero[row])), np.uint32(
                int(kept[row].float().view(torch.int32)) & 2**32 - 1
            )
        magic = 0x6400 if dtype == FP16 else 0x4300
        number = int(kept[row].view(torch.int16)) & 0xFFFF
        return np.uint32((magic | int(zero[row])) * 0x10001), np.uint32(number * 0x10001)

    places = PAIRS[2 if bits == 3 else bits]
    count = 2 * len(places)
    for lane, first in itertools.product(range(32), (0, 2)):
        g, t = divmod(lane, 4)
        inputs = [words[lane, first], words[lane, first + 1]]
        inputs += [] if high is None else [high[lane, first // 2]] * 2
        inputs += [grid(r)[i] for i in (0, 1) for r in (g, g, g + 8, g + 8)]
        found = _run(operands.assembly(bits, dtype == FP16), count, inputs)
        for i, row_half in itertools.product(range(len(places)), (0, 1)):
            two = torch.from_numpy(np.atleast_1d(found[2 * i + row_half]).view(np.int16)).view(dtype)
            column = first // 2 * tile_columns(bits) // 2 + places[i] + 2 * t
            assert torch.equal(two, exact[g + 8 * row_half, column : column + 2])


# Compiled ahead of time.


@pytest.mark.parametrize("block_m", [128, 256])
@pytest.mark.parametrize(
    ("bits", "split", "group", "dtype", "bias"),
    [
        (4, 1, 128, BF16, False),
        (4, 2, 64, FP16, True),
        (4, 4, 32, BF16, True),
        (4, 1, 0, FP16, True),
        (2, 1, 128, BF16, False),
        (2, 2, 32, FP16, True),
        (3, 1, 128, FP16, True),
        (3, 4, 32, BF16, False),
        (8, 1, 128, BF16, False),
        (8, 2, 32, BF16, True),
        (8, 1, 64, FP16, False),
    ],
)
def test_products_run_while_codes_are_unpacked(
    block_m: int,
    bits: int,
    split: int,
    group: int,
    dtype: torch.dtype,
    bias: bool,
    tmp_path: Path,
    compile_ahead: Callable[..., Any],
) -> None:
    import triton

    from gptq_ao.kernels.gluon import launch_many_rows as launch
    from gptq_ao.kernels.gluon.many_rows import many_rows_kernel

    c = ManyRowsConfig(block_m, split)
    values = launch.constants(c, bits, group or 4096, 4096, dtype)
    values |= {} if bias else {"bias": None}
    values |= {} if split > 1 else {"partial": None, "counters": None}
    kind = "fp16" if dtype == FP16 else "bf16"
    values |= {} if bits == 3 else {"h_desc": None}
    types = {
        name: f"tensordesc<{'i32' if len(box) == 3 else kind}{list(box)},{launch.LAYOUTS[len(box)]!r}>"
        for name, box in launch.boxes(c, bits).items()
    }
    types |= {"qdata": "*i32", "scale_zero": "*i32", "bias": f"*{kind}", "partial": "*fp32", "counters": "*i32"}
    compiled, usage = compile_ahead(many_rows_kernel, values, types, "i32", launch.OPTIONS, 90)
    assert usage["LOCAL"] == usage["STACK"] == "0"  # nothing spills
    assert compiled.metadata.shared <= 227 * 2**10
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    command = [str(tools / "nvdisasm"), "-c", str(tmp_path / "cubin")]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    products, waits = code.count("HGMMA"), code.count("DEPBAR.LE gsb0")
    # Two groups of warps with two steps of four products each; a wait for each step, and one at the end.
    assert (products, waits) == (16, 6)
    # ptxas says when it makes products wait for each other, but Triton does not pass that on.
    (tmp_path / "ptx").write_text(compiled.asm["ptx"])
    ptxas = "ptxas-blackwell" if (tools / "ptxas-blackwell").exists() and triton.__version__ >= "3.9" else "ptxas"
    command = [str(tools / ptxas), "-v", "--gpu-name=sm_90a", "-o", "/dev/null", str(tmp_path / "ptx")]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.findall(r"C75\d\d", said.stdout + said.stderr) == []


# On a GPU.


def weight(n: int, k: int, group: int, perm: bool = False, seed: int = 0, bits: int = 4) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(n, k // group, generator=generator) - 0.4).half()
    zero_point = torch.randint(0, 2**bits, scale.shape, generator=generator, dtype=torch.uint8)
    order = torch.randperm(k, generator=generator).to(torch.int32).cuda() if perm else None
    grid = pack_scale_zero(scale, zero_point).cuda()
    qdata, high_plane = pack_codes(codes, bits)
    high_plane = None if high_plane is None else high_plane.cuda()
    return Packed(qdata.cuda(), grid, high_plane, order, bits, group, n, k)


def check(x: Tensor, w: Packed, bias: Tensor | None, y: Tensor) -> None:
    """Sums in fp32. Rounded: the scale, the weight and the result."""
    dense = reference.dequantize(w, torch.float32).double()
    exact, size = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    eps = torch.finfo(x.dtype).eps
    bound = size * (1.01 * eps + w.in_features * 2.0**-24) + exact.abs() * eps
    assert ((y.double() - exact).abs() <= bound).all()


def poisoned(compute: Callable[[], Tensor]) -> Tensor:
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        return compute()
    finally:
        torch.use_deterministic_algorithms(False)


SHAPES = [
    (256, 1024, 128, 128),
    (4136, 1088, 32, 200),
    (520, 4096, 4096, 300),
    (4096, 1024, 64, 1030),
    (72, 328, 328, 65),
    (8, 64, 32, 70),
    (136, 1056, 32, 513),
    (1032, 14336, 256, 77),
]


def only_on_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel has instructions of Hopper")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("n", "k", "group", "rows"), SHAPES)
def test_every_configuration_is_right(n: int, k: int, group: int, rows: int, bits: int, dtype: torch.dtype) -> None:
    from gptq_ao.kernels.gluon.launch_many_rows import prepared

    only_on_hopper()
    w = weight(n, k, group, bits=bits)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(2)).to("cuda", dtype)
    each = [(c, SMS) for c in candidates(rows, n, k, SMS)]
    each += [(ManyRowsConfig(256, 1), 3), *([(ManyRowsConfig(128, 2), 7)] if k >= 1024 else [])]  # with much work each
    for (c, sms), b in itertools.product(each, (None, bias)):
        launch = prepared(c, bits, group, n, k, dtype, 0, sms)
        y = poisoned(lambda launch=launch, b=b: launch(x, w, b))  # type: ignore[misc]
        check(x, w, b, y)
        assert torch.equal(y, poisoned(lambda launch=launch, b=b: launch(x, w, b)))  # type: ignore[misc]


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["perm", "more dimensions", "not contiguous", "not at 16 bytes", "odd", "no rows"])
def test_the_operator_takes_what_it_is_given(how: str) -> None:
    """`odd`: sizes that the kernel does not compute, and the operator computes otherwise."""
    n, k = (100, 200) if how == "odd" else (264, 512)
    w = weight(n, k, 200 if how == "odd" else 128, perm=how == "perm")
    x = torch.randn(3, 150, k, device="cuda", dtype=BF16)
    if how == "not contiguous":
        x = torch.randn(3, k, 150, device="cuda", dtype=BF16).mT
    elif how == "not at 16 bytes":
        x = torch.randn(450 * k + 1, device="cuda", dtype=BF16)[1:].view(3, 150, k)
    elif how == "no rows":
        x = x[:, :0]
    elif how != "more dimensions":
        x = x.flatten(0, 1)
    assert how == "no rows" or x.numel() // k >= FEWEST_ROWS
    y = poisoned(lambda: ops.linear(x, *w))
    assert y.shape == (*x.shape[:-1], n)
    check(x.flatten(0, -2), w, None, y.flatten(0, -2))


@pytest.mark.gpu
def test_graphs_and_streams_at_the_same_time() -> None:
    """Of a split: sums and counters of one launch are no other's."""
    from gptq_ao.kernels.gluon.launch_many_rows import prepared

    only_on_hopper()
    w = [weight(256, 4096, 128, seed=i) for i in range(4)]
    x = torch.randn(128, 4096, device="cuda", dtype=BF16)
    launch = prepared(ManyRowsConfig(128, 4), 4, 128, 256, 4096, BF16, 0, 8)
    expected = [launch(x, each) for each in w]
    torch.cuda.synchronize()
    graphs, results = [], []
    for each in w:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(launch(x, each))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in w]
    eager: list[list[Tensor]] = [[] for _ in w]
    for _ in range(20):
        for graph, stream, each, found in zip(graphs, streams, w, eager, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                found.append(launch(x, each))
    torch.cuda.synchronize()
    for y, result, found in zip(expected, results, eager, strict=True):
        assert torch.equal(result, y)
        assert all(torch.equal(each, y) for each in found)


@pytest.mark.gpu
def test_a_compiled_product_is_the_eager_one() -> None:
    w, x = weight(512, 1024, 128), torch.randn(200, 1024, device="cuda", dtype=BF16)
    eager = ops.linear(x, *w)
    for mode in ("default", "reduce-overhead"):
        compiled = torch.compile(lambda x: ops.linear(x, *w), fullgraph=True, mode=mode)
        assert all(torch.equal(compiled(x).clone(), eager) for _ in range(3))


@pytest.mark.gpu
def test_another_triton_is_checked_and_believed_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptq_ao.kernels import cuda
    from gptq_ao.kernels.triton import self_check

    only_on_hopper()
    device = torch.device("cuda", 0)
    monkeypatch.setattr(self_check, "RUN_WITH", set())
    assert self_check.many_rows_agree(device, 4)
    monkeypatch.setattr(self_check, "_close", lambda *_: False)
    with pytest.warns(
        UserWarning, match=r"4-bit kernels for many rows disagree with the reference with Triton .* the other kernels"
    ):
        assert not self_check.many_rows_agree(device, 4)
    cuda._usable_many.cache_clear()
    cuda.forget()
    with pytest.warns(UserWarning, match="for many rows disagree"):
        assert not cuda.reads_many_rows(device, BF16, 4, 128, 512)
    w, x = weight(264, 512, 128), torch.randn(300, 512, device="cuda", dtype=BF16)
    check(x, w, None, ops.linear(x, *w))  # by the other kernels
    cuda._usable_many.cache_clear()
    cuda.forget()
