"""A quantized model as a GPTQ checkpoint: `quantization_config`, and what the format cannot hold.

One setting is the checkpoint's, that of most weights; modules with another one, and linear layers that stay as they
are, are listed under `dynamic`, where GPTQModel and vLLM look. Engines that fuse layers look there for the name of the
fused one, so a pattern for q_proj, k_proj and v_proj also matches qkv_proj, and one for the experts of a layer their
stack.
"""

import re
from collections import Counter
from typing import Any

from gptq_ao.checkpoint.exchange.engine_names import FUSED, HEAD, expert_stack, wholes
from gptq_ao.checkpoint.exchange.hub_names import ExportedModel, refuse
from gptq_ao.tensor import GroupTensor
from gptq_ao.version import VERSION

__all__ = ["gptq_config_of"]


def gptq_config_of(model: ExportedModel, format: str) -> dict[str, Any]:
    """The quantization_config.

    Args:
        format: "gptq" (version 1, symmetric weights only) or "gptq_v2".

    Raises:
        CheckpointError: nothing is quantized, or the format cannot hold a weight.
    """
    modules = model.modules
    refuse(modules, lambda w: _why_not(w, format), format)
    quantized = {module: (modules[module].bits, size) for module, size in model.group_sizes.items()}
    # The most frequent setting is the checkpoint's, which leaves the fewest exceptions.
    usual, _ = Counter(quantized.values()).most_common(1)[0]
    settings: dict[str, tuple[int, int] | None] = {**dict.fromkeys(model.plain), **quantized}
    whole = wholes(settings)
    dynamic: dict[str, dict[str, int]] = {}
    for module, setting in settings.items():
        # The output head has a setting of its own below.
        if setting == usual or (setting is None and module.rpartition(".")[2] == HEAD):
            continue
        stack = expert_stack(module)
        # Of experts that are alike one pattern, for the stack and what is in it.
        pattern = _pattern(module) if stack is None or stack not in whole else rf"^{re.escape(stack)}(\.|$)"
        # "-:" is "not quantized", "+:" is "with these settings".
        if setting is None:
            dynamic[f"-:{pattern}"] = {}
        else:
            dynamic[f"+:{pattern}"] = {"bits": setting[0], "group_size": setting[1]}
    return {
        "quant_method": "gptq",
        "bits": usual[0],
        "group_size": usual[1],
        "desc_act": any(w.perm is not None for w in modules.values()),
        "sym": all(w.symmetric for w in modules.values()),
        "lm_head": HEAD in modules,
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


def _pattern(module: str) -> str:
    parent, dot, leaf = module.rpartition(".")
    # Engines that fuse these layers look up the fused name only.
    leaves = f"({re.escape(leaf)}|{FUSED[leaf]})" if leaf in FUSED else re.escape(leaf)
    return f"^{re.escape(parent + dot)}{leaves}$"
