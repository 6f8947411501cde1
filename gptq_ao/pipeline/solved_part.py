"""Some rows of a weight, solved."""

from dataclasses import dataclass

from torch import Tensor

from gptq_ao.adapter import LowRank
from gptq_ao.passes.records import Part
from gptq_ao.solver.solution import Solution

__all__ = ["SolvedPart"]


@dataclass(frozen=True)
class SolvedPart:
    """Some rows of a weight, solved.

    Attributes:
        solution: of the rows [n, K].
        changed, energy: tr(E·H·Eᵀ) and tr(W·H·Wᵀ), summed over all calibration rows; None without a Hessian.
        adapter: B·A for the rows [n, K].
        expert_rows: of each expert whose rows these are, in their order; empty for what is no expert.
        See `report.WeightReport` for the others.
    """

    part: Part
    solution: Solution
    method: str
    rows: int = 0
    damp: float | None = None
    dead: int = 0
    changed: float | None = None
    energy: float | None = None
    fallback: str | None = None
    adapter: LowRank | None = None
    expert_rows: tuple[int, ...] = ()

    def dequantize(self) -> Tensor:
        """What the rows are from now on, [n, K] fp32."""
        rows = self.solution.dequantize()
        return rows if self.adapter is None else rows + self.adapter.dense()

    @property
    def error(self) -> float | None:
        """The share of the output's energy that the rounding changed."""
        if self.changed is None or self.energy is None:
            return None
        return self.changed / self.energy if self.energy > 0 else 0.0
