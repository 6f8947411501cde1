"""What a call costs the host, apart from what it computes: one row, a weight so small that hardly anything is computed.

    python benchmarks/call_overhead.py --device cuda

Microseconds from call to return, the least of several rounds. On a GPU a call returns when its kernel is queued; few
calls are made in a row, so that the queue is never full. A decoding step makes hundreds of such calls: where it is not
captured in a CUDA graph, this is what limits it.
"""

import argparse
import platform
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from gptq_ao.tensor import Int4GroupTensor

CALLS = 200


def microseconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - start)
    return 1e6 * best / CALLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    device, n = torch.device(args.device), args.size
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}, [{n}, {n}] bf16, one row")
    codes = torch.randint(0, 16, (n, n), dtype=torch.uint8)
    scale, zero_point = torch.ones(n, n // 128).half(), torch.full((n, n // 128), 8, dtype=torch.uint8)
    weight = Int4GroupTensor.from_codes(codes, scale, zero_point, dtype=torch.bfloat16).to(device)
    dense, x = weight.dequantize(), torch.ones(1, n, dtype=torch.bfloat16, device=device)
    # The operator's flat arguments, in the order of its schema.
    inner = (weight.qdata, weight.scale_zero, weight.high_plane, weight.perm, 4, 128, n, n)
    calls: dict[str, Callable[[], object]] = {
        "F.linear, dense": lambda: F.linear(x, dense),
        "F.linear, quantized": lambda: F.linear(x, weight),
        "gptq_ao::linear": lambda: torch.ops.gptq_ao.linear(x, *inner),
    }
    with torch.no_grad():
        for what, call in calls.items():
            print(f"{what:22} {microseconds(call, device, args.rounds):8.2f} µs")


if __name__ == "__main__":
    main()
