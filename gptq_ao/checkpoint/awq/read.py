"""An AWQ checkpoint before its weights are read: do its config and the headers of its files fit together?"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from gptq_ao.checkpoint.awq.tensors import AWQ_BITS, PER_WORD, decode_awq
from gptq_ao.checkpoint.exchange.packed_weight import PackedWeight, Rounding
from gptq_ao.checkpoint.files.shards import StoredTensor
from gptq_ao.errors import CheckpointError

__all__ = ["AWQ_PARTS", "awq_weights", "check_activations"]

AWQ_PARTS = ("qweight", "qzeros", "scales")
_VERSION = "gemm"
_FLOATING = (torch.float16, torch.bfloat16, torch.float32)


def awq_weights(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], rounding: Rounding
) -> Iterator[PackedWeight]:
    """Every quantized weight of a checkpoint, of which the headers are known.

    Raises:
        CheckpointError: the config asks for what cannot be read, or config and tensors contradict each other.
    """
    size = _group_size(config)
    modules: dict[str, dict[str, StoredTensor]] = {}
    # Tensors of one module are found by their names, `module.part`.
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    for module, parts in modules.items():
        n, k, group_size = _check(module, parts, size)
        dtype = parts["scales"].dtype
        yield PackedWeight(f"{module}.weight", AWQ_BITS, group_size, (n, k), dtype, parts, decode_awq, rounding)


def check_activations(dense: Mapping[str, StoredTensor]) -> None:
    """AWQ divides some activations by a vector (of models such as MPT, Falcon, Bloom and GPT-NeoX, where no layer comes
    before that could take it in): the module around the activation is called "scale" there, and its vector `scales`.

    Raises:
        CheckpointError: the checkpoint has such.
    """
    names = [n for n, t in dense.items() if n.rpartition(".")[2] == "scales" and t.dtype in _FLOATING]
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise CheckpointError(
            f"the checkpoint scales activations: {names[0]!r}{more}, {list(dense[names[0]].shape)}, is what the output "
            "of an activation function is divided by, which the unquantized model has no place for, nor can codes take "
            "it in without being rounded again. Quantize the original model instead"
        )


def _group_size(config: Mapping[str, Any]) -> int:
    """Input features of a group; −1 is one group per row."""
    # AutoAWQ calls it "version", in capitals in old files, GPTQModel "checkpoint_format" or "format".
    names = ("version", "checkpoint_format", "format")
    version = next((config[n] for n in names if config.get(n) is not None), _VERSION)
    if not isinstance(version, str) or version.lower() != _VERSION:
        raise CheckpointError(
            f"AWQ checkpoints of the version {version!r} cannot be read, only {_VERSION!r}: other versions pack the "
            "same codes for other kernels. Look for the model in that version, or quantize the original one"
        )
    bits = _number(config, ("bits", "w_bit"))
    if bits != AWQ_BITS:
        raise CheckpointError(f"the checkpoint has AWQ weights of {bits} bits, only {AWQ_BITS} can be read")
    size = _number(config, ("group_size", "q_group_size"))
    if size < 1 and size != -1:
        raise CheckpointError(f"the checkpoint has a group_size of {size}: not a number of input features, nor -1")
    return size


def _check(module: str, parts: Mapping[str, StoredTensor], size: int) -> tuple[int, int, int]:
    """N, K and group size of a module whose tensors fit together."""
    lacks = [p for p in AWQ_PARTS if p not in parts]
    if lacks:
        raise CheckpointError(f"module {module!r} has {sorted(parts)[0]!r} and lacks {lacks[0]!r}")
    found = {p: (t.dtype, t.shape) for p, t in parts.items()}
    codes, zeros, scales = (parts[p] for p in AWQ_PARTS)
    integers = all(t.dtype == torch.int32 and len(t.shape) == 2 for t in (codes, zeros))
    if not integers or scales.dtype not in _FLOATING or len(scales.shape) != 2:
        raise CheckpointError(f"the tensors of {module!r} are not a quantized weight: {found}")
    # Transposed in this format: a row for each input feature, columns of words along N.
    k, columns = codes.shape
    groups, n = scales.shape
    size = k if size == -1 else size
    fits = 0 < size <= k and k % size == 0 and (groups, n) == (k // size, columns * PER_WORD)
    if not fits or zeros.shape != (groups, columns) or n == 0:
        raise CheckpointError(
            f"the config (AWQ, {AWQ_BITS} bits, groups of {size}) and the tensors of {module!r} contradict each "
            f"other: {found}"
        )
    return n, k, size


def _number(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    value = next((config[n] for n in names if n in config), None)
    # Not isinstance: JSON's true would pass for 1.
    if type(value) is not int:
        raise CheckpointError(f"the config is damaged: {names[0]!r} is {value!r}, not a number")
    return value
