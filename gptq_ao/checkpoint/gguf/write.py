"""Write a quantized model as a GGUF file, weight by weight."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptq_ao.checkpoint.exchange.hub_names import export_model, refuse
from gptq_ao.checkpoint.exchange.packed_weight import warn_moved
from gptq_ao.checkpoint.files.model_config import has_config
from gptq_ao.checkpoint.files.output_file import OutputFile
from gptq_ao.checkpoint.gguf.architecture import Architecture, architecture_of
from gptq_ao.checkpoint.gguf.blocks import block_kind, to_blocks, why_no_blocks
from gptq_ao.checkpoint.gguf.package import gguf_package
from gptq_ao.checkpoint.gguf.vocabulary import Vocabulary, vocabulary_of
from gptq_ao.checkpoint.origin import Origin
from gptq_ao.errors import CheckpointError, ConfigError
from gptq_ao.model.state import state_names
from gptq_ao.model.weights import ModelWeights
from gptq_ao.report import Report, names_of
from gptq_ao.tensor import GroupTensor
from gptq_ao.version import VERSION

__all__ = ["check_gguf", "write_gguf"]

SUFFIX = ".gguf"
_DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file.

    Attributes:
        kind: GGUF's name of its type.
        shape: [..., in features], as torch has it.
        read: its bytes, and how far offsets were moved by rounding (see `Blocks`).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    read: Callable[[], tuple[Tensor, float]]


def write_gguf(model: nn.Module, path: Path, tokenizer: Any, report: Report | None, origin: Origin | None) -> None:
    """
    Args:
        tokenizer: one of transformers; None: that of `origin`, if it has one.
        origin: where the model came from.

    Raises:
        CheckpointError: the format or llama.cpp cannot hold the model or its tokenizer (nothing is written in these
            cases), there is something at `path`, or it cannot be written.
        ConfigError: `path` is not that of a GGUF file, or the package gguf is missing.
    """
    if path.suffix != SUFFIX:
        raise ConfigError(f"a GGUF file is one file, whose name ends in {SUFFIX}: {path} is not such a path")
    gguf = gguf_package()
    architecture, vocabulary = check_gguf(model, tokenizer, origin)
    entries = [*_entries(model, architecture)]
    writer = gguf.GGUFWriter(None, architecture.name)
    given = Path(str(getattr(model.config, "_name_or_path", "") or "")).name
    name = given or type(model).__name__
    why_no_name = vocabulary.why_no_name(name)
    if why_no_name is None:
        writer.add_name(name)
    _describe(writer, gguf, architecture, vocabulary, report, {e.kind for e in entries})
    moved: dict[str, float] = {}
    with OutputFile(path) as file:
        sizes = [gguf.quant_shape_to_byte_shape(e.shape, gguf.GGMLQuantizationType[e.kind]) for e in entries]
        for entry, shape in zip(entries, sizes, strict=True):
            size = torch.Size(shape).numel()
            kind = gguf.GGMLQuantizationType[entry.kind]
            writer.add_tensor_info(entry.name, shape, torch.empty(0, dtype=torch.uint8).numpy().dtype, size, kind)
        file.check_space(sum(torch.Size(shape).numel() for shape in sizes))
        with file.errors(), contextlib.closing(writer):
            writer.write_header_to_file(file.temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry in entries:
                data, distance = entry.read()
                writer.write_tensor_data(data.numpy())
                if distance:
                    moved[entry.name] = distance
        file.finish()
    notes = [*architecture.notes, *vocabulary.notes_for(name if why_no_name is None else "")]
    if given and why_no_name is not None:
        notes.append(f"the file has no name of the model in it: {why_no_name}")
    _tell(model, path, tuple(notes), moved, origin)


def check_gguf(model: Any, tokenizer: Any, origin: Origin | None) -> tuple[Architecture, Vocabulary]:
    """What llama.cpp calls the model and its tokens. Weights are not looked at; they may be on the meta device.

    Raises:
        CheckpointError: it has no such model, or no such tokenizer.
        ConfigError: the package gguf is missing.
    """
    if not has_config(model):
        raise CheckpointError(
            f"GGUF holds models that llama.cpp has code for, here those of transformers: not a {type(model).__name__}"
        )
    architecture, size = architecture_of(model), len(model.get_input_embeddings().weight)
    return architecture, vocabulary_of(tokenizer if tokenizer is not None else _tokenizer_of(origin), size)


def _entries(model: nn.Module, architecture: Architecture) -> Iterator[_Entry]:
    get = ModelWeights(model).get
    exported = export_model(model, {first: get(first) for first, *_ in state_names(model)})
    refuse(exported.quantized, why_no_blocks, "gguf")
    stacks: dict[str, list[tuple[list[int], Tensor]]] = {}  # by name, with the numbers in the names of their parts
    for name, tensor in exported.tensors.items():
        known, stacked = architecture.tensor_name(name)
        if known is None:
            raise CheckpointError(f"'gguf' cannot hold {name!r}: llama.cpp's {architecture.name!r} has no such tensor")
        if not isinstance(tensor, GroupTensor) and tensor.dtype not in _DENSE:
            raise CheckpointError(f"'gguf' cannot hold {name!r}: it is of the type {tensor.dtype}")
        if stacked:
            stacks.setdefault(known, []).append(([int(n) for n in name.split(".") if n.isdigit()], tensor))
        else:
            yield _entry(known, [tensor], tuple(tensor.shape), *architecture.rows(known, len(tensor)))
    for name, numbered in stacks.items():
        parts = [tensor for _, tensor in sorted(numbered, key=lambda part: part[0])]
        yield _entry(name, parts, (len(parts), *parts[0].shape))
    for name, tensor in architecture.extra.items():
        yield _entry(name, [tensor], tuple(tensor.shape))


def _entry(
    name: str, parts: list[Tensor], shape: tuple[int, ...], order: Tensor | None = None, larger: int = 0
) -> _Entry:
    """
    Args:
        parts: what is in the file one after the other, of one shape.
        order: which row of a part each one of the file is; None: the same.
        larger: what is added to numbers that are not quantized.
    """
    weights = [part for part in parts if isinstance(part, GroupTensor)]
    if weights:
        # "Q4_1" if a part is: one that happens to be symmetric is held by that as well.
        kind = max(block_kind(weight) for weight in weights)

        def blocks() -> tuple[Tensor, float]:
            made = [to_blocks(weight, kind) for weight in weights]
            return torch.cat([b.data if order is None else b.data[order] for b in made]), max(b.moved for b in made)

        return _Entry(name, kind, shape, blocks)
    # llama.cpp adds and multiplies vectors in fp32 only, which holds the others exactly.
    dtype = torch.float32 if len(shape) < 2 else parts[0].dtype

    def values() -> tuple[Tensor, float]:
        own = torch.cat([part.detach().cpu().to(dtype) for part in parts])
        own = (own if order is None else own[order]) + larger
        return own.contiguous().view(torch.uint8), 0.0

    return _Entry(name, _DENSE[dtype], shape, values)


def _tokenizer_of(origin: Origin | None) -> Any:
    """That of the directory that the model was loaded from."""
    if origin is None or not {"tokenizer.json", "tokenizer.model"} & {*origin.files}:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(origin.directory))
    except Exception as e:  # which one depends on its kind, and on what is missing or damaged
        raise CheckpointError(f"{origin.directory} has a tokenizer that cannot be loaded: {e}") from e


def _describe(
    writer: Any,
    gguf: Any,
    architecture: Architecture,
    vocabulary: Vocabulary,
    report: Report | None,
    kinds: set[str],
) -> None:
    """All that is not a tensor."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_quantized_by(f"gptq_ao {VERSION}")
    if report is not None:
        writer.add_description("; ".join(f"{key}: {value}" for key, value in report.recipe.items()))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    # Which type most weights have: a name for people, by the widest of the usual three.
    usual = next(kind for kind in ("Q8_0", "Q4_1", "Q4_0") if kind in kinds)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{usual}"])
    for key, value in architecture.numbers.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture.name}.{key}", value)
    vocabulary.add(writer)


def _tell(model: nn.Module, path: Path, notes: tuple[str, ...], moved: dict[str, float], origin: Origin | None) -> None:
    """A warning for each thing that is not in the file as it is in the model."""
    warn_moved(path, "GGUF", moved)
    if origin is not None and origin.ignored:
        what = f"{len(origin.ignored)} tensors of {origin.directory} that {type(model).__name__} does not use"
        notes = (*notes, f"{what} are not in the file: {names_of(origin.ignored)}")
    if origin is not None and origin.lost:
        notes = (*notes, origin.loss(model))
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=4)
