"""A checkpoint as vLLM's loaders expect one: tensors one after the other, under the names of a dense one on the hub."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from gptq_ao.checkpoint.exchange.hub_names import revert_conversions
from gptq_ao.checkpoint.formats import open_quantized
from gptq_ao.model.empty import empty_model

__all__ = ["hub_tensors"]


def hub_tensors(directory: Path, *, trust_remote_code: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint, by name, on the CPU; quantized weights as GroupTensors [N, K].

    Raises:
        CheckpointError: it cannot be read.
    """
    files = open_quantized(directory)
    # In the native format the names are those of transformers' modules, which has experts in stacks, for example.
    frame = None if files.format.hub_names else empty_model(directory, trust_remote_code=trust_remote_code)
    for name in sorted(files.tensors):
        tensor = files.tensors[name].read()
        yield from ([(name, tensor)] if frame is None else revert_conversions(frame, {name: tensor}).items())
