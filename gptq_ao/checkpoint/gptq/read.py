"""A GPTQ checkpoint before its weights are read: do its config and the headers of its files fit together?

The shapes of a module's tensors say which bits and which group size it has; the config (`dynamic` gives single modules
other settings) only says which are possible. So the patterns of a config, which may be anything, are never matched.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gptq_ao.checkpoint.exchange.packed_weight import PackedWeight, Rounding
from gptq_ao.checkpoint.files.shards import StoredTensor
from gptq_ao.checkpoint.gptq.tensors import ZeroPoints, decode_gptq
from gptq_ao.codes.bit_stream import word_count
from gptq_ao.config import BITS
from gptq_ao.errors import CheckpointError

__all__ = ["GPTQ_PARTS", "GptqSettings", "gptq_settings", "gptq_weights"]

GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_VERSIONS = {"gptq": 1, "gptq_v2": 2}
_FLOATING = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class GptqSettings:
    """What a config allows.

    Attributes:
        bits, group_sizes: settings that modules may have; −1 is one group per row.
        zero_points: what it says of them.
    """

    bits: frozenset[int]
    group_sizes: frozenset[int]
    zero_points: ZeroPoints


def gptq_settings(config: Mapping[str, Any]) -> GptqSettings:
    """
    Raises:
        CheckpointError: the config asks for what cannot be read, or is damaged.
    """
    # A config that names no format is one of version 1.
    name = config.get("checkpoint_format") or config.get("format") or "gptq"
    if not isinstance(name, str) or name not in _VERSIONS:
        raise CheckpointError(f"GPTQ checkpoints of the format {name!r} cannot be read, only {', '.join(_VERSIONS)}")
    for key in ("rotation", "activation"):
        if config.get(key):
            raise CheckpointError(f"the checkpoint has {key} {config[key]!r}: it is more than quantized weights")
    if config.get("pack_dtype") not in (None, "int32"):
        raise CheckpointError(f"codes are packed in {config['pack_dtype']!r}, only int32 can be read")
    # That of the checkpoint and those of single modules, each of which may leave out what it shares with the first.
    settings = [config, *_overrides(config)]
    bits = {_number(s, config, ("bits", "w_bit", "wbits")) for s in settings}
    sizes = {_number(s, config, ("group_size", "q_group_size")) for s in settings}
    odd = sorted(bits - set(BITS))
    if odd:
        raise CheckpointError(f"the checkpoint has weights of {odd[0]} bits, only {BITS} can be read")
    if any(size < 1 and size != -1 for size in sizes):
        raise CheckpointError(
            f"the checkpoint has a group_size of {min(sizes)}: not a number of input features, nor -1"
        )
    meta = config.get("meta")
    # Who wrote it decides whether a zero point of 0 can be recovered (see `tensors.py`).
    writers = meta.get("quantizer", ()) if isinstance(meta, dict) else ()
    borrows = any("gptqmodel" in str(w) for w in (writers if isinstance(writers, list) else [writers]))
    # Some configs say `sym`, some say `zero_point`, which means the opposite. If any module may be symmetric, its
    # stored zero points tell which version it is.
    sym = any(s.get("sym", not s.get("zero_point", True)) for s in settings if "sym" in s or "zero_point" in s)
    return GptqSettings(frozenset(bits), frozenset(sizes), ZeroPoints(_VERSIONS[name], sym, borrows))


def gptq_weights(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], rounding: Rounding
) -> Iterator[PackedWeight]:
    """Every quantized weight of a checkpoint, of which the headers are known.

    Raises:
        CheckpointError: config and tensors contradict each other.
    """
    settings = gptq_settings(config)
    modules: dict[str, dict[str, StoredTensor]] = {}
    # Tensors of one module are found by their names, `module.part`.
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        if part in GPTQ_PARTS:
            modules.setdefault(module, {})[part] = tensor
    for module, parts in modules.items():
        k, bits, group_size = _check(module, parts, settings)
        decode = functools.partial(
            decode_gptq, bits=bits, in_features=k, group_size=group_size, stored=settings.zero_points
        )
        n = parts["scales"].shape[1]
        yield PackedWeight(f"{module}.weight", bits, group_size, (n, k), parts["scales"].dtype, parts, decode, rounding)


def _check(module: str, parts: Mapping[str, StoredTensor], settings: GptqSettings) -> tuple[int, int, int]:
    """K, bits and group size of a module whose tensors fit together."""
    # g_idx may be missing.
    lacks = [p for p in GPTQ_PARTS[:3] if p not in parts]
    if lacks:
        raise CheckpointError(f"module {module!r} has {sorted(parts)[0]!r} and lacks {lacks[0]!r}")
    found = {p: (t.dtype, t.shape) for p, t in parts.items()}
    integers = all(parts[p].dtype == torch.int32 and len(parts[p].shape) == 2 for p in ("qweight", "qzeros"))
    g_idx = parts.get("g_idx")
    indexed = g_idx is None or (g_idx.dtype in (torch.int32, torch.int64) and len(g_idx.shape) == 1)
    scales = parts["scales"]
    if not integers or not indexed or scales.dtype not in _FLOATING or len(scales.shape) != 2:
        raise CheckpointError(f"the tensors of {module!r} are not a quantized weight: {found}")
    # Transposed in this format: rows of words along K, a column for each output feature.
    rows, n = parts["qweight"].shape
    groups = scales.shape[0]
    fitting = []  # K, bits and group size that all shapes allow; if there are several, the codes are ambiguous
    for bits in settings.bits:
        # Without g_idx no tensor has K as a size; then the words of codes are taken to be full.
        k = rows * 32 // bits if g_idx is None else g_idx.shape[0]
        sizes = sorted({k if size == -1 else size for size in settings.group_sizes})
        # Rounded up: the last group may be shorter.
        sizes = [size for size in sizes if -(-k // size) == groups] if k else []
        if (
            sizes
            and rows == word_count(k, bits)
            and scales.shape == (groups, n)
            and parts["qzeros"].shape == (groups, word_count(n, bits))
        ):
            fitting.append((k, bits, sizes[0]))
    if len(fitting) != 1 or n == 0:
        allowed = f"{sorted(settings.bits)} bits, groups of {sorted(settings.group_sizes)}"
        raise CheckpointError(f"the config ({allowed}) and the tensors of {module!r} contradict each other: {found}")
    return fitting[0]


def _overrides(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(v, dict) for v in dynamic.values()):
        raise CheckpointError("the config is damaged: 'dynamic' gives patterns no settings")
    # A pattern with "-:" names modules that are not quantized: it has no settings.
    return [v for pattern, v in dynamic.items() if not pattern.startswith("-:")]


def _number(settings: Mapping[str, Any], otherwise: Mapping[str, Any], names: tuple[str, ...]) -> int:
    # Writers have used several names for the same setting; what a module does not say, the checkpoint does.
    value = next((s[n] for s in (settings, otherwise) for n in names if n in s), None)
    # Not isinstance: JSON's true would pass for 1.
    if type(value) is not int:
        raise CheckpointError(f"the config is damaged: {names[0]!r} is {value!r}, not a number")
    return value
