"""Save a quantized model, in any format.

A checkpoint is written to a temporary directory, which gets its name when everything is in it. No pickle, no code.
"""

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from gptq_ao.checkpoint.engines import contents_of, engine_named, unserved
from gptq_ao.checkpoint.files.model_config import has_config
from gptq_ao.checkpoint.formats import DENSE, GGUF, target_format
from gptq_ao.checkpoint.gguf.write import write_gguf
from gptq_ao.checkpoint.native.format import NATIVE
from gptq_ao.checkpoint.native.write import CheckpointWriter, stored_bytes
from gptq_ao.checkpoint.origin import Origin, origin_of
from gptq_ao.checkpoint.write import write_dense, write_foreign
from gptq_ao.errors import CheckpointError, EngineWarning
from gptq_ao.model.state import state_names
from gptq_ao.model.unwrap import unwrapped
from gptq_ao.model.weights import ModelWeights
from gptq_ao.report import Report
from gptq_ao.tensor.fused import FusedProjections

__all__ = ["save_quantized"]


def save_quantized(
    model: nn.Module,
    directory: str | Path,
    *,
    format: str = "native",
    tokenizer: Any = None,
    report: Report | None = None,
    max_shard_bytes: int = 5 * 2**30,
    engine: str | None = None,
) -> None:
    """Write a quantized model, with its config and a model card if it is a Hugging Face model. Codes and scales are
    written as they are; nothing is quantized again. What else lies in the directory that it was loaded from comes
    along: tensors that its class does not use, and files that are not weights. Of a model inside of torch.compile,
    DataParallel, DistributedDataParallel, or a module that has no other parameters, the model is written, not the
    wrapper.

    Args:
        format: "native", which holds whatever `quantize_` makes; "gptq" (version 1, symmetric weights), "gptq_v2",
            "compressed-tensors" or "awq", for other libraries; "dense", the weights that the quantized ones stand for;
            "gguf", one file for llama.cpp, whose path `directory` is then.
        tokenizer: one to save with the model.
        report: what `quantize_` returned, for the model card.
        max_shard_bytes: size of the files; a GGUF file is one, of any size.
        engine: what is to serve it, one of `ENGINES` in `checkpoint/engines.py`.

    Raises:
        CheckpointError: the format cannot hold the model, the directory holds something, the disk is full, or the model
            has adapters, is sharded over processes, or has state that is not a tensor. Nothing is left at `directory`.
        ConfigError: there is no such format or engine; a parameter is on the meta device, without values; the package
            gguf is missing, or the path is not that of a GGUF file.

    Warns:
        EngineWarning: `engine` does not serve such a model in this format, or no engine does.
        RoundedScalesWarning: in a GGUF file, offsets of asymmetric weights had to be rounded.
    """
    target = target_format(format)
    if engine is not None:
        engine_named(engine)
    model = unwrapped(model)
    # Its layers have no weight of their own, so the names in the files would fit no other model.
    fused = next((name for name, m in model.named_modules() if isinstance(m, FusedProjections)), None)
    if fused is not None:
        raise CheckpointError(
            f"{fused!r} is a fused weight, which belongs to no layer: call unfuse_projections_(model) first"
        )
    origin = origin_of(model)
    if origin is not None and origin.unread:
        warnings.warn(origin.doubt(model), stacklevel=2)
    if format == GGUF:
        write_gguf(model, Path(directory), tokenizer, report, origin)
    elif target is None:
        write_dense(model, Path(directory), tokenizer, max_shard_bytes, report, origin)
    elif target is not NATIVE:
        write_foreign(model, Path(directory), target, tokenizer, max_shard_bytes, report, origin)
    else:
        _write_native(model, Path(directory), tokenizer, max_shard_bytes, report, origin)
    if format != DENSE and has_config(model):
        why = unserved(engine, format, contents_of(model))
        if why is not None:
            warnings.warn(f"{directory}: {why}", EngineWarning, stacklevel=2)


def _write_native(
    model: nn.Module,
    directory: Path,
    tokenizer: Any,
    max_shard_bytes: int,
    report: Report | None,
    origin: Origin | None,
) -> None:
    state = model.state_dict(keep_vars=True)
    firsts = [first for first, *_ in state_names(model)]
    with CheckpointWriter(directory, max_shard_bytes) as writer:
        # Before anything is written: a full disk is best noticed at the start.
        size = stored_bytes({first: state[first] for first in firsts})
        writer.check_space(size + (origin.nbytes if origin else 0))
        writer.add_rest(model, ModelWeights(model).get)
        writer.finish_checkpoint(model, tokenizer, report, origin)
