"""Weights for models that transformers spreads over processes (`tp_plan="auto"`, `DistributedConfig`)."""

import math
from typing import Any

from torch import Tensor

from gptq_ao.errors import CheckpointError
from gptq_ao.tensor import GroupTensor
from gptq_ao.tensor.sharding import why_uncut

__all__ = ["part_of"]


def part_of(model: Any, name: str, whole: Tensor) -> Tensor:
    """This rank's part of the parameter `name`, which was read whole; or all of it, if it is not spread.

    Raises:
        CheckpointError: a quantized weight cannot be cut so and stay packed; on every rank alike.
    """
    # Only transformers' own models are spread, and then torch.distributed is imported already.
    place = model.get_parameter_or_buffer(name)
    if not hasattr(place, "placements"):
        return whole
    from transformers.distributed.sharding_utils import DtensorShardOperation

    if isinstance(whole, GroupTensor):
        for dim in range(whole.dim()):
            parts = _parts(place, dim)
            if (why := why_uncut(whole, dim, parts)) is not None:
                raise CheckpointError(
                    f"{name!r}, {whole!r}, cannot be cut into {parts} parts along dimension {dim} and stay packed: "
                    f"{why}. Load the model on another number of processes"
                )
    part: Tensor = DtensorShardOperation(place).shard_tensor(whole)
    return part.contiguous()


def _parts(place: Any, dim: int) -> int:
    """How many pieces a dimension is cut into, over all dimensions of the mesh; a fused weight's parts are cut each."""
    cuts = [(i, p) for i, p in enumerate(place.placements) if getattr(p, "dim", None) in (dim, dim - place.dim())]
    return math.prod(place.device_mesh.size(i) * getattr(p, "split_factor", 1) for i, p in cuts)
