"""Zeroed counters for programs that must know which of them comes last.

Whoever comes last sets its counter to zero again, so launches that follow each other can share counters, and launches
that may run at the same time must not:

    outside of CUDA graphs   one set per stream, which is an order.
    while one is captured    a set of their own for every launch, as graphs may be replayed on any stream, beside any
                             other. They are cut from a supply and never come back: some hundred bytes per captured
                             launch. Nothing can be allocated or zeroed then, so the supply is made by launches before.
"""

import threading

import torch
from torch import Tensor

__all__ = ["zeroed_counters"]

SUPPLY = 2**20  # counters, 4 MB

_of_stream: dict[tuple[int, int], Tensor] = {}
_supply: dict[int, Tensor] = {}  # by device, what is left
_kept: list[Tensor] = []  # supplies that graphs hold parts of
_lock = threading.Lock()


def zeroed_counters(device: torch.device, count: int) -> Tensor | None:
    """At least `count` int32 zeros for a launch on the current stream of `device`, the current one; None if a graph is
    being captured and the supply is used up."""
    number = device.index
    with _lock:
        if torch.cuda.is_current_stream_capturing():
            supply = _supply.get(number)
            if supply is None or len(supply) < count:
                return None
            _supply[number] = supply[count:]
            return supply[:count]
        if number not in _supply or len(_supply[number]) < SUPPLY // 2:
            _supply[number] = torch.zeros(SUPPLY, dtype=torch.int32, device=device)
            _kept.append(_supply[number])
            torch.cuda.current_stream(device).synchronize()  # the zeros will be used on other streams
        key = (number, torch.cuda.current_stream(device).cuda_stream)
        if key not in _of_stream or len(_of_stream[key]) < count:
            _of_stream[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
        return _of_stream[key]
