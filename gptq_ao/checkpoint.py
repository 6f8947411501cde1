"""Save and load quantized models: safetensors shards and one JSON file.

    DIRECTORY/
      gptq_ao.json                          the manifest, written last: without it there is no checkpoint
      model-00001-of-00002.safetensors …
      config.json, tokenizer.json, …        of a Hugging Face model

A quantized weight NAME [N, K] is stored as `NAME.codes` (uint8 [N, ceil(K·bits/8)], each row a little-endian stream of
bits), `NAME.scale` (fp16 [N, G]), `NAME.zero_point` (uint8 [N, G]) and, if its columns are permuted, `NAME.perm`
(int32 [K]); w = (code − zero_point)·scale. That is independent of how this package arranges codes at run time. All
other parameters and buffers are stored as they are.

A checkpoint is written to a temporary directory and renamed when complete. On loading, `manifest.py` first checks
names, sizes and files, and the model is changed only when all tensors are there. No pickle, no code from a checkpoint.
"""

import contextlib
import copy
import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gptq_ao.architecture import empty_model
from gptq_ao.errors import CheckpointError, ConfigError, NonFiniteError
from gptq_ao.manifest import DTYPES, FORMAT_VERSION, MANIFEST, Manifest, read_manifest, shard_path
from gptq_ao.packing import pack_bits, unpack_bits
from gptq_ao.tensor import GroupTensor, tensor_class

__all__ = ["load_quantized", "save_quantized"]

_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


def save_quantized(
    model: nn.Module, directory: str | Path, *, tokenizer: Any = None, max_shard_bytes: int = 5 * 2**30
) -> None:
    """Write a quantized model, with its config if it is a Hugging Face model, and the tokenizer if one is given.

    Raises:
        CheckpointError: the directory holds something, the disk is full, or the model has state that is no tensor.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} exists and is not empty: nothing is overwritten, choose another directory")
    tensors, manifest = _contents(model)
    files = _shard(tensors, max_shard_bytes)
    need = sum(t.nbytes for t in tensors.values())
    directory.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory.parent).free
    if need > free:
        raise CheckpointError(f"the disk of {directory} is full: {need} bytes needed, {free} free")
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        with _disk_errors(directory, need):
            for file, names in files.items():
                save_file({n: tensors[n] for n in names}, temporary / file, metadata={"format": "pt"})
            parts: tuple[Any, ...] = (_config(model), getattr(model, "generation_config", None), tokenizer)
            for part in parts:
                if hasattr(part, "save_pretrained"):
                    part.save_pretrained(str(temporary))
            manifest["shards"] = {n: file for file, names in files.items() for n in names}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            temporary.chmod(0o755)  # mkdtemp makes it private
            temporary.replace(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_quantized(
    model_or_directory: nn.Module | str | Path,
    directory: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Load what `save_quantized` wrote.

    `load_quantized(directory)` builds the Hugging Face model of the directory's config.
    `load_quantized(model, directory)` replaces all parameters and buffers of a model you built (it may be on the meta
    device).

    Raises:
        CheckpointError: the checkpoint is incomplete, inconsistent, unsafe, or does not fit the model, which is then
        unchanged.
    """
    if isinstance(model_or_directory, nn.Module):
        if directory is None:
            raise CheckpointError("load_quantized(model, directory) needs the directory")
        path, model = Path(directory), model_or_directory
        manifest = read_manifest(path)
    else:
        path = Path(model_or_directory)
        manifest = read_manifest(path)
        model = empty_model(path)
    _check_fits(model, manifest, path)
    loaded = _load(path, manifest, torch.device(device))
    _assign(model, loaded, manifest)
    return model


def _contents(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors to store and the manifest without its shards."""
    tensors: dict[str, Tensor] = {}
    manifest: dict[str, Any] = {"format": "gptq_ao", "format_version": FORMAT_VERSION}
    quantized, dense, tied = (manifest.setdefault(part, {}) for part in ("quantized", "dense", "tied"))
    first_name: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"state {name!r} is a {type(value).__name__}, not a tensor: it cannot be saved")
        if value.device.type == "meta":
            raise CheckpointError(f"{name!r} is on the meta device: it has no values to save")
        if id(value) in first_name:
            tied[name] = first_name[id(value)]
            continue
        first_name[id(value)] = name
        if isinstance(value, GroupTensor):
            quantized[name] = _entry(name, value)
            tensors |= _parts(name, value)
        else:
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    dense |= {
        n: {"dtype": _safetensors_dtype(t), "shape": list(t.shape)}
        for n, t in tensors.items()
        if n in first_name.values()
    }
    return tensors, manifest


def _config(model: nn.Module) -> Any:
    """The model's config, which names the class to build; a model made from a config does not say that by itself."""
    config: Any = copy.deepcopy(getattr(model, "config", None))
    if hasattr(config, "save_pretrained"):
        config.architectures = [type(model).__name__]
    return config


def _entry(name: str, weight: GroupTensor) -> dict[str, Any]:
    if weight.dim() != 2:
        raise CheckpointError(f"{name!r} {tuple(weight.shape)}: only matrices can be saved yet")
    return {
        "bits": weight.bits,
        "shape": [weight.out_features, weight.in_features],
        "groups": weight.in_features // weight.group_size,
        "dtype": _NAME_OF[weight.dtype],
        "transposed": weight.transposed,
        "perm": weight.perm is not None,
    }


def _parts(name: str, weight: GroupTensor) -> dict[str, Tensor]:
    parts = {"codes": pack_bits(weight.codes(), weight.bits), "scale": weight.scale, "zero_point": weight.zero_point}
    if weight.perm is not None:
        parts["perm"] = weight.perm.clone()  # weights solved together share it, files do not share tensors
    return {f"{name}.{part}": t.detach().cpu().contiguous() for part, t in parts.items()}


def _safetensors_dtype(t: Tensor) -> str:
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    names |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
    names |= {torch.bool: "BOOL"}
    if t.dtype not in names:
        raise CheckpointError(f"tensors of {t.dtype} cannot be saved")
    return names[t.dtype]


def _shard(tensors: dict[str, Tensor], limit: int) -> dict[str, list[str]]:
    """File name → tensor names, in order, each file within `limit` bytes unless a single tensor is larger."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, t in tensors.items():
        if shards[-1] and size + t.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += t.nbytes
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}


@contextlib.contextmanager
def _disk_errors(directory: Path, need: int) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as e:
        full = getattr(e, "errno", None) == errno.ENOSPC or "StorageFull" in str(e) or "code: 28" in str(e)
        what = f"the disk is full ({need} bytes needed)" if full else str(e)
        raise CheckpointError(f"{directory} could not be written, nothing is left of it: {what}") from e


def _check_fits(model: nn.Module, manifest: Manifest, directory: Path) -> None:
    state = model.state_dict(keep_vars=True)
    names = {*manifest.quantized, *manifest.dense, *manifest.tied}
    if set(state) != names:
        lacks, extra = sorted(set(state) - names), sorted(names - set(state))
        what = f"lacks {lacks[0]!r}" if lacks else f"has {extra[0]!r}, which the model does not"
        raise CheckpointError(f"{directory} does not fit the {type(model).__name__}: it {what}")
    for name, old in state.items():
        target = manifest.tied.get(name, name)
        if target in manifest.quantized:
            entry = manifest.quantized[target]
            shape = list(reversed(entry.shape)) if entry.transposed else list(entry.shape)
        else:
            shape = manifest.dense[target][1]
        if list(old.shape) != shape:
            raise CheckpointError(f"{directory}: {name!r} has shape {shape}, in the model {list(old.shape)}")


def _load(directory: Path, manifest: Manifest, device: torch.device) -> dict[str, Tensor]:
    """All tensors of a checked manifest, quantized ones put together."""
    raw: dict[str, Tensor] = {}
    for file in sorted(set(manifest.shards.values())):
        with safe_open(shard_path(directory, file), framework="pt", device=str(device)) as shard:
            raw |= {name: shard.get_tensor(name) for name, f in manifest.shards.items() if f == file}
    loaded = {name: raw[name] for name in manifest.dense}
    for name, e in manifest.quantized.items():
        codes = unpack_bits(raw.pop(f"{name}.codes"), e.bits, e.shape[1])
        scale, zero_point = raw.pop(f"{name}.scale"), raw.pop(f"{name}.zero_point")
        perm = raw.pop(f"{name}.perm", None)
        try:
            loaded[name] = tensor_class(e.bits).from_codes(
                codes, scale, zero_point, dtype=DTYPES[e.dtype], perm=perm, transposed=e.transposed
            )
        except (ConfigError, NonFiniteError) as error:
            raise CheckpointError(f"{directory}: weight {name!r} is damaged: {error}") from error
    return loaded


def _assign(model: nn.Module, loaded: dict[str, Tensor], manifest: Manifest) -> None:
    made: dict[str, nn.Parameter] = {}
    for name in model.state_dict(keep_vars=True):
        target = manifest.tied.get(name, name)
        prefix, _, leaf = name.rpartition(".")
        module = model.get_submodule(prefix)
        if leaf in module._buffers:
            module._buffers[leaf] = loaded[target]
        else:
            if target not in made:
                trains = module._parameters[leaf].requires_grad and target not in manifest.quantized  # type: ignore[union-attr]
                made[target] = nn.Parameter(loaded[target], requires_grad=trains)
            module._parameters[leaf] = made[target]
