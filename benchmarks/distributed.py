"""How long quantizing takes on several GPUs: a model of Llama-3-8B's shapes with random weights, phase by phase.

    python benchmarks/distributed.py --json one.json
    torchrun --nproc-per-node 2 benchmarks/distributed.py --single one.json

Each process needs a CUDA device that holds the model and its share of the activations. What is counted is the longest
that a process took. The first run is on a model of one layer: it compiles the kernels and is not counted.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from llama_8b import llama  # type: ignore[import-not-found]

from gptq_ao import gptq_config, quantize_
from gptq_ao.distributed.launch import launched
from gptq_ao.distributed.ranks import Ranks

PHASES = ("capture", "plan", "calibrate", "solve")


def measured(a: argparse.Namespace, layers: int, sequences: int, ranks: Ranks) -> dict[str, Any]:
    device = f"cuda:{torch.cuda.current_device()}"
    model = llama(layers, a.vocabulary, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, a.vocabulary, (sequences, a.seq_len), generator=generator)
    config = gptq_config(4, 128, effort=a.effort, calibration=[{"input_ids": rows} for rows in ids.split(a.batch_size)])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    ranks.tell()  # all begin at the same time
    start = time.perf_counter()
    report = quantize_(model, config, distributed=ranks.size > 1)
    assert report is not None
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30
    said = ranks.tell([seconds, peak])
    return {
        "layers": layers,
        "effort": a.effort,
        "tokens": sequences * a.seq_len,
        "world": ranks.size,
        "seconds": {phase: report.seconds[phase] for phase in PHASES} | {"total": max(s for s, _ in said)},
        "peak_gib": [peak for _, peak in said],
        "error": sum(w.error or 0.0 for w in report.weights) / len(report.weights),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--effort", default="default", choices=["fast", "default", "max"])
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", type=Path, help="file to write what was measured to")
    parser.add_argument("--single", type=Path, help="such a file of one process, to compare with")
    a = parser.parse_args()
    with launched() as ranks, ranks.together():
        measured(a, 1, a.batch_size * ranks.size, ranks)
        torch.cuda.empty_cache()
        found = measured(a, a.layers, a.sequences, ranks)
        if ranks.first:
            show(a, found)


def show(a: argparse.Namespace, found: dict[str, Any]) -> None:
    version = torch.cuda.nccl.version() if dist.is_nccl_available() else ()
    found |= {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "nccl": ".".join(map(str, version)),
        "python": platform.python_version(),
    }
    on = f"torch {found['torch']}, NCCL {found['nccl']}, Python {found['python']}"
    print(f"{found['world']} x {found['device']}, {on}")
    print(f"{a.layers} layers, effort {a.effort}, {a.sequences} x {a.seq_len} tokens, {a.batch_size} a batch")
    one = json.loads(a.single.read_text())["seconds"] if a.single is not None else None
    print(f"{'phase':>10} {'seconds':>8}" + (f" {'alone':>8} {'ratio':>6}" if one else ""))
    for phase, seconds in found["seconds"].items():
        ratio = f" {one[phase]:>8.2f} {one[phase] / max(seconds, 1e-9):>6.2f}" if one else ""
        print(f"{phase:>10} {seconds:>8.2f}{ratio}")
    print(
        f"peak GiB of each: {', '.join(f'{peak:.1f}' for peak in found['peak_gib'])}; mean error {found['error']:.3e}"
    )
    if a.json is not None:
        a.json.write_text(json.dumps(found, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
