"""Time of a linear layer with quantized weights beside the dense one.

    python benchmarks/linear.py --device cpu --dtype bfloat16

Prints the device, the versions and, per shape and number of rows M, the median time, the bytes of weight read per
second, the ratio to the dense layer, and on a CPU that of PyTorch's 4-bit operator alone, if that is what runs.
"""

import argparse

import torch
import torch.nn.functional as F
import torch.utils.benchmark
from torch import Tensor

from gptq_ao.kernels import cpu
from gptq_ao.kernels.packed import Packed
from gptq_ao.recipe import Recipe
from gptq_ao.solver.solve import round_to_nearest
from gptq_ao.tensor import GroupTensor, tensor_class

SHAPES = [(4096, 4096), (4096, 14336)]
ROWS = [1, 4, 16, 64, 96, 128, 256]


def microseconds(statement: str, **names: object) -> float:
    timer = torch.utils.benchmark.Timer(statement, globals={"F": F, **names}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).median * 1e6


def operator_alone(x: Tensor, w: GroupTensor) -> str:
    """Microseconds of what `kernels/cpu.py` calls, for as many rows as one call takes; else empty."""
    packed = Packed(*w.packed())
    if x.is_cuda or not cpu.supports(x, packed) or len(x) > cpu.ROWS_PER_CALL:
        return ""
    weight, scales = cpu._convert(packed)
    operator = torch.ops.aten._weight_int4pack_mm_for_cpu
    return f"{microseconds('f(x, w, g, s)', f=operator, x=x, w=weight, g=w.group_size, s=scales):.1f}"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--bits", type=int, nargs="*", default=[4])
    parser.add_argument("--group-size", type=int, default=128)
    args = parser.parse_args()

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {args.dtype}, group {args.group_size}")
    titles = f"{'us':>10} {'GB/s':>8} {'dense us':>10} {'dense/quantized':>16} {'aten us':>10}"
    print(f"{'N x K':>14} {'bits':>4} {'M':>4} {titles}")
    for n, k in SHAPES:
        dense = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        for bits in args.bits:
            s = round_to_nearest(dense, Recipe(bits, args.group_size))
            weight = tensor_class(bits).from_codes(s.codes, s.scale, s.zero_point, dtype=dtype)
            size = sum(getattr(weight, part).nbytes for part in weight.__tensor_flatten__()[0])
            for m in ROWS:
                x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(device, dtype)
                ours, theirs = (microseconds("F.linear(x, w)", x=x, w=w) for w in (weight, dense))
                print(
                    f"{f'{n} x {k}':>14} {bits:>4} {m:>4} {ours:>10.1f} {size / ours / 1e3:>8.2f} {theirs:>10.1f} "
                    f"{theirs / ours:>16.2f} {operator_alone(x, weight):>10}"
                )


if __name__ == "__main__":
    main()
