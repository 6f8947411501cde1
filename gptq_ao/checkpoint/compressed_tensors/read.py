"""A compressed-tensors checkpoint before its weights are read: do its config and the headers of its files fit together?

Bits, groups and symmetry of a module follow from its tensors; the config only says which schemes there are (it calls
them config groups). Its targets, which may be regular expressions, are never matched.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gptq_ao.checkpoint.compressed_tensors.tensors import decode_compressed
from gptq_ao.checkpoint.exchange.packed_weight import PackedWeight, Rounding
from gptq_ao.checkpoint.files.shards import StoredTensor
from gptq_ao.codes.bit_stream import word_count
from gptq_ao.errors import CheckpointError

__all__ = ["COMPRESSED_PARTS", "Scheme", "compressed_schemes", "compressed_weights"]

COMPRESSED_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
_FORMAT = "pack-quantized"
_DENSE = "dense"  # the sparse format that is none
# Observers may still be attached to the model, or its weights have been what they are in files: packed all the same.
_DONE = ("compressed", "frozen", "calibration")
_FLOATING = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Scheme:
    """How weights are quantized. `group_size` is None for one scale per row."""

    bits: int
    sym: bool
    group_size: int | None


def compressed_schemes(config: Mapping[str, Any]) -> list[Scheme]:
    """
    Raises:
        CheckpointError: the config asks for what cannot be read, or is damaged.
    """
    schemes = config.get("config_groups")
    if not isinstance(schemes, dict) or not schemes:
        raise CheckpointError("the config is damaged: it has no 'config_groups'")
    inner = [s.get("format") for s in schemes.values() if isinstance(s, dict)]
    # The config as a whole may name no format, or a mixture, if each of its schemes says what it is. Without any, the
    # tensors have to show it.
    allowed = [_FORMAT, "mixed-precision", None] if all(f == _FORMAT for f in inner) else [_FORMAT, None]
    odd = [f for f in inner if f not in (_FORMAT, None)] + [f for f in [config.get("format")] if f not in allowed]
    if odd:
        raise CheckpointError(f"compressed-tensors of the format {odd[0]!r} cannot be read, only {_FORMAT!r}")
    # With one of these the stored weights alone do not give the model's outputs. Versions differ in how they write that
    # there is none.
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config"):
        value = config.get(key)
        if not _is_empty(value) and not (isinstance(value, dict) and value.get("format") == _DENSE):
            what = f" of the format {value['format']!r}" if isinstance(value, dict) and value.get("format") else ""
            raise CheckpointError(
                f"the checkpoint has a {key}{what}: it is more than quantized weights, and cannot be read"
            )
    status = config.get("quantization_status")
    if status not in (*_DONE, None):
        raise CheckpointError(f"the checkpoint is {status!r}, only {', '.join(map(repr, _DONE))} can be read")
    return [_scheme(name, scheme) for name, scheme in schemes.items()]


def compressed_weights(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], rounding: Rounding
) -> Iterator[PackedWeight]:
    """Every quantized weight of a checkpoint, of which the headers are known; of the data only `weight_shape` is read.

    Raises:
        CheckpointError: config and tensors contradict each other.
    """
    schemes = compressed_schemes(config)
    modules: dict[str, dict[str, StoredTensor]] = {}
    # Tensors of one module are found by their names, `module.part`.
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        if part in COMPRESSED_PARTS:
            modules.setdefault(module, {})[part] = tensor
    for module, parts in modules.items():
        n, k, bits = _check(module, parts, schemes)
        decode = functools.partial(decode_compressed, bits=bits)
        scale = parts["weight_scale"]
        group_size = k // scale.shape[1]
        yield PackedWeight(f"{module}.weight", bits, group_size, (n, k), scale.dtype, parts, decode, rounding)


def _is_empty(value: Any) -> bool:
    """None, or nothing but containers of it."""
    return not value or (isinstance(value, dict) and all(map(_is_empty, value.values())))


def _scheme(name: str, scheme: Any) -> Scheme:
    weights = scheme.get("weights") if isinstance(scheme, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(f"the config is damaged: config group {name!r} has no 'weights'")
    for key in ("input_activations", "output_activations"):
        if not _is_empty(scheme.get(key)):
            raise CheckpointError(f"config group {name!r} quantizes activations ({key}): only weights can be read")
    # What is null or left out has the library's default.
    given = {key: value for key, value in weights.items() if value is not None}
    bits, size, sym = given.get("num_bits", 8), given.get("group_size"), given.get("symmetric", True) is True
    strategy = given.get("strategy", "tensor" if size is None else "group")
    if given.get("type", "int") != "int" or type(bits) is not int or not 2 <= bits <= 8:
        raise CheckpointError(f"config group {name!r} has weights of {bits!r} bits, type {given.get('type')!r}: only "
                              "integers of 2 to 8 bits can be read")  # fmt: skip
    if strategy == "group" and type(size) is int and size > 0:
        return Scheme(bits, sym, size)
    # Two spellings of one scale per row.
    if strategy == "channel" or (strategy == "group" and size == -1):
        return Scheme(bits, sym, None)
    raise CheckpointError(f"config group {name!r} has the strategy {strategy!r} with group_size {size!r}: only groups "
                          "and channels can be read")  # fmt: skip


def _check(module: str, parts: Mapping[str, StoredTensor], schemes: list[Scheme]) -> tuple[int, int, int]:
    """N, K and bits of a module whose tensors fit together."""
    # The first three are always written; zero points and g_idx are optional.
    lacks = [p for p in COMPRESSED_PARTS[:3] if p not in parts]
    if lacks:
        raise CheckpointError(f"module {module!r} has {sorted(parts)[0]!r} and lacks {lacks[0]!r}")
    found = {p: (t.dtype, t.shape) for p, t in parts.items()}
    packed, scale, zero_point = parts["weight_packed"], parts["weight_scale"], parts.get("weight_zero_point")
    g_idx = parts.get("weight_g_idx")
    kinds = (
        packed.dtype == torch.int32
        and len(packed.shape) == len(scale.shape) == 2
        and scale.dtype in _FLOATING
        and parts["weight_shape"].dtype == torch.int64
        and parts["weight_shape"].shape == (2,)
        and (zero_point is None or zero_point.dtype == torch.int32)
        and (g_idx is None or g_idx.dtype in (torch.int32, torch.int64))
    )
    if not kinds:
        raise CheckpointError(f"the tensors of {module!r} are not a quantized weight: {found}")
    # From the data, since padding hides K: the last word of a row may be partly filled. It may be any number.
    n, k = parts["weight_shape"].read().tolist()
    groups = scale.shape[1]
    # Schemes that could be this module's. All that counts is their number of bits, which may not be ambiguous.
    fitting = {
        scheme.bits
        for scheme in schemes
        if scheme.sym == (zero_point is None)
        and 0 < k < 2**31
        # `/` and not `//`: a K that the group size does not divide fits no scheme.
        and groups == (1 if scheme.group_size is None else k / scheme.group_size)
        and packed.shape == (n, word_count(k, scheme.bits))
        and scale.shape == (n, groups)
        and (zero_point is None or zero_point.shape == (word_count(n, scheme.bits), groups))
        and (g_idx is None or g_idx.shape == (k,))
    }
    if len(fitting) != 1 or n <= 0:
        raise CheckpointError(
            f"the config ({', '.join(map(str, schemes))}) and the tensors of {module!r}, whose weight_shape is "
            f"{[n, k]}, contradict each other: {found}"
        )
    return n, k, fitting.pop()
