"""How fast a device is, measured in a fraction of a second, and how long a given work takes it."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from gptq_ao.kernels.columns import MAX_COLUMNS
from gptq_ao.kernels.groups import round_group
from gptq_ao.planning.footprint import Work
from gptq_ao.recipe import Recipe
from gptq_ao.solver.factor import factor
from gptq_ao.solver.fp32 import ieee_fp32
from gptq_ao.solver.hessian import Hessian
from gptq_ao.solver.solve import solve

__all__ = ["Speed", "measure_speed"]

CANDIDATES = 16  # of a scale, with either sign


@dataclass(frozen=True)
class Speed:
    """Of one device.

    Attributes:
        flops: dtype → operations of large products per second.
        bandwidth: bytes read and written per second.
        step: seconds per column that is solved, however short.
        rounding: seconds per weight that is rounded in the loops over columns.
    """

    flops: Mapping[torch.dtype, float]
    bandwidth: float
    step: float
    rounding: float

    def seconds(self, work: Work) -> float:
        """As if nothing overlapped."""
        products = sum(count / self.flops.get(dtype, min(self.flops.values())) for dtype, count in work.flops.items())
        solving = work.steps * self.step + work.rounded * self.rounding
        return products + work.moved / self.bandwidth + solving


def measure_speed(device: torch.device, dtypes: Iterable[torch.dtype]) -> Speed:
    side = 512 if device.type == "cpu" else 4096
    flops = {}
    for dtype in {torch.float32, torch.float64, *(d for d in dtypes if d.is_floating_point)}:
        a = torch.ones(side, side, dtype=dtype, device=device)
        flops[dtype] = 2 * side**3 / _shortest(lambda a=a: a @ a, device)  # type: ignore[misc]
    large = torch.ones(16 * side * side, dtype=torch.float32, device=device)
    columns = MAX_COLUMNS
    eye = torch.eye(columns, dtype=torch.float32, device=device)
    f = factor(Hessian(eye, columns), Recipe(4, columns, act_order="static"))
    weight = torch.ones(16, columns, dtype=torch.float32, device=device)
    rows = 64 if device.type == "cpu" else 8192
    block = torch.ones(columns, rows, dtype=torch.float32, device=device)
    codes, scale, zero_point = (
        torch.empty(*shape, rows, dtype=dtype, device=device)
        for shape, dtype in (((columns,), torch.uint8), ((), torch.float16), ((), torch.uint8))
    )

    def rounded() -> None:
        left = block.clone()
        round_group(block, eye, f.pivots, left, codes, scale, zero_point, 4, sym=True, signed=True, count=CANDIDATES)

    return Speed(
        flops,
        2 * large.nbytes / _shortest(lambda: large + 1, device),
        _shortest(lambda: solve(weight, f), device) / columns,
        _shortest(rounded, device) / (columns * rows * (2 * CANDIDATES + 1)),
    )


def _shortest(function: Callable[[], object], device: torch.device) -> float:
    times = []
    with torch.no_grad(), ieee_fp32():
        for _ in range(3):
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return min(times)
