"""How large checkpoints are on disk, of each format and width.

    python benchmarks/sizes.py [DIRECTORY]      DIRECTORY: of a model, examples/tiny_lm if there is none

Prints a table: bits that the files hold for each weight that is quantized, scales and all else that belongs to it
included. What is not quantized has the size that it had. Rounded to nearest: sizes do not depend on the method.
"""

import argparse
import json
import struct
import tempfile
import warnings
from pathlib import Path
from typing import Any

from gptq_ao import gptq_config, quantize_, save_quantized
from gptq_ao.errors import CheckpointError
from gptq_ao.integrations.transformers import load_model, load_tokenizer
from gptq_ao.model.weights import ModelWeights
from gptq_ao.tensor import GroupTensor

FORMATS = ("native", "gptq", "gptq_v2", "compressed-tensors", "awq", "gguf", "mlx")
KINDS = [(bits, group, sym) for bits in (2, 3, 4, 8) for group in (32, 128) for sym in (True, False)]


def quantized_bytes(path: Path, modules: set[str]) -> int:
    """Of the tensors that stand for the weights of these modules."""
    if path.is_file():
        import gguf

        tensors = gguf.GGUFReader(path).tensors
        return sum(int(t.n_bytes) for t in tensors if t.tensor_type.name.startswith("Q"))
    found = 0
    for file in path.glob("*.safetensors"):
        for name, (begin, end) in offsets(file).items():
            found += (end - begin) * any(name.startswith(f"{module}.") for module in modules)
    return found


def offsets(file: Path) -> dict[str, tuple[int, int]]:
    """Name of a tensor → where it lies, by the header of a safetensors file."""
    with file.open("rb") as content:
        (length,) = struct.unpack("<Q", content.read(8))
        header = json.loads(content.read(length))
    return {name: tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", nargs="?", default="examples/tiny_lm")
    directory = parser.parse_args().directory
    warnings.simplefilter("ignore")
    tokenizer = load_tokenizer(directory)
    print(f"| weights | {' | '.join(FORMATS)} |\n|---|{'---|' * len(FORMATS)}")
    for bits, group, sym in KINDS:
        model: Any = load_model(directory)
        quantize_(model, gptq_config(bits=bits, group_size=group, sym=sym, method="rtn"))
        weights = {name: ModelWeights(model).get(name) for name, _ in model.named_parameters()}
        packed = {name: w for name, w in weights.items() if isinstance(w, GroupTensor)}
        number = sum(w.numel() for w in packed.values())
        cells = []
        for format in FORMATS:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / ("m.gguf" if format == "gguf" else "m")
                try:
                    save_quantized(model, path, format=format, tokenizer=tokenizer)
                except CheckpointError:  # it has no weights of this kind
                    cells.append("")
                    continue
                stored = quantized_bytes(path, {name.removesuffix(".weight") for name in packed})
                cells.append(f"{8 * stored / number:.3f}")
        row = f"{bits} bits, groups of {group}, {'symmetric' if sym else 'asymmetric'}"
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
