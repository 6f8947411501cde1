"""The parameters of a Hugging Face model, quantized or not, read one at a time from the directory that holds them.

transformers renames, merges and splits tensors on loading (a checkpoint's experts become one 3-D parameter, a prefix
comes or goes). Its own conversions decide here too: they run once on empty tensors, which tells what every parameter is
made of, and its shape, before anything is read; and again on the tensors of one parameter when that is asked for.
"""

import copy
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gptq_ao.checkpoint.exchange.format import Readable
from gptq_ao.checkpoint.exchange.packed_weight import DenseWeight, PackedWeight
from gptq_ao.checkpoint.files.directory import quantization_config, stored_tensors
from gptq_ao.checkpoint.files.shards import StoredTensor
from gptq_ao.errors import CheckpointError
from gptq_ao.model.empty import empty_model
from gptq_ao.tensor import GroupTensor

__all__ = ["Source", "left_over", "open_source", "source_of"]


@dataclass(frozen=True)
class Conversion:
    """What to read, and transformers' transform that makes parameters of it.

    Attributes:
        target: the parameter; the first one, if the transform makes several.
        transform: a WeightConverter, or None if one tensor is the parameter.
        inputs: (pattern of the transform, key in the checkpoint, tensor), in transformers' order.
        dtype: the one into which the tensors are converted first.
        transposed: whether files of quantized weights have it as [out, in] and the module as [in, out].
    """

    target: str
    transform: Any
    inputs: tuple[tuple[str | None, str, Readable], ...]
    dtype: torch.dtype
    transposed: bool

    def make(self, model: Any, device: torch.device | str = "cpu", *, empty: bool = False) -> dict[str, Tensor]:
        """Name → tensor, on `device`, where all the work is done; if `empty`, on meta, with nothing read."""
        # On meta the operations give shapes and names, and compute nothing.
        read = [torch.empty(s.shape, device="meta") if empty else s.read(device) for _, _, s in self.inputs]
        tensors = [t.to(self.dtype) for t in read]
        if self.transform is None:
            return {self.target: tensors[0].mT if self.transposed else tensors[0]}
        # A WeightConverter collects the tensors it is given, so each use needs a fresh one.
        transform = copy.deepcopy(self.transform)
        for (pattern, key, _), tensor in zip(self.inputs, tensors, strict=True):
            transform.add_tensor(self.target, key, pattern, tensor)
        del read, tensors  # the operations free their inputs as they go
        try:
            made = transform.convert(self.target, model=model, config=model.config)
        except (NotImplementedError, ValueError) as e:  # of quantized weights that cannot be put together
            raise CheckpointError(f"{self.target!r} cannot be put together: {e}") from e
        # Operations may return a list with one tensor.
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}

    @property
    def quantized(self) -> bool:
        """Whether it makes quantized weights.

        Raises:
            CheckpointError: it merges quantized weights with others.
        """
        dense = [key for _, key, tensor in self.inputs if isinstance(tensor, StoredTensor | DenseWeight)]
        if dense and len(dense) < len(self.inputs):
            raise CheckpointError(
                f"{self.target!r} is made of quantized weights and of others ({dense[0]!r}): it can only be one of both"
            )
        return not dense


@dataclass(frozen=True)
class Source:
    """A model on the meta device and where its values are. Non-persistent buffers are computed, and in the model.

    Attributes:
        conversions: parameter or buffer → what makes it, and its name there (another one, if it is tied).
        ignored: tensors that the model's class has no use for, by its own word, such as layers that predict more than
            one token.
    """

    model: nn.Module
    conversions: Mapping[str, tuple[Conversion, str]]
    ignored: Mapping[str, Readable]

    def read(self, name: str) -> Tensor:
        """A parameter or buffer, of its shape and dtype in the model, on the CPU."""
        conversion, made = self.conversions[name]
        return conversion.make(self.model)[made]


def open_source(directory: Path, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> Source:
    """Find every parameter of the unquantized model in `directory`. Only headers are read (and tensors that are stored
    twice).

    Args:
        dtype: that of the model; None: the one on which `from_pretrained(…, dtype="auto")` decides.
        trust_remote_code: whether code in the directory may be run.

    Raises:
        CheckpointError: the directory is unsafe or has no safetensors, or is quantized; a tensor is missing, unknown,
            or of another shape than in the model.
    """
    stored = stored_tensors(directory)
    if quantization_config(directory) is not None:
        raise CheckpointError(
            f"{directory} is quantized already, says its config.json: start from the original weights"
        )
    return source_of(directory, stored, dtype=dtype, trust_remote_code=trust_remote_code)


def source_of(
    directory: Path,
    stored: Mapping[str, Readable],
    model: Any = None,
    dtype: torch.dtype | None = None,
    *,
    strict: bool = True,
    trust_remote_code: bool = False,
) -> Source:
    """Which of the tensors `stored` makes which parameter.

    Args:
        directory: place of the model's config, which is only read without a `model`; named in messages.
        model: the one to fill, which is left as it is; None: the empty one of the config.
        dtype: that of `open_source`.
        strict: whether model and files have to have the same parameters.
        trust_remote_code: see `empty_model`.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape than in the model.
    """
    ours = model is None
    if ours:
        # For a config that names no dtype: the dtype of the first floating-point tensor.
        floating = (t.dtype for t in stored.values() if t.dtype.is_floating_point)
        model = empty_model(
            directory,
            dtype,
            otherwise=next(floating, None),
            shapes=[t.shape for t in stored.values()],
            trust_remote_code=trust_remote_code,
        )
        _keep_fp32(model)
    conversions, unknown = _conversions(model, stored)
    ignored, unexpected = _divide(model, unknown)
    # Such a bias belongs to no parameter, and changes nothing.
    unexpected = [key for key in unexpected if not _empty_bias(key, stored)]
    made: dict[str, tuple[Conversion, torch.Size]] = {}
    # A rehearsal on empty tensors: it finds what does not fit before a weight is read.
    for conversion in conversions:
        try:
            empty = conversion.make(model, empty=True)
        except CheckpointError as e:
            raise CheckpointError(f"{directory}: {e}") from e
        except Exception as e:  # whatever transformers' operations raise on tensors that do not fit together
            keys = ", ".join(key for _, key, _ in conversion.inputs[:3])
            raise CheckpointError(f"{directory}: {conversion.target!r} cannot be made of {keys}, …: {e}") from e
        made |= {name: (conversion, t.shape) for name, t in empty.items()}
    shapes = {name: shape for name, (_, shape) in made.items()}
    _check_shapes(model, directory, shapes)
    if strict:
        _check(model, directory, shapes, unexpected)
    kept = {key: stored[key] for key in ignored}
    source = Source(model, {name: (conversion, name) for name, (conversion, _) in made.items()}, kept)
    return dataclasses.replace(source, conversions={**source.conversions, **_ties(source, ours)})


def left_over(model: Any, stored: Mapping[str, Readable]) -> tuple[list[str], list[str]]:
    """Which of the tensors `stored` make no parameter of `model`: those that its class has no use for, by its own word,
    and others."""
    _, unknown = _conversions(model, stored)
    ignored, unexpected = _divide(model, unknown)
    return ignored, [key for key in unexpected if not _empty_bias(key, stored)]


def _divide(model: Any, unknown: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Tensors that make no parameter: those that the model's class declares to be fine, and others."""
    odd = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unknown.values()))
    if hasattr(model, "_adjust_missing_and_unexpected_keys"):
        model._adjust_missing_and_unexpected_keys(odd)
    fine = [key for key, name in unknown.items() if name not in odd.unexpected_keys]
    return fine, [key for key, name in unknown.items() if name in odd.unexpected_keys]


def _empty_bias(key: str, stored: Mapping[str, Readable]) -> bool:
    """AutoGPTQ gave every quantized layer a bias, of zeros where the model has none."""
    weight = stored.get(f"{key.removesuffix('.bias')}.weight")
    if not key.endswith(".bias") or not isinstance(weight, PackedWeight) or stored[key].shape != weight.shape[:1]:
        return False
    return not stored[key].read().any()


def _keep_fp32(model: Any) -> None:
    """Give the parameters that the model wants in fp32 that dtype, as `from_pretrained` does."""
    plan = model._get_dtype_plan(model.config.dtype)
    for name, parameter in model.named_parameters():
        # The plan's keys are parts of names, with "*" for anything.
        kept = next((dtype for part, dtype in plan.items() if re.search(part.replace("*", ".*"), name)), None)
        if kept is not None:
            _set_empty(model, name, parameter, kept)


def _set_empty(model: nn.Module, name: str, like: nn.Parameter, dtype: torch.dtype) -> None:
    prefix, _, leaf = name.rpartition(".")
    model.get_submodule(prefix)._parameters[leaf] = nn.Parameter(torch.empty_like(like, dtype=dtype))


def _conversions(model: Any, stored: Mapping[str, Readable]) -> tuple[list[Conversion], dict[str, str]]:
    """The conversions, and the tensors that belong to no parameter: key → the name in the model, if it had them.
    This is what `convert_and_load_state_dict_in_model` of transformers does before it loads."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    # The WeightConverter of a pattern is what `rename_source_key` says a tensor belongs to.
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix, state = getattr(model, "base_model_prefix", None), model.state_dict()
    tables = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    inputs: dict[str, list[tuple[str | None, str, Readable]]] = {}
    unknown: dict[str, str] = {}
    # In transformers' order, where expert 10 comes after expert 9: experts are stacked as they come.
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        # It has the model's own name already, and must not be renamed.
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name in state:
            tensor = stored[key]
            if name in tables and isinstance(tensor, PackedWeight):
                tensor = DenseWeight(tensor)
            inputs.setdefault(name, []).append((pattern, key, tensor))
        else:
            unknown[key] = name
    conversions = []
    for name, parts in inputs.items():
        transform = by_pattern[parts[0][0]] if parts[0][0] else None
        conversion = Conversion(name, transform, tuple(parts), state[name].dtype, False)
        if conversion.quantized and transform is None:
            # Conv1D (GPT-2) has [in, out]; other libraries store quantized weights as [out, in] all the same.
            kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
            packed = isinstance(parts[0][2], PackedWeight)
            conversion = dataclasses.replace(conversion, transposed=packed and kind == "Conv1D")
        conversions.append(conversion)
    # Without a transform there is nothing that could merge two tensors.
    twice = next((r for r in conversions if r.transform is None and len(r.inputs) > 1), None)
    if twice is not None:
        keys = " and ".join(key for _, key, _ in twice.inputs)
        raise CheckpointError(f"tensors {keys} of the checkpoint are the same parameter {twice.target!r} of the model")
    return conversions, unknown


def _check_shapes(model: Any, directory: Path, made: Mapping[str, torch.Size]) -> None:
    state = model.state_dict(keep_vars=True)
    for name, shape in made.items():
        # Names that the model lacks are `_check`'s matter.
        if name in state and state[name].shape != shape:
            wanted = f"in the {type(model).__name__} {list(state[name].shape)}"
            raise CheckpointError(f"{directory}: {name!r} has shape {list(shape)}, {wanted}")


def _check(model: Any, directory: Path, made: Mapping[str, torch.Size], unexpected: list[str]) -> None:
    """What the checkpoint makes is what the model has.

    Args:
        unexpected: tensors that make nothing.
    """
    state = model.state_dict(keep_vars=True)
    valued = {
        id(t) for name, t in state.items() if name in made
    }  # tied parameters have values under any of their names
    odd = SimpleNamespace(
        missing_keys={n for n, t in state.items() if id(t) not in valued},
        unexpected_keys={name for name in made if name not in state},
    )
    if hasattr(model, "_adjust_missing_and_unexpected_keys"):
        model._adjust_missing_and_unexpected_keys(odd)  # those that the model's class declares to be fine
    # A parameter has to have a value, whatever the class declares; a buffer was computed.
    missing = sorted(n for n, t in state.items() if id(t) not in valued and (n in odd.missing_keys or t.is_meta))
    extra = sorted({*unexpected, *odd.unexpected_keys})
    for what, names in (("lacks", missing), ("has", extra)):
        if names:
            rest = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            tail = "" if what == "lacks" else ", which the model does not"
            raise CheckpointError(
                f"{directory} does not fit the {type(model).__name__}: it {what} {names[0]!r}{rest}{tail}"
            )


def _ties(source: Source, ours: bool) -> dict[str, tuple[Conversion, str]]:
    """Where tied parameters come from: from whichever of their names is stored. If several are, with different values,
    those are not tied any more, and a model that is `ours` is changed accordingly."""
    tied: dict[int, list[str]] = {}
    parameters = dict(source.model.named_parameters(remove_duplicate=False))
    for name, p in parameters.items():
        # By identity: tied names lead to one Parameter.
        tied.setdefault(id(p), []).append(name)
    found: dict[str, tuple[Conversion, str]] = {}
    for names in tied.values():
        first, *others = [n for n in names if n in source.conversions] or [""]
        if not first:
            continue  # the caller decides whether that is an error
        # Files may hold both names of a tied parameter. Only their values tell whether they are still the same.
        differ = [other for other in others if not _same(source.read(first), source.read(other))]
        for other in differ if ours else ():
            _set_empty(source.model, other, parameters[other], parameters[other].dtype)
        found |= {name: source.conversions[first] for name in names if name not in differ}
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    return type(a) is type(b) and torch.equal(*(t.dequantize() if isinstance(t, GroupTensor) else t for t in (a, b)))
