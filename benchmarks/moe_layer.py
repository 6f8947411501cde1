"""One layer of a mixture of experts, quantized: time by phase, memory beside what `plan` says, and portions of experts.

    python benchmarks/moe_layer.py
    python benchmarks/moe_layer.py --experts 256 --hidden 7168 --intermediate 2048 --max-memory 60

By default of Qwen3-30B-A3B's shapes: 128 experts of three matrices (two are one parameter), 8 of them for each token,
with random weights in bf16 and random tokens. `--max-memory` is for the GPU; on a CPU, what is free decides. Memory is
that of PyTorch's allocator on a GPU, on a CPU what the process holds, interpreter and libraries included.
"""

import argparse
import platform
import time
from typing import Any

import torch
import transformers
from torch import nn

from gptq_ao import gptq_config, plan, quantize_

VOCABULARY = 1024


def layer(a: argparse.Namespace) -> nn.Module:
    heads = max(a.hidden // 64, 1)
    config = transformers.Qwen3MoeConfig(
        hidden_size=a.hidden,
        moe_intermediate_size=a.intermediate,
        num_experts=a.experts,
        num_experts_per_tok=min(a.per_token, a.experts),
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads // 8 if heads % 8 == 0 else heads,
        head_dim=min(a.hidden, 128),
        vocab_size=VOCABULARY,
        max_position_embeddings=max(a.seq_len, 64),
    )
    with torch.device("meta"):
        model: Any = transformers.Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device=a.device).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(a.device)
    generator = torch.Generator(a.device).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:  # in place: a copy of all experts may not fit
                p.normal_(std=p.shape[-1] ** -0.5, generator=generator)
            else:
                p.fill_(1)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--per-token", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-memory", type=float, metavar="GiB", help="of the GPU; default: what is free")
    parser.add_argument("--effort", default="default", choices=["fast", "default", "max"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    on_gpu = torch.device(a.device).type == "cuda"
    if a.max_memory is not None and not on_gpu:
        parser.error("--max-memory is for a GPU; on a CPU, what is free decides")
    limit = None if a.max_memory is None else {a.device: int(a.max_memory * 2**30)}

    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    print(f"{torch.cuda.get_device_name(a.device) if on_gpu else threads}, {versions}")
    print(
        f"{a.experts} experts of {a.hidden} x {a.intermediate}, {min(a.per_token, a.experts)} for each token; "
        f"{a.sequences} x {a.seq_len} tokens, {a.batch_size} a batch, effort {a.effort}, "
        f"{'no limit' if a.max_memory is None else f'at most {a.max_memory:g} GiB'}",
        flush=True,
    )
    model = layer(a)
    ids = torch.randint(0, VOCABULARY, (a.sequences, a.seq_len), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": rows} for rows in ids.split(a.batch_size)]
    group_size = 128 if a.hidden % 128 == a.intermediate % 128 == 0 else -1
    config = gptq_config(4, group_size, effort=a.effort, calibration=batches)
    planned = plan(model, config, device=a.device, max_memory=limit)
    if on_gpu:
        torch.cuda.synchronize(a.device)
        torch.cuda.reset_peak_memory_stats(a.device)
    start = time.perf_counter()
    report = quantize_(model, config, device=a.device, max_memory=limit)
    assert report is not None
    if on_gpu:
        torch.cuda.synchronize(a.device)
    seconds = time.perf_counter() - start
    peak = report.peak_bytes["cuda" if on_gpu else "host"]

    print(f"{'phase':>10} {'seconds':>8} {'planned':>8}")
    for phase, of_phase in report.seconds.items():
        print(f"{phase:>10} {of_phase:>8.1f} {planned.seconds.get(phase, float('nan')):>8.1f}")
    print(f"{'total':>10} {seconds:>8.1f}")
    print(f"memory: {peak / 2**30:.2f} GiB at most, planned {planned.peak_bytes['device'] / 2**30:.2f}")
    waiting = {place: report.peak_bytes[place] / 2**30 for place in ("activations", "offloaded", "files")}
    print("waiting activations: " + ", ".join(f"{place} {size:.2f} GiB" for place, size in waiting.items()))
    divided = [note for note in report.notes if "portions" in note]
    print(*(divided or ["all experts at once"]), sep="\n")
    errors = [w.error for w in report.weights if "experts" in w.name and w.error is not None]
    print(f"mean relative error of experts {sum(errors) / len(errors):.3e}; fallbacks {len(report.fallbacks)}")


if __name__ == "__main__":
    main()
