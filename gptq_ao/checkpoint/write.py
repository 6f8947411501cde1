"""Write a quantized model in the format of another library, or dense, weight by weight."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptq_ao.checkpoint.exchange.format import Format
from gptq_ao.checkpoint.exchange.hub_names import revert_conversions
from gptq_ao.checkpoint.exchange.packed_weight import warn_moved
from gptq_ao.checkpoint.files.directory import config_keys
from gptq_ao.checkpoint.files.model_config import has_config
from gptq_ao.checkpoint.files.output_directory import OutputDirectory, as_json
from gptq_ao.checkpoint.model_card import CARD, model_card
from gptq_ao.checkpoint.origin import Origin
from gptq_ao.model.state import state_names
from gptq_ao.model.weights import ModelWeights
from gptq_ao.report import Report
from gptq_ao.tensor import GroupTensor

__all__ = ["write_dense", "write_foreign"]


def write_foreign(
    model: nn.Module,
    directory: Path,
    format: Format,
    tokenizer: Any,
    max_shard_bytes: int,
    report: Report | None,
    origin: Origin | None,
) -> None:
    """
    Args:
        format: that of another library; the native one is written by `CheckpointWriter`.
        origin: where the model came from, for what else there is.

    Raises:
        CheckpointError: nothing is quantized, the format cannot hold a weight (nothing is written in these cases), or
            the directory cannot be written.
    """
    whole: Any = model
    exported = format.export(model, _values(model))
    if origin is not None:
        exported = exported.and_plain(origin.matrices)
    # Raises if the format cannot hold a weight, so it comes before anything is written.
    config = format.config(exported)
    weights = [(w.bits, w.group_size) for w in exported.quantized.values()]
    with OutputDirectory(directory, max_shard_bytes) as output:
        size = sum(t.nbytes for tensor in exported.tensors.values() for t in _inner(tensor))
        output.check_space(size + (origin.nbytes if origin else 0))
        for name, tensor in format.tensors(exported, getattr(model, "dtype", torch.float16)):
            output.add({name: _copy(tensor)})
        files = _add_others(output, origin)
        texts = {} if format.config_file is None else {format.config_file: as_json(config)}
        if has_config(model):
            texts |= {CARD: model_card(model, format, weights, report, origin)}
        else:
            # A model that is not of Hugging Face writes no config.json, and readers look for the settings there.
            texts |= {"config.json": as_json(dict.fromkeys(config_keys(config), config))}
        settings = format.settings(whole.config) if has_config(model) else {}
        output.finish(model, tokenizer, output.finish_shards(), config, texts, files, settings)
    for note in format.notes(whole.config) if has_config(model) else ():
        warnings.warn(f"{directory}: {note}", stacklevel=3)
    if format.moved is not None:
        moved = {name: format.moved(weight) for name, weight in exported.quantized.items()}
        warn_moved(directory, format.name, {name: distance for name, distance in moved.items() if distance})


def write_dense(
    model: nn.Module,
    directory: Path,
    tokenizer: Any,
    max_shard_bytes: int,
    report: Report | None,
    origin: Origin | None,
) -> None:
    """
    Args:
        origin: where the model came from, for what else there is.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    values = _values(model)
    weights = [(w.bits, w.group_size) for w in values.values() if isinstance(w, GroupTensor)]
    # Dense before the conversions run: they then need not know how to take a quantized stack apart.
    stacks = {n: t.dequantize() for n, t in values.items() if isinstance(t, GroupTensor) and t.dim() > 2}
    reverted = revert_conversions(model, {**values, **stacks})
    del values, stacks
    with OutputDirectory(directory, max_shard_bytes) as output:
        size = sum(t.numel() * t.dtype.itemsize for t in reverted.values())
        output.check_space(size + (origin.nbytes if origin else 0))
        for name in list(reverted):
            # Taken out one by one, so that what is written can be freed.
            tensor = reverted.pop(name)
            output.add({name: _copy(tensor.dequantize() if isinstance(tensor, GroupTensor) else tensor)})
        files = _add_others(output, origin)
        texts = {CARD: model_card(model, None, weights, report, origin)} if has_config(model) else {}
        output.finish(model, tokenizer, output.finish_shards(), None, texts, files)


def _add_others(output: OutputDirectory, origin: Origin | None) -> Mapping[str, Path]:
    """Store the tensors that the model's class does not use. Returns the files to copy."""
    if origin is None:
        return {}
    for name, tensor in origin.tensors():
        output.add({name: tensor})
    return origin.files


def _values(model: nn.Module) -> dict[str, Tensor]:
    get = ModelWeights(model).get
    return {first: get(first) for first, *_ in state_names(model)}


def _inner(tensor: Tensor) -> Iterable[Tensor]:
    """What holds the values: of a quantized weight several tensors."""
    if not isinstance(tensor, GroupTensor):
        return [tensor]
    return (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])


def _copy(tensor: Tensor) -> Tensor:
    """Of its own, on the CPU: a view would keep all that it is a view of."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
