"""A step of training LoRA adapters on a 4-bit Llama-3-8B (random weights): tokens per second and peak memory.

    python benchmarks/qlora.py [--layers 32] [--tokens 2048] [--compile] [--profile]

Beside it: bitsandbytes' nf4 (with its scales quantized too, as QLoRA has them, and without), torchao's nf4, and the
dense weights in bf16. Adapters of rank 16 on all linear layers but the head, gradient checkpointing, autocast to bf16,
AdamW: what Trainer does with `bf16=True`. Each runs in a process of its own; one that is not installed is left out.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from llama_8b import llama  # type: ignore[import-not-found]
from torch import nn

VOCABULARY = 128256
STEPS = 10


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]


def ours(model: Any) -> None:
    from gptq_ao import gptq_config, quantize_

    quantize_(model, gptq_config(4, 128, method="rtn", rules={"lm_head": None}))


def _nf4(model: Any, double: bool) -> None:
    import bitsandbytes

    for name, linear in _linears(model):
        new = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=double,
            quant_type="nf4",
            device="meta",
        )
        new.weight = bitsandbytes.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=double
        ).cuda()
        model.set_submodule(name, new)
    model.is_loaded_in_4bit = True  # by which PEFT knows


def _torchao_nf4(model: Any) -> None:
    from torchao.dtypes.nf4tensor import to_nf4

    for _, linear in _linears(model):
        linear.weight = nn.Parameter(to_nf4(linear.weight.data, 64, 256), requires_grad=False)


# name → (package, what is done with the model, bits that are stored of a weight)
CONTESTANTS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "gptq_ao, 4 bits, group 128": ("gptq_ao", ours),
    "bitsandbytes nf4, double quantization": ("bitsandbytes", lambda model: _nf4(model, True)),
    "bitsandbytes nf4": ("bitsandbytes", lambda model: _nf4(model, False)),
    "torchao nf4": ("torchao.dtypes.nf4tensor", _torchao_nf4),
    "bf16, not quantized": ("torch", lambda model: None),
}


def measure(name: str, layers: int, tokens: int, compiled: bool, profiled: bool) -> dict[str, Any]:
    import peft

    model: Any = llama(layers, VOCABULARY, "cuda")
    CONTESTANTS[name][1](model)
    torch.cuda.empty_cache()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model.requires_grad_(False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM")).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    if compiled:
        for layer in model.base_model.model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)
    ids = torch.randint(0, VOCABULARY, (1, tokens), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    weights = torch.cuda.memory_allocated()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / STEPS
    peak = torch.cuda.max_memory_allocated()
    if profiled:
        with torch.profiler.profile() as profile:
            step()
            torch.cuda.synchronize()
        print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=18, max_name_column_width=70))
    return {"tokens_per_s": tokens / seconds, "peak_gib": peak / 2**30, "weights_gib": weights / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--compile", action="store_true", help="each layer, by torch.compile")
    parser.add_argument("--profile", action="store_true", help="what takes the time of a step, too")
    parser.add_argument("--only", choices=CONTESTANTS, help="in this process")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.layers, args.tokens, args.compile, args.profile)))
        return
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.layers} layers, 1 x {args.tokens} tokens"
        f"{', compiled layers' if args.compile else ''}"
    )
    print(f"{'':40}{'tokens/s':>10}{'':>8}{'peak GiB':>10}{'weights GiB':>13}")
    first = 0.0
    for name, (package, _) in CONTESTANTS.items():
        try:
            if importlib.util.find_spec(package) is None:
                continue
        except ModuleNotFoundError:
            continue
        command = [sys.executable, *sys.argv, "--only", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name:40}failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        *log, last = done.stdout.strip().splitlines()
        print("\n".join(log) + "\n" if log else "", end="")
        found = json.loads(last)
        first = first or found["tokens_per_s"]
        ratio = first / found["tokens_per_s"]
        print(
            f"{name:40}{found['tokens_per_s']:10.0f}{ratio:7.2f}x{found['peak_gib']:10.2f}{found['weights_gib']:13.2f}",
            flush=True,
        )
    with_versions = [f"{p} {importlib.metadata.version(p)}" for p in ("bitsandbytes", "torchao", "peft") if _has(p)]
    print(", ".join(with_versions))


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    main()
