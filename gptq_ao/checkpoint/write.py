"""Write a quantized model in the format of another library, or dense, weight by weight."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptq_ao.checkpoint.compressed_tensors.write import compressed_config_of, compressed_tensors_of
from gptq_ao.checkpoint.exchange.hub_names import ExportedModel, export_model, revert_conversions
from gptq_ao.checkpoint.files.model_card import CARD, model_card
from gptq_ao.checkpoint.files.output_directory import OutputDirectory, as_json, has_config
from gptq_ao.checkpoint.gptq.write import gptq_config_of, gptq_tensors_of
from gptq_ao.errors import CheckpointError
from gptq_ao.model.inspection import state_names
from gptq_ao.model.weights import ModelWeights
from gptq_ao.report import Report
from gptq_ao.tensor import GroupTensor

__all__ = ["config_of", "tensors_of", "write_dense", "write_foreign"]


def write_foreign(
    model: nn.Module, directory: Path, format: str, tokenizer: Any, max_shard_bytes: int, report: Report | None
) -> None:
    """
    Args:
        format: "gptq", "gptq_v2" or "compressed-tensors".

    Raises:
        CheckpointError: nothing is quantized, the format cannot hold a weight (nothing is written in these cases), or
            the directory cannot be written.
    """
    exported = export_model(model, _values(model))
    config = config_of(exported, format)
    weights = [(w.bits, w.group_size) for w in exported.quantized.values()]
    with OutputDirectory(directory, max_shard_bytes) as output:
        dense = sum(t.nbytes for t in exported.dense.values())
        output.check_space(dense + sum(t.nbytes for w in exported.quantized.values() for t in _inner(w)))
        for name, tensor in tensors_of(exported, format, getattr(model, "dtype", torch.float16)):
            output.add({name: _copy(tensor)})
        texts = {"quantize_config.json": as_json(config)} if config["quant_method"] == "gptq" else {}
        if has_config(model):
            texts |= {CARD: model_card(model, format, weights, report)}
        else:
            texts |= {"config.json": as_json({"quantization_config": config})}
        output.finish(model, tokenizer, output.finish_shards(), config, texts)


def write_dense(model: nn.Module, directory: Path, tokenizer: Any, max_shard_bytes: int, report: Report | None) -> None:
    """
    Raises:
        CheckpointError: the directory cannot be written.
    """
    values = _values(model)
    weights = [(w.bits, w.group_size) for w in values.values() if isinstance(w, GroupTensor)]
    stacks = {n: t.dequantize() for n, t in values.items() if isinstance(t, GroupTensor) and t.dim() > 2}
    reverted = revert_conversions(model, {**values, **stacks})
    del values, stacks
    with OutputDirectory(directory, max_shard_bytes) as output:
        output.check_space(sum(t.numel() * t.dtype.itemsize for t in reverted.values()))
        for name in list(reverted):
            tensor = reverted.pop(name)
            output.add({name: _copy(tensor.dequantize() if isinstance(tensor, GroupTensor) else tensor)})
        texts = {CARD: model_card(model, "dense", weights, report)} if has_config(model) else {}
        output.finish(model, tokenizer, output.finish_shards(), None, texts)


def config_of(exported: ExportedModel, format: str) -> dict[str, Any]:
    """The quantization_config.

    Raises:
        CheckpointError: nothing is quantized, or the format cannot hold a weight.
    """
    if not exported.quantized:
        raise CheckpointError(f"the model has no quantized weight, so there is nothing to write as {format!r}")
    return compressed_config_of(exported) if format == "compressed-tensors" else gptq_config_of(exported, format)


def tensors_of(exported: ExportedModel, format: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name and value of everything in the files, one weight at a time.

    Args:
        dtype: of the model.
    """
    for module, weight in exported.quantized.items():
        if format == "compressed-tensors":
            yield from compressed_tensors_of(module, weight, dtype).items()
        else:
            yield from gptq_tensors_of(module, weight, format).items()
    yield from exported.dense.items()


def _values(model: nn.Module) -> dict[str, Tensor]:
    get = ModelWeights(model).get
    return {first: get(first) for first, *_ in state_names(model)}


def _inner(weight: GroupTensor) -> Iterable[Tensor]:
    return (getattr(weight, name) for name in weight.__tensor_flatten__()[0])


def _copy(tensor: Tensor) -> Tensor:
    """Of its own, on the CPU: a view would keep all that it is a view of."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
