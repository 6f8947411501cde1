"""Device memory of quantizing a model that is kept on the host: Llama-3-8B's shapes with random weights.

    python benchmarks/memory.py --layers 32 --max-memory 8GiB

Prints what the calibration data, one Hessian per activation, and offloading change. Needs a CUDA device and host memory
for the model.
"""

import argparse
import platform
import resource
import time

import torch
from llama_8b import llama  # type: ignore[import-not-found]

from gptq_ao import gptq_config, plan, quantize_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--max-memory", help="of the device; without: activations stay there")
    parser.add_argument("--method", default="gptq")
    a = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {platform.platform()}")
    start = time.perf_counter()
    model = llama(a.layers, a.vocabulary)
    dense = sum(p.nbytes for p in model.parameters())
    print(f"model: {dense / 2**30:.2f} GiB on the host, made in {time.perf_counter() - start:.0f} s")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, a.vocabulary, (a.sequences, a.seq_len), generator=generator)
    batches = [{"input_ids": rows} for rows in ids.split(a.batch_size)]
    config = gptq_config(4, 128, method=a.method, calibration=batches)
    limits: dict[str | int, int | str] | None = {"cuda": a.max_memory} if a.max_memory else None
    planned = plan(model, config, device="cuda", max_memory=limits)
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    report = quantize_(model, config, device="cuda", max_memory=limits)
    assert report is not None
    peak = torch.cuda.max_memory_allocated()
    hidden = a.sequences * a.seq_len * 4096 * 2
    k = [w.shape[1] for w in report.weights]
    separate = sum(4 * n * n for n in k)
    shared = 4 * a.layers * (3 * 4096**2 + 14336**2)
    print(
        f"{a.sequences} x {a.seq_len} tokens, {a.batch_size} a batch; "
        f"one activation of all of them: {hidden / 2**30:.2f} GiB"
    )
    print(
        f"peak on the device: {peak / 2**30:.2f} GiB, predicted {planned.peak_bytes['device'] / 2**30:.2f} GiB; "
        f"activations there: {report.peak_bytes['activations'] / 2**30:.2f} GiB"
    )
    print(f"peak of the process on the host: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    print(
        f"{len(k)} weights, {report.hessians} Hessians: "
        f"{shared / 2**30:.1f} GiB instead of {separate / 2**30:.1f} GiB for one each;"
    )
    print(
        f"at most {4 * 14336**2 / 2**30:.2f} GiB at a time. "
        f"Holding the model and all of them: {(dense + separate) / 2**30:.1f} GiB"
    )
    print(
        ", ".join(f"{phase} {s:.1f} s" for phase, s in report.seconds.items()),
        f"; {time.perf_counter() - start:.0f} s in all",
    )


if __name__ == "__main__":
    main()
