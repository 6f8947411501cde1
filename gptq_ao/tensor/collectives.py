"""Quantized weights between processes: what torch does with a tensor is done with each of its parts.

The work is waited for at once: a handler returns one handle, and there are several parts.
"""

from typing import Any

import torch
from torch import Tensor

from gptq_ao.codes.tiles import TILE_ROWS
from gptq_ao.errors import ConfigError
from gptq_ao.tensor.group_tensor import GroupTensor
from gptq_ao.tensor.sharding import written
from gptq_ao.tensor.table import implements

_c10d, _functional = torch.ops.c10d, torch.ops._c10d_functional


@implements([_c10d.broadcast_.default])
def broadcast_(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """`dist.broadcast(weight, src)`: the codes of one rank on all."""
    (weight,), *rest = args
    for name in weight.__tensor_flatten__()[0]:
        done = func([getattr(weight, name)], *rest, **kwargs)[1]
        done.wait()
    written(weight)
    return [weight], done


@implements([_c10d.scatter_.default])
def scatter_(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """`dist.scatter(part, parts, src)`: each rank gets one of the parts that one rank has."""
    (target,), given, *rest = args
    for name in target.__tensor_flatten__()[0]:
        parts = [[getattr(part, name).contiguous() for part in each] for each in given]
        done = func([getattr(target, name)], parts, *rest, **kwargs)[1]
        done.wait()
    written(target)
    return [target], done


@implements([_c10d.allgather_.default])
def allgather_(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """`dist.all_gather(weights, weight)`: every rank's weight on all."""
    (targets,), (weight,), *rest = args
    for name in weight.__tensor_flatten__()[0]:
        done = func([[getattr(t, name) for t in targets]], [getattr(weight, name).contiguous()], *rest, **kwargs)[1]
        done.wait()
    for target in targets:
        written(target)
    return [targets], done


@implements([_functional.all_gather_into_tensor.default])
def all_gather_into_tensor(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """The weights of all ranks, one after the other along the first dimension.

    Raises:
        ConfigError: rows of one would begin within a tile.
    """
    weight, ranks, group = args
    stacked = weight.qdata.dim() > 3
    if weight.transposed or (not stacked and weight.out_features % TILE_ROWS):
        raise ConfigError(
            f"{weight!r} of {ranks} ranks cannot be gathered into one and stay packed: codes lie in tiles of "
            f"{TILE_ROWS} output features"
        )
    inner = {n: _waited(func(t.contiguous(), ranks, group)) for n, t in weight.tiled().items()}
    rows = weight.out_features if stacked else weight.out_features * ranks
    shape = weight.view_shape and (weight.view_shape[0] * ranks, *weight.view_shape[1:])
    return weight.replace(**inner, out_features=rows, view_shape=shape)


def _waited(tensor: Tensor) -> Tensor:
    result: Tensor = _functional.wait_tensor.default(tensor)
    return result


@implements([_functional.wait_tensor.default])
def wait_tensor(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """What a collective has returned, once it is there: it is, see above."""
    weight: Tensor = args[0]
    return weight


# Registered by a file of torch that is imported late.
GroupTensor.implemented_by_name["_c10d_functional::_wrap_tensor_autograd"] = wait_tensor
