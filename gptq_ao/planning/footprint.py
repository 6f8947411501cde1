"""What a plan takes of the device that computes: memory and work."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from gptq_ao.passes.records import Portion
from gptq_ao.planning.solve_cost import SolveCost

__all__ = ["Footprint", "Work"]


@dataclass
class Work:
    """Operations in products by dtype, bytes read and written by other operators, steps that follow one another, and
    weights that are rounded column by column (`SolveCost.rounded`)."""

    flops: Counter[torch.dtype] = field(default_factory=Counter)
    moved: int = 0
    steps: int = 0
    rounded: int = 0

    def add(self, flops: Mapping[torch.dtype, int], moved: int, times: int) -> None:
        for dtype, count in flops.items():
            self.flops[dtype] += times * count
        self.moved += times * moved

    def add_solve(self, cost: SolveCost, times: int) -> None:
        self.flops[torch.float64] += times * cost.fp64
        self.flops[torch.float32] += times * cost.fp32
        self.steps += times * cost.columns
        self.rounded += times * cost.rounded


@dataclass(frozen=True)
class Footprint:
    """What a plan needs of the device that computes, in bytes of tensors: libraries' workspaces come on top.

    Attributes:
        resident: of the model, at the beginning.
        working: at most, if waiting activations are elsewhere: all but the batch that runs and the one that follows.
        peak: at most, if all activations wait on the device.
        activations: that wait, when they are most.
        originals: of weights in files that are quantized and whose original values are still to be read, at most.
        rows: name of a `SharedInput` → rows of calibration data, of one expert on average.
        packed: weight → bytes in memory when it is quantized.
        calibrate, solve: the work of both phases.
        portions: of each stage.
        largest: the stage in which `working` is reached, by its first weight, and in how many portions; "" if in none.
    """

    resident: int
    working: int
    peak: int
    activations: int
    originals: int
    rows: dict[str, int]
    packed: dict[str, int]
    calibrate: Work
    solve: Work
    portions: tuple[tuple[Portion, ...], ...] = ()
    largest: tuple[str, int] = ("", 1)
