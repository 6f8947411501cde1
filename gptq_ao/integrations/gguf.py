"""A model in a GGUF file, as a directory of Hugging Face: what quantized blocks stand for, as numbers.

transformers reads the file, with the package gguf. What it is known to drop is an error here.
"""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from gptq_ao.checkpoint.gguf.architecture import unlike_file
from gptq_ao.checkpoint.gguf.package import gguf_package
from gptq_ao.checkpoint.save import save_quantized
from gptq_ao.errors import CheckpointError
from gptq_ao.report import names_of

__all__ = ["dense_from_gguf", "is_gguf"]

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def is_gguf(source: str | Path) -> bool:
    """Whether it is the path of a file that is called as one."""
    return str(source).endswith(SUFFIX) and os.path.isfile(source)


def dense_from_gguf(path: Path, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Write the model and the tokenizer of a GGUF file into a directory that is empty: safetensors, unquantized. The
    config says what it was made of, under `requantized_from`: `quantize_` repeats that in its report, and the model
    card does.

    Args:
        dtype: of the model; None: fp32, which holds what blocks of up to 8 bits stand for.

    Raises:
        CheckpointError: the file is damaged, or transformers cannot read all of it.
        ConfigError: the package gguf is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    types, keys = _checked(path)
    place, how = str(path.parent), {"gguf_file": path.name}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype or torch.float32, output_loading_info=True, **how
        )
        tokenizer = AutoTokenizer.from_pretrained(place, **how)
    except Exception as e:  # which one depends on what the file holds
        raise CheckpointError(f"{path} cannot be read by transformers: {type(e).__name__}: {_first_line(e)}") from e
    # transformers would go on with random numbers in their place.
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"], *(str(k[0]) for k in info["mismatched_keys"])})
    if wrong:
        raise CheckpointError(f"{path} does not fit the {type(model).__name__} of transformers: {names_of(wrong)}")
    # It has no place for some numbers, and goes on with usual ones.
    unlike = unlike_file(model, keys)
    if unlike is not None:
        raise CheckpointError(
            f"{path} becomes another model when transformers reads it: {unlike}. Start from the original weights"
        )
    model.config.requantized_from = {"file": path.name, "types": types}
    model.config._name_or_path = ""  # the folder of the file: what else lies there does not belong to it
    save_quantized(model, directory, format="dense", tokenizer=tokenizer)
    # The time of the file: a run that goes on tells by it that these are the same weights.
    times = path.stat()
    for made in directory.iterdir():
        os.utime(made, ns=(times.st_atime_ns, times.st_mtime_ns))


def _checked(path: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """How many tensors there are of each type of GGUF; and the numbers of the file, by their keys.

    Raises:
        CheckpointError: it is no GGUF file, or transformers would drop something.
    """
    gguf = gguf_package()
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file: it begins with {magic!r}")
    try:
        reader = gguf.GGUFReader(path)
        # All of them are looked at here: a field that cannot be read is an error now.
        keys: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as e:  # offsets and lengths that lie end in any error of numpy's
        raise CheckpointError(f"{path} is truncated or damaged: {type(e).__name__}: {_first_line(e)}") from e
    if keys.get("split.count", 1) > 1:
        raise CheckpointError(f"{path} is one of {keys['split.count']} parts of a model: merge them first (gguf-split)")
    name = keys.get("general.architecture")
    scaling = keys.get(f"{name}.rope.scaling.type", "none")
    factors = [tensor for tensor in _ROPE_FACTORS if tensor in tensors]
    if factors or scaling != "none":
        what = f"a tensor {factors[0]!r}" if factors else f"rope.scaling.type {scaling!r}"
        raise CheckpointError(
            f"{path} has {what}: its rotary frequencies are scaled, which transformers does not read from GGUF files, "
            "and the model would be another one. Start from the original weights"
        )
    return dict(Counter(t.tensor_type.name for t in tensors.values()).most_common()), keys


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [""])[0][:300]
