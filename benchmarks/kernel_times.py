"""Time of products with packed weights on a GPU, beside dense ones and other kernels.

    python benchmarks/kernel_times.py                                 # the table
    python benchmarks/kernel_times.py --sweep sweep.jsonl --minutes 8  # all configurations worth trying

Each time is that of one launch in a CUDA graph that goes through distinct weights of 200 MB together, so that none is
in the L2 cache: the median of several replays. "roof": the time it takes to read the packed weight at the bandwidth
measured first, by a kernel that does nothing else. Prints "absent" for what is not installed.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from kernel_sweep import sweep  # type: ignore[import-not-found]
from packed import Shape, read_bandwidth, ring  # type: ignore[import-not-found]
from peers import PEERS, dense_us, peer_us  # type: ignore[import-not-found]
from torch import Tensor

from gptq_ao.kernels import ops, reference
from gptq_ao.kernels.packed import Packed
from gptq_ao.kernels.tuning.timing import microseconds

SIZES = [(4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (6144, 4096)]  # N, K
ROWS = [1, 16, 64, 128, 256, 512, 2048]
FORMATS = [(4, 32), (2, 128), (3, 128), (8, 128)]  # bits and group, beside 4 and 128
BF16 = torch.bfloat16


def _calls(m: int) -> int:
    return 96 if m <= 64 else 24


def table(shapes: list[Shape], rows: list[int], roof: float) -> None:
    for m in sorted(rows):  # after many rows the GPU is slower for a while
        for s in shapes:
            weights = ring(s)
            x = torch.randn(m, s.k, device="cuda", dtype=BF16)
            check(weights[0], x)
            us = microseconds(lambda i, w=weights, x=x: ops.linear(x, *w[i]), len(weights), calls=_calls(m))  # type: ignore[misc]
            dense = dense_us(s.n, s.k, m)
            least = s.bytes / roof / 1e3
            others = [peer_us(p, s.n, s.k, m, s.group) if s.bits == 4 and s.group == 128 else "-" for p in PEERS]
            print(
                f"{f'{s.n} x {s.k}':>14} {s.bits:>4} {s.group:>5} {m:>5} {us:>8.2f} {s.bytes / us / 1e3:>6.0f} "
                f"{least / us:>5.0%} {2e-6 * m * s.n * s.k / us:>7.1f} {dense:>8.2f} {dense / us:>5.2f} "
                + " ".join(f"{other:>9}" for other in others),
                flush=True,
            )


def check(w: Packed, x: Tensor) -> None:
    """Before it is timed, it must be right."""
    dense = reference.dequantize(w, torch.float32)
    exact, magnitude = x.float() @ dense.T, x.float().abs() @ dense.abs().T
    assert ((ops.linear(x, *w).float() - exact).abs() <= 2**-6 * magnitude).all(), f"{w[4:]} M {len(x)} is wrong"


def dequantize_speed() -> None:
    print("\ndequantize, bf16: GB/s read and written")
    for n, k in SIZES:
        for bits, group in [(4, 128), *FORMATS]:
            s = Shape(bits, group, n, k)
            weights = ring(s)

            def run(i: int, weights: list[Packed] = weights) -> Tensor:
                return ops.dequantize(*weights[i], BF16)

            us = microseconds(run, len(weights), calls=12)
            print(f"{f'{n} x {k}':>14} {bits} bits g{group}: {us:7.1f} us {(s.bytes + 2 * n * k) / us / 1e3:6.0f}")


def overhead() -> None:
    """What a call costs in Python, where the GPU has next to nothing to do."""
    w = ring(Shape(4, 128, 256, 256), 1)[0]
    x, weight = torch.randn(1, 256, device="cuda", dtype=BF16), reference.dequantize(w, BF16)
    calls: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: ops.linear(x, *w),
        "F.linear": lambda: F.linear(x, weight),
    }
    print("\na call from Python, us:")
    for name, call in calls.items():
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(1000):
                call()
            times.append((time.perf_counter() - start) * 1e3)
            torch.cuda.synchronize()
        print(f"  {name}: {min(times):.1f}")


def first_call() -> None:
    """With Triton's cache empty, and of a dtype that was not used before."""
    triton.knobs.cache.dir = tempfile.mkdtemp()
    for s, m in [(Shape(4, 128, 384, 512), 1), (Shape(4, 128, 384, 512), 40), (Shape(3, 128, 384, 512), 1)]:
        w = ring(s, 1)[0]
        x = torch.randn(m, s.k, device="cuda", dtype=torch.float16)
        torch.cuda.synchronize()
        start = time.perf_counter()
        ops.linear(x, *w)
        torch.cuda.synchronize()
        print(f"first call, {s.bits} bits, M {m}: {time.perf_counter() - start:.2f} s")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=Path, help="time configurations instead, and write them here as JSON lines")
    parser.add_argument("--minutes", type=float, default=8, help="of the sweep at most")
    parser.add_argument("--processes", type=int, default=14, help="that compile for the sweep")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 2, 3, 8])
    parser.add_argument("--quick", action="store_true", help="one size, no other formats")
    args = parser.parse_args()

    sizes = SIZES[:1] if args.quick else SIZES
    formats = [(b, g) for b, g in FORMATS if b in args.bits and not args.quick]
    if args.sweep:
        shapes = [Shape(4, 128, n, k) for n, k in sizes] if 4 in args.bits else []
        products = [(s, m) for m in args.rows if m <= 256 for s in shapes]
        products += [(Shape(b, g, n, k), m) for b, g in formats for m in args.rows if m <= 16 for n, k in sizes]
        sweep(products, args.sweep, args.minutes, args.processes)
        return
    roof = read_bandwidth()
    properties: Any = torch.cuda.get_device_properties()
    print(
        f"{properties.name}, {properties.multi_processor_count} SMs, torch {torch.__version__}, {triton.__version__=}"
    )
    print(f"reads {roof:.0f} GB/s")
    names = " ".join(f"{p:>9}" for p in PEERS)
    print(f"{'N x K':>14} bits group     M       us   GB/s  roof TFLOP/s  bf16 us ratio {names}")
    few, many = [m for m in args.rows if m <= 16], [m for m in args.rows if m > 64]
    table([Shape(b, g, n, k) for b, g in formats for n, k in sizes], few, roof)
    table([Shape(4, 128, n, k) for n, k in sizes], args.rows, roof)
    table([Shape(b, 128, n, k) for b, _ in formats if b != 4 for n, k in sizes], many, roof)
    dequantize_speed()
    overhead()
    first_call()


if __name__ == "__main__":
    main()
