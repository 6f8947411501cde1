"""What engines call layers that are one product there and several in a checkpoint: they look for the name of the whole.

| parts | whole |
|---|---|
| `….q_proj`, `….k_proj`, `….v_proj` | `….qkv_proj` |
| `….gate_proj`, `….up_proj` | `….gate_up_proj` |
| `….experts.0.w1`, … all of a layer | `….experts` |
"""

from collections.abc import Mapping
from typing import TypeVar

__all__ = ["FUSED", "HEAD", "expert_stack", "wholes"]

FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
HEAD = "lm_head"  # a matrix product, and no linear layer
_EXPERTS = "experts"

SettingT = TypeVar("SettingT")


def expert_stack(module: str) -> str | None:
    """The layer's experts, if `module` is one of them or a part of one, or a stack of all."""
    parts = module.split(".")
    if _EXPERTS not in parts:
        return None
    return ".".join(parts[: parts.index(_EXPERTS) + 1])


def wholes(settings: Mapping[str, SettingT]) -> dict[str, SettingT]:
    """Whole → setting of its parts, for those whose parts have all the same: only such can be one product.

    Args:
        settings: module → its setting, of all that have a matrix.
    """
    found: dict[str, SettingT] = {}
    differ: set[str] = set()
    for module, setting in settings.items():
        parent, dot, leaf = module.rpartition(".")
        whole = expert_stack(module) or (parent + dot + FUSED[leaf] if leaf in FUSED else None)
        if whole is not None and found.setdefault(whole, setting) != setting:
            differ.add(whole)
    return {whole: setting for whole, setting in found.items() if whole not in differ}
