"""The manifest of a checkpoint, `gptq_ao.json`: what it holds, in which file, in which shape.

    DIRECTORY/
      gptq_ao.json                          written last: without it there is no checkpoint
      model-00001-of-00002.safetensors …
      config.json, tokenizer.json, …        of a Hugging Face model

    {"format": "gptq_ao", "format_version": 1,
     "quantized": {NAME: {"bits": 4, "shape": [N, K], "groups": G, "dtype": "bfloat16",
                          "transposed": false, "perm": false}},
     "dense": {NAME: {"dtype": "BF16", "shape": […]}},
     "tied": {OTHER_NAME: NAME},
     "ignored": {NAME: {"dtype": "BF16", "shape": […]}},
     "shards": {TENSOR: FILE}}

A stack of matrices (experts) has the shape [E, N, K]. A matrix that the model has in another shape (a convolution) says
so: "view_as": [out, in, height, width]. A checkpoint with one of these has the version 2. One with tensors that its
model's class does not use ("ignored"), which are kept for others who do, has the version 3.

Everything that can be wrong with a checkpoint is looked for here, in the JSON and in the shards' headers, before a
tensor is allocated.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gptq_ao.checkpoint.files.directory import read_json
from gptq_ao.checkpoint.files.paths import MANIFEST, shard_path
from gptq_ao.checkpoint.files.shards import NAME_OF, StoredTensor, read_header
from gptq_ao.codes.packed_spec import PackedSpec
from gptq_ao.config import BITS
from gptq_ao.errors import CheckpointError

__all__ = [
    "DTYPES",
    "Manifest",
    "QuantizedEntry",
    "check_version",
    "entry_json",
    "entry_of",
    "format_version",
    "parse_entries",
    "read_manifest",
]

FORMAT_VERSIONS = (1, 2, 3)
Header = tuple[str, list[int]]  # of a tensor: the name safetensors gives its dtype, and its shape
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class QuantizedEntry:
    """One quantized weight of a manifest."""

    bits: int
    shape: tuple[int, ...]
    groups: int
    dtype: str
    transposed: bool
    perm: bool
    view_as: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls, spec: PackedSpec, dtype: torch.dtype, transposed: bool, view_as: tuple[int, ...] | None
    ) -> "QuantizedEntry":
        return cls(spec.bits, spec.shape, spec.groups, _NAME_OF[dtype], transposed, spec.permuted, view_as)

    @property
    def spec(self) -> PackedSpec:
        return PackedSpec(self.shape, self.bits, self.shape[-1] // self.groups, self.perm)

    def tensors(self, name: str) -> dict[str, tuple[str, list[int]]]:
        """What the shards must hold for it: name → (safetensors dtype, shape)."""
        *rows, k = self.shape
        parts = {
            # Each row begins with a new byte.
            f"{name}.codes": ("U8", [*rows, -(-k * self.bits // 8)]),
            f"{name}.scale": ("F16", [*rows, self.groups]),
            f"{name}.zero_point": ("U8", [*rows, self.groups]),
        }
        # Without the dimension of a stack: all its matrices have one order of columns.
        return {**parts, f"{name}.perm": ("I32", [k])} if self.perm else parts

    def stored_bytes(self, name: str) -> int:
        # Of those dtypes that `tensors` names.
        sizes = {"U8": 1, "F16": 2, "I32": 4}
        return sum(sizes[dtype] * math.prod(shape) for dtype, shape in self.tensors(name).values())

    @property
    def parameter_shape(self) -> list[int]:
        """Of the parameter in the model."""
        if self.view_as is not None:
            return list(self.view_as)
        *lead, n, k = self.shape
        return [*lead, k, n] if self.transposed else [*lead, n, k]


@dataclass(frozen=True)
class Manifest:
    """A checked manifest: names, sizes and files fit together.

    Attributes:
        quantized: parameter → what is said of it.
        dense: other parameter or buffer → what its header says.
        tied: other name of a parameter → its name above.
        ignored: tensor that the model's class does not use → what its header says.
        stored: tensor → where it lies.
    """

    quantized: dict[str, QuantizedEntry]
    dense: dict[str, Header]
    tied: dict[str, str]
    ignored: dict[str, Header]
    stored: dict[str, StoredTensor]

    @property
    def names(self) -> set[str]:
        """All that a model has."""
        return {*self.quantized, *self.dense, *self.tied}

    @property
    def shapes(self) -> list[list[int]]:
        """Of all parameters and buffers."""
        return [e.parameter_shape for e in self.quantized.values()] + [shape for _, shape in self.dense.values()]


def entry_json(entry: QuantizedEntry) -> dict[str, Any]:
    """An entry as the file has it."""
    # A field that is None was unknown to version 1: left out, the entry is as it was there.
    return {field: value for field, value in asdict(entry).items() if value is not None}


def entry_of(said: Mapping[str, Any]) -> QuantizedEntry:
    """The inverse."""
    fields: dict[str, Any] = {field: tuple(v) if isinstance(v, list) else v for field, v in said.items()}
    return QuantizedEntry(**fields)


def format_version(quantized: Mapping[str, QuantizedEntry], ignored: Collection[str] = ()) -> int:
    """The lowest version that can hold these weights, and these tensors that no parameter is made of."""
    if ignored:
        return 3
    return 2 if any(len(e.shape) > 2 or e.view_as is not None for e in quantized.values()) else 1


def read_manifest(directory: str | Path) -> Manifest:
    """Read and check a checkpoint's manifest and the headers of its shards; no tensor is loaded."""
    directory = Path(directory)
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {MANIFEST}: not a checkpoint of gptq_ao, or one whose writing was cut off"
        )
    content = read_json(path)
    if content.get("format") != "gptq_ao":
        raise CheckpointError(f"{path} is not a manifest of gptq_ao")
    check_version(content.get("format_version"), path)
    try:
        quantized, dense, tied, ignored = _parse(content)
        shards = {str(t): str(f) for t, f in content["shards"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path} is damaged: {type(e).__name__}: {e}") from e
    # Every tensor that the shards must hold, and what its header must say.
    expected = {**dense, **ignored}
    for name, entry in quantized.items():
        expected |= entry.tensors(name)
    return Manifest(quantized, dense, tied, ignored, _find(expected, shards, directory))


def check_version(version: object, path: object) -> None:
    """
    Raises:
        CheckpointError: this package does not know the version.
    """
    if version not in FORMAT_VERSIONS:
        raise CheckpointError(
            f"{path} has format version {version!r}, this gptq_ao reads {FORMAT_VERSIONS}: update gptq_ao"
        )


def parse_entries(entries: dict[str, Any]) -> dict[str, QuantizedEntry]:
    """The "quantized" of a manifest.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: it is damaged.
    """
    return {name: _parse_entry(name, e) for name, e in entries.items()}


def _parse(
    content: dict[str, Any],
) -> tuple[dict[str, QuantizedEntry], dict[str, Header], dict[str, str], dict[str, Header]]:
    """`Manifest`'s quantized, dense, tied and ignored."""
    quantized = parse_entries(content["quantized"])
    dense, ignored = (
        {name: (str(e["dtype"]), [int(s) for s in e["shape"]]) for name, e in headers.items()}
        for headers in (content["dense"], content.get("ignored", {}))
    )
    tied = {str(a): str(b) for a, b in content["tied"].items()}
    known = {*quantized, *dense}
    # Otherwise one parameter could be loaded twice, or a tied one from nowhere.
    twice = known & {*tied, *ignored} or set(quantized) & set(dense) or set(tied) & set(ignored)
    if twice or not set(tied.values()) <= known:
        raise ValueError("a name is listed twice, or tied to one that is not there")
    return quantized, dense, tied, ignored


def _parse_entry(name: str, e: dict[str, Any]) -> QuantizedEntry:
    view_as = tuple(e["view_as"]) if "view_as" in e else None
    entry = QuantizedEntry(e["bits"], tuple(e["shape"]), e["groups"], e["dtype"], e["transposed"], e["perm"], view_as)
    # Not isinstance: JSON's true would pass for 1. Sizes have to fit into int32.
    whole = all(type(v) is int and 0 < v < 2**31 for v in (*entry.shape, entry.groups, *(view_as or ())))
    flags = type(entry.transposed) is bool and type(entry.perm) is bool
    if entry.bits not in BITS or not whole or not flags or len(entry.shape) not in (2, 3) or entry.dtype not in DTYPES:
        raise ValueError(f"{name!r} cannot be {e}")
    # Only a matrix can be seen in another shape, of as many elements.
    viewed = view_as is None or (len(entry.shape) == 2 and math.prod(view_as) == math.prod(entry.shape))
    if entry.shape[-1] % entry.groups or not viewed:
        raise ValueError(f"{name!r} cannot be {e}")
    return entry


def _find(expected: Mapping[str, Header], shards: Mapping[str, str], directory: Path) -> dict[str, StoredTensor]:
    """Tensor → where it lies.

    Args:
        expected: tensor → what the manifest says of it.
        shards: tensor → file.

    Raises:
        CheckpointError: a tensor is missing, or not what the manifest says.
    """
    # In both directions: a tensor that no entry mentions is as suspicious as one that is missing.
    if set(shards) != set(expected):
        odd = sorted(set(shards) ^ set(expected))[0]
        raise CheckpointError(f"{directory / MANIFEST} is damaged: no shard, or no entry, for tensor {odd!r}")
    stored: dict[str, StoredTensor] = {}
    # Each header is read once, for all of the file's tensors.
    for file in sorted(set(shards.values())):
        path = shard_path(directory, file)
        header, names = read_header(path), sorted(name for name, f in shards.items() if f == file)
        missing = [name for name in names if name not in header]
        if missing:
            raise CheckpointError(f"{path} lacks tensor {missing[0]!r} (and {len(missing) - 1} more)")
        for name in names:
            stored[name] = header[name]
            found = (NAME_OF[header[name].dtype], list(header[name].shape))
            if found != expected[name]:
                raise CheckpointError(f"{path}: tensor {name!r} is {found}, the manifest says {expected[name]}")
    return stored
