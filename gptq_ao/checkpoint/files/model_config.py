"""config.json of a Hugging Face model: what the model is now, not what it was when it was made."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from gptq_ao.checkpoint.files.directory import config_keys, method_of
from gptq_ao.model.state import state_names

__all__ = ["config_of", "has_config", "take_mlx"]


def has_config(model: nn.Module) -> bool:
    """Whether it is a Hugging Face model."""
    return hasattr(getattr(model, "config", None), "save_pretrained")


def config_of(model: nn.Module, quantization: Mapping[str, Any] | None) -> Any:
    """A config to write with the model, whose own stays as it is; None if it has none.

    Args:
        quantization: the `quantization_config`; None: the weights are not quantized.
    """
    if not has_config(model):
        return None
    whole: Any = model
    config: Any = copy.deepcopy(whole.config)
    # `empty_model` reads this to know what to build; a model made from a config does not say it by itself.
    config.architectures = [type(model).__name__]
    ours = dict(_parts(whole.config, config))  # part of the model's config, by identity → that of ours
    for part in ours.values():
        # What the model was loaded from may have been quantized, also in another way.
        for stale in ("quantization_config", "compression_config"):
            if hasattr(part, stale):
                delattr(part, stale)
        take_mlx(part)
    _set_dtypes(whole, ours)
    _set_ties(whole, ours)
    if quantization is not None:
        for key in config_keys(quantization):
            setattr(config, key, dict(quantization))
    return config


def take_mlx(config: Any) -> dict[str, Any] | None:
    """What mlx-lm looks for in a config, which is removed there: it is about the files that the config came with. None:
    there is none. Other models may have something else of that name, which stays."""
    found = getattr(config, "quantization", None)
    if not isinstance(found, dict) or method_of(found) != "mlx":
        return None
    delattr(config, "quantization")
    return found


def _parts(config: Any, same: Any) -> Iterator[tuple[int, Any]]:
    """A config and its parts (of the text model, the vision model, …), by identity, each with that of a copy."""
    yield id(config), same
    for name in getattr(config, "sub_configs", ()):
        if getattr(config, name, None) is not None:
            yield from _parts(getattr(config, name), getattr(same, name))


def _set_dtypes(model: Any, ours: Mapping[int, Any]) -> None:
    """Each part gets the dtype of its own module, as transformers names it: that of its first parameter."""
    for part in ours.values():
        part.dtype = _dtype(model)
    seen = set()
    for _, m in model.named_modules():
        key = id(getattr(m, "config", None))
        # The outermost module of a part.
        if key in ours and key not in seen and (dtype := _dtype(m)) is not None:
            seen.add(key)
            ours[key].dtype = dtype


def _dtype(module: nn.Module) -> Any:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _set_ties(model: Any, ours: Mapping[int, Any]) -> None:
    """Whether the pairs of weights that a class may tie are tied: one is enough, since a checkpoint may also hold both
    of another pair."""
    group = {name: number for number, names in enumerate(state_names(model)) for name in names}
    for prefix, m in model.named_modules():
        pairs, key = getattr(type(m), "_tied_weights_keys", None), id(getattr(m, "config", None))
        if not isinstance(pairs, Mapping) or key not in ours:
            continue
        names = [[f"{prefix}.{n}".removeprefix(".") for n in pair] for pair in pairs.items()]
        # Patterns of names are left to the class.
        tied = [group[a] == group[b] for a, b in names if a in group and b in group]
        if not tied or getattr(ours[key], "tie_word_embeddings", None) in (None, any(tied)):
            continue
        for config in (ours[key], ours[key].get_text_config(decoder=True)):
            if getattr(config, "tie_word_embeddings", None) is not None:
                config.tie_word_embeddings = any(tied)
