"""A quantized model as a compressed-tensors checkpoint: the least config that its readers accept.

The scheme of most weights targets "Linear"; the others come before it, with the names of their modules. Linear layers
that are not quantized are listed under `ignore`. `actorder` is left out: older readers refuse its newer values, and it
means nothing to a weight whose columns are in their natural order.
"""

from collections import Counter
from typing import Any

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
    settings = {module: _setting(w) for module, w in model.modules.items()}
    usual = Counter(settings.values()).most_common(1)[0][0]
    targets: dict[Setting, list[str]] = {}
    for module, setting in settings.items():
        if setting != usual:
            targets.setdefault(setting, []).append(module)
    # Inserted last, so that it comes after the schemes with names.
    targets[usual] = ["Linear"]
    schemes = {f"group_{i}": _scheme(setting, names) for i, (setting, names) in enumerate(targets.items())}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(model.plain),
        "config_groups": schemes,
    }


def _scheme(setting: Setting, targets: list[str]) -> dict[str, Any]:
    bits, sym, size = setting
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": sym, "dynamic": False}
    weights |= {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
    return {"targets": targets, "weights": weights}


def _setting(weight: GroupTensor) -> Setting:
    # A single group is a row, which the format calls a channel.
    size = -1 if weight.group_size == weight.in_features else weight.group_size
    return weight.bits, weight.symmetric, size


def _why_not(weight: GroupTensor) -> str | None:
    if weight.perm is not None:
        return (
            "its columns are in activation order, which readers of compressed-tensors no longer know: quantize with "
            'act_order="group_aware", or write gptq'
        )
    return None
