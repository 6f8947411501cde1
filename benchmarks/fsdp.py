"""Training LoRA adapters on a 4-bit Llama-3-8B (random weights) under FSDP2, beside one GPU on the same batch.

    torchrun --nproc-per-node 2 benchmarks/fsdp.py [--layers 32] [--tokens 2048]

Each rank has one sequence, the one GPU all of them: losses and tokens per second of both, and a rank's peak memory.
Gradient checkpointing, autocast to bf16, AdamW, adapters of rank 16 on all linear layers but the head.
"""

import argparse
import os
import time
from typing import Any

import peft
import torch
import torch.distributed as dist
from llama_8b import llama  # type: ignore[import-not-found]
from torch.distributed.fsdp import fully_shard

from gptq_ao import gptq_config, quantize_

VOCABULARY, WARM_UP, STEPS = 128256, 2, 6


def trained(layers: int, ids: torch.Tensor, sharded: bool) -> tuple[list[float], float, float]:
    """Losses, seconds per step, and peak GiB."""
    model: Any = llama(layers, VOCABULARY, "cuda")
    quantize_(model, gptq_config(4, 128, method="rtn", rules={"lm_head": None}))
    model.requires_grad_(False)
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM")).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    if sharded:
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    losses = []
    for i in range(WARM_UP + STEPS):
        if i == WARM_UP:
            torch.cuda.synchronize()
            start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    torch.cuda.synchronize()
    return [x.item() for x in losses], (time.perf_counter() - start) / STEPS, torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (ranks, args.tokens), device="cuda", generator=generator)
    # Every rank computes it, so that none waits.
    losses, seconds, peak = trained(args.layers, ids, sharded=False)
    if rank == 0:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.layers} layers, {args.tokens} tokens")
        print(
            f"one GPU, {ranks} rows    {ids.numel() / seconds:8.0f} tokens/s {peak:7.2f} GiB  losses", *_short(losses)
        )
    losses, seconds, peak = trained(args.layers, ids[rank : rank + 1], sharded=True)
    mean = torch.tensor(losses, device="cuda") / ranks
    dist.all_reduce(mean)
    most = torch.tensor(peak, device="cuda")
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if rank == 0:
        speed = ids.numel() / seconds
        print(f"FSDP2, {ranks} GPUs      {speed:8.0f} tokens/s {most.item():7.2f} GiB  losses", *_short(mean.tolist()))
    dist.destroy_process_group()


def _short(losses: list[float]) -> list[str]:
    return [f"{x:.4f}" for x in losses]


if __name__ == "__main__":
    main()
