"""A quantized model as a compressed-tensors checkpoint: the least config that its readers accept.

The scheme of most weights targets "Linear", and the output head by its name, as it is no linear layer in engines; the
others come before it, with the names of their modules. Linear layers that are not quantized are listed under `ignore`.
Layers that engines fuse are named as such too, since not all of them know what they have fused. `actorder` is left out:
older readers refuse its newer values, and it means nothing to a weight whose columns are in their natural order.
"""

import re
from collections import Counter
from typing import Any

from gptq_ao.checkpoint.exchange.engine_names import HEAD, expert_stack, wholes
from gptq_ao.checkpoint.exchange.hub_names import ExportedModel, refuse
from gptq_ao.tensor import GroupTensor

__all__ = ["compressed_config_of"]

Setting = tuple[int, bool, int]  # bits, symmetric, group size (−1: one scale per row)


def compressed_config_of(model: ExportedModel) -> dict[str, Any]:
    """The quantization_config.

    Raises:
        CheckpointError: nothing is quantized, or the format cannot hold a weight.
    """
    refuse(model.modules, _why_not, "compressed-tensors")
    # A single group is a row, which the format calls a channel.
    sizes, weights = model.group_sizes, model.modules
    quantized = {module: (w.bits, w.symmetric, sizes[module]) for module, w in weights.items()}
    usual = Counter(quantized.values()).most_common(1)[0][0]
    settings: dict[str, Setting | None] = {**dict.fromkeys(model.plain), **quantized}
    whole = wholes(settings)
    # Experts are looked for one by one.
    settings |= {name: setting for name, setting in whole.items() if expert_stack(name) is None}
    several = len(set(quantized.values())) > 1
    targets: dict[Setting, dict[str, None]] = {}
    for module, setting in settings.items():
        stack = expert_stack(module)
        # transformers takes the first scheme for that of the experts, unless a pattern names some.
        pattern = rf"re:^{re.escape(stack)}\." if several and stack is not None and stack in whole else None
        if setting is not None and (setting != usual or pattern is not None):
            targets.setdefault(setting, {})[pattern or module] = None
    heads = [module for module in quantized if quantized[module] == usual and module.rpartition(".")[2] == HEAD]
    # Inserted last, so that it comes after the schemes with names.
    targets[usual] = dict.fromkeys(["Linear", *heads, *targets.pop(usual, {})])
    schemes = {f"group_{i}": _scheme(setting, list(names)) for i, (setting, names) in enumerate(targets.items())}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [module for module, setting in settings.items() if setting is None],
        "config_groups": schemes,
    }


def _scheme(setting: Setting, targets: list[str]) -> dict[str, Any]:
    bits, sym, size = setting
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": sym, "dynamic": False}
    weights |= {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
    return {"targets": targets, "weights": weights}


def _why_not(weight: GroupTensor) -> str | None:
    if weight.perm is not None:
        return (
            "its columns are in activation order, which readers of compressed-tensors no longer know: quantize with "
            'act_order="group_aware", or write gptq'
        )
    return None
