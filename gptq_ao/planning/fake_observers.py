"""The observers of a segment, for fake tensors."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gptq_ao.passes.calibrate import compared
from gptq_ao.passes.records import Segment, SharedInput, Stage
from gptq_ao.planning.live_bytes import LiveBytes
from gptq_ao.solver.hessian import HessianObserver

__all__ = ["FakeObserver", "fake_observers"]


class FakeObserver(HessianObserver):
    """Its sums are there from the beginning, and rows that are sorted by expert fall to them evenly."""

    panel = 2**62  # one product takes as much memory as one after the other, and less time to predict

    def __init__(
        self, shared: SharedInput, segment: Segment, device: torch.device, tracker: LiveBytes | None = None
    ) -> None:
        super().__init__(shared.in_features, shared.experts)
        self.start(device, *compared(segment, shared))
        self._tracker = tracker
        self.seen = 0  # rows
        self.flops: Counter[torch.dtype] = Counter()

    @property
    def compares(self) -> bool:
        """Whether it sees what is otherwise in the original model."""
        return self._drift is not None or bool(self._residuals)

    @property
    def size(self) -> int:
        """Bytes of one Hessian, with what is observed besides."""
        tensors = [self._sum, self._drift, *self._residuals]
        return sum(t.nbytes for t in tensors if t is not None) // self.experts

    def restart(self) -> tuple[int, Counter[torch.dtype]]:
        """Rows that were seen since the last call, and operations of products that this took."""
        found = self.seen, self.flops
        self.seen, self.flops = 0, Counter()
        return found

    def forward(self, x: Tensor, *others: Any) -> None:
        self.seen += x.numel() // self.in_features
        before = Counter(self._tracker.flops) if self._tracker is not None else None
        super().forward(x, *others)
        if self._tracker is not None and before is not None:
            self.flops += self._tracker.flops - before

    def _bounds(self, x: Tensor, offsets: Tensor) -> list[int]:
        # A fake has no values: rows are divided equally, which takes as much memory and work in all.
        return [x.shape[0] * i // self.experts for i in range(self.experts + 1)]


@contextlib.contextmanager
def fake_observers(
    stage: Stage, segment: Segment, device: torch.device, tracker: LiveBytes | None = None
) -> Iterator[list[FakeObserver]]:
    """Within, the segment's observers, in the order of the stage's inputs, take fakes. `tracker`: counts their work."""
    before = {shared.name: segment.module.get_submodule(shared.name) for shared in stage.inputs}
    fakes = []
    for shared in stage.inputs:
        fakes.append(FakeObserver(shared, segment, device, tracker))
        setattr(segment.module, shared.name, fakes[-1])
    try:
        yield fakes
    finally:
        for name, observer in before.items():
            setattr(segment.module, name, observer)
