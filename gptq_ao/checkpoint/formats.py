"""All formats; and a directory in one of them: every quantized weight as one tensor, under the name of a dense one.

A new format is a folder beside this file and a line in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_ao.checkpoint.awq.format import AWQ
from gptq_ao.checkpoint.compressed_tensors.format import COMPRESSED_TENSORS
from gptq_ao.checkpoint.exchange.format import Format, QuantizedWeight, Readable
from gptq_ao.checkpoint.exchange.packed_weight import Rounding
from gptq_ao.checkpoint.files.directory import has_manifest, method_of, quantization_config, stored_tensors
from gptq_ao.checkpoint.files.shards import StoredTensor
from gptq_ao.checkpoint.gptq.format import GPTQ, GPTQ_V2
from gptq_ao.checkpoint.mlx.format import MLX
from gptq_ao.checkpoint.native.format import NATIVE
from gptq_ao.errors import CheckpointError, ConfigError

__all__ = ["DENSE", "FORMATS", "GGUF", "QuantizedFiles", "format_in", "format_of", "open_quantized", "target_format"]

FORMATS = {format.name: format for format in (NATIVE, GPTQ, GPTQ_V2, COMPRESSED_TENSORS, AWQ, MLX)}
# Not formats of a directory: one without quantized weights, and one file, which is only written.
DENSE = "dense"
GGUF = "gguf"


@dataclass(frozen=True)
class QuantizedFiles:
    """A checked directory.

    Attributes:
        weights: name → quantized weight; it has the name and shape of the dense one.
        dense: name → any other tensor.
        rounding: record of scales that were rounded, complete when all weights have been read.
    """

    format: Format
    weights: Mapping[str, QuantizedWeight]
    dense: Mapping[str, StoredTensor]
    rounding: Rounding

    @property
    def tensors(self) -> dict[str, Readable]:
        """Name → tensor, dense or quantized."""
        return {**self.dense, **self.weights}


def target_format(name: str) -> Format | None:
    """What `save_quantized` calls so; None for "dense" and "gguf".

    Raises:
        ConfigError: there is no such format.
    """
    if name in (DENSE, GGUF):
        return None
    if name not in FORMATS:
        raise ConfigError(f"format is {name!r}: give one of {', '.join((*FORMATS, DENSE, GGUF))}")
    return FORMATS[name]


def format_in(config: Mapping[str, Any], where: object) -> Format:
    """The format of a quantization_config.

    Args:
        where: place of the config, for messages.

    Raises:
        CheckpointError: it is one that cannot be read.
    """
    # "gptq" names its version here. compressed-tensors has "format" for something else, which is no name of a format.
    method, version = method_of(config), config.get("checkpoint_format") or config.get("format")
    formats = [f for f in FORMATS.values() if f.quant_method == method]
    if not formats:
        known = ", ".join(dict.fromkeys(f.quant_method for f in FORMATS.values()))
        raise CheckpointError(f"{where} is quantized with {method!r}, which cannot be read, only {known}")
    # Without a version: the first format of the method (for gptq, version 1).
    return next((f for f in formats if f.name == version), formats[0])


def format_of(directory: Path) -> Format | None:
    """What the directory says that it is; None if it says nothing of quantized weights.

    Raises:
        CheckpointError: it is not a directory, has a format that cannot be read, or a damaged config.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: download the model first (`hf download`)")
    # Before config.json: a native checkpoint of a model that is not of Hugging Face has none.
    if has_manifest(directory):
        return NATIVE
    config = quantization_config(directory)
    return None if config is None else format_in(config, directory)


def open_quantized(directory: Path) -> QuantizedFiles:
    """Check a directory, of which only configs and headers are read.

    Raises:
        CheckpointError: it is not quantized, or in a way that cannot be read; files are missing, damaged or lie outside
            of it; config and tensors contradict each other.
    """
    config = quantization_config(directory)
    if config is None:
        raise CheckpointError(f"{directory} is not a quantized checkpoint: its config.json has no quantization_config")
    format = format_in(config, directory)
    stored, rounding = stored_tensors(directory), Rounding()
    stored = stored if format.stacks is None else format.stacks.split(stored)
    dense = {name: t for name, t in stored.items() if not _is_part(name, stored, format)}
    weights: dict[str, QuantizedWeight] = {}
    try:
        if format.check_dense is not None:
            format.check_dense(dense)
        for weight in format.read(config, {name: t for name, t in stored.items() if name not in dense}, rounding):
            if weight.name in dense or weight.name in weights:
                raise CheckpointError(f"{weight.name!r} is there twice, dense and quantized")
            weights[weight.name] = weight
    except CheckpointError as e:
        raise CheckpointError(f"{directory}: {e}") from e
    if not weights:
        raise CheckpointError(
            f"{directory} says that it is quantized with {format.quant_method!r}, and has no quantized weight"
        )
    return QuantizedFiles(format, weights, dense, rounding)


def _is_part(name: str, stored: Mapping[str, StoredTensor], format: Format) -> bool:
    """Whether it is a part of a quantized weight. A parameter of the model may be called like one ("scale")."""
    prefix, _, part = name.rpartition(".")
    if part not in format.parts:
        return False
    codes, *others = (f"{prefix}.{p}" in stored for p in format.parts)
    return codes and any(others)
