"""A group rounded to the best of several grids, in plain torch and on a GPU: both are held against what they are made
of, in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_ao.codes.grid import candidate_grids
from gptq_ao.kernels.groups import best_grid, round_group
from tests.kernels import gluon_in_torch
from tests.kernels.test_columns import U, check_codes

# Bits, and whether the grid is symmetric and its scale may be negative.
FORMS = [(2, True, True), (3, False, False), (4, True, True), (4, True, False), (4, False, False), (8, True, False)]
forms = pytest.mark.parametrize(("bits", "sym", "signed"), FORMS, ids=[f"{b}-{s:d}{n:d}" for b, s, n in FORMS])
# [B, N]: about the tiles of 16 columns and programs of 32 and 64 rows, and what has no whole tiles.
SHAPES = [(32, 1), (32, 33), (64, 70), (96, 31), (128, 65), (48, 5), (100, 40), (7, 3)]
COUNT = 9

pytestmark = pytest.mark.usefixtures("one_thread")


def make(columns: int, rows: int, seed: int = 0) -> dict[str, Tensor]:
    """What is passed on reaches all later columns. What is on the diagonal and below it must not matter. One row is
    zero, and one has weights of one sign."""
    generator = torch.Generator().manual_seed(1000 * columns + rows + seed)
    x = torch.randn(columns, rows, generator=generator)
    x[:, 0] = 0
    x[:, -1] = x[:, -1].abs()
    distance = torch.arange(columns) - torch.arange(columns).unsqueeze(1)
    follow = torch.where(distance > 0, 0.3 ** distance.clamp(min=0), torch.nan)
    follow += 0.004 * torch.randn(columns, columns, generator=generator)
    importance = 0.1 + torch.rand(columns, generator=generator)
    return {
        "x": x,
        "follow": follow,
        "importance": importance,
        "weight": torch.randn(columns, rows, generator=generator),
    }


def rounded(a: dict[str, Tensor], bits: int, sym: bool, signed: bool, device: str = "cpu") -> dict[str, Tensor]:
    """All that `round_group` sets, which is poisoned before and lies between other numbers."""
    columns, rows = a["x"].shape
    given = {n: t.to(device, copy=True) for n, t in a.items()}
    poison = {
        "codes": (columns + 2, rows, torch.uint8),
        "scale": (3, rows, torch.float16),
        "zero_point": (3, rows, torch.uint8),
    }
    made = {n: torch.full((k, m), 77, dtype=dtype, device=device) for n, (k, m, dtype) in poison.items()}
    around = torch.full((columns + 2, rows), torch.nan, device=device)
    around[1:-1] = given["weight"]
    sets = {
        "weight": around[1:-1],
        "codes": made["codes"][1:-1],
        "scale": made["scale"][1],
        "zero_point": made["zero_point"][1],
    }
    kept = {n: given[n] for n in ("x", "follow", "importance")}
    round_group(**kept, **sets, bits=bits, sym=sym, signed=signed, count=COUNT)
    assert all(torch.equal(t.cpu().nan_to_num(), a[n].nan_to_num()) for n, t in kept.items())
    assert around[0].isnan().all()
    assert around[-1].isnan().all()
    assert all((t[0] == 77).all() and (t[-1] == 77).all() for t in made.values())
    return {n: t.cpu().clone() for n, t in sets.items()}


def check(b: dict[str, Tensor], a: dict[str, Tensor], bits: int, sym: bool, signed: bool) -> None:
    """The grid is one of the candidates, to within a step of fp16, and loses as little as the best of them, but for
    what a near-tie of a code may change; codes are the nearest ones on it; what is left of the weights is theirs."""
    s, z = b["scale"].float(), b["zero_point"].float()
    scale, zero = candidate_grids(a["x"], bits, sym, signed, COUNT)
    near = ((scale.float() - s).abs() <= 2.0**-10 * s.abs()) & (zero == b["zero_point"])
    assert near.any(0).all()
    columns = len(a["x"])
    arguments = a | {"scale": s.expand(columns, -1), "zero_point": z.expand(columns, -1)}
    # Of what columns pass on in blocks of whole tiles, three products of TF32 leave out 2⁻²¹.
    check_codes(b["codes"], arguments, bits, before=False, unit=8 * U)
    chosen, best = (loss(a, bits, *grid) for grid in ((s, z), best_of(a, bits, sym, signed)))
    assert (chosen <= best * (1 + 1e-3) + 1e-12).double().mean() >= 0.97
    assert chosen.sum() <= best.sum() * 1.001 + 1e-12
    left = a["weight"].double() - (b["codes"].double() - z.double()) * s.double()
    assert torch.allclose(b["weight"].double(), left, rtol=4 * U, atol=4 * U * float(left.abs().max()))


def best_of(a: dict[str, Tensor], bits: int, sym: bool, signed: bool) -> tuple[Tensor, Tensor]:
    scale, zero_point = best_grid(a["x"], [a["follow"]], a["importance"], bits, sym, signed, COUNT)
    return scale.float(), zero_point.float()


def loss(a: dict[str, Tensor], bits: int, scale: Tensor, zero_point: Tensor) -> Tensor:
    """[N]: what rounding with this grid for each row loses, in fp64."""
    x, follow, s, z = a["x"].double(), a["follow"].double(), scale.double(), zero_point.double()
    lost = torch.zeros_like(s)
    for i in range(len(x)):
        p = x[i] - ((x[i] / s).round().add(z).clamp(0, 2**bits - 1) - z) * s
        lost += a["importance"][i].double() * p**2
        x[i + 1 :] -= torch.outer(follow[i, i + 1 :], p)
    return lost


@forms
@pytest.mark.parametrize(("columns", "rows"), SHAPES)
def test_the_best_grid_and_its_codes(columns: int, rows: int, bits: int, sym: bool, signed: bool) -> None:
    a = make(columns, rows)
    check(rounded(a, bits, sym, signed), a, bits, sym, signed)


def test_of_equal_grids_the_first_is_taken() -> None:
    """All grids of a row of zeros lose nothing."""
    a = make(32, 4) | {"x": torch.zeros(32, 4)}
    scale, zero_point = candidate_grids(a["x"], 4, False, False, COUNT)
    b = rounded(a, 4, False, False)
    assert torch.equal(b["scale"], scale[0])
    assert torch.equal(b["zero_point"], zero_point[0])


HOSTILE = {"infinite": torch.inf, "NaN": torch.nan, "beyond fp16": 1e9}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("sym", [True, False])
def test_a_row_without_a_grid_has_no_finite_scale(value: float, sym: bool, device: str) -> None:
    """`solve` looks for it at the end. The other rows are not touched by it."""
    a = make(64, 40)
    bad = a | {"x": a["x"].clone()}
    bad["x"][5, 7] = value
    b, c = (rounded(each, 4, sym, sym, device) for each in (a, bad))
    others = torch.arange(40) != 7
    assert not c["scale"][7].isfinite()
    assert c["scale"][others].isfinite().all()
    assert all(torch.equal(b[n][..., others], c[n][..., others]) for n in b)


def test_a_weight_too_large_for_the_widest_grid_only() -> None:
    """A narrower one that fp16 can hold is taken."""
    a = make(32, 3)
    a["x"][4, 1] = 65504 * 7.5 * 1.5
    assert rounded(a, 4, True, True)["scale"].isfinite().all()


# Every number of tiles that is common, ends of a program's rows.
EMULATED = [(32, 1), (64, 70), (128, 33)]


@pytest.mark.parametrize(("bits", "sym", "signed"), [FORMS[0], FORMS[1], FORMS[4]], ids=["sym", "asym 3", "asym"])
@pytest.mark.parametrize(("columns", "rows"), EMULATED)
def test_kernels_run_as_python_agree(
    columns: int, rows: int, bits: int, sym: bool, signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptq_ao.kernels.gluon import groups

    a = make(columns, rows)
    monkeypatch.setattr(groups, "launch_there", gluon_in_torch.launch)
    monkeypatch.setattr("gptq_ao.kernels.groups.in_gluon", lambda x: True)
    b = rounded(a, bits, sym, signed)
    monkeypatch.undo()
    check(b, a, bits, sym, signed)
    plain = rounded(a, bits, sym, signed)
    assert all((b[n] == plain[n]).double().mean() >= 0.99 for n in ("codes", "scale", "zero_point"))


@pytest.mark.gpu
@forms
def test_on_cuda(bits: int, sym: bool, signed: bool) -> None:
    for columns, rows in [*SHAPES, (128, 3001)]:
        a = make(columns, rows)
        b = rounded(a, bits, sym, signed, "cuda")
        check(b, a, bits, sym, signed)
        again = rounded(a, bits, sym, signed, "cuda")
        assert all(torch.equal(b[n], again[n]) for n in b)
        # A factor that is the transpose of a contiguous one, as `solve_triangular` returns it.
        other = rounded(a | {"follow": a["follow"].T.contiguous().T}, bits, sym, signed, "cuda")
        assert all(torch.equal(b[n], other[n]) for n in b)


WIDTHS = [128, pytest.param(32, marks=pytest.mark.long)]
TYPES = {"codes": "*u8", "zero_point": "*u8", "scale": "*fp16", "rows": "i32", "count": "i32", "grids": "i32"}
ABSENT = {"rate": ["weight", "codes", "scale", "zero_point"], "round": ["importance"]}


@pytest.mark.parametrize("architecture", [80, 90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("sym", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ABSENT)
def test_kernels_compile_without_spilling(
    kind: str, sym: bool, columns: int, architecture: int, compile_ahead: Callable[..., Any]
) -> None:
    from gptq_ao.kernels.gluon import groups, tiles

    rows = groups.RATE_ROWS if kind == "rate" else groups.ROUND_ROWS
    constants: dict[str, Any] = {"SYM": sym, "COLUMNS": columns, "ROWS": rows, **dict.fromkeys(ABSENT[kind])}
    types = TYPES | {"levels": "fp32"}
    _, used = compile_ahead(groups._walk, constants, types, "*fp32", dict(tiles.OPTIONS), architecture)
    assert used["STACK"] == used["LOCAL"] == "0"
