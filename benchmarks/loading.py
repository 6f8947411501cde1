"""How fast a checkpoint loads, and how much host memory that takes beside what is loaded.

    python benchmarks/loading.py [--formats gptq native] [--shard-mib 512]

Writes a checkpoint of the shape of Llama-2-7B in shards; all layers are equal, which no reader can make use of. Loads
it in a new process, once its modules are imported, with `load_quantized` and with `from_pretrained`. Prints size and
speed, next to that of reading the files' tensors with safetensors and no more, and the memory at its peak: what the
process has more than when it is done, pages of files that it maps included. All files are in the system's cache.
"""

import argparse
import copy
import itertools
import platform
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from gptq_ao import gptq_config, quantize_, save_quantized

PLAIN = """
import sys, time
from pathlib import Path
from safetensors import safe_open

start = time.perf_counter()
for file in Path(sys.argv[1]).glob("*.safetensors"):
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():
            tensors.get_tensor(name).clone()
print(time.perf_counter() - start)
"""
LOAD = """
import ctypes, gc, sys, threading, time
import torch
import gptq_ao
from gptq_ao.integrations.transformers import load_with_gptq_ao
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
load_with_gptq_ao("gptq", "compressed-tensors")

def load(folder):
    if loader == "from_pretrained":
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": device})
    return gptq_ao.load_quantized(folder, device=device)

def resident():
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmRSS")) * 1024

small, folder, device, loader = sys.argv[1:]
load(small)  # modules are imported, whatever they take
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # what is free, but kept, would not be seen to be used again
peak = resident()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, resident())

thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
model = load(folder)
if device != "cpu":
    torch.cuda.synchronize()
seconds = time.perf_counter() - start
done.set()
thread.join()
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
after = resident()
print(seconds, peak - after)
"""


def llama(layers: int, width: int) -> torch.nn.Module:
    """A quantized model whose layers are copies of the first."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=1, vocab_size=32000)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    quantize_(model, gptq_config(4, 128, method="rtn", effort="fast"))
    first = model.model.layers[0]
    model.model.layers.extend(copy.deepcopy(first) for _ in range(layers - 1))
    config.num_hidden_layers = layers
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", default=["gptq", "compressed-tensors", "native"])
    parser.add_argument("--shard-mib", type=int, default=512)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--devices", nargs="*", default=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    parser.add_argument("--loaders", nargs="*", default=["load_quantized", "from_pretrained"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for format in arguments.formats:
        with tempfile.TemporaryDirectory() as folder:
            small, large = f"{folder}/small", f"{folder}/large"
            save_quantized(llama(1, 2048), small, format=format)
            model = llama(arguments.layers, arguments.width)
            save_quantized(model, large, format=format, max_shard_bytes=arguments.shard_mib * 2**20)
            del model
            sizes = [f.stat().st_size for f in Path(large).glob("*.safetensors")]
            plain = float(_run(PLAIN, large)[0])
            print(f"{format}: {sum(sizes) / 2**30:.2f} GiB in {len(sizes)} files, the largest {max(sizes) / 2**20:.0f} "
                  f"MiB; safetensors reads {sum(sizes) / plain / 1e9:.2f} GB/s")  # fmt: skip
            for loader, device in itertools.product(arguments.loaders, arguments.devices):
                seconds, peak = map(float, _run(LOAD, small, large, device, loader))
                print(f"  {loader:15} to {device:4} {seconds:6.1f} s, {sum(sizes) / seconds / 1e9:.2f} GB/s, "
                      f"peak {peak / 2**20:.0f} MiB, {peak / max(sizes):.2f} of a file", flush=True)  # fmt: skip


def _run(program: str, *arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.split()


if __name__ == "__main__":
    main()
