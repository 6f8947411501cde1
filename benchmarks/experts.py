"""Time of products with the packed weights of experts on a GPU, beside dense ones (`F.grouped_mm`).

    python benchmarks/experts.py

A mixture of experts of Qwen3-30B-A3B's shapes: 128 experts, of which every token takes 8 at random. Each time is that
of one launch in a CUDA graph that goes through distinct weights, as in `benchmarks/kernel_times.py`; "GB/s" counts the
packed weights of the experts that have rows.
"""

import argparse

import torch
import torch.nn.functional as F
import triton
from packed import Shape, ring  # type: ignore[import-not-found]
from torch import Tensor

from gptq_ao.kernels import ops, reference
from gptq_ao.kernels.tuning.timing import BEYOND_CACHE, microseconds

EXPERTS, TAKEN = 128, 8
SIZES = [(1536, 2048), (2048, 768)]  # N, K of gate and up together, and of down
BF16 = torch.bfloat16


def routed(tokens: int, experts: int, taken: int) -> Tensor:
    """int32 [experts]: where each expert's rows end, if every token takes other experts at random."""
    generator = torch.Generator().manual_seed(tokens)
    counts = torch.zeros(experts, dtype=torch.int32)
    for _ in range(tokens):
        counts[torch.randperm(experts, generator=generator)[:taken]] += 1
    return counts.cumsum(0).to(torch.int32).cuda()


def measure(s: Shape, experts: int, taken: int, tokens: int) -> str:
    one = ring(s, 1)[0]
    count = -(-BEYOND_CACHE // (s.bytes * experts))
    stacks = [one.each(lambda t: t.expand(experts, -1, -1, -1).contiguous()) for _ in range(count)]
    dense = reference.dequantize(one, BF16)
    dense_stacks = [dense.mT.expand(experts, -1, -1).contiguous() for _ in range(count)]
    offsets, x = routed(tokens, experts, taken), torch.randn(tokens * taken, s.k, device="cuda", dtype=BF16)

    def ours(i: int) -> Tensor:
        return ops.grouped_linear(x, *stacks[i], offsets)

    # All experts have the same weight here: it must be right, before it is timed.
    exact, magnitude = x.float() @ dense.float().T, x.float().abs() @ dense.float().abs().T
    assert ((ours(0).float() - exact).abs() <= 2**-6 * magnitude).all(), f"{s} of {tokens} tokens is wrong"
    us = microseconds(ours, count, calls=24)
    dense_us = microseconds(lambda i: F.grouped_mm(x, dense_stacks[i], offs=offsets), count, calls=24)
    reached = int((offsets.diff(prepend=offsets.new_zeros(1)) > 0).sum())
    return (
        f"{f'{s.n} x {s.k}':>12} {tokens:>6} {tokens * taken:>6} {reached:>7} {us:>8.1f} "
        f"{reached * s.bytes / us / 1e3:>6.0f} {dense_us:>8.1f} {dense_us / us:>5.2f}"
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--taken", type=int, default=TAKEN)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 4, 16, 64, 256, 2048])
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {triton.__version__=}, 4 bits, group 128")
    print(f"{'N x K':>12} tokens   rows reached       us   GB/s  bf16 us ratio")
    for n, k in SIZES:
        for tokens in args.tokens:
            print(measure(Shape(4, 128, n, k), args.experts, args.taken, tokens), flush=True)


if __name__ == "__main__":
    main()
