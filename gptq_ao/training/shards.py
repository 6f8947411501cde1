"""Which weights can be cut for several processes."""

from torch import nn

from gptq_ao.tensor import GroupTensor
from gptq_ao.tensor.sharding import why_uncut

__all__ = ["unshardable"]


def unshardable(model: nn.Module, ranks: int) -> set[nn.Parameter]:
    """The quantized weights that FSDP2 cannot cut into one part for each of `ranks`, which are to stay whole:

        fully_shard(model, ignored_params=unshardable(model, ranks))

    A part has whole tiles of 16 output features (whole matrices of a stack), in the order in which they are stored.
    """
    return {p for p in model.parameters() if _is_uncut(getattr(p, "_local_tensor", p), ranks)}


def _is_uncut(weight: object, ranks: int) -> bool:
    # FSDP cuts dimension 0, and refuses what is not contiguous: transposed weights.
    return isinstance(weight, GroupTensor) and (weight.transposed or why_uncut(weight, 0, ranks) is not None)
