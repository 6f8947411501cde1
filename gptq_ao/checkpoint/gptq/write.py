"""A quantized model as a GPTQ checkpoint: `quantization_config`, and what the format cannot hold.

One setting is the checkpoint's, that of most weights; modules with another one, and linear layers that stay as they
are, are listed under `dynamic`, where GPTQModel and vLLM look. Engines that fuse layers look there for the name of the
fused one, so a pattern for q_proj, k_proj and v_proj also matches qkv_proj.
"""

import re
from collections import Counter
from typing import Any

from gptq_ao.checkpoint.exchange.hub_names import ExportedModel, refuse
from gptq_ao.tensor import GroupTensor
from gptq_ao.version import VERSION

__all__ = ["gptq_config_of"]

_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
_FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
_HEAD = "lm_head"


def gptq_config_of(model: ExportedModel, format: str) -> dict[str, Any]:
    """The quantization_config.

    Args:
        format: "gptq" (version 1, symmetric weights only) or "gptq_v2".

    Raises:
        CheckpointError: nothing is quantized, or the format cannot hold a weight.
    """
    modules = model.modules
    refuse(modules, lambda w: _why_not(w, format), format)
    settings = {module: (w.bits, _group_size(w)) for module, w in modules.items()}
    # The most frequent setting is the checkpoint's, which leaves the fewest exceptions.
    (bits, group_size), _ = Counter(settings.values()).most_common(1)[0]
    dynamic: dict[str, dict[str, int]] = {}
    for module in model.plain:
        # The output head has a setting of its own below.
        if module.rpartition(".")[2] != _HEAD:
            # "-:" is "not quantized", "+:" is "with these settings".
            dynamic[f"-:{_pattern(module)}"] = {}
    for module, setting in settings.items():
        if setting != (bits, group_size):
            dynamic[f"+:{_pattern(module)}"] = {"bits": setting[0], "group_size": setting[1]}
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": any(w.perm is not None for w in modules.values()),
        "sym": all(w.symmetric for w in modules.values()),
        "lm_head": _HEAD in modules,
        "checkpoint_format": format,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": [f"gptq_ao:{VERSION}"]},
    }


def _why_not(weight: GroupTensor, format: str) -> str | None:
    n, k = weight.out_features, weight.in_features
    if n % 32 or k % 32:
        return f"it has {n} output and {k} input features, and readers of GPTQ need multiples of 32"
    if format == "gptq" and not weight.symmetric:
        return "it is asymmetric, for which version 1 of the format is ambiguous: write gptq_v2 or compressed-tensors"
    return None


def _group_size(weight: GroupTensor) -> int:
    return -1 if weight.group_size == weight.in_features else weight.group_size


def _pattern(module: str) -> str:
    parent, dot, leaf = module.rpartition(".")
    # Engines that fuse these layers look up the fused name only.
    leaves = f"({re.escape(leaf)}|{_FUSED[leaf]})" if leaf in _FUSED else re.escape(leaf)
    return f"^{re.escape(parent + dot)}{leaves}$"
