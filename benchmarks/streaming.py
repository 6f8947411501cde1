"""Quantize a checkpoint in a process that may use a quarter of its size as memory, and compare with doing it in memory.

    python benchmarks/streaming.py --gigabytes 4 /tmp/streaming

Makes a random bf16 Llama of that size in the folder, then runs GPTQ on it twice, each time in a process of its own:
`quantize_checkpoint` under a hard RLIMIT_DATA (all private writable memory of the process, imports included; an
allocation beyond it fails) of a quarter of the checkpoint, and `quantize_` with `save_quantized` without a limit.
Prints both processes' peak of private writable memory and the seconds, and whether all tensors are equal, byte for
byte. Linux only: the numbers come from /proc.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import transformers

from gptq_ao import gptq_config, quantize_, quantize_checkpoint, save_quantized
from gptq_ao.checkpoint.files.shards import ShardWriter, read_header
from gptq_ao.integrations.transformers import load_model
from gptq_ao.model.empty import empty_model

VOCABULARY = 4096


def make(directory: Path, gigabytes: float, hidden: int, intermediate: int) -> int:
    """Write a random model, tensor by tensor. Returns its size in bytes."""
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=hidden // 64, vocab_size=VOCABULARY
    )
    config.num_key_value_heads = config.num_attention_heads
    layer = 2 * (4 * hidden**2 + 3 * hidden * intermediate)
    config.num_hidden_layers = math.ceil(gigabytes * 2**30 / layer)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    writer, size = ShardWriter(directory, 2**28), 0
    generator = torch.Generator().manual_seed(0)
    for name, p in empty_model(directory).named_parameters():
        value = torch.ones(p.shape)
        if p.dim() > 1:
            value = torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
        writer.add({name: value.to(torch.bfloat16)})
        size += p.nbytes
    index = {"metadata": {"total_size": size}, "weight_map": writer.finish()}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


class Peak(threading.Thread):
    """The largest VmData and RssAnon of this process, looked up every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = {"VmData": 0, "RssAnon": 0}

    def run(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self.bytes:
                    self.bytes[name] = max(self.bytes[name], int(value.split()[0]) * 1024)
            time.sleep(0.02)


def run(mode: str, source: Path, out: Path, tokens: int) -> None:
    """In the process that is measured."""
    peak = Peak()
    peak.start()
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, VOCABULARY, (1, tokens // 2), generator=generator) for _ in range(2)]
    config = gptq_config(4, 128, calibration=[{"input_ids": ids} for ids in batches])
    start = time.perf_counter()
    if mode == "stream":
        quantize_checkpoint(source, out, config, max_shard_bytes=2**26)
    else:
        model = load_model(str(source))
        quantize_(model, config)
        save_quantized(model, out)
    print(json.dumps({"seconds": time.perf_counter() - start, **peak.bytes}))


def measured(mode: str, source: Path, out: Path, tokens: int, limit: int | None) -> dict[str, float]:
    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [sys.executable, __file__, "--run", mode, "--tokens", str(tokens), str(source), str(out)]
    # Left alone, glibc keeps freed weights of up to 32 MiB in its heap, where later ones of other sizes do not fit.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=limited, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{mode} failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def same(a: Path, b: Path) -> bool:
    """One tensor at a time."""
    left, right = ({n: t for f in sorted(d.glob("*.safetensors")) for n, t in read_header(f).items()} for d in (a, b))
    return left.keys() == right.keys() and all(
        t.dtype == right[n].dtype and torch.equal(t.read(), right[n].read()) for n, t in left.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=512, help="of calibration data")
    parser.add_argument("--fraction", type=float, default=0.25, help="of the checkpoint's size: the limit")
    parser.add_argument("--run", choices=["stream", "memory"], help=argparse.SUPPRESS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args.run, args.folder, args.out, args.tokens)
        return

    print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}")
    size = make(args.folder / "model", args.gigabytes, args.hidden, args.intermediate)
    limit = int(size * args.fraction)
    gib = 2**30
    print(f"checkpoint {size / gib:.2f} GiB, {args.tokens} calibration tokens, limit {limit / gib:.2f} GiB", flush=True)
    for mode, bound in (("stream", limit), ("memory", None)):
        r = measured(mode, args.folder / "model", args.folder / mode, args.tokens, bound)
        print(
            f"{mode}: private memory at most {r['VmData'] / gib:.2f} GiB mapped, {r['RssAnon'] / gib:.2f} GiB "
            f"resident; {r['seconds']:.0f} s",
            flush=True,
        )
    print("equal, byte for byte:", same(args.folder / "stream", args.folder / "memory"))


if __name__ == "__main__":
    main()
