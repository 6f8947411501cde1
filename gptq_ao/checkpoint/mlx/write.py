"""A quantized model as an MLX checkpoint: the config that mlx-lm reads, and what the format cannot hold.

It has the setting of most weights, and under a module's name another one, or `false`: it is dense.
"""

from collections import Counter
from typing import Any

from gptq_ao.checkpoint.exchange.hub_names import ExportedModel, refuse
from gptq_ao.checkpoint.mlx.experts import EXPERTS
from gptq_ao.checkpoint.mlx.tensors import SIZES, biases_moved, written_size
from gptq_ao.errors import CheckpointError
from gptq_ao.tensor import GroupTensor

__all__ = ["mlx_config_of"]


def mlx_config_of(model: ExportedModel) -> dict[str, Any]:
    """The settings. They have no "quant_method": transformers stops there, where it would go on with random weights if
    it met a method that it does not know.

    Raises:
        CheckpointError: nothing is quantized, or the format cannot hold a weight.
    """
    refuse(model.modules, _why_not, "mlx")
    own: dict[str, dict[str, Any] | bool] = {EXPERTS.name(module): False for module in model.plain}
    for module, weight in model.modules.items():
        setting = {"group_size": written_size(weight), "bits": weight.bits}
        if own.setdefault(EXPERTS.name(module), setting) != setting:
            raise CheckpointError(
                f"'mlx' cannot hold the weight of {module!r}: the experts of a layer are one tensor there, and others "
                "have other settings. Quantize all experts of a layer alike"
            )
    counts = Counter(tuple(setting.items()) for setting in own.values() if isinstance(setting, dict))
    usual = dict(counts.most_common(1)[0][0])
    return {**usual, "mode": "affine", **{module: setting for module, setting in own.items() if setting != usual}}


def _why_not(weight: GroupTensor) -> str | None:
    if written_size(weight) is None:
        order = "its columns are in activation order" if weight.perm is not None else f"groups of {weight.group_size}"
        sizes = ", ".join(map(str, sorted(SIZES)))
        return f"{order}, {weight.in_features} input features: MLX has groups of {sizes} neighbouring input features"
    if biases_moved(weight) == float("inf"):
        return "an offset, zero_point·scale, is larger than fp16 can be"
    return None
