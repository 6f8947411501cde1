"""A quantized weight as it lies in a file, and back.

A weight NAME [N, K] is stored as `NAME.codes` (uint8 [N, ⌈K·bits/8⌉], each row a stream of bits, see
`codes/bit_stream.py`), `NAME.scale` (fp16 [N, G]), `NAME.zero_point` (uint8 [N, G]) and, if its columns are permuted,
`NAME.perm` (int32 [K]); w = (code − zero_point)·scale. A stack of them [E, N, K] has E in front, except for `perm`.
That is independent of how codes are arranged at run time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gptq_ao.checkpoint.native.manifest import DTYPES, QuantizedEntry
from gptq_ao.codes.bit_stream import pack_bits
from gptq_ao.codes.reinterpret import reinterpret
from gptq_ao.errors import CheckpointError, ConfigError, NonFiniteError
from gptq_ao.tensor import GroupTensor, tensor_class

__all__ = ["encode_native", "from_stored", "stored_entry"]


def stored_entry(weight: GroupTensor) -> QuantizedEntry:
    """What the manifest says of a weight."""
    return QuantizedEntry.of(weight.spec, weight.dtype, weight.transposed, weight.view_shape)


def encode_native(weight: GroupTensor) -> dict[str, Tensor]:
    """The tensors of a weight by the last parts of their names, as above, on the CPU."""
    codes = pack_bits(weight.codes().cpu(), weight.bits)
    parts = {"codes": codes, "scale": weight.scale, "zero_point": weight.zero_point}
    if weight.perm is not None:
        parts["perm"] = weight.perm.clone()  # weights solved together share it, files do not share tensors
    return {part: t.detach().cpu().contiguous() for part, t in parts.items()}


def from_stored(name: str, entry: QuantizedEntry, get: Callable[[str], Tensor], where: object) -> GroupTensor:
    """The weight, of the parameter's shape and dtype, on the device of its tensors.

    Args:
        entry: what the manifest says of it.
        get: reader of a tensor by its name; names, shapes and dtypes are those above.
        where: place of the files, for messages.

    Raises:
        CheckpointError: the tensors do not make a weight.
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
            view_shape=entry.view_as,
        )
    except (ConfigError, NonFiniteError) as error:
        raise CheckpointError(f"{where}: weight {name!r} is damaged: {error}") from error


def _words(stream: Tensor) -> Tensor:
    """Rows of bytes as rows of int32."""
    # A row of bytes need not fill its last word; what is added is zero, as in a stream of words. Bytes are little-
    # endian.
    rest = -stream.shape[-1] % 4
    return reinterpret(torch.nn.functional.pad(stream, (0, rest)) if rest else stream, torch.int32)
