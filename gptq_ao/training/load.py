"""A full state dict, which may be on one rank only, into a model that is spread over several."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gptq_ao.errors import CheckpointError
from gptq_ao.tensor import GroupTensor

__all__ = ["kinds_of", "load_full_state_dict", "parts_of", "quantized"]


@torch.no_grad()
def load_full_state_dict(model: nn.Module, state: dict[str, Any], *, from_rank0: bool = False) -> None:
    """Copy every parameter and buffer of `state` into `model`: whole, or this rank's part of it.

    One tensor at a time is whole on each rank.

    Args:
        model: as it trains: under FSDP2, tensor parallelism, both or neither; not on meta (`model.to_empty(device=…)`).
        state: of the model before it was spread over ranks, by the same names.
        from_rank0: whether only rank 0 has it, and the others give {}. Every rank has to call this then.

    Raises:
        CheckpointError: names, shapes or kinds differ, or the model is on meta; on every rank, and nothing was changed.
    """
    own = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    given = state if not from_rank0 or dist.get_rank() == 0 else {}
    kinds = kinds_of(given, from_rank0=from_rank0)
    missing, unknown = sorted(own.keys() - kinds.keys()), sorted(kinds.keys() - own.keys())
    if missing or unknown:
        raise CheckpointError(f"the state dict is not that of the model: it lacks {missing[:5]}, and has {unknown[:5]}")
    for name, target in own.items():
        if _local(target).is_meta:
            raise CheckpointError(f"{name!r} is on meta: make room for the model first, by model.to_empty(device=…)")
    for name, part in parts_of(own, given, kinds, from_rank0=from_rank0):
        _local(own[name]).copy_(part)


def kinds_of(state: dict[str, Any], *, from_rank0: bool) -> dict[str, tuple[Any, ...]]:
    """All that must be known of each tensor to make an empty one like it: on each rank that of rank 0, if asked for."""
    sent = [{name: _kind(t) for name, t in state.items() if isinstance(t, Tensor)}]
    if from_rank0:
        dist.broadcast_object_list(sent, 0)
    return sent[0]


def parts_of(
    own: dict[str, Any], given: dict[str, Any], kinds: dict[str, tuple[Any, ...]], *, from_rank0: bool
) -> Iterator[tuple[str, Tensor]]:
    """Name by name, this rank's part of the tensors that `kinds` are of, cut as those of `own`, the model's, are.

    Raises:
        CheckpointError: a kind is not that of the model; before any tensor travels.
    """
    for name, (cls, shape, *_) in kinds.items():
        mine = type(_local(own[name])) if quantized(own[name]) else torch.Tensor
        if (mine, tuple(own[name].shape)) != (cls, shape):
            here = f"a {mine.__name__} {tuple(own[name].shape)}"
            raise CheckpointError(f"{name!r} is {here} in the model, and a {cls.__name__} {shape} in the state dict")
    for name, kind in kinds.items():
        # A part that FSDP keeps on the host may only travel between GPUs.
        mesh, device = getattr(own[name], "device_mesh", None), own[name].device
        if mesh is not None or device.type == "meta":
            device = torch.device(mesh.device_type if mesh else dist.distributed_c10d._get_pg_default_device())
        whole = given[name].detach().to(device).contiguous() if name in given else _empty(kind, device)
        if from_rank0:
            dist.broadcast(whole, 0)
        yield name, _part(whole, own[name])


def quantized(tensor: Any) -> bool:
    """Whether a tensor is a quantized weight, or a part of one."""
    return isinstance(getattr(tensor, "_local_tensor", tensor), GroupTensor)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    if not isinstance(tensor, GroupTensor):
        return torch.Tensor, tuple(tensor.shape), tensor.dtype
    names, attributes = tensor.__tensor_flatten__()
    parts = {n: (tuple(getattr(tensor, n).shape), getattr(tensor, n).dtype) for n in names}
    return type(tensor), tuple(tensor.shape), tensor.dtype, parts, attributes


def _empty(kind: tuple[Any, ...], device: torch.device) -> Tensor:
    cls, shape, dtype, *packed = kind
    if not packed:
        return torch.empty(shape, dtype=dtype, device=device)
    parts, attributes = packed
    inner = {n: torch.empty(size, dtype=of, device=device) for n, (size, of) in parts.items()}
    weight: Tensor = cls.__tensor_unflatten__(inner, attributes, None, None)
    return weight


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _part(whole: Any, target: Tensor) -> Tensor:
    """What `target`, a parameter or buffer of the model, has of a whole tensor."""
    if not isinstance(target, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    part: Tensor = whole[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))]
    return part
