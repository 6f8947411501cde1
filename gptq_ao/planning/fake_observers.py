"""The observers of a segment, for fake tensors."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gptq_ao.passes.calibrate import compared
from gptq_ao.passes.records import Segment, SharedInput, Stage
from gptq_ao.solver.hessian import HessianObserver

__all__ = ["FakeObserver", "fake_observers"]


class FakeObserver(HessianObserver):
    """Its sums are there from the beginning, and rows that are sorted by expert fall to them evenly."""

    panel = 2**62  # one product takes as much memory as one after the other, and less time to predict

    def __init__(self, shared: SharedInput, segment: Segment, device: torch.device) -> None:
        super().__init__(shared.in_features, shared.experts)
        self.start(device, *compared(segment, shared))
        self.seen = 0  # rows

    @property
    def compares(self) -> bool:
        """Whether it sees what is otherwise in the original model."""
        return self._drift is not None or bool(self._residuals)

    def restart(self) -> int:
        """Rows that were seen since the last call."""
        seen, self.seen = self.seen, 0
        return seen

    def forward(self, x: Tensor, *others: Any) -> None:
        self.seen += x.numel() // self.in_features
        super().forward(x, *others)

    def _bounds(self, x: Tensor, offsets: Tensor) -> list[int]:
        # A fake has no values: rows are divided equally, which takes as much memory and work in all.
        return [x.shape[0] * i // self.experts for i in range(self.experts + 1)]


@contextlib.contextmanager
def fake_observers(stage: Stage, segment: Segment, device: torch.device) -> Iterator[list[FakeObserver]]:
    """Within, the segment's observers, in the order of the stage's inputs, take fakes."""
    before = {shared.name: segment.module.get_submodule(shared.name) for shared in stage.inputs}
    fakes = []
    for shared in stage.inputs:
        fakes.append(FakeObserver(shared, segment, device))
        setattr(segment.module, shared.name, fakes[-1])
    try:
        yield fakes
    finally:
        for name, observer in before.items():
            setattr(segment.module, name, observer)
