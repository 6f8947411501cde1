"""What llama.cpp calls a model: its architecture, its numbers, its tensors.

The names of tensors are those of the package gguf, the names of numbers those by which transformers reads GGUF files,
in the other direction; and so are the rows of matrices that llama.cpp has in another order. What is written here by
hand is which architectures are known to give the same results there, and what they have no number for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gptq_ao.checkpoint.gguf.package import gguf_package, transformers_reader
from gptq_ao.errors import CheckpointError

__all__ = ["Architecture", "architecture_of", "unlike_file"]


@dataclass(frozen=True)
class _Known:
    """What is known of an architecture of llama.cpp and written nowhere else.

    Attributes:
        name: as GGUF has it.
        fixed: setting of a config → its values, of which llama.cpp computes the first, whichever it is.
        numbers: key that transformers does not read → setting of a config, which may not be None.
        windows: of so many layers the last one attends to all tokens, the others to some; 0: llama.cpp has no windows.
        large: with so many layers, scores of attention are scaled by the width of the model and not by that of heads.
        ropes: kinds of rotary embeddings that it has besides default ones.
    """

    name: str
    fixed: Mapping[str, tuple[Any, ...]]
    numbers: Mapping[str, str] = field(default_factory=dict)
    windows: int = 0
    large: int = 0
    ropes: tuple[str, ...] = ("linear",)


_USUAL: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
_WHOLE: dict[str, tuple[Any, ...]] = {**_USUAL, "partial_rotary_factor": (1.0,)}
_UNBIASED: dict[str, tuple[Any, ...]] = {**_WHOLE, "attention_bias": (False,)}
_GEMMA: dict[str, tuple[Any, ...]] = {"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,)}
_GEMMA |= {"use_bidirectional_attention": (False, None)}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
# By `model_type` of transformers: models that were compared.
_ARCHITECTURES = {
    "llama": _Known("llama", _WHOLE, ropes=("linear", "llama3")),
    "mistral": _Known("llama", _WHOLE),
    "qwen2": _Known("qwen2", _WHOLE),
    "qwen3": _Known("qwen3", _UNBIASED),
    "qwen3_moe": _Known("qwen3moe", {**_UNBIASED, "norm_topk_prob": (True,)}),
    "gemma2": _Known("gemma2", _GEMMA, _CAPS, windows=2, large=46),
    "gemma3_text": _Known("gemma3", _GEMMA | dict.fromkeys(_CAPS, (None,)), windows=6, large=62),
    "phi3": _Known("phi3", _USUAL, ropes=("longrope",)),
}
_HINT = ": write another format"
_FLOATS = ("freq_base", "freq_base_swa", "epsilon", "factor", "softcapping")  # ends of keys


@dataclass(frozen=True)
class Architecture:
    """
    Attributes:
        name: as GGUF has it.
        numbers: key, behind the architecture's name → int, float or str.
        extra: tensors that are no parameters, by their names in GGUF.
        notes: what is not as in transformers, a sentence each.
        tensor_names, processor: how tensors are named and their rows ordered; see the methods.
    """

    name: str
    numbers: Mapping[str, Any]
    extra: Mapping[str, Tensor]
    notes: tuple[str, ...]
    tensor_names: Any
    processor: Any

    def tensor_name(self, name: str) -> tuple[str | None, bool]:
        """Of a parameter with the name that it has in a hub checkpoint (None if there is none); and whether the tensor
        is a stack, of all parameters of that name, in the order of their numbers."""
        of_all = self.processor.preprocess_name(name)  # without the number of an expert
        return self.tensor_names.get_name(of_all, try_suffixes=(".weight", ".bias")), of_all != name

    def rows(self, name: str, rows: int) -> tuple[Tensor | None, int]:
        """Which row of the parameter each row of the tensor `name` of GGUF is: int64 [rows] (None: they are the same);
        and what its numbers are larger by: norms of a Gemma by 1.

        transformers undoes both when it reads; here it does so with the numbers of the rows.
        """
        undone = torch.from_numpy(self.processor.process(torch.arange(rows).numpy(), name).weights)
        larger = -int(undone.min())
        undone = undone + larger
        return (None if torch.equal(undone, torch.arange(rows)) else undone.argsort()), larger


def architecture_of(model: Any) -> Architecture:
    """The architecture of a Hugging Face model.

    Raises:
        CheckpointError: it is none of those above, or computes something that llama.cpp does not.
        ConfigError: the package gguf is missing, or the version of transformers has no tables of GGUF.
    """
    gguf, reader = gguf_package(), transformers_reader()
    config, kind = model.config, type(model).__name__
    known = _ARCHITECTURES.get(config.model_type)
    if known is None or not kind.endswith("ForCausalLM"):
        raise CheckpointError(
            f"a {kind} (model_type {config.model_type!r}) cannot be written as GGUF: language models of the types "
            f"{', '.join(_ARCHITECTURES)} can, which give the same results in llama.cpp"
        )
    rope, local = _ropes(config)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    _check(config, kind, known, head, rope)
    tables = reader.GGUF_TO_TRANSFORMERS_MAPPING["config"]
    table = {key: own for key, own in tables.get(config.model_type, tables.get(known.name)).items() if own is not None}
    numbers = {key: getattr(config, own, rope.get(own)) for key, own in {**table, **known.numbers}.items()}
    # Those that transformers does not read, where heads have another size than llama.cpp takes them to have.
    numbers |= dict.fromkeys(("attention.key_length", "attention.value_length"), head)
    numbers["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1.0))
    if local:
        numbers["rope.freq_base_swa"] = local["rope_theta"]
    if getattr(config, "moe_intermediate_size", None) is not None:
        numbers["expert_feed_forward_length"] = config.moe_intermediate_size
    extra, scaling, notes = _scaled_rope(config, rope, head, known)
    window = getattr(config, "sliding_window", None)
    if not known.windows and window is not None and window < config.max_position_embeddings:
        numbers["context_length"] = window
        notes.append(
            f"attention has a sliding window of {window} tokens, which llama.cpp does not know of a {known.name!r}: "
            f"the file says that contexts have at most {window} tokens, up to which there is no difference"
        )
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == known.name)
    return Architecture(
        known.name,
        {k: float(v) if k.endswith(_FLOATS) else v for k, v in (numbers | scaling).items() if v is not None},
        extra,
        tuple(notes),
        gguf.get_tensor_name_map(arch, config.num_hidden_layers),
        reader.TENSOR_PROCESSORS.get(known.name, reader.TensorProcessor)(config=config.to_dict()),
    )


def _ropes(config: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Settings of rotary embeddings, and those of layers with a window where they have their own."""
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    return (rope["full_attention"], rope["sliding_attention"]) if "full_attention" in rope else (rope, {})


def unlike_file(model: Any, keys: Mapping[str, Any]) -> str | None:
    """What a model that was read from a GGUF file computes otherwise than llama.cpp with that file, in words; None:
    nothing that is known, which it is not of architectures that are not written here.

    Args:
        keys: of the file.
    """
    if model.config.model_type not in _ARCHITECTURES:
        return None
    try:
        architecture = architecture_of(model)
    except CheckpointError as e:
        return str(e).removesuffix(_HINT)
    numbers = {f"{architecture.name}.{key}": value for key, value in architecture.numbers.items()}
    other = [
        f"{key} {keys[key]!r}, and the model {value!r}"
        for key, value in numbers.items()
        if keys.get(key, value) != (float(torch.tensor(value)) if isinstance(value, float) else value)
    ]
    return f"the file has {'; '.join(other)}" if other else None


def _check(config: Any, kind: str, known: _Known, head: int, rope: Mapping[str, Any]) -> None:
    """What is a setting of a config and fixed in llama.cpp."""
    given = {**rope, **config.to_dict()}
    fixed = dict(known.fixed)
    if known.windows:
        whole = [(i + 1) % known.windows == 0 for i in range(config.num_hidden_layers)]
        fixed["layer_types"] = (["full_attention" if w else "sliding_attention" for w in whole],)
        by_width = config.num_hidden_layers == known.large
        fixed["query_pre_attn_scalar"] = (config.hidden_size // config.num_attention_heads if by_width else head,)
    wrong = {k: v[0] for k, v in fixed.items() if given.get(k, v[0]) not in v}
    for key, value in wrong.items():
        raise CheckpointError(f"this {kind} has {key} {given[key]!r}, and llama.cpp always computes {value!r}{_HINT}")
    for key in known.numbers.values():
        if given.get(key) is None:
            raise CheckpointError(f"this {kind} has no {key}, and llama.cpp always computes with one{_HINT}")


def _scaled_rope(
    config: Any, rope: Mapping[str, Any], head: int, known: _Known
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Tensors and numbers of rotary frequencies that are not the usual powers, and notes."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}, {}, []
    if kind in known.ropes:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if kind == "linear":
            return {}, {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}, []
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        if kind == "llama3":
            usual = 1.0 / rope["rope_theta"] ** (torch.arange(0, head, 2).float() / head)
            return {"rope_freqs.weight": usual / frequencies}, {}, []
        length = rope.get("original_max_position_embeddings", config.original_max_position_embeddings)
        note = (
            f"llama.cpp takes the long_factor of its rotary embedding for contexts of more than {length} tokens, "
            "however few of them a text fills; transformers for longer texts"
        )
        tensors = {f"rope_factors_{n}.weight": torch.tensor(rope[f"{n}_factor"]).float() for n in ("long", "short")}
        numbers = {"rope.scaling.original_context_length": length, "rope.scaling.attn_factor": factor}
        return tensors, numbers, [note]
    raise CheckpointError(
        f"its rotary embedding has the rope_type {kind!r}, which is not written for llama.cpp's {known.name!r}: "
        f"default and {' and '.join(known.ropes)} are{_HINT}"
    )
