"""A quantized model as an AWQ checkpoint: `quantization_config`, and what the format cannot hold.

It has one setting for all weights. What is not quantized is listed under `modules_to_not_convert`, and readers take for
such every module whose name contains one of these.
"""

from typing import Any

from gptq_ao.checkpoint.awq.tensors import AWQ_BITS, PER_WORD
from gptq_ao.checkpoint.exchange.hub_names import ExportedModel, refuse
from gptq_ao.errors import CheckpointError
from gptq_ao.tensor import GroupTensor

__all__ = ["awq_config_of"]


def awq_config_of(model: ExportedModel) -> dict[str, Any]:
    """The quantization_config.

    Raises:
        CheckpointError: nothing is quantized, or the format cannot hold a weight.
    """
    modules = model.modules
    rows = all(w.group_size == w.in_features for w in modules.values())
    sizes = {w.group_size for w in modules.values()}
    # One group per row is one setting, even if rows have different sizes.
    sizes = {-1} if rows and len(sizes) > 1 else sizes
    refuse(modules, lambda w: _why_not(w, sizes), "awq")
    for plain in model.plain:
        within = next((m for m in modules if plain in m), None)
        if within is not None:
            raise CheckpointError(
                f"'awq' cannot hold the weight of {within!r}: {plain!r} is not quantized, and readers of AWQ take "
                "every module whose name contains that for such. Write gptq_v2 or compressed-tensors"
            )
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": AWQ_BITS,
        "group_size": sizes.pop(),
        "zero_point": True,
        "modules_to_not_convert": list(model.plain),
    }


def _why_not(weight: GroupTensor, sizes: set[int]) -> str | None:
    if weight.bits != AWQ_BITS:
        return f"it has {weight.bits} bits, and AWQ {AWQ_BITS}"
    if weight.perm is not None:
        return "its columns are in activation order, which AWQ does not know: write gptq"
    if weight.out_features % PER_WORD:
        return f"it has {weight.out_features} output features, and AWQ needs multiples of {PER_WORD}"
    if len(sizes) > 1:
        return f"AWQ has one group size for all weights, and these have {sorted(sizes)}"
    return None
