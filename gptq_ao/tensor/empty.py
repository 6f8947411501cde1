"""Weights without values, to be filled by `copy_`, by a checkpoint, or by other ranks."""

from typing import Any

import torch
from torch import Tensor

from gptq_ao.codes.tiles import TILE_ROWS
from gptq_ao.tensor.group_tensor import GroupTensor
from gptq_ao.tensor.sharding import axis_of, called_from, refuse_place, remember_source
from gptq_ao.tensor.table import aten, implements
from gptq_ao.tensor.values import on_values


@implements([aten.empty_like.default])
def empty_like(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """A weight of the same kind and shape, on any device (`to_empty`)."""
    weight = args[0]
    device, dtype = kwargs.get("device") or weight.device, kwargs.get("dtype") or weight.dtype
    inner = {n: torch.empty_like(t, device=device) for n, t in weight.tiled().items()}
    return weight.replace(**inner, perm=_order(weight, device), dtype=dtype)


@implements([aten.new_empty.default, aten.new_zeros.default])
def new_rows(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """A weight of the same kind with another number of rows, or of matrices in a stack; any other shape is dense.

    Raises:
        ConfigError: FSDP2 makes room for parts that are cut along another dimension than the first (`refuse_place`).
    """
    weight, size = args
    of_fsdp = called_from("torch.distributed.fsdp.")
    if of_fsdp:
        refuse_place(weight, size)
    alike = len(size) == weight.dim() and 0 not in size and not weight.transposed
    # At most one dimension may differ, and it must be one that tiles can be added to.
    axes = {axis_of(weight, d) for d, n in enumerate(size) if n != weight.shape[d]} if alike else {"columns"}
    if axes not in (set(), {"rows"}, {"stack"}):
        return on_values(GroupTensor, func, args, kwargs)
    rows = size[0 if weight.view_shape is not None else -2] if axes == {"rows"} else weight.out_features
    lead = () if weight.view_shape is not None else tuple(size[:-2])
    device = kwargs.get("device") or weight.device
    inner = {
        n: func(t, (*lead, -(-rows // TILE_ROWS), *t.shape[-2:]), device=device) for n, t in weight.tiled().items()
    }
    view_shape = weight.view_shape and tuple(size)
    dtype = kwargs.get("dtype") or weight.dtype
    new = weight.replace(**inner, perm=_order(weight, device), out_features=rows, dtype=dtype, view_shape=view_shape)
    if of_fsdp:  # it copies this rank's part of `weight` into the new one
        remember_source(new, weight)
    return new


def _order(weight: GroupTensor, device: torch.device) -> Tensor | None:
    """An order of columns to be overwritten, which kernels can already follow: numbers that were nowhere would be read
    as addresses."""
    if weight.perm is None:
        return None
    return torch.arange(weight.in_features, dtype=torch.int32, device=device)
