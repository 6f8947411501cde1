"""Quantized weights between processes: what torch does with a tensor is done with each of its parts.

The work is waited for at once: a handler returns one handle, and there are several parts.
"""

from typing import Any

import torch
import torch.distributed as dist
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
        done = _done(func, [getattr(weight, name)], *rest, **kwargs)
    written(weight)
    return [weight], done


@implements([_c10d.scatter_.default])
def scatter_(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """`dist.scatter(part, parts, src)`: each rank gets one of the parts that one rank has."""
    (target,), given, *rest = args
    for name in target.__tensor_flatten__()[0]:
        parts = [[getattr(part, name).contiguous() for part in each] for each in given]
        done = _done(func, [getattr(target, name)], parts, *rest, **kwargs)
    written(target)
    return [target], done


@implements([_c10d.allgather_.default])
def allgather_(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """`dist.all_gather(weights, weight)`: every rank's weight on all."""
    (targets,), (weight,), *rest = args
    for name in weight.__tensor_flatten__()[0]:
        done = _done(func, [[getattr(t, name) for t in targets]], [getattr(weight, name).contiguous()], *rest, **kwargs)
    for target in targets:
        written(target)
    return [targets], done


def _done(func: Any, *args: Any, **kwargs: Any) -> Any:
    """The handle of a collective that is over."""
    names = (argument.name for argument in func._schema.arguments)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    # Otherwise NCCL gives a handle that refers to nothing, and waiting for it ends the process.
    done = func(**{**given, "async_op": True})[1]
    done.wait()
    return done


@implements([_functional.all_gather_into_tensor.default])
def all_gather_into_tensor(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """The weights of all ranks, one after the other along the first dimension.

    Raises:
        ConfigError: rows of one would begin within a tile.
    """
    weight, ranks, group = args
    stacked = weight.qdata.dim() > 3
    if not stacked and (weight.transposed or weight.out_features % TILE_ROWS):
        raise ConfigError(
            f"{weight!r} of {ranks} ranks cannot be gathered into one and stay packed: codes lie in tiles of "
            f"{TILE_ROWS} output features"
        )
    inner = {n: _waited(func(t.contiguous(), ranks, group)) for n, t in weight.tiled().items()}
    rows = weight.out_features if stacked else weight.out_features * ranks
    shape = weight.view_shape and (weight.view_shape[0] * ranks, *weight.view_shape[1:])
    return weight.replace(**inner, out_features=rows, view_shape=shape)


def shard_dim_alltoall(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """The whole weight, of which ranks have parts along one dimension, cut along another: this rank's part.

    Raises:
        ConfigError: the new parts would begin within a tile or group.
    """
    weight, joined, cut, group = args
    if not isinstance(group, dist.ProcessGroup):
        group = dist.distributed_c10d._resolve_process_group(group)
    parts = [torch.empty_like(weight) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, weight, group=group)
    return torch.cat(parts, joined).chunk(len(parts), cut)[dist.get_rank(group)].contiguous()


def _waited(tensor: Tensor) -> Tensor:
    result: Tensor = _functional.wait_tensor.default(tensor)
    return result


@implements([_functional.wait_tensor.default])
def wait_tensor(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """What a collective has returned, once it is there: it is, see above."""
    weight: Tensor = args[0]
    return weight


# Registered by files of torch that are imported late.
GroupTensor.implemented_by_name["_dtensor::shard_dim_alltoall"] = shard_dim_alltoall
GroupTensor.implemented_by_name["_c10d_functional::_wrap_tensor_autograd"] = wait_tensor
