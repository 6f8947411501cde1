"""max_memory: what may be said, and what becomes of it. Counting bytes: the tracker, and the solver's formula."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_ao.calibration.activation_store import Budget
from gptq_ao.config import EFFORTS, gptq_config
from gptq_ao.errors import ConfigError
from gptq_ao.kernels.columns import SCRATCH, score_grids
from gptq_ao.passes.records import Part
from gptq_ao.pipeline.solve_together import solve_together
from gptq_ao.planning import memory
from gptq_ao.planning.limits import Limits, read_limits
from gptq_ao.planning.live_bytes import LiveBytes
from gptq_ao.planning.memory import choose_budget, free_bytes, readable
from gptq_ao.planning.simulate import Footprint, Work
from gptq_ao.planning.solve_cost import SolveCost, solve_cost
from gptq_ao.recipe import Recipe
from gptq_ao.solver.hessian import HessianObserver
from gptq_ao.solver.solve import round_to_nearest
from gptq_ao.tensor import tensor_class

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "device", "limits"),
    [
        (None, CUDA, Limits()),
        ({}, CPU, Limits()),
        ({"cuda": "8GiB", "cpu": 10**9}, CUDA, Limits(8 * 2**30, 10**9)),
        ({"cuda:1": "1.5 MB"}, torch.device("cuda:1"), Limits(1_500_000)),
        ({1: " 512mib "}, torch.device("cuda", 1), Limits(2**29)),
        ({"cuda:0": "0"}, CUDA, Limits(0)),
        ({"cpu": "2KiB"}, CPU, Limits(host=2048)),
    ],
)
def test_limits(given: Any, device: torch.device, limits: Limits) -> None:
    assert read_limits(given, device) == limits


@pytest.mark.parametrize(
    ("given", "device", "message"),
    [
        ("8GiB", CUDA, r"max_memory is a str: give a dict such as"),
        ({"cuda": "8GiB"}, CPU, r"max_memory names 'cuda': it may have the key 'cpu', for waiting activations$"),
        ({"cuda:1": 1}, torch.device("cuda:0"), r"names 'cuda:1': .* and 'cuda', 'cuda:0' or 0 for the device that"),
        ({1: 1}, CUDA, r"names 1: it may"),
        ({True: 1}, torch.device("cuda:1"), r"names True: it may"),
        ({"gpu": 1}, CUDA, r"names 'gpu': it may"),
        ({"cuda": 1, 0: 1}, CUDA, r"names 0 twice, by different names: \['cuda', 0\]"),
        ({"cuda": "8 apples"}, CUDA, r"max_memory of 'cuda' is '8 apples': give bytes, or a string such as '8GiB'"),
        ({"cpu": -1}, CPU, r"max_memory of 'cpu' is -1: give bytes"),
        ({"cpu": 1.5}, CPU, r"is 1.5: give bytes"),
        ({"cpu": True}, CPU, r"is True: give bytes"),
        ({"cpu": ""}, CPU, r"is '': give bytes"),
    ],
)
def test_limits_that_mean_nothing(given: Any, device: torch.device, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_limits(given, device)


def test_the_budget_is_what_the_working_set_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    footprint = Footprint(100, 400, 900, 600, 0, {}, {}, Work(), Work())
    free: dict[str, int | None] = {"cuda": 1000, "cpu": 5000}
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[device.type])
    assert choose_budget(Limits(), footprint, CUDA) == Budget(100 + 900 - 400, 4000)
    assert choose_budget(Limits(500, 70), footprint, CUDA) == Budget(100, 70)
    assert choose_budget(Limits(400), footprint, CUDA) == Budget(0, 4000)
    with pytest.raises(
        ConfigError, match=r"max_memory allows 399 B on cuda, but .* take 400 B, .*: allow more, or use"
    ):
        choose_budget(Limits(399), footprint, CUDA)
    free["cuda"] = 10  # it may still fit: nothing is refused for what was not promised
    assert choose_budget(Limits(), footprint, CUDA).device == 0
    free.update(cuda=None, cpu=None)
    assert choose_budget(Limits(), footprint, CUDA) == Budget(None, None)


def test_free_memory_of_this_machine() -> None:
    free = free_bytes(CPU)
    assert free is None or 2**20 < free < 2**50
    assert torch.cuda.is_available() or free_bytes(CUDA) is None


def test_sizes_are_readable() -> None:
    assert [readable(n) for n in (0, 1023, 1536, 3 * 2**20, 5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.50 KiB",
        "3.00 MiB",
        "5120.00 GiB",
    ]


def test_live_bytes_follows_storages_not_tensors() -> None:
    given = torch.ones(10)
    with LiveBytes() as tracker:
        assert tracker.add(given) == 40
        assert tracker.add(given.view(2, 5)) == 0
        a = torch.ones(100)
        view = a[10:].t()
        b = a + 1
        assert tracker.live["cpu"] == 40 + 800
        del a
        assert tracker.live["cpu"] == 840  # the view keeps it
        del view
        assert tracker.live["cpu"] == 440
        b.add_(1)
        b = b.double()
        assert tracker.peak["cpu"] == 40 + 400 + 800
        tracker.restart()
        assert tracker.peak["cpu"] == 40 + 800
        torch.ones(2, 3) @ torch.ones(3, 4)
        assert tracker.flops == {torch.float32: 2 * 2 * 3 * 4}
        b.t()
        assert tracker.moved["cpu"] == 24 + 48  # what `ones` wrote
    del b, given
    assert tracker.live["cpu"] == 0


def test_live_bytes_sees_inside_quantized_tensors() -> None:
    s = round_to_nearest(torch.randn(32, 64), Recipe(4, 32))
    with LiveBytes() as tracker:
        before = tracker.add(s.codes, s.scale, s.zero_point)
        weight = tensor_class(4).from_codes(s.codes, s.scale, s.zero_point, dtype=torch.float32)
        assert tracker.live["cpu"] - before == weight.qdata.nbytes + weight.scale_zero.nbytes
        copy = weight.clone()
        assert tracker.live["cpu"] - before == 2 * (weight.qdata.nbytes + weight.scale_zero.nbytes)
        del copy
        tracker.restart()
        weight.dequantize()
        # Codes of a byte beside the result: `gptq_ao::dequantize` is written in Python, and looked into.
        assert tracker.peak["cpu"] >= tracker.live["cpu"] + 32 * 64 * (1 + 4)


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"effort": "fast"},
    "min-max": {"effort": "fast", "scale_candidates": 1},
    "static": {"act_order": "static"},
    "none": {"act_order": "none"},
    "group": {"act_order": "group"},
    "asym": {"sym": False, "bits": 2},
    "row": {"group_size": -1},
    "rtn": {"method": "rtn"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "k"), [((40,), 128), ((96, 48, 300), 128), ((8, 24), 320)])
@pytest.mark.parametrize("case", CASES)
def test_the_solver_takes_what_its_formula_says(case: str, rows: tuple[int, ...], k: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    c = gptq_config(**{"group_size": 64, **CASES[case]})
    weights: dict[Part, Tensor] = {
        Part(str(i), 0, n): torch.randn(n, k, generator=g).to(dtype) for i, n in enumerate(rows)
    }
    observer = HessianObserver(k)
    x = torch.randn(2000, k, generator=g)
    compensated = dtype == torch.float32
    observer(x, None, None, 1.01 * x if compensated else None)
    (hessian,) = observer.finish()
    with LiveBytes() as tracker:
        tracker.add(hessian.matrix, *weights.values(), *([] if hessian.drift is None else [hessian.drift]))
        before = tracker.live["cpu"]
        kept = 0
        for solved in solve_together(weights, {p.weight: c for p in weights}, hessian, strict=True):
            kept = max(kept, tracker.live["cpu"] - before)
            del solved
    cost = solve_cost(rows, k, dtype.itemsize, c.recipe, compensated)
    assert cost.peak == pytest.approx(tracker.peak["cpu"] - before, rel=0.1)
    assert cost.kept == pytest.approx(kept, rel=0.1)
    passes = {"rtn": 0, "min-max": 1, "fast": 2, "static": 1 + 4}.get(case, 2 + 4)
    assert cost.columns == passes * k


def test_many_rows_are_tried_in_parts() -> None:
    """The copy for each grid does not grow with the rows, and the parts are what the whole would be."""
    block, grids, n = 64, 40, 3 * SCRATCH // (4 * 64 * 40) + 5
    g = torch.Generator().manual_seed(0)
    x, follow = torch.randn(block, n, generator=g), torch.randn(block, block, generator=g) / 20
    importance, scale = torch.rand(block, generator=g), torch.rand(grids, n, generator=g) + 0.1
    zero_point = torch.full((grids, n), 8.0)
    with LiveBytes() as tracker:
        before = tracker.add(x, scale, zero_point)
        loss = score_grids(x, follow, importance, scale, zero_point, 4)
        assert tracker.peak["cpu"] - before <= 1.2 * SCRATCH + 2 * loss.nbytes
    some = torch.tensor([0, n // 2, n - 1])
    alone = score_grids(x[:, some], follow, importance, scale[:, some], zero_point[:, some], 4)
    # 64 sums of products in fp32; a multiply-add may be rounded once or twice. No weight here is at a tie of two codes.
    torch.testing.assert_close(loss[:, some], alone, rtol=1e-4, atol=0)


def test_the_work_of_the_solver() -> None:
    k, rows = 1024, [256]

    def cost(compensated: bool = False, **settings: Any) -> SolveCost:
        recipe = Recipe(**{**EFFORTS["fast"], "scale_candidates": 1, **settings})
        return solve_cost(rows, k, 4, recipe, compensated)

    plain = cost()
    assert (plain.fp64, plain.fp32) == (k**3 // 3, 256 * k * k * (1 + 4))
    assert plain.rounded == 256 * k
    assert cost(scale_candidates=20).rounded == (1 + 2 * 20) * 256 * k  # either sign
    assert cost(scale_candidates=20, signed_scale=False).rounded == (1 + 20) * 256 * k
    assert cost(scale_candidates=20, sym=False).rounded == (1 + 2 * 20) * 256 * k  # either zero point
    assert cost(scale_candidates=20, act_order="static") == cost(act_order="static")
    swept = cost(refine_sweeps=3)
    assert (swept.columns, swept.rounded) == (4 * k, 4 * 256 * k)
    assert swept.fp32 - plain.fp32 == 3 * 2 * 256 * k * k
    made_up = cost(compensate="inputs", compensated=True)
    assert made_up.fp32 - plain.fp32 == k**3 // 3 + 4 * 256 * k * k
    assert cost(compensate="inputs") == cost(compensated=True) == plain


def test_the_factor_of_a_wide_hessian_is_in_fp32() -> None:
    c = gptq_config(4, 128)
    narrow, wide = (solve_cost([1], k, 2, c.recipe) for k in (8192, 8320))
    # fp32 weights beside H and its factor in fp64, or beside A and H damped and H's diagonal when it is refined.
    assert narrow.peak == pytest.approx(2 * 8 * 8192**2, rel=0.01)
    assert wide.peak == pytest.approx(3 * 4 * 8320**2, rel=0.01)
    assert (narrow.fp64, wide.fp64) == (8192**3 // 3, 0)
