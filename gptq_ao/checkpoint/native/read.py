"""The native format (see `tensors.py`) in a directory that transformers wrote: config.json is the manifest.

    "quantization_config": {"format": "gptq_ao", "format_version": 1, "weights": {NAME: {"bits": 4, …}}}

with the entries of `manifest.py`. Names are those of the model's parameters.

There is no "quant_method", and that is what makes transformers stop where gptq_ao is not installed. Of a method that it
does not know it only warns; it would then take all quantized weights for missing ones, and go on with random numbers.
Files that have one ("gptq_ao") are read too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gptq_ao.checkpoint.exchange.packed_weight import Rounding
from gptq_ao.checkpoint.files.shards import NAME_OF, StoredTensor
from gptq_ao.checkpoint.native.manifest import DTYPES, QuantizedEntry, check_version, parse_entries
from gptq_ao.checkpoint.native.tensors import from_stored
from gptq_ao.errors import CheckpointError
from gptq_ao.tensor import GroupTensor

__all__ = ["NATIVE_PARTS", "NativeWeight", "native_config", "native_weights"]

NATIVE_PARTS = ("codes", "scale", "zero_point", "perm")


@dataclass(frozen=True)
class NativeWeight:
    """A quantized weight in the native format, which is read like any other tensor (`StoredTensor`)."""

    name: str
    entry: QuantizedEntry
    parts: Mapping[str, StoredTensor]

    @property
    def bits(self) -> int:
        return self.entry.bits

    @property
    def group_size(self) -> int:
        return self.entry.spec.group_size

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.entry.parameter_shape)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.entry.dtype]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def read(self, device: torch.device | str = "cpu") -> GroupTensor:
        """The weight, of the parameter's shape and dtype, on `device`.

        Raises:
            CheckpointError: the tensors do not make a weight.
        """
        where = next(iter(self.parts.values())).path
        return from_stored(self.name, self.entry, lambda name: self.parts[name].read(device), where)


def native_config(entries: Mapping[str, Any], version: int) -> dict[str, Any]:
    """The quantization_config of config.json. A Hugging Face model is recognized by it.

    Args:
        entries: the "quantized" of the manifest.
        version: its format version.
    """
    return {"format": "gptq_ao", "format_version": version, "weights": dict(entries)}


def native_weights(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], rounding: Rounding
) -> Iterator[NativeWeight]:
    """Every quantized weight of a checkpoint, of which the headers are known.

    Raises:
        CheckpointError: config and tensors contradict each other.
    """
    check_version(config.get("format_version"), "config.json")
    try:
        entries = parse_entries(config["weights"])
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"config.json is damaged: {type(e).__name__}: {e}") from e
    known = set()
    for name, entry in entries.items():
        parts = {}
        # Here already, from headers, so that loading cannot fail halfway on a tensor that is missing.
        for part, (dtype, shape) in entry.tensors(name).items():
            if part not in stored:
                raise CheckpointError(f"tensor {part!r} is missing")
            found = (NAME_OF[stored[part].dtype], list(stored[part].shape))
            if found != (dtype, shape):
                raise CheckpointError(f"tensor {part!r} is {found}, config.json says {(dtype, shape)}")
            parts[part] = stored[part]
        known |= set(parts)
        yield NativeWeight(name, entry, parts)
    # A part without an entry would be dropped silently.
    odd = sorted(n for n in stored if n.rpartition(".")[2] in NATIVE_PARTS and n not in known)
    if odd:
        raise CheckpointError(f"tensor {odd[0]!r} belongs to no weight that config.json knows")
