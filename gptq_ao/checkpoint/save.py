"""Save and load quantized models: the own format, safetensors shards and one JSON file, and those of other libraries.

    DIRECTORY/
      gptq_ao.json                          the manifest, written last: without it there is no checkpoint
      model-00001-of-00002.safetensors …
      config.json, tokenizer.json, …        of a Hugging Face model

A quantized weight NAME [N, K] is stored as `NAME.codes` (uint8 [N, ceil(K·bits/8)], each row a little-endian stream of
bits), `NAME.scale` (fp16 [N, G]), `NAME.zero_point` (uint8 [N, G]) and, if its columns are permuted, `NAME.perm`
(int32 [K]); w = (code − zero_point)·scale. A stack of them [E, N, K] has E in front, except for `perm`. That is
independent of how this package arranges codes at run time. All other parameters and buffers are stored as they are.

A checkpoint is written to a temporary directory and renamed when complete. On loading, `manifest.py` first checks
names, sizes and files, and the model is changed only when all tensors are there. No pickle, no code from a checkpoint.

The other formats are in `formats/`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptq_ao.architecture import empty_model
from gptq_ao.errors import CheckpointError, ConfigError
from gptq_ao.formats.directory import quantization_config
from gptq_ao.formats.recognize import open_quantized
from gptq_ao.formats.write import write_dense, write_foreign
from gptq_ao.freed_memory import return_freed_memory
from gptq_ao.fuse import FusedProjections
from gptq_ao.manifest import MANIFEST, Manifest, read_manifest, shard_path
from gptq_ao.report import Report
from gptq_ao.shards import StoredTensor, read_header
from gptq_ao.source import source_of
from gptq_ao.stored import from_stored
from gptq_ao.tensor import GroupTensor
from gptq_ao.weights import ModelWeights
from gptq_ao.writer import CheckpointWriter, state_names, stored_bytes

__all__ = ["FORMATS", "load_quantized", "save_quantized"]

FORMATS = ("native", "gptq", "gptq_v2", "compressed-tensors", "dense")


def save_quantized(
    model: nn.Module,
    directory: str | Path,
    *,
    format: str = "native",
    tokenizer: Any = None,
    report: Report | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write a quantized model, with its config and a model card if it is a Hugging Face model. Codes and scales are
    written as they are; nothing is quantized again.

    Args:
        format: "native", which holds whatever `quantize_` makes; "gptq" (version 1, symmetric weights), "gptq_v2" or
            "compressed-tensors", for other libraries; "dense", the weights that the quantized ones stand for.
        tokenizer: to be saved with the model.
        report: what `quantize_` returned, for the model card.
        max_shard_bytes: size of the files.

    Raises:
        CheckpointError: the format cannot hold the model, the directory holds something, the disk is full, or the model
            has state that is no tensor. Nothing is left at `directory`.
        ConfigError: there is no such format; a parameter is on the meta device, without values.
    """
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}: give one of {', '.join(FORMATS)}")
    fused = next((name for name, m in model.named_modules() if isinstance(m, FusedProjections)), None)
    if fused is not None:
        raise CheckpointError(
            f"{fused!r} is a fused weight, which belongs to no layer: call unfuse_projections_(model) first"
        )
    if format == "dense":
        return write_dense(model, Path(directory), tokenizer, max_shard_bytes, report)
    if format != "native":
        return write_foreign(model, Path(directory), format, tokenizer, max_shard_bytes, report)
    state = model.state_dict(keep_vars=True)
    firsts = [first for first, *_ in state_names(model)]
    with CheckpointWriter(Path(directory), max_shard_bytes) as writer:
        writer.check_space(stored_bytes({first: state[first] for first in firsts}))
        writer.add_rest(model, ModelWeights(model).get)
        writer.finish_checkpoint(model, tokenizer, report)
    return None


def load_quantized(
    model_or_directory: nn.Module | str | Path,
    directory: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Load a quantized checkpoint, whose format the directory tells: the own one, GPTQ or compressed-tensors.

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
    else:
        path, model = Path(model_or_directory), None
    if not (path / MANIFEST).is_file() and quantization_config(path) is not None:
        return _load_foreign(path, model, torch.device(device))
    manifest = read_manifest(path)
    model = empty_model(path) if model is None else model
    _check_fits(model, manifest, path)
    loaded = _load(path, manifest, torch.device(device))
    _assign(model, loaded, manifest.tied)
    return model


def _load_foreign(directory: Path, model: nn.Module | None, device: torch.device) -> nn.Module:
    files = open_quantized(directory)
    source = source_of(directory, files.tensors, model)
    loaded: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    placed: dict[tuple[str, str], str] = {}  # what makes a parameter → the first that it makes
    for name, (recipe, made) in source.recipes.items():
        first = placed.setdefault((recipe.target, made), name)
        if first != name:
            tied[name] = first
        elif name not in loaded:
            made_of = recipe.make(source.model, device)
            loaded |= {n: made_of[m] for n, (r, m) in source.recipes.items() if r is recipe}
            if device.type != "cpu":
                return_freed_memory()
    files.rounding.warn()
    _assign(source.model, loaded, tied)
    return source.model


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
            shape = manifest.quantized[target].parameter_shape
        else:
            shape = manifest.dense[target][1]
        if list(old.shape) != shape:
            raise CheckpointError(f"{directory}: {name!r} has shape {shape}, in the model {list(old.shape)}")


def _load(directory: Path, manifest: Manifest, device: torch.device) -> dict[str, Tensor]:
    """All tensors of a checked manifest, quantized ones put together."""
    stored: dict[str, StoredTensor] = {}
    for file in sorted(set(manifest.shards.values())):
        stored |= read_header(shard_path(directory, file))

    def read(name: str) -> Tensor:
        return stored[name].read(device)

    loaded = {name: read(name) for name in manifest.dense}
    for name, entry in manifest.quantized.items():
        loaded[name] = from_stored(name, entry, read, directory)
        if device.type != "cpu":
            return_freed_memory()
    return loaded


def _assign(model: nn.Module, loaded: dict[str, Tensor], tied: Mapping[str, str]) -> None:
    made: dict[str, nn.Parameter] = {}
    for name in model.state_dict(keep_vars=True):
        target = tied.get(name, name)
        if target not in loaded:
            continue  # a buffer that was computed
        prefix, _, leaf = name.rpartition(".")
        module = model.get_submodule(prefix)
        if leaf in module._buffers:
            module._buffers[leaf] = loaded[target]
        else:
            if target not in made:
                value = loaded[target]
                trains = module._parameters[leaf].requires_grad and not isinstance(value, GroupTensor)  # type: ignore[union-attr]
                made[target] = nn.Parameter(value, requires_grad=trains)
            module._parameters[leaf] = made[target]
