"""Zeroed counters for programs that must know which of them comes last.

The program that comes last sets its counter to zero again. So launches that follow each other can share counters, and
launches that may run at the same time must not:

    outside of CUDA graphs   one set per stream, on which launches follow each other.
    while one is captured    a new set for every launch, as graphs may be replayed on any stream, beside any other.
                             They are cut from a supply and never come back: some hundred bytes per captured launch.
                             Nothing can be allocated or zeroed then, so the supply is made by launches before.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["zeroed_counters"]

SUPPLY = 2**20  # counters, 4 MB

_of_stream: dict[tuple[int, int], Tensor] = {}
_supply: dict[int, Tensor] = {}  # by device, what is left
_kept: list[Tensor] = []  # supplies that graphs hold parts of
_lock = threading.Lock()


def zeroed_counters(device: int, count: int, stream: int) -> Tensor | None:
    """Zeros, int32 [at least `count`], for a launch on `stream`, the current one of the current device; None if a graph
    is being captured and the supply is used up."""
    count = -(-count // 4) * 4  # whole 16 bytes: for others Triton would compile another kernel
    with _lock:
        if torch.cuda.is_current_stream_capturing():
            supply = _supply.get(device)
            if supply is None or supply.numel() < count:
                return None
            _supply[device] = supply[count:]
            return supply[:count]
        # Long before it is used up: during a capture nothing can be added.
        if device not in _supply or _supply[device].numel() < SUPPLY // 2:
            _supply[device] = _zeros(device, SUPPLY)
            _kept.append(_supply[device])
        own = _of_stream.get((device, stream))
        if own is None or own.numel() < count:
            # More than asked for, so that larger launches seldom need another set.
            own = _of_stream[device, stream] = _zeros(device, max(count, 4096))
        return own


def _zeros(device: int, count: int) -> Tensor:
    """For all streams. What this thread allocates may come from the memory of CUDA graphs, for instance when
    torch.compile warms up for one, and has to be given back: so another thread allocates."""

    def make() -> Tensor:
        zeros = torch.zeros(count, dtype=torch.int32, device=f"cuda:{device}")
        # Other streams will use them without waiting for this one.
        torch.cuda.current_stream(device).synchronize()
        return zeros

    with ThreadPoolExecutor(1) as another:
        return another.submit(make).result()
