"""Tokens per second of decoding with a model of Llama-3-8B's shapes and random weights.

    python benchmarks/decode.py                 # 32 layers
    python benchmarks/decode.py --layers 4      # less to compile, for a first look

One step (a token for each sequence of the batch, static key-value cache, greedy choice) is compiled by torch.compile,
captured in a CUDA graph and replayed. Compares bf16, packed weights of this project (random codes, packed where they
are: speed does not depend on them), the same with projections fused (q, k and v; gate and up), and torchao's
Int4WeightOnlyConfig, which runs PyTorch's tinygemm. "+ passes" is compiled by this project's backend.

--prefill 2048 also times the first step of so many tokens, compiled: the latency of the first token.
"""

import argparse
import gc
import time
from typing import Any

import torch
import transformers
from llama_8b import llama  # type: ignore[import-not-found]
from packed import Shape, ring  # type: ignore[import-not-found]
from torch import Tensor, nn

from gptq_ao import fuse_projections_
from gptq_ao.inference.backend import backend as gptq_ao_backend
from gptq_ao.tensor import tensor_class

KINDS = ["bf16", "bf16 + passes", "gptq_ao", "fused", "fused + passes", "torchao"]


def linears(model: nn.Module, head: bool) -> list[nn.Linear]:
    named = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [m for name, m in named if head or not name.endswith("lm_head")]


def pack(model: nn.Module, bits: int, group: int, head: bool) -> None:
    for layer in linears(model, head):
        n, k = layer.weight.shape
        w = ring(Shape(bits, group, n, k), 1)[0]
        packed: Any = tensor_class(bits)
        weight = packed(w.qdata, w.scale_zero, group, n, k, False, torch.bfloat16, None, w.high_plane)
        layer.weight = nn.Parameter(weight, requires_grad=False)


def quantize_by_torchao(model: nn.Module, group: int, head: bool) -> None:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    config = Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")
    chosen = set(map(id, linears(model, head)))
    quantize_(model, config, filter_fn=lambda m, name: id(m) in chosen)


def first_token(model: Any, prompt: int, backend: Any) -> float:
    """Milliseconds."""
    torch._dynamo.reset()  # or it would take the number of tokens for one that changes
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), device=next(model.parameters()).device)
    cache = transformers.StaticCache(config=model.config, max_cache_len=prompt + 64)

    def step(ids: Tensor) -> Tensor:
        return model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)

    run = torch.compile(step, fullgraph=True, backend=backend)
    took = []
    for _ in range(8):
        cache.reset()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(ids)
        torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return min(took) * 1e3


def tokens_per_second(model: Any, batch: int, prompt: int, tokens: int, backend: Any) -> float:
    torch._dynamo.reset()  # or it would take the batch size for one that changes
    device = next(model.parameters()).device
    cache = transformers.StaticCache(config=model.config, max_cache_len=-(-(prompt + tokens + 8) // 64) * 64)
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=device)
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

    def step(token: Tensor) -> Tensor:
        return model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

    run = torch.compile(step, fullgraph=True, backend=backend)
    for _ in range(3):
        token.copy_(run(token))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token.copy_(run(token))
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(tokens):
        graph.replay()
    torch.cuda.synchronize()
    return batch * tokens / (time.perf_counter() - start)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--head", action="store_true", help="quantize the output head too")
    parser.add_argument("--prefill", type=int, default=0, help="tokens")
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    args = parser.parse_args()

    name = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{name}, {versions}, {args.layers} layers, {args.bits} bits, group {args.group_size}")
    for kind in args.kinds:
        torch._dynamo.reset()
        model = llama(args.layers, args.vocabulary, "cuda")
        backend = gptq_ao_backend if kind.endswith("passes") else "inductor"
        try:
            if kind.startswith(("gptq_ao", "fused")):
                pack(model, args.bits, args.group_size, args.head)
            if kind.startswith("fused"):
                fuse_projections_(model, torch.zeros(1, 8, dtype=torch.long, device="cuda"))
            elif kind == "torchao":
                quantize_by_torchao(model, args.group_size, args.head)
            gc.collect()
            size = torch.cuda.memory_allocated() / 2**30
            for batch in args.batch:
                start = time.perf_counter()
                speed = tokens_per_second(model, batch, args.prompt, args.tokens, backend)
                took = time.perf_counter() - start
                print(
                    f"{kind:>14} batch {batch:>3}: {speed:>8.1f} tokens/s, {batch / speed * 1e3:>7.3f} ms a step, "
                    f"weights {size:.2f} GiB (measured in {took:.0f} s)",
                    flush=True,
                )
            if args.prefill:
                latency = first_token(model, args.prefill, backend)
                print(f"{kind:>14} first token after {args.prefill}: {latency:.2f} ms", flush=True)
        except Exception as error:
            if kind != "torchao":
                raise
            print(f"{kind:>14}: absent ({type(error).__name__}: {str(error)[:200]})")
        del model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
