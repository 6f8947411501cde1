"""What llama.cpp calls a model: its architecture, its numbers, its tensors.

The names of tensors are those of the package gguf, the names of numbers those by which transformers reads GGUF files,
in the other direction; and so are the rows of matrices that llama.cpp has in another order. What is written here by
hand is which architectures are known to give the same results there, and what they have no number for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq_ao.checkpoint.gguf.package import gguf_package, transformers_reader
from gptq_ao.errors import CheckpointError

__all__ = ["Architecture", "architecture_of"]

# `model_type` of transformers → architecture of llama.cpp, of models that were compared.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_ARCHITECTURES |= {"qwen3_moe": "qwen3moe"}
_WITH_ROPE_FACTORS = ("llama",)  # architectures that read a divisor for each frequency


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

    def row_order(self, name: str, rows: int) -> Tensor | None:
        """Which row of the parameter each row of the tensor `name` of GGUF is: int64 [rows]; None: they are the same.

        transformers undoes llama.cpp's order of rows when it reads; here it does so with the numbers of the rows.
        """
        undone = torch.from_numpy(self.processor.process(torch.arange(rows).numpy(), name).weights)
        return None if torch.equal(undone, torch.arange(rows)) else undone.argsort()


def architecture_of(model: Any) -> Architecture:
    """The architecture of a Hugging Face model.

    Raises:
        CheckpointError: it is none of those above, or computes something that llama.cpp does not.
        ConfigError: the package gguf is missing, or the version of transformers has no tables of GGUF.
    """
    gguf, reader = gguf_package(), transformers_reader()
    config, kind = model.config, type(model).__name__
    name = _ARCHITECTURES.get(config.model_type)
    if name is None or not kind.endswith("ForCausalLM"):
        raise CheckpointError(
            f"a {kind} (model_type {config.model_type!r}) cannot be written as GGUF: language models of the types "
            f"{', '.join(_ARCHITECTURES)} can, which give the same results in llama.cpp"
        )
    _check(config, kind)
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    known = reader.GGUF_TO_TRANSFORMERS_MAPPING["config"][config.model_type]
    numbers = {key: getattr(config, own, rope.get(own)) for key, own in known.items() if own is not None}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Those that transformers does not read, where heads have another size than llama.cpp takes them to have.
    numbers |= dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), head)
    if getattr(config, "moe_intermediate_size", None) is not None:
        numbers["expert_feed_forward_length"] = config.moe_intermediate_size
    extra, scaling = _scaled_rope(config, rope, head, name)
    notes, window = [], getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        numbers["context_length"] = window
        notes.append(
            f"attention has a sliding window of {window} tokens, which llama.cpp does not know of a {name!r}: the file "
            f"says that contexts have at most {window} tokens, up to which there is no difference"
        )
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == name)
    return Architecture(
        name,
        {key: value for key, value in (numbers | scaling).items() if value is not None},
        extra,
        tuple(notes),
        gguf.get_tensor_name_map(arch, config.num_hidden_layers),
        reader.TENSOR_PROCESSORS.get(name, reader.TensorProcessor)(config=config.to_dict()),
    )


def _check(config: Any, kind: str) -> None:
    """What is a setting of a config and fixed in llama.cpp."""
    fixed = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "norm_topk_prob": True}
    given = {**(getattr(config, "rope_parameters", None) or {}), **config.to_dict()}
    for key, value in fixed.items():
        if given.get(key, value) != value:
            raise CheckpointError(
                f"this {kind} has {key} {given[key]!r}, and llama.cpp always computes {value!r}: write another format"
            )


def _scaled_rope(
    config: Any, rope: Mapping[str, Any], head: int, name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and numbers of rotary frequencies that are not the usual powers."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}, {}
    if kind == "linear":
        return {}, {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "llama3" and name in _WITH_ROPE_FACTORS:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        usual = 1.0 / rope["rope_theta"] ** (torch.arange(0, head, 2).float() / head)
        return {"rope_freqs.weight": usual / frequencies}, {}
    raise CheckpointError(
        f"its rotary embedding has the rope_type {kind!r}, which is not written for llama.cpp's {name!r}: default and "
        "linear are, and llama3 of a Llama. Write another format"
    )
