"""How long something takes on a GPU when nothing waits for Python: launches in a CUDA graph, over distinct weights."""

import statistics
from collections.abc import Callable

import torch

__all__ = ["BEYOND_CACHE", "microseconds"]

BEYOND_CACHE = 200 * 2**20  # bytes of distinct weights that are at least gone through: over three times an L2 cache


def microseconds(run: Callable[[int], object], distinct: int, calls: int = 96, replays: int = 7) -> float:
    """Of one call, on average over a graph of at least `calls`, the median of so many replays.

    Args:
        run: takes the number of a weight, which goes round 0 … distinct − 1.
    """
    calls = -(-calls // distinct) * distinct
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for i in range(min(distinct, 3)):
            run(i)
        stream.synchronize()
        graph.capture_begin()
        try:
            for i in range(calls):
                run(i % distinct)
        finally:
            graph.capture_end()
        times = []
        for i in range(replays + 1):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i > 0:
                times.append(start.elapsed_time(end))
    torch.cuda.current_stream().wait_stream(stream)
    return statistics.median(times) * 1e3 / calls
