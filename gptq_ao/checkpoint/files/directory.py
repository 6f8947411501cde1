"""What lies in a Hugging Face directory: its configs and the headers of its shards. Nothing in it is trusted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptq_ao.checkpoint.files.paths import INDEX, MANIFEST, SINGLE_FILE, check_weight_map, shard_path
from gptq_ao.checkpoint.files.shards import StoredTensor, read_header
from gptq_ao.errors import CheckpointError

__all__ = [
    "check_quantized",
    "config_keys",
    "has_manifest",
    "method_of",
    "quantization_config",
    "read_json",
    "stored_tensors",
    "weight_files",
]

# So that a hostile file cannot fill the host's memory.
MAX_JSON_BYTES = 256 * 2**20
_KEY, _MLX_KEY = "quantization_config", "quantization"
_KEYS = (_KEY, "compression_config")  # the second in early versions of compressed-tensors
# Of configs with bits and a group size, those of other libraries have one of these.
_NOT_MLX = {"quant_method", "checkpoint_format", "sym", "desc_act", "zero_point", "version"}
_SIDE_CONFIGS = ("quantize_config.json", "quant_config.json")  # where settings were before config.json had them


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: it is too large, not JSON, or not an object.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    # RecursionError: JSON that is nested very deeply.
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not JSON: {e}") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(content).__name__}, not an object")
    return content


def has_manifest(directory: Path) -> bool:
    """Whether a manifest tells what the directory holds; not if transformers has written into it since, which leaves
    the manifest where it is."""
    return (directory / MANIFEST).is_file() and not _saved_by_transformers(directory)


def _saved_by_transformers(directory: Path) -> bool:
    """By `save_pretrained`: into one file, or with an index that counts parameters. Nothing here writes either."""
    if (directory / SINGLE_FILE).is_file():
        return True
    metadata = read_json(directory / INDEX).get("metadata") if (directory / INDEX).is_file() else None
    return isinstance(metadata, dict) and "total_parameters" in metadata


def quantization_config(directory: Path) -> dict[str, Any] | None:
    """What the directory says of how its weights are quantized; None if it says nothing. For a model of several parts
    it may be in the config of the part that has the language model.

    Raises:
        CheckpointError: a config is damaged, or two of them contradict each other.
    """
    path = directory / "config.json"
    content = read_json(path) if path.is_file() else {}
    parts = [content, *(p for p in [content.get("text_config")] if isinstance(p, dict))]
    found = next((p[key] for p in parts for key in _KEYS if p.get(key) is not None), None)
    if found is None:
        # Other models may have something else of that name.
        found = next((p[_MLX_KEY] for p in parts if _is_mlx(p.get(_MLX_KEY))), None)
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: its quantization_config is a {type(found).__name__}")
    if found is not None and "compression_config" in content:
        found = {"quant_method": "compressed-tensors", **found}
    for name in _SIDE_CONFIGS:
        if not (directory / name).is_file():
            continue
        aside = read_json(directory / name)
        if found is None and not any(n.endswith(".qweight") for n in stored_tensors(directory)):
            continue  # dense weights were saved over quantized ones
        if found is None:
            # Of the two methods that had such files, AWQ has versions of this name.
            return {"quant_method": "awq" if "version" in aside else "gptq", **aside}
        if "gptq_ao" in str(found.get("meta")) and _saved_by_transformers(directory):
            continue  # it was there before
        # Settings that decide what the codes mean: with the wrong one weights would load, as wrong numbers.
        for key in ("bits", "group_size", "checkpoint_format", "sym", "desc_act"):
            if key in found and key in aside and found[key] != aside[key]:
                raise CheckpointError(
                    f"{path} says {key} = {found[key]!r}, {name} says {aside[key]!r}: remove the one that is wrong"
                )
        # config.json wins where the two differ in something else.
        return {**aside, **found}
    return found


def method_of(config: Mapping[str, Any]) -> Any:
    """Which method a quantization_config names. That of the native format does it by another key
    (`checkpoint/native/read.py`), MLX's by what it consists of."""
    if _is_mlx(config):
        return "mlx"
    return config.get("quant_method", "gptq_ao" if config.get("format") == "gptq_ao" else None)


def config_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Where in config.json readers look for this quantization_config."""
    return (_KEY, _MLX_KEY) if method_of(config) == "mlx" else (_KEY,)


def _is_mlx(config: Any) -> bool:
    return isinstance(config, dict) and {"bits", "group_size"} <= {*config} and not _NOT_MLX & {*config}


def check_quantized(directory: Path) -> None:
    """
    Raises:
        CheckpointError: the directory says nothing of quantized weights.
    """
    if quantization_config(directory) is not None:
        return
    if any(directory.glob("*.safetensors")) and (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} is not quantized: load it with `from_pretrained` of transformers, and quantize the model; or "
            "call quantize_checkpoint"
        )
    raise CheckpointError(
        f"{directory} has no {MANIFEST}: not a checkpoint of gptq_ao, or one whose writing was cut off"
        f"{_pickles(directory)}"
    )


def _pickles(directory: Path) -> str:
    """A remark on files with weights that are not read."""
    if any(directory.glob("*.safetensors")):
        return ""
    found = sorted(p.name for suffix in ("bin", "pt", "pth", "ckpt") for p in directory.glob(f"*.{suffix}"))
    return f". Its weights are in {found[0]}, a pickle, which can run code: convert it to safetensors" if found else ""


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a directory, by their names there; the index and the files have to agree.

    Raises:
        CheckpointError: there are none, a file is damaged or lies outside, or the index says otherwise.
    """
    check_weight_map(directory)
    index = directory / INDEX
    placed = _placed(index)
    if placed is None:
        return read_header(shard_path(directory, _only_file(directory)))
    stored: dict[str, StoredTensor] = {}
    for file in sorted(set(placed.values())):
        header = read_header(shard_path(directory, file))
        listed = {name for name, f in placed.items() if f == file}
        # Either a tensor would be missing, or one that nobody has named would be loaded.
        if listed != set(header):
            name = sorted(listed ^ set(header))[0]
            where = "is not in" if name in listed else "is in"
            raise CheckpointError(f"{index} is damaged: tensor {name!r} {where} {file}, the index says otherwise")
        stored |= header
    return stored


def weight_files(directory: Path) -> set[str]:
    """Names of the files that `stored_tensors` reads.

    Raises:
        CheckpointError: there are none, or the index is damaged.
    """
    check_weight_map(directory)
    placed = _placed(directory / INDEX)
    return {_only_file(directory)} if placed is None else set(placed.values())


def _placed(index: Path) -> dict[str, str] | None:
    """Tensor → file, of an index that was checked; None if all tensors are in one file."""
    # As transformers does it: with the one file, an index is left over from what was there before.
    if (index.parent / SINGLE_FILE).is_file() or not index.is_file():
        return None
    placed: dict[str, str] = read_json(index)["weight_map"]
    return placed


def _only_file(directory: Path) -> str:
    """The one file with weights: `model.safetensors`, or whatever AutoGPTQ called it."""
    files = sorted(p.name for p in directory.glob("*.safetensors"))
    if SINGLE_FILE in files:
        return SINGLE_FILE
    # The native writer always writes an index: with a manifest and none, the directory is incomplete.
    if len(files) == 1 and not (directory / MANIFEST).is_file():
        return files[0]
    raise CheckpointError(
        f"{directory} has neither {SINGLE_FILE} nor {INDEX}: no safetensors to read{_pickles(directory)}"
    )
