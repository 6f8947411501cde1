"""Which Hessian an expert is solved with: its own, or that of all experts' rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_ao.solver.hessian import Hessian

__all__ = ["ExpertHessian", "ExpertHessians"]


@dataclass(frozen=True)
class ExpertHessian:
    """What expert `number` is solved with.

    Attributes:
        rows: of its own.
        fallback: why that is not the Hessian of its own rows; None if it is.
    """

    number: int
    hessian: Hessian
    rows: int
    fallback: str | None = None


class ExpertHessians:
    """Takes the Hessians of a `SharedInput`, portion by portion, in order. An expert that saw fewer than `min_rows`
    rows waits until those of all are known, and gets the Hessian of them. A single Hessian is what it is."""

    def __init__(self, experts: int, min_rows: int) -> None:
        self._experts, self._min_rows = experts, min_rows
        self._few: list[tuple[int, int]] = []  # number of an expert, and its rows
        self._seen = self._rows = 0
        self._sum: Tensor | None = None  # XᵀX of all so far

    def add(self, hessians: tuple[Hessian, ...]) -> list[ExpertHessian]:
        """Those that can be solved now; with the last portion, all that are left."""
        if self._experts == 1:
            return [ExpertHessian(0, h, h.rows) for h in hessians]
        ready = []
        for h in hessians:
            self._sum = torch.zeros_like(h.matrix) if self._sum is None else self._sum
            self._sum.add_(h.matrix, alpha=h.rows)
            self._rows += h.rows
            if h.rows < self._min_rows:
                self._few.append((self._seen, h.rows))
            else:
                ready.append(ExpertHessian(self._seen, h, h.rows))
            self._seen += 1
        if self._seen < self._experts or self._sum is None:
            return ready
        together = Hessian(self._sum.div_(max(self._rows, 1)), self._rows)
        self._sum = None
        why = f"the expert saw {{}} rows, fewer than {self._min_rows}: solved with the Hessian of all experts' rows"
        return [*ready, *(ExpertHessian(number, together, rows, why.format(rows)) for number, rows in self._few)]
