"""The loops over columns, in plain torch and as Triton kernels: all are held against the same loop in fp64."""

import contextlib
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq_ao.kernels.columns import MAX_COLUMNS, OUTER, column_blocks, round_columns, score_grids

U = 2.0**-24  # unit roundoff of fp32
# [B, N]: about the tiles of 32 columns and programs of 32 rows that the kernels work with.
SHAPES = [(b, n) for b in (1, 7, 32, 33, 48, 64, 100, 128) for n in (1, 31, 70)]
shapes = pytest.mark.parametrize(("columns", "rows"), SHAPES, ids=[f"{b}x{n}" for b, n in SHAPES])
every_bits = pytest.mark.parametrize("bits", [2, 3, 4, 8], ids=["2bit", "3bit", "4bit", "8bit"])
with_before = pytest.mark.parametrize("before", [False, True], ids=["own", "before"])


pytestmark = pytest.mark.usefixtures("one_thread")


def make(columns: int, rows: int, bits: int, grids: int | None = None) -> dict[str, Tensor]:
    """Arguments of `round_columns`, or of `score_grids` if a number of `grids` is given.

    Scales have both signs, zero points are anywhere on the grid, and some values lie outside it. `follow` couples a
    column strongly to its neighbours and weakly to all; what is not above its diagonal must not matter.
    """
    generator = torch.Generator().manual_seed(1000 * columns + 10 * rows + bits)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    distance = torch.arange(columns) - torch.arange(columns).unsqueeze(1)
    follow = torch.where(distance > 0, 0.4 ** distance.clamp(min=0) * randn(columns, columns).sign(), torch.nan)
    follow += 0.005 * randn(columns, columns)
    each = (columns if grids is None else grids, rows)
    size = 2.5 / 2 ** (bits - 1) * (0.5 + torch.rand(each, generator=generator))
    scale = torch.where(randn(*each) > 0, size, -size).half().float()
    zero_point = torch.randint(0, 2**bits, each, generator=generator).float()
    arguments = {"x": randn(columns, rows), "follow": follow}
    if grids is None:
        return arguments | {"scale": scale, "zero_point": zero_point, "before": randn(columns, rows)}
    importance = 0.1 + torch.rand(columns, generator=generator)
    return arguments | {"importance": importance, "scale": scale, "zero_point": zero_point}


def pass_on(x: Tensor, error: Tensor, follow: Tensor, p: Tensor, of_p: Tensor, unit: float = U) -> None:
    """x_j ← x_j − p·follow_j, for all columns to come, and what fp32 may be wrong by if p is wrong by `of_p`."""
    follow = follow.view(-1, *[1] * p.dim())
    change = follow * p
    x -= change
    error += 1.01 * (follow.abs() * of_p + unit * change.abs() + U * x.abs())


def check_codes(codes: Tensor, a: dict[str, Tensor], bits: int, before: bool, unit: float = U) -> None:
    """Each code is the nearest one *given the codes before it*: a near-tie may fall to either side, and all that
    follows in its row depends on that. How near is what a running error analysis of the loop allows fp32, or what sums
    of products to within `unit` do."""
    x, follow, scale, zero = (a[n].double() for n in ("x", "follow", "scale", "zero_point"))
    error = torch.zeros_like(x)  # of x in fp32
    assert codes.dtype == torch.uint8
    assert codes.shape == x.shape
    assert codes.max() <= 2**bits - 1
    same = []
    for i in range(len(x)):
        quotient = x[i] / scale[i]
        place = (quotient + zero[i]).clamp(0, 2**bits - 1)
        code = codes[i].double()
        # The quotient is rounded, the zero point is an integer. 1.01: products of two errors.
        near = 1.01 * (error[i] / scale[i].abs() + unit * quotient.abs())
        assert near.max() < 0.01  # or else all this says little
        assert ((place - code).abs() <= 0.5 + near).all(), f"column {i}"
        same.append(place.round() == code)
        value = (code - zero[i]) * scale[i]
        first = a["before"][i].double() if before else x[i]
        p = first - value
        of_p = U * value.abs() + U * p.abs() + (0 if before else error[i])
        pass_on(x[i + 1 :], error[i + 1 :], follow[i, i + 1 :], p, of_p, unit)
    assert torch.stack(same).double().mean() >= 0.999


def check_scores(loss: Tensor, a: dict[str, Tensor], bits: int) -> None:
    """Rows without near-ties have the loss that fp64 finds, within the bound of the same analysis."""
    scale, zero, importance = (a[n].double() for n in ("scale", "zero_point", "importance"))
    x = a["x"].double().unsqueeze(1).repeat(1, len(scale), 1)
    follow = a["follow"].double()
    error, expected, bound = torch.zeros_like(x), torch.zeros_like(scale), torch.zeros_like(scale)
    clear = torch.ones_like(scale, dtype=torch.bool)
    for i in range(len(x)):
        quotient = x[i] / scale
        place = quotient + zero
        inside = (place > -0.75) & (place < 2**bits - 0.25)
        near = 1.01 * (error[i] / scale.abs() + U * quotient.abs())
        clear &= ~inside | (((place - place.floor()) - 0.5).abs() > near)
        value = (place.round().clamp(0, 2**bits - 1) - zero) * scale
        p = x[i] - value
        of_p = error[i] + U * value.abs() + U * p.abs()
        expected += importance[i] * p**2
        bound += 1.01 * importance[i] * (2 * p.abs() * of_p + of_p**2 + 2 * U * p**2) + U * expected
        pass_on(x[i + 1 :], error[i + 1 :], follow[i, i + 1 :], p, of_p)
    assert loss.dtype == torch.float32
    assert loss.shape == scale.shape
    if clear.numel() == 1 and not clear.any():
        return  # a single number, and a tie
    assert clear.double().mean() > 0.5
    assert ((loss.double() - expected).abs() <= bound)[clear].all()
    assert bound[clear].sum() < 0.01 * expected[clear].sum()  # or else that says little


def rounded(a: dict[str, Tensor], bits: int, before: bool) -> Tensor:
    return round_columns(a["x"], a["follow"], a["scale"], a["zero_point"], bits, before=a["before"] if before else None)


@with_before
@every_bits
@shapes
def test_codes_are_the_nearest_given_those_before(columns: int, rows: int, bits: int, before: bool) -> None:
    a = make(columns, rows, bits)
    kept = {name: t.clone() for name, t in a.items()}
    codes = rounded(a, bits, before)
    check_codes(codes, a, bits, before)
    assert all(torch.equal(a[n].nan_to_num(), kept[n].nan_to_num()) for n in a)


@every_bits
@shapes
def test_scores_are_the_losses_of_rounding_with_each_grid(columns: int, rows: int, bits: int) -> None:
    a = make(columns, rows, bits, grids=3)
    kept = {name: t.clone() for name, t in a.items()}
    check_scores(score_grids(**a, bits=bits), a, bits)
    assert all(torch.equal(a[n].nan_to_num(), kept[n].nan_to_num()) for n in a)


def test_a_score_is_that_of_the_codes() -> None:
    a = make(48, 31, 3, grids=4)
    scores = score_grids(**a, bits=3)
    for c in range(4):
        s, z = (a[n][c].expand(48, -1) for n in ("scale", "zero_point"))
        codes = round_columns(a["x"], a["follow"], s, z, 3)
        x, loss = a["x"].double(), torch.zeros(31, dtype=torch.float64)
        for i in range(48):
            p = x[i] - (codes[i] - z[i]).double() * s[i]
            loss += a["importance"][i] * p**2
            x[i + 1 :] -= torch.outer(a["follow"][i, i + 1 :].double(), p)
        assert torch.allclose(scores[c].double(), loss, rtol=1e-4)


def test_uncoupled_columns_are_rounded_to_nearest() -> None:
    a = make(33, 31, 4)
    a["follow"] = torch.zeros(33, 33)
    expected = (a["x"] / a["scale"]).round().add(a["zero_point"]).clamp(0, 15)
    assert torch.equal(rounded(a, 4, False).float(), expected)
    assert torch.equal(rounded(a, 4, True).float(), expected)  # what came before matters to later columns only


def strided(t: Tensor) -> Tensor:
    """The same numbers, neither contiguous nor dense."""
    if t.dim() == 1:
        return torch.stack([t, t + 1], 1)[:, 0]
    return torch.stack([t.T, t.T + 1], 2)[..., 0].T


@pytest.mark.parametrize("change", [strided, lambda t: t.T.contiguous().T if t.dim() == 2 else t], ids=["gaps", "T"])
def test_strides_do_not_matter(change: Callable[[Tensor], Tensor]) -> None:
    a = make(33, 31, 3)
    b = {name: change(t) for name, t in a.items()}
    assert not b["x"].is_contiguous()
    for before in (False, True):
        assert torch.equal(rounded(a, 3, before), rounded(b, 3, before))
    a = make(33, 31, 3, grids=4)
    assert torch.equal(score_grids(**a, bits=3), score_grids(**{n: change(t) for n, t in a.items()}, bits=3))


def test_one_grid_for_all_columns_may_be_expanded() -> None:
    a = make(33, 31, 3)
    b = dict(a)
    for name in ("scale", "zero_point"):
        b[name] = a[name][:1].expand(33, 31)
        a[name] = b[name].contiguous()
    assert torch.equal(rounded(a, 3, False), rounded(b, 3, False))


LENGTHS = [(1, 1), (96, 32), (130, 130), (160, 160), (480, 160), (2048, 32), (3072, 96), (1500, 300), (4097, 241)]


@pytest.mark.parametrize(("length", "group"), [*LENGTHS, (2100, 128), (1025, 1024), (3000, 3000), (70, 128)])
def test_blocks_cover_all_columns_once_and_split_no_group_needlessly(length: int, group: int) -> None:
    ranges = list(column_blocks(length, group))
    assert [r[0] for r in ranges] == [0, *(r[1] for r in ranges[:-1])]
    assert ranges[-1][1] == length
    for first, last, blocks in ranges:
        assert [b.start for b in blocks] == [first, *(b.stop for b in blocks[:-1])]
        assert blocks[-1].stop == last
        assert first % group == 0  # a range begins with a group
        assert last % group == 0 or last == length
        assert last - first <= max(OUTER, group)
        for b in blocks:
            assert 0 < b.stop - b.start <= MAX_COLUMNS
            assert b.start // group == (b.stop - 1) // group  # one group
            end = min((b.start // group + 1) * group, length)
            assert b.stop == end or b.stop - b.start == MAX_COLUMNS
            assert (b.start % group) % MAX_COLUMNS == 0


def test_blocks_of_a_group_that_is_longer_than_a_block() -> None:
    assert list(column_blocks(480, 160)) == [(0, 480, [slice(*b) for b in LONGER])]
    assert list(column_blocks(0, 32)) == []


LONGER = [(0, 128), (128, 160), (160, 288), (288, 320), (320, 448), (448, 480)]


class Outputs:
    """In place of `torch` in `columns_triton`: outputs are filled with poison and lie between two fences of it."""

    def __init__(self) -> None:
        self.made = list[Tensor]()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        poison = float("nan") if dtype.is_floating_point else 0xEE
        self.made.append(torch.full((math.prod(shape) + 256,), poison, dtype=dtype, device=device))
        return self.made[-1][128:-128].view(shape)

    def empty_like(self, t: Tensor, memory_format: torch.memory_format) -> Tensor:
        assert memory_format == torch.contiguous_format  # the kernels know no strides
        return self.empty(*t.shape, dtype=t.dtype, device=t.device)


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    from gptq_ao.kernels.triton import columns as columns_triton

    outputs = Outputs()
    vars(columns_triton)["torch"] = outputs
    try:
        yield
    finally:
        vars(columns_triton)["torch"] = torch
    assert outputs.made
    for t in outputs.made:
        for fence in (t[:128], t[-128:]):
            assert (fence.isnan() if fence.is_floating_point() else fence == 0xEE).all()


# Every number of tiles, full and not, ends of a program's rows, every width. The interpreter is slow.
INTERPRETED = [(1, 1, 8), (7, 33, 2), (32, 34, 4), (33, 1, 3), (48, 5, 8), (64, 5, 2), (100, 5, 4), (128, 1, 3)]
WITH_BEFORE, WITH_GAPS = INTERPRETED[1::2], (7, 33, 2)


def interpret(folder: Path) -> None:
    """In a process of its own: run the kernels on the CPU, on the arguments in a file."""
    from gptq_ao.kernels.triton import columns as columns_triton

    runpy.run_path(str(Path(__file__).with_name("ptx_in_numpy.py")))["install"]()
    given, results = load_file(folder / "arguments.safetensors"), {}
    for case in INTERPRETED:
        change = strided if case == WITH_GAPS else Tensor.clone
        columns, rows, bits = case
        key = f"{columns}x{rows}"
        r, s = (
            {n.rpartition(".")[2]: change(t) for n, t in given.items() if n.startswith(f"{key}.{kind}.")}
            for kind in ("round", "score")
        )
        before = r.pop("before")
        with poisoned_outputs():
            results[f"{key}.codes"] = columns_triton.round_columns(
                **r, bits=bits, before=before if case in WITH_BEFORE else None
            )
            results[f"{key}.score"] = columns_triton.score_grids(**s, bits=bits)
    save_file(results, folder / "results.safetensors")


def test_kernels_in_the_interpreter_agree(tmp_path: Path) -> None:
    cases = {(b, n, bits): (make(b, n, bits), make(b, n, bits, 2 if b < 64 else 1)) for b, n, bits in INTERPRETED}
    given = {
        f"{b}x{n}.{kind}.{name}": t
        for (b, n, _), both in cases.items()
        for kind, a in zip(("round", "score"), both, strict=True)
        for name, t in a.items()
    }
    save_file(given, tmp_path / "arguments.safetensors")
    # Triton reads the flag when it is imported.
    code = f"import pathlib, runpy\nrunpy.run_path({__file__!r})['interpret'](pathlib.Path({str(tmp_path)!r}))"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = load_file(tmp_path / "results.safetensors")
    same = []
    for (b, n, bits), (r, s) in cases.items():
        codes, before = results[f"{b}x{n}.codes"], (b, n, bits) in WITH_BEFORE
        check_codes(codes, r, bits, before)
        same.append((codes == rounded(r, bits, before)).flatten())
        check_scores(results[f"{b}x{n}.score"], s, bits)
    assert torch.cat(same).double().mean() >= 0.999


@pytest.mark.gpu
@every_bits
def test_codes_on_cuda_agree(bits: int) -> None:
    same = []
    for columns, rows in [*SHAPES, (128, 3000)]:
        a = make(columns, rows, bits)
        on_gpu = {n: t.cuda() for n, t in a.items()}
        for before in (False, True):
            with poisoned_outputs():
                codes = rounded(on_gpu, bits, before)
                again = rounded({n: strided(t) for n, t in on_gpu.items()}, bits, before)
            assert torch.equal(codes, again)
            check_codes(codes.cpu(), a, bits, before)
            same.append((codes.cpu() == rounded(a, bits, before)).flatten())
        assert all(torch.equal(on_gpu[n].cpu().nan_to_num(), a[n].nan_to_num()) for n in a)
    assert torch.cat(same).double().mean() >= 0.999  # a multiply-add is rounded once: ties may fall either way


@pytest.mark.gpu
@every_bits
def test_scores_on_cuda_agree(bits: int) -> None:
    for columns, rows in SHAPES:
        for grids in (1, 41):
            a = make(columns, rows, bits, grids)
            on_gpu = {n: t.cuda() for n, t in a.items()}
            with poisoned_outputs():
                loss = score_grids(**on_gpu, bits=bits)
                again = score_grids(**{n: strided(t) for n, t in on_gpu.items()}, bits=bits)
            assert torch.equal(loss, again)
            check_scores(loss.cpu(), a, bits)


# The arguments that are None.
VARIANTS = {
    "round": ["before", "importance", "loss"],
    "round-before": ["importance", "loss"],
    "score": ["before", "codes"],
}


@pytest.mark.parametrize("architecture", [80, 90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("tiles", [1, 2, 4])
@pytest.mark.parametrize("absent", VARIANTS.values(), ids=VARIANTS)
def test_kernels_compile_without_spilling(
    absent: list[str], tiles: int, architecture: int, compile_ahead: Callable[..., Any]
) -> None:
    from gptq_ao.kernels.triton import columns as columns_triton

    constants: dict[str, Any] = {"LEVELS": 15.0, "TILES": tiles, "ROWS": columns_triton.ROWS, **dict.fromkeys(absent)}
    types = {"rows": "i32", "columns": "i32", "stride": "i32", "codes": "*u8"}
    options = columns_triton.OPTIONS
    _, usage = compile_ahead(columns_triton._walk, constants, types, "*fp32", options, architecture)
    # A register that does not fit goes to the stack, in local memory.
    assert usage["STACK"] == usage["LOCAL"] == "0"
    assert int(usage["REG"]) <= 255
