"""Load a quantized checkpoint, whatever its format. The model is changed only when all tensors are there."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gptq_ao.checkpoint.files.directory import check_quantized, has_manifest
from gptq_ao.checkpoint.files.find import find_checkpoint
from gptq_ao.checkpoint.files.model_config import take_mlx
from gptq_ao.checkpoint.formats import open_quantized
from gptq_ao.checkpoint.freed_memory import return_freed_memory
from gptq_ao.checkpoint.native.manifest import Manifest, read_manifest
from gptq_ao.checkpoint.native.tensors import from_stored
from gptq_ao.checkpoint.source import source_of
from gptq_ao.errors import CheckpointError
from gptq_ao.model.empty import empty_model
from gptq_ao.model.unwrap import is_hf_model, unwrapped
from gptq_ao.tensor import GroupTensor

__all__ = ["load_quantized"]


def load_quantized(
    model_or_directory: nn.Module | str | Path,
    directory: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    subfolder: str = "",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a quantized checkpoint, whose format the directory tells: the native one, GPTQ, compressed-tensors or
    AWQ.

    `load_quantized(directory)` builds the Hugging Face model of the directory's config.
    `load_quantized(model, directory)` replaces all parameters and buffers of a model you built (it may be on the meta
    device).

    Args:
        directory: or the id of a model on the hub, from where what is missing here is fetched.
        subfolder: place of the files in it.
        revision, cache_dir: of the hub: a branch, tag or commit; and where its files are kept.
        trust_remote_code: whether to run code that came with the checkpoint, if that is what makes the model.

    Raises:
        CheckpointError: there is no such checkpoint; it is not quantized, incomplete, inconsistent, unsafe, or does not
            fit the model, which is then unchanged.
    """
    if isinstance(model_or_directory, nn.Module):
        if directory is None:
            raise CheckpointError("load_quantized(model, directory) needs the directory")
        where, model = directory, model_or_directory
    else:
        where, model = model_or_directory, None
    path = find_checkpoint(
        where, subfolder=subfolder, revision=revision, cache_dir=cache_dir, code=trust_remote_code and model is None
    )
    # Parameters are those of the model inside, if it is wrapped; unless it was the wrapper that was saved.
    if not has_manifest(path):
        check_quantized(path)
        inside = None if model is None else unwrapped(model)
        filled = _load_foreign(path, inside, torch.device(device), trust_remote_code)
        _remember(filled, path)
        return filled if model is None else model
    manifest = read_manifest(path)
    if model is None:
        model = empty_model(path, shapes=manifest.shapes, trust_remote_code=trust_remote_code)
    inside = model if set(model.state_dict()) == manifest.names else unwrapped(model)
    _check_fits(inside, manifest, path)
    loaded = _load(path, manifest, torch.device(device))
    _assign(inside, loaded, manifest.tied)
    _remember(inside, path)
    return model


def _remember(model: nn.Module, directory: Path) -> None:
    """As `from_pretrained` does: what the directory has besides the model comes along when that is saved."""
    if is_hf_model(model):
        model.config._name_or_path = str(directory)  # type: ignore[union-attr]
        take_mlx(model.config)


def _load_foreign(directory: Path, model: nn.Module | None, device: torch.device, trust_remote_code: bool) -> nn.Module:
    files = open_quantized(directory)
    source = source_of(directory, files.tensors, model, trust_remote_code=trust_remote_code)
    loaded: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    placed: dict[tuple[str, str], str] = {}  # what makes a parameter → the first name of it: others are tied to that
    for name, (conversion, made) in source.conversions.items():
        first = placed.setdefault((conversion.target, made), name)
        if first != name:
            tied[name] = first
        elif name not in loaded:
            # One conversion may make several parameters; all of them are taken now, so nothing is read twice.
            made_of = conversion.make(source.model, device)
            loaded |= {n: made_of[m] for n, (r, m) in source.conversions.items() if r is conversion}
            if device.type != "cpu":
                return_freed_memory()
    # Rounded scales are known only when all weights have been read.
    files.rounding.warn()
    _assign(source.model, loaded, tied)
    return source.model


def _check_fits(model: nn.Module, manifest: Manifest, directory: Path) -> None:
    state = model.state_dict(keep_vars=True)
    # Names and shapes are compared before anything is read: loading then cannot fail for the model's sake.
    if set(state) != manifest.names:
        lacks, extra = sorted(set(state) - manifest.names), sorted(manifest.names - set(state))
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

    def read(name: str) -> Tensor:
        return manifest.stored[name].read(device)

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
            # Tied names get one Parameter object, so that they stay tied.
            if target not in made:
                value = loaded[target]
                # Codes are integers: a quantized weight has no gradient.
                trains = module._parameters[leaf].requires_grad and not isinstance(value, GroupTensor)  # type: ignore[union-attr]
                made[target] = nn.Parameter(value, requires_grad=trains)
            module._parameters[leaf] = made[target]
