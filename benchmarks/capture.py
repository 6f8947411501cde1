"""Seconds and memory that it takes to turn a model into a graph, and that into a plan. The weights are on meta: nothing
of them is allocated.

    python benchmarks/capture.py
    python benchmarks/capture.py --models 8B --device cuda --effort fast

Prints the machine, the versions and, per model: seconds of wall time to capture (and to canonicalize), and to plan
(what `plan` does, but for measuring the device); CPU seconds of both; nodes of the graph; how many layers were copied
instead of traced; and by how much the peak of resident memory grew.
"""

import argparse
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from gptq_ao.config import EFFORTS, gptq_config
from gptq_ao.model.weights import ModelWeights
from gptq_ao.planning.job import Job
from gptq_ao.planning.prepare import prepare
from gptq_ao.planning.simulate import fakes_on, simulate

MODELS: dict[str, dict[str, int]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cpu", help="that would run the graph")
    parser.add_argument("--effort", default="default", choices=list(EFFORTS))
    args = parser.parse_args()

    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(f"{'model':>6} {'capture s':>10} {'plan s':>7} {'CPU s':>6} {'nodes':>6} {'copied':>7} {'peak RSS':>10}")
    for name in args.models:
        config = LlamaConfig(**MODELS[name], num_key_value_heads=8, vocab_size=128256)
        with torch.device("meta"):
            model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        settings = gptq_config(calibration=[torch.zeros(1, args.seq_len, dtype=torch.long)], effort=args.effort)
        job, before = Job.of(ModelWeights(model), settings, device=fakes_on(torch.device(args.device))), peak_bytes()
        prepared, _, cpu = timed(partial(prepare, job))
        _, simulated, more = timed(partial(simulate, job.weights, prepared, job.device))
        program, seconds = prepared.calibrated.program, job.clock.seconds
        grown = (peak_bytes() - before) / 2**20
        print(
            f"{name:>6} {seconds['capture']:>10.1f} {seconds['plan'] + simulated:>7.1f} {cpu + more:>6.1f} "
            f"{len(program.graph.nodes):>6} {program.repeated:>7} {grown:>6.0f} MiB"
        )


if __name__ == "__main__":
    main()
