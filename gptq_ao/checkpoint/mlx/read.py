"""An MLX checkpoint before its weights are read: do its config and the headers of its files fit together?

The config has a width and a group size for all weights, and others under the name of a module. A module that has no
`scales` is dense.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from gptq_ao.checkpoint.exchange.packed_weight import PackedWeight, Rounding
from gptq_ao.checkpoint.files.shards import StoredTensor
from gptq_ao.checkpoint.mlx.experts import EXPERTS
from gptq_ao.checkpoint.mlx.tensors import decode_mlx, dequantize_mlx
from gptq_ao.errors import CheckpointError

__all__ = ["MLX_PARTS", "mlx_weights"]

MLX_PARTS = ("weight", "scales", "biases")
_BITS = (2, 3, 4, 5, 6, 8)
_MODE = "affine"
_FLOATING = (torch.float16, torch.bfloat16, torch.float32)


def mlx_weights(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], rounding: Rounding
) -> Iterator[PackedWeight]:
    """Every quantized weight of a checkpoint, of which the headers are known.

    Raises:
        CheckpointError: the config asks for what cannot be read, or config and tensors contradict each other.
    """
    usual = _setting(config, "the config")
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    for module, parts in modules.items():
        own = config.get(EXPERTS.name(module))
        if own is False:
            raise CheckpointError(f"the config says that {module!r} is not quantized, and it has scales")
        # true: as the others.
        bits, size = usual if own in (None, True) else _setting(own, f"the config of {module!r}", usual)
        n, k = _check(module, parts, bits, size)
        decode, values = functools.partial(decode_mlx, bits=bits), functools.partial(dequantize_mlx, bits=bits)
        dtype = parts["scales"].dtype
        yield PackedWeight(f"{module}.weight", bits, size, (n, k), dtype, parts, decode, rounding, values)


def _setting(config: Any, what: str, usual: tuple[int, int] | None = None) -> tuple[int, int]:
    """Bits and group size."""
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{what} is damaged: it is {config!r}, not an object")
    mode = config.get("mode", _MODE)
    if mode != _MODE:
        raise CheckpointError(
            f"{what} has MLX weights of the mode {mode!r}, and only {_MODE!r} can be read: the other modes have codes "
            "that are no integers. Quantize the original model instead"
        )
    bits, size = (config.get(key, None if usual is None else usual[i]) for i, key in enumerate(("bits", "group_size")))
    # Not isinstance: JSON's true would pass for 1.
    if type(bits) is not int or type(size) is not int or bits not in _BITS or size < 1:
        raise CheckpointError(
            f"{what} is damaged: bits is {bits!r} and group_size {size!r}; bits are one of {', '.join(map(str, _BITS))}"
        )
    return bits, size


def _check(module: str, parts: Mapping[str, StoredTensor], bits: int, size: int) -> tuple[int, int]:
    """N and K of a module whose tensors fit together."""
    lacks = [p for p in MLX_PARTS if p not in parts]
    if lacks:
        raise CheckpointError(f"module {module!r} has {sorted(parts)[0]!r} and lacks {lacks[0]!r}")
    found = {p: (t.dtype, t.shape) for p, t in parts.items()}
    words, scales, biases = (parts[p] for p in MLX_PARTS)
    kinds = words.dtype == torch.uint32 and scales.dtype in _FLOATING and biases.dtype in _FLOATING
    if not kinds or not len(words.shape) == len(scales.shape) == len(biases.shape) == 2:
        raise CheckpointError(f"the tensors of {module!r} are not a quantized weight: {found}")
    n, groups = scales.shape
    fits = words.shape[0] == n and words.shape[1] * 32 == groups * size * bits
    if biases.shape != scales.shape or 0 in scales.shape or not fits:
        raise CheckpointError(
            f"the config (MLX, {bits} bits, groups of {size}) and the tensors of {module!r} contradict each other: "
            f"{found}"
        )
    return n, groups * size
