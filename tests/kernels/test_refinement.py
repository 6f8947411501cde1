"""The steps of refinement, in plain torch and as Triton kernels: both are held against the same steps in fp64."""

import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gptq_ao.kernels.refinement import fit_codes, fit_scale
from tests.kernels import gluon_in_torch

U = 2.0**-24  # unit roundoff of fp32
# [B, N]: about the tiles of 32 columns and the programs of 8 and 64 rows that the kernels work with.
SHAPES = [(1, 1), (7, 33), (16, 8), (32, 65), (33, 1), (64, 9), (80, 5), (100, 3), (128, 4)]

pytestmark = pytest.mark.usefixtures("one_thread")


def make(columns: int, rows: int, bits: int, signed: bool = True) -> dict[str, Tensor]:
    """A group in the middle of a sweep: H [B, B] is a part of a larger matrix, and of the error E = W − Ŵ a gradient
    comes from other columns, too. The first row has no steps; in some the scale is far off."""
    generator = torch.Generator().manual_seed(1000 * columns + 10 * rows + bits)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = randn(4 * columns + 40, columns + 5) * (0.2 + torch.rand(columns + 5, generator=generator))
    H = (x.T @ x)[2 : columns + 2, 2 : columns + 2]
    size = 2.5 / 2 ** (bits - 1) * (0.5 + torch.rand(rows, generator=generator))
    scale = (torch.where(randn(rows) > 0, size, -size) if signed else size).half()
    zero_point = torch.randint(0, 2**bits, (rows,), generator=generator).float()
    codes = torch.randint(0, 2**bits, (columns, rows), generator=generator, dtype=torch.uint8)
    codes[:, 0] = zero_point[0].to(torch.uint8)
    target = (codes - zero_point) * scale.float() * (0.8 + 0.5 * torch.rand(rows, generator=generator))
    target += 0.3 * randn(columns, rows) * scale.abs().float()
    error = target - (codes - zero_point) * scale.float()
    gradient = H @ error + 0.2 * randn(columns, rows) * H.diagonal().sqrt().unsqueeze(1)
    tensors = {"H": H, "gradient": gradient, "codes": codes, "scale": scale, "zero_point": zero_point}
    return {**tensors, "target": target, "error": error, "change": torch.full_like(error, torch.nan)}


def copied(a: dict[str, Tensor], device: str = "cpu") -> dict[str, Tensor]:
    return {n: t.to(device, copy=True) if n != "H" else t.to(device) for n, t in a.items()}


def of_scale(a: dict[str, Tensor]) -> dict[str, Any]:
    return {n: t for n, t in a.items() if n != "target"}


def scales_fitted(a: dict[str, Tensor], signed: bool) -> dict[str, Tensor]:
    fit_scale(**of_scale(a), signed=signed)
    return a


def codes_fitted(a: dict[str, Any], bits: int) -> dict[str, Tensor]:
    fit_codes(**a, bits=bits)
    return a


def check_scales(b: dict[str, Tensor], a: dict[str, Tensor], signed: bool, unit: float = U) -> None:
    """From a to b: in each row the scale is the best one to within a step of fp16, or the old one is about as good."""
    assert all(torch.equal(b[n], a[n]) for n in ("H", "codes", "zero_point", "target"))
    assert b["scale"].dtype == torch.float16
    old, new = a["scale"].double(), b["scale"].double()
    steps = a["codes"].double() - a["zero_point"].double()
    product = a["H"].double() @ steps
    slope, curvature = (steps * a["gradient"].double()).sum(0), (steps * product).sum(0)
    # Sums of B products, of which each is rounded.
    wrong = 2 * len(steps) * unit * (steps * a["gradient"].double()).abs().sum(0)
    wrong += (
        2
        * len(steps)
        * unit
        * (slope / curvature).nan_to_num().abs()
        * (steps * (a["H"].double().abs() @ steps.abs())).abs().sum(0)
    )
    best = old + slope / curvature
    assert torch.equal(new[curvature == 0], old[curvature == 0])
    live = curvature > 0
    if not signed:
        assert (new > 0).all()
    changed = live & (new != old)
    near = (wrong / curvature + 2.0**-10 * best.abs())[changed]
    assert ((new - best).abs()[changed] <= near).all()
    # What was left would not gain more than rounding to fp16 takes.
    left = live & ~changed & (best > 0 if not signed else best != 0)
    gain = curvature * (best - old) ** 2
    assert (gain[left] <= (wrong.square() / curvature + curvature * (2.0**-10 * best) ** 2)[left]).all()
    assert changed.double().mean() > 0.4 or len(new) < 5
    # Error and gradient follow, and are those of the new scale.
    change = (old - new) * steps
    assert ((b["change"].double() - change).abs() <= 4 * U * change.abs()).all()
    assert torch.allclose(
        b["error"].double(),
        a["error"].double() + change,
        rtol=0,
        atol=8 * U * float(a["target"].abs().max() + change.abs().max()),
    )
    expected = a["gradient"].double() + a["H"].double() @ change
    size = a["gradient"].double().abs() + a["H"].double().abs() @ change.abs()
    assert ((b["gradient"].double() - expected).abs() <= (len(steps) + 4) * unit * size).all()


def check_codes(b: dict[str, Tensor], a: dict[str, Tensor], bits: int) -> None:
    """From a to b: each code is the nearest one *given the codes before it*; a near-tie may fall to either side. How
    near is what a running error analysis of the loop allows fp32. The error is that of the codes."""
    assert all(torch.equal(b[n], a[n]) for n in ("H", "scale", "zero_point", "target"))
    H, gradient, scale, zero = (a[n].double() for n in ("H", "gradient", "scale", "zero_point"))
    wrong = 2 * U * gradient.abs()
    same = []
    for i in range(len(H)):
        now = (a["codes"][i].double() - zero) * scale
        best = now + gradient[i] / H[i, i]
        place = (best / scale + zero).clamp(0, 2**bits - 1)
        # As the difference of target and error, `now` is as exact as those are.
        near = (wrong[i] / H[i, i] + 4 * U * (best.abs() + now.abs() + a["target"][i].abs())) / scale.abs() + U * place
        assert near.max() < 0.02  # or else all this says little
        code = b["codes"][i].double()
        assert ((place - code).abs() <= 0.5 + near).all(), f"column {i}"
        same.append(place.round() == code)
        p = now - (code - zero) * scale
        gradient[i + 1 :] += torch.outer(H[i, i + 1 :], p)
        of_p = 4 * U * (now.abs() + a["target"][i].abs() + p.abs())
        wrong[i + 1 :] += 1.01 * (
            torch.outer(H[i, i + 1 :].abs(), of_p + 3 * U * p.abs()) + 2 * U * gradient[i + 1 :].abs()
        )
    assert torch.stack(same).double().mean() >= 0.99
    value = (b["codes"].double() - zero) * scale
    error = a["target"].double() - value
    assert ((b["error"].double() - error).abs() <= 4 * U * (a["target"].abs() + value.abs())).all()
    grown = b["error"].double() - a["error"].double() + a["change"].double()
    size = a["target"].abs() + value.abs() + (a["target"] - a["error"]).abs() + a["change"].abs()
    assert ((b["change"].double() - grown).abs() <= 8 * U * size).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("columns", "rows"), [*SHAPES, (300, 20)])
def test_steps(columns: int, rows: int, bits: int) -> None:
    signed = bits != 8
    a = make(columns, rows, bits, signed)
    b = scales_fitted(copied(a), signed)
    check_scales(b, a, signed)
    if columns <= 128:
        check_codes(codes_fitted(copied(b), bits), b, bits)


def test_a_scale_that_cannot_be_is_not_taken() -> None:
    """Beyond fp16, zero, or of the other sign where that is not allowed."""
    columns, steps = 8, torch.ones(8, 4)
    H = torch.eye(columns)
    for best, taken in ((1e6, False), (1e-9, False), (-0.5, False), (0.5, True)):
        error = steps * (best - 1.0)
        a = {"H": H, "gradient": H @ error, "codes": torch.full((8, 4), 9, dtype=torch.uint8), "error": error}
        a |= {"change": torch.full_like(error, torch.nan)}
        a |= {"scale": torch.ones(4).half(), "zero_point": torch.full((4,), 8.0), "target": error + steps}
        b = scales_fitted(copied(a), signed=False)
        assert (b["scale"] == (best if taken else 1.0)).all()
        assert torch.equal(b["error"], a["error"] if not taken else torch.zeros_like(steps))
    negative = scales_fitted({**copied(a), "gradient": steps * -1.5, "error": steps * -1.5}, signed=True)
    assert (negative["scale"] == -0.5).all()


# Every number of tiles, full and not. The interpreter is slow.
INTERPRETED = [(1, 1, 8), (7, 33, 2), (32, 9, 4), (33, 1, 3), (64, 5, 2), (100, 3, 4), (128, 2, 3)]


def interpret(folder: Path) -> None:
    """In a process of its own: run the kernels on the CPU."""
    from gptq_ao.kernels.triton import refinement

    runpy.run_path(str(Path(__file__).with_name("ptx_in_numpy.py")))["install"]()
    results: dict[str, Tensor] = {}
    for columns, rows, bits in INTERPRETED:
        a: dict[str, Any] = copied(make(columns, rows, bits, bits != 8))
        refinement.fit_scale(**of_scale(a), signed=bits != 8)
        results |= {f"{columns}.scales.{n}": t.clone() for n, t in a.items()}
        refinement.fit_codes(**a, bits=bits)
        results |= {f"{columns}.codes.{n}": t.clone() for n, t in a.items()}
    save_file(results, folder / "results.safetensors")


@pytest.mark.parametrize(("columns", "rows", "bits"), INTERPRETED)
def test_kernels_in_the_interpreter_agree(columns: int, rows: int, bits: int, interpreted: dict[str, Tensor]) -> None:
    a = make(columns, rows, bits, bits != 8)
    b, c = ({n: interpreted[f"{columns}.{step}.{n}"] for n in a} for step in ("scales", "codes"))
    check_scales(b, a, bits != 8)
    check_codes(c, b, bits)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("tiles", [4, pytest.param(2, marks=pytest.mark.long), pytest.param(1, marks=pytest.mark.long)])
def test_codes_compile_without_spilling(tiles: int, architecture: int, compile_ahead: Callable[..., Any]) -> None:
    from gptq_ao.kernels.triton import refinement

    constants: dict[str, Any] = {"LEVELS": 15.0, "TILES": tiles, "ROWS": refinement.CODE_ROWS}
    options = {"num_warps": 1, "enable_fp_fusion": True}
    _, used = compile_ahead(refinement._fit_codes, constants, TYPES, "*fp32", options, architecture)
    assert used["STACK"] == used["LOCAL"] == "0"


@pytest.mark.parametrize(("columns", "rows", "bits"), [(32, 1, 8), (64, 33, 2), (128, 40, 4)])
def test_codes_in_gluon_run_as_python_agree(
    columns: int, rows: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptq_ao.kernels.gluon import refinement

    a = scales_fitted(copied(make(columns, rows, bits)), True)
    monkeypatch.setattr(refinement, "launch_there", gluon_in_torch.launch)
    monkeypatch.setattr("gptq_ao.kernels.refinement.in_gluon", lambda gradient: True)
    b = codes_fitted(copied(a), bits)
    check_codes(b, a, bits)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("columns", [128, pytest.param(32, marks=pytest.mark.long)])
def test_codes_in_gluon_compile(columns: int, architecture: int, compile_ahead: Callable[..., Any]) -> None:
    """A few addresses go to the stack, no more."""
    from gptq_ao.kernels.gluon import refinement, tiles

    constants: dict[str, Any] = {"COLUMNS": columns, "ROWS": refinement.ROWS}
    types = TYPES | {"levels": "fp32"}
    _, used = compile_ahead(refinement._fit_codes, constants, types, "*fp32", dict(tiles.OPTIONS), architecture)
    assert int(used["STACK"]) <= 256
    assert used["LOCAL"] == "0"


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("precision", ["tf32x3", pytest.param("tf32", marks=pytest.mark.long)])
def test_scales_compile(precision: str, architecture: int, compile_ahead: Callable[..., Any]) -> None:
    from gptq_ao.kernels.triton import refinement

    constants = {"SIGNED": True, "COLUMNS": 128, "ROWS": refinement.SCALE_ROWS, "PRECISION": precision}
    options = {"num_warps": 4, "enable_fp_fusion": True}
    compile_ahead(refinement._fit_scale, constants, TYPES, "*fp32", options, architecture)


TYPES = {"codes": "*u8", "scale": "*fp16", "stride": "i32", "rows": "i32", "columns": "i32"}


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_kernels_on_cuda_agree(bits: int) -> None:
    from gptq_ao.solver.fp32 import ieee_fp32

    for columns, rows in [*SHAPES, (128, 3000)]:
        signed = bits != 8
        a = make(columns, rows, bits, signed)
        # For the former, products are made of three of the latter.
        for precision, unit in (("ieee", 2.0**-20), ("tf32", 2.0**-10)):
            with ieee_fp32(cuda=precision):
                b = scales_fitted(copied(a, "cuda"), signed)
                b = copied(b)
                check_scales(b, a, signed, unit)
            check_codes(copied(codes_fitted(copied(b, "cuda"), bits)), b, bits)


@pytest.mark.gpu
def test_the_host_waits_for_no_group() -> None:
    """Nor for a sweep: however many there are, it looks at values as often."""
    from gptq_ao.recipe import Recipe
    from gptq_ao.solver.factor import factor
    from gptq_ao.solver.hessian import HessianObserver
    from gptq_ao.solver.refine import refine
    from gptq_ao.solver.solve import solve

    counts = []
    for width, sweeps in ((256, 1), (1024, 1), (1024, 3)):
        recipe = Recipe(4, 128, act_order="group_aware", signed_scale=True, scale_candidates=5, refine_sweeps=sweeps)
        observer = HessianObserver(width).cuda()
        observer(torch.randn(2 * width, width, device="cuda"))
        (hessian,) = observer.finish()
        f, weight = factor(hessian, recipe), torch.randn(96, width, device="cuda")
        refine(solve(weight, f), weight, hessian, f)  # compiles
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # says itself that it is a prototype
            try:
                refine(solve(weight, f), weight, hessian, f)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("called a synchronizing" in str(w.message) for w in caught))
    assert counts[0] == counts[1] == counts[2] > 0
