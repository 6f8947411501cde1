"""A model's settings as mlx-lm looks for them in config.json: by the names that they had before transformers 5."""

from collections.abc import Mapping
from typing import Any

__all__ = ["mlx_notes", "mlx_settings"]

# `model_type` of transformers → the activation function that mlx-lm computes there, of models that were compared.
_COMPARED = dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe"), "silu")
_COMPARED |= dict.fromkeys(("phi3", "olmo2", "olmoe", "smollm3", "granite", "stablelm"), "silu")
_COMPARED |= dict.fromkeys(("gemma", "gemma2", "gemma3_text", "starcoder2"), "gelu_pytorch_tanh")
_WINDOWED = ("gemma3_text",)  # models whose sliding window mlx-lm has


def mlx_settings(config: Any) -> dict[str, Any]:
    """Further keys of config.json. Without them mlx-lm would take its defaults, without a word.

    Args:
        config: that of a model of transformers.
    """
    found = {old: getattr(config, old) for old in getattr(config, "attribute_map", {}) if hasattr(config, old)}
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    # Of a model with two kinds of attention, each has its own.
    whole = rope.get("full_attention", rope)
    if "rope_theta" in whole:
        found["rope_theta"] = whole["rope_theta"]
    if whole.get("rope_type", "default") != "default":
        scaling = {key: value for key, value in whole.items() if key not in ("rope_theta", "partial_rotary_factor")}
        found["rope_scaling"] = {"type": whole["rope_type"], **scaling}
    if "partial_rotary_factor" in whole:
        found["partial_rotary_factor"] = whole["partial_rotary_factor"]
    if "sliding_attention" in rope:
        found["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    pattern = _pattern(config)
    return found if pattern is None else {**found, "sliding_window_pattern": pattern}


def mlx_notes(config: Any) -> tuple[str, ...]:
    """What mlx-lm may compute otherwise than transformers, a sentence each."""
    kind, notes = config.model_type, []
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if kind not in _COMPARED:
        notes.append(
            f"models of the type {kind!r} were not compared with mlx-lm, which may compute something else, or not know "
            f"them: {', '.join(_COMPARED)} were"
        )
    elif activation != _COMPARED[kind]:
        notes.append(f"mlx-lm always computes {_COMPARED[kind]!r} in a {kind!r}, and this one has {activation!r}")
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings and kind not in _WINDOWED:
        notes.append(
            f"attention has a sliding window of {window} tokens, which mlx-lm does not know of a {kind!r}: results "
            "differ in longer contexts"
        )
    if kind in _WINDOWED and _pattern(config) is None:
        notes.append("its layers with a sliding window are not every n-th but one, as mlx-lm takes them to be")
    return tuple(notes)


def _pattern(config: Any) -> int | None:
    """n, if every n-th layer, and no other, has whole attention; None: it is not so, or no layer has a window."""
    types = list(getattr(config, "layer_types", None) or ())
    if "sliding_attention" not in types:
        return None
    n = (types.index("full_attention") if "full_attention" in types else len(types)) + 1
    return n if all((t == "full_attention") == ((i + 1) % n == 0) for i, t in enumerate(types)) else None
