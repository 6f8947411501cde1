"""A quantized weight as it lies in a file, see `checkpoint.py`, and back."""

from collections.abc import Callable

import torch
from torch import Tensor

from gptq_ao.checkpoint.native.manifest import DTYPES, QuantizedEntry
from gptq_ao.codes.bit_stream import pack_bits
from gptq_ao.errors import CheckpointError, ConfigError, NonFiniteError
from gptq_ao.tensor import GroupTensor, tensor_class

__all__ = ["from_stored", "stored_entry", "stored_parts"]

_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


def stored_entry(weight: GroupTensor) -> QuantizedEntry:
    """What the manifest says of a weight."""
    return QuantizedEntry(
        weight.bits,
        (*weight.qdata.shape[:-3], weight.out_features, weight.in_features),
        weight.in_features // weight.group_size,
        _NAME_OF[weight.dtype],
        weight.transposed,
        weight.perm is not None,
        weight.view_as,
    )


def stored_parts(name: str, weight: GroupTensor) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU."""
    codes = pack_bits(weight.codes().cpu(), weight.bits)
    parts = {"codes": codes, "scale": weight.scale, "zero_point": weight.zero_point}
    if weight.perm is not None:
        parts["perm"] = weight.perm.clone()  # weights solved together share it, files do not share tensors
    return {f"{name}.{part}": t.detach().cpu().contiguous() for part, t in parts.items()}


def from_stored(name: str, entry: QuantizedEntry, get: Callable[[str], Tensor], where: object) -> GroupTensor:
    """The weight whose tensors `get` reads.

    Raises:
        CheckpointError: the tensors are no such weight.
    """
    k = entry.shape[-1]
    try:
        return tensor_class(entry.bits).from_words(
            _words(get(f"{name}.codes")),
            k,
            get(f"{name}.scale"),
            get(f"{name}.zero_point"),
            dtype=DTYPES[entry.dtype],
            perm=get(f"{name}.perm") if entry.perm else None,
            transposed=entry.transposed,
            view_as=entry.view_as,
        )
    except (ConfigError, NonFiniteError) as error:
        raise CheckpointError(f"{where}: weight {name!r} is damaged: {error}") from error


def _words(stream: Tensor) -> Tensor:
    """Rows of bytes as rows of int32."""
    rest = -stream.shape[-1] % 4
    return (torch.nn.functional.pad(stream, (0, rest)) if rest else stream).view(torch.int32)
