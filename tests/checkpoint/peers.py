"""`make conformance`: files that gptq_ao writes, read by the libraries whose formats they are.

    python -m tests.checkpoint.peers PYTHON      PYTHON: of an environment with gptqmodel and compressed-tensors

Each checkpoint is read in a process that does not import gptq_ao, by the peer's own loader, and its logits are compared
with those of the same weights, dense. compressed-tensors has two: the library, and transformers with it. llm-compressor
writes with the library and has no reader of its own; two checkpoints that it wrote are read too. Prints a table; what
is not installed is listed as not run.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from gptq_ao import gptq_config, load_quantized, quantize_, save_quantized

from ..models import tiny_llama, token_batches

# name → (settings, formats that hold it)
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "4 bits, symmetric": ({"bits": 4}, ("gptq", "gptq_v2", "compressed-tensors")),
    "4 bits, asymmetric": ({"bits": 4, "sym": False}, ("gptq_v2", "compressed-tensors")),
    "8 bits": ({"bits": 8}, ("gptq", "compressed-tensors")),
    "3 bits": ({"bits": 3}, ("gptq", "compressed-tensors")),
    "2 bits, asymmetric": ({"bits": 2, "sym": False}, ("gptq_v2", "compressed-tensors")),
    "one scale per row": ({"bits": 4, "group_size": -1}, ("gptq", "compressed-tensors")),
    "activation order": ({"bits": 4, "act_order": "group"}, ("gptq",)),
    "mixed": (
        {"bits": 4, "rules": {"re:.*down_proj.*": {"bits": 8}, "re:.*layers.0.self_attn.*": None}},
        ("gptq", "compressed-tensors"),
    ),
}

# Prints logits of the checkpoint in argv[1], for the token ids in argv[2], as JSON.
READERS = {
    "gptqmodel": """
import json, sys, torch
from gptqmodel import GPTQModel, BACKEND
model = GPTQModel.load(sys.argv[1], device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH)
with torch.no_grad():
    logits = model.model(torch.tensor(json.loads(sys.argv[2]))).logits
print("LOGITS" + json.dumps(logits.float().tolist()))
""",
    # The format's own library, which finds each module's scheme and decompresses its tensors.
    "compressed_tensors": """
import json, sys, torch
from pathlib import Path
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained(sys.argv[1])
settings = QuantizationConfig.model_validate(config.quantization_config)
del config.quantization_config
model, marked = (AutoModelForCausalLM.from_config(config, dtype=torch.float32) for _ in range(2))
apply_quantization_config(marked, settings)
NAMES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
tensors = {n: t for file in Path(sys.argv[1]).glob("*.safetensors") for n, t in load_file(file).items()}
for name, module in marked.named_modules():
    if hasattr(module, "quantization_scheme"):
        parts = {n: tensors.pop(f"{name}.{n}") for n in NAMES if f"{name}.{n}" in tensors}
        read = BaseCompressor.load_from_registry("pack-quantized").decompress(parts, module.quantization_scheme)
        tensors[f"{name}.weight"] = read["weight"]
model.load_state_dict(tensors)
with torch.no_grad():
    logits = model(torch.tensor(json.loads(sys.argv[2]))).logits
print("LOGITS" + json.dumps(logits.float().tolist()))
""",
    "transformers": """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    logits = model(torch.tensor(json.loads(sys.argv[2]))).logits
print("LOGITS" + json.dumps(logits.float().tolist()))
""",
}

READERS_OF = {"compressed-tensors": ("compressed_tensors", "transformers")}


def main(python: str) -> int:
    """The number of checkpoints that were read otherwise than meant."""
    failures = 0
    ids = token_batches(1, rows=1, length=12)[0]["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        print("| checkpoint | format | reader | largest difference of a logit | |\n|---|---|---|---|---|")
        with tarfile.open(Path(__file__).with_name("peers.tar.xz")) as archive:
            archive.extractall(folder, filter="data")
        cannot: dict[bool, set[str]] = {True: set(), False: set()}  # symmetric → who does not read llm-compressor's own
        for sym in (True, False):
            name = f"llm-compressor-0.14-4bit-{'sym' if sym else 'asym'}"
            directory = Path(folder) / "peers" / name
            expected = logits(load_quantized(directory).float(), ids)
            for reader in READERS_OF["compressed-tensors"]:
                if not compare(python, reader, directory, ids, expected, name, "its own"):
                    cannot[sym].add(reader)
        tokenizer = AutoTokenizer.from_pretrained("examples/tiny_lm")  # GPTQModel insists on one
        for case, (settings, formats) in CASES.items():
            model = tiny_llama()
            calibration = token_batches(2)
            quantize_(model, gptq_config(**{"group_size": 32, **settings}, effort="fast", calibration=calibration))
            for format in formats:
                directory = Path(folder) / f"{case}-{format}".replace(" ", "-").replace(",", "")
                save_quantized(model, directory, format=format, tokenizer=tokenizer)
                for reader in READERS_OF.get(format, ("gptqmodel",)):
                    good = compare(python, reader, directory, ids, logits(model, ids), case, format)
                    # What a reader cannot read of its own kind, it cannot be asked to read of ours.
                    failures += not good and reader not in cannot[settings.get("sym", True)]
    return failures


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def compare(
    python: str, reader: str, directory: Path, ids: torch.Tensor, expected: torch.Tensor, case: str, format: str
) -> bool:
    """Whether the reader reads what was meant, or is not installed."""
    version = installed(python, reader)
    if version is None:
        print(f"| {case} | {format} | {reader} | | not installed |", flush=True)
        return True
    command = [python, "-c", READERS[reader], str(directory), json.dumps(ids.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory.parent)
    line = next((x for x in done.stdout.splitlines() if x.startswith("LOGITS")), None)
    if line is None:
        why = (done.stderr.strip().splitlines() or ["?"])[-1]
        print(f"| {case} | {format} | {reader} {version} | | not read: {why[:200]} |", flush=True)
        return False
    difference = (torch.tensor(json.loads(line.removeprefix("LOGITS"))) - expected).abs().max().item()
    # Readers may keep scales and products in fp16: 2^-11 of the largest logit for each of some 20 products.
    good = difference <= 20 * 2**-11 * expected.abs().max().item()
    verdict = "same" if good else "DIFFERENT"
    print(f"| {case} | {format} | {reader} {version} | {difference:.1e} | {verdict} |", flush=True)
    return good


def installed(python: str, package: str) -> str | None:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1])))
