"""Which format a directory has, and its tensors: every quantized weight as one, under the name of a dense one."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gptq_ao.checkpoint.compressed_tensors.read import COMPRESSED_PARTS, compressed_weights
from gptq_ao.checkpoint.exchange.packed_weight import Rounding
from gptq_ao.checkpoint.files.directory import quantization_config, stored_tensors
from gptq_ao.checkpoint.files.shards import StoredTensor
from gptq_ao.checkpoint.gptq.read import GPTQ_PARTS, gptq_weights
from gptq_ao.checkpoint.native.read import NATIVE_PARTS, native_weights
from gptq_ao.errors import CheckpointError

__all__ = ["QUANT_METHODS", "QuantizedFiles", "Readable", "open_quantized"]


class Readable(Protocol):
    """A tensor in files: a dense one (`StoredTensor`) or a quantized weight."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def nbytes(self) -> int: ...

    def read(self, device: torch.device | str = "cpu") -> Tensor: ...


@dataclass(frozen=True)
class QuantizedFiles:
    """A checked directory.

    Attributes:
        quant_method: as its config calls the format.
        tensors: name → tensor; a quantized weight has the name and shape of the dense one.
        rounding: knows, when they have been read, of scales that were rounded.
    """

    quant_method: str
    tensors: Mapping[str, Readable]
    rounding: Rounding


Weights = Callable[[Mapping[str, Any], Mapping[str, StoredTensor], Rounding], Iterator[Any]]
# quant_method → the last parts of its tensors' names, and what makes weights of them
_READERS: dict[str, tuple[tuple[str, ...], Weights]] = {
    "gptq": (GPTQ_PARTS, gptq_weights),
    "compressed-tensors": (COMPRESSED_PARTS, compressed_weights),
    "gptq_ao": (NATIVE_PARTS, native_weights),
}
QUANT_METHODS = tuple(_READERS)


def open_quantized(directory: Path) -> QuantizedFiles:
    """Check a directory, of which only configs and headers are read.

    Raises:
        CheckpointError: it is not quantized, or in a way that cannot be read; files are missing, damaged or lie outside
            of it; config and tensors contradict each other.
    """
    config = quantization_config(directory)
    if config is None:
        raise CheckpointError(f"{directory} is no quantized checkpoint: its config.json has no quantization_config")
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        known = ", ".join(QUANT_METHODS)
        raise CheckpointError(f"{directory} is quantized with {method!r}, which cannot be read, only {known}")
    parts, make = _READERS[method]
    stored, rounding = stored_tensors(directory), Rounding()
    tensors: dict[str, Readable] = {n: t for n, t in stored.items() if n.rpartition(".")[2] not in parts}
    try:
        for weight in make(config, stored, rounding):
            if weight.name in tensors:
                raise CheckpointError(f"{weight.name!r} is there twice, dense and quantized")
            tensors[weight.name] = weight
    except CheckpointError as e:
        raise CheckpointError(f"{directory}: {e}") from e
    if not any(not isinstance(t, StoredTensor) for t in tensors.values()):
        raise CheckpointError(f"{directory} says that it is quantized with {method!r}, and has no quantized weight")
    return QuantizedFiles(method, tensors, rounding)
