"""How long something takes on a GPU when nothing waits for Python: launches in a CUDA graph, over distinct weights."""

import statistics
from collections.abc import Callable

import torch

__all__ = ["BEYOND_CACHE", "microseconds"]

BEYOND_CACHE = 200 * 2**20  # least bytes of distinct weights to go through: over three times an L2 cache


def microseconds(run: Callable[[int], object], distinct: int, calls: int = 96, replays: int = 7) -> float:
    """The time of one call: the average over a CUDA graph of at least `calls`, and the median of that over `replays`.

    Args:
        run: function that is given the number of a weight, 0 … distinct − 1 and again from 0.
    """
    # Whole rounds, so that each weight is read equally often.
    calls = -(-calls // distinct) * distinct
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for i in range(min(distinct, 3)):  # kernels are compiled and loaded before the capture
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
            if i > 0:  # the first replay uploads the graph
                times.append(start.elapsed_time(end))
    torch.cuda.current_stream().wait_stream(stream)
    return statistics.median(times) * 1e3 / calls
