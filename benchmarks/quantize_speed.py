"""How long quantizing takes: a model of Llama-3-8B's shapes with random weights, phase by phase, and the solver alone.

    python benchmarks/quantize_speed.py --layers 32

Needs a CUDA device that holds the model and the calibration activations. The first run of each effort is on a model of
one layer: it compiles the kernels and is not counted.
"""

import argparse
import platform
import time
from collections.abc import Callable
from functools import partial

import torch
import triton
from llama_8b import llama  # type: ignore[import-not-found]

from gptq_ao import gptq_config, quantize_
from gptq_ao.recipe import Recipe
from gptq_ao.solver.compensate import corrected_target
from gptq_ao.solver.factor import factor
from gptq_ao.solver.hessian import Hessian, HessianObserver
from gptq_ao.solver.refine import refine
from gptq_ao.solver.solve import solve


def milliseconds(function: Callable[[], object], repeats: int = 3) -> float:
    """The median, after one call that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[repeats // 2]


def solver_alone() -> None:
    print(
        f"\nsolver alone, 4 bits, groups of 128, ms:\n{'weight':>12} {'Hessian*':>9} {'factor':>7} {'static':>7} "
        f"{'fast':>7} {'sweep':>7} {'target':>7}   * of 16384 tokens"
    )
    static = Recipe(4, 128, act_order="static")
    searched = Recipe(4, 128, act_order="group_aware", signed_scale=True, scale_candidates=20, refine_sweeps=4)
    for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        x = (torch.randn(16384, k, device="cuda") * torch.rand(k, device="cuda")).bfloat16()
        observer = HessianObserver(k).cuda()
        gram = milliseconds(partial(observer, x))
        H = observer.finish()[0]
        H = Hessian(H.matrix, H.rows, drift=0.01 * H.matrix)
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        f, in_static = factor(H, searched), factor(H, static)
        s = solve(w, f)
        columns = (
            milliseconds(partial(factor, H, searched)),
            milliseconds(partial(solve, w, in_static)),
            milliseconds(partial(solve, w, f)),
            milliseconds(partial(refine, s, w, H, f)) / 4,
            milliseconds(partial(corrected_target, w, H)),
        )
        print(f"{n:>6}x{k:<6} {gram:>9.2f}", " ".join(f"{c:>7.1f}" for c in columns))


def whole_model(effort: str, a: argparse.Namespace, layers: int) -> None:
    model = llama(layers, a.vocabulary, "cuda")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, a.vocabulary, (a.sequences, a.seq_len), generator=generator)
    config = gptq_config(4, 128, effort=effort, calibration=[{"input_ids": rows} for rows in ids.split(a.batch_size)])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    report = quantize_(model, config)
    assert report is not None
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated()
    phases = ", ".join(f"{phase} {s:.1f}" for phase, s in report.seconds.items())
    per_layer = (report.seconds["calibrate"] + report.seconds["solve"]) / layers
    print(
        f"{effort:>8}, {layers} layers: {seconds:.1f} s ({phases}); calibrate and solve {per_layer:.2f} s a layer, "
        f"all {seconds / layers:.2f} s a layer; device memory {before / 2**30:.1f} GiB before, {peak / 2**30:.1f} GiB "
        f"at most, of which waiting activations {report.peak_bytes['activations'] / 2**30:.1f} GiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="*", default=[4])
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--efforts", nargs="*", default=["fast", "default"])
    a = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"Python {platform.python_version()}; {a.sequences} x {a.seq_len} tokens, {a.batch_size} a batch")
    solver_alone()
    print()
    for effort in a.efforts:
        whole_model(effort, argparse.Namespace(**{**vars(a), "sequences": a.batch_size}), 1)
        for layers in a.layers:
            whole_model(effort, a, layers)


if __name__ == "__main__":
    main()
