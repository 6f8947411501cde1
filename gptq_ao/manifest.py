"""The manifest of a checkpoint: what it holds, in which file, in which shape.

    {"format": "gptq_ao", "format_version": 1,
     "quantized": {NAME: {"bits": 4, "shape": [N, K], "groups": G, "dtype": "bfloat16",
                          "transposed": false, "perm": false}},
     "dense": {NAME: {"dtype": "BF16", "shape": […]}},
     "tied": {OTHER_NAME: NAME},
     "shards": {TENSOR: FILE}}

Everything that can be wrong with a checkpoint is looked for here, in the JSON and in the shards' headers, before a
tensor is allocated.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gptq_ao.config import BITS
from gptq_ao.errors import CheckpointError

__all__ = [
    "DTYPES",
    "FORMAT_VERSION",
    "MANIFEST",
    "Manifest",
    "QuantizedEntry",
    "check_weight_map",
    "read_manifest",
    "shard_path",
]

MANIFEST = "gptq_ao.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 256 * 2**20
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class QuantizedEntry:
    """One quantized weight of a manifest."""

    bits: int
    shape: tuple[int, int]
    groups: int
    dtype: str
    transposed: bool
    perm: bool

    def tensors(self, name: str) -> dict[str, tuple[str, list[int]]]:
        """What the shards must hold for it: name → (safetensors dtype, shape)."""
        n, k = self.shape
        parts = {
            f"{name}.codes": ("U8", [n, -(-k * self.bits // 8)]),
            f"{name}.scale": ("F16", [n, self.groups]),
            f"{name}.zero_point": ("U8", [n, self.groups]),
        }
        return {**parts, f"{name}.perm": ("I32", [k])} if self.perm else parts


@dataclass(frozen=True)
class Manifest:
    """A checked manifest: names, sizes and files fit together."""

    quantized: dict[str, QuantizedEntry]
    dense: dict[str, tuple[str, list[int]]]
    tied: dict[str, str]
    shards: dict[str, str]


def read_manifest(directory: str | Path) -> Manifest:
    """Read and check a checkpoint's manifest and the headers of its shards; no tensor is loaded."""
    directory = Path(directory)
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {MANIFEST}: not a checkpoint of gptq_ao, or one whose writing was cut off"
        )
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CheckpointError(f"{path} is not JSON: {e}") from e
    if not isinstance(content, dict) or content.get("format") != "gptq_ao":
        raise CheckpointError(f"{path} is not a manifest of gptq_ao")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r}, this gptq_ao reads {FORMAT_VERSION}: update gptq_ao"
        )
    try:
        manifest = _parse(content)
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path} is damaged: {type(e).__name__}: {e}") from e
    _check_headers(directory, manifest)
    return manifest


def check_weight_map(directory: Path) -> None:
    """Refuse a Hugging Face directory whose index names shards outside of it; transformers would follow such a name."""
    for index in directory.glob("*.index.json"):
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise CheckpointError(f"{index} is damaged: {type(e).__name__}: {e}") from e
        for file in sorted(map(str, files)):
            shard_path(directory, file)


def _parse(content: dict[str, Any]) -> Manifest:
    quantized = {}
    for name, e in content["quantized"].items():
        n, k = e["shape"]
        entry = QuantizedEntry(e["bits"], (n, k), e["groups"], e["dtype"], e["transposed"], e["perm"])
        whole = all(type(v) is int and 0 < v < 2**31 for v in (n, k, entry.groups))
        if entry.bits not in BITS or not whole or k % entry.groups or entry.dtype not in DTYPES:
            raise ValueError(f"{name!r} cannot be {e}")
        if type(entry.transposed) is not bool or type(entry.perm) is not bool:
            raise ValueError(f"{name!r} cannot be {e}")
        quantized[name] = entry
    dense = {name: (str(e["dtype"]), [int(s) for s in e["shape"]]) for name, e in content["dense"].items()}
    tied = {str(a): str(b) for a, b in content["tied"].items()}
    shards = {str(t): str(f) for t, f in content["shards"].items()}
    known = {*quantized, *dense}
    if known & set(tied) or not set(tied.values()) <= known or set(quantized) & set(dense):
        raise ValueError("a name is listed twice, or tied to one that is not there")
    return Manifest(quantized, dense, tied, shards)


def _expected(manifest: Manifest) -> dict[str, tuple[str, list[int]]]:
    expected = dict(manifest.dense)
    for name, entry in manifest.quantized.items():
        expected |= entry.tensors(name)
    return expected


def _check_headers(directory: Path, manifest: Manifest) -> None:
    """The shards hold exactly the tensors the manifest speaks of, in the right shapes and dtypes."""
    expected = _expected(manifest)
    if set(manifest.shards) != set(expected):
        odd = sorted(set(manifest.shards) ^ set(expected))[0]
        raise CheckpointError(f"{directory / MANIFEST} is damaged: no shard, or no entry, for tensor {odd!r}")
    for file in sorted(set(manifest.shards.values())):
        path = shard_path(directory, file)
        names = {t for t, f in manifest.shards.items() if f == file}
        try:
            with safe_open(path, framework="pt") as shard:
                missing = sorted(names - set(shard.keys()))
                if missing:
                    raise CheckpointError(f"{path} lacks tensor {missing[0]!r} (and {len(missing) - 1} more)")
                for name in sorted(names):
                    header = shard.get_slice(name)
                    found = (header.get_dtype(), list(header.get_shape()))
                    if found != expected[name]:
                        raise CheckpointError(f"{path}: tensor {name!r} is {found}, the manifest says {expected[name]}")
        except SafetensorError as e:
            raise CheckpointError(f"{path} is truncated or no safetensors file: {e}") from e


def shard_path(directory: Path, file: str) -> Path:
    """A shard is a file in the directory itself (or, in a hub cache, in the blobs that its snapshots link to)."""
    if not _SHARD_NAME.fullmatch(file):
        raise CheckpointError(
            f"{directory / MANIFEST} names the shard {file!r}: only plain *.safetensors names are allowed"
        )
    root = directory.resolve()
    path = (directory / file).resolve()
    if path.parent not in (root, root.parent.parent / "blobs"):
        raise CheckpointError(f"shard {file!r} of {directory} links to {path}, outside the checkpoint")
    if not path.is_file():
        raise CheckpointError(f"{directory} lacks the shard {file!r}")
    return path
