"""How much host memory loading takes, beside what it loads to.

    python benchmarks/loading.py [--format gptq]

Writes a checkpoint of a Llama with random weights in shards, and loads it in a new process onto the meta device, which
stands for a device with memory of its own. Prints the private memory that loading took at its peak, and the largest
shard.
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from gptq_ao import gptq_config, quantize_, save_quantized

LOAD = """
import ctypes, gc, sys, time
import gptq_ao

def private(key):
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(key)) * 1024

gptq_ao.load_quantized(sys.argv[1], device="meta")  # modules are imported, whatever they take
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # what is free, but kept, would not be seen to be used again
start = time.perf_counter()
before = private("RssAnon")
peak = before
import threading
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, private("RssAnon"))

thread = threading.Thread(target=watch)
thread.start()
gptq_ao.load_quantized(sys.argv[1], device="meta")
done.set()
thread.join()
print(peak - before, time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--format", default="gptq")
    parser.add_argument("--shard-mib", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=arguments.layers, vocab_size=32000,
                         num_attention_heads=16, num_key_value_heads=4)  # fmt: skip
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    warnings.simplefilter("ignore")
    quantize_(model, gptq_config(4, 128, method="rtn", effort="fast"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        save_quantized(model, out, format=arguments.format, max_shard_bytes=arguments.shard_mib * 2**20)
        sizes = [f.stat().st_size for f in out.glob("*.safetensors")]
        done = subprocess.run([sys.executable, "-c", LOAD, str(out)], capture_output=True, text=True, check=True)
        peak, seconds = done.stdout.split()
        print(f"torch {torch.__version__}, {arguments.format}: {sum(sizes) / 2**20:.0f} MiB in {len(sizes)} shards")
        print(f"largest shard {max(sizes) / 2**20:.0f} MiB, peak {int(peak) / 2**20:.0f} MiB, {float(seconds):.1f} s")


if __name__ == "__main__":
    main()
