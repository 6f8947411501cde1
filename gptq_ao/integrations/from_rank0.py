"""State dicts that rank 0 sends to the others, who make room for a dense tensor of each one's shape before it comes."""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch.distributed.tensor import DTensor

from gptq_ao.training.load import kinds_of, parts_of, quantized

__all__ = ["register_with_accelerate", "register_with_torch"]


def register_with_torch() -> None:
    """`set_model_state_dict(…, broadcast_from_rank0=True)` sends codes.

    Its `CheckpointError`, of a weight that is quantized only in the model or only in the state dict, is on every rank.
    """
    module: Any = import_module("torch.distributed.checkpoint.state_dict")
    # Torch's own business, which may have another name some day.
    if hasattr(module, "_broadcast_state_dict"):
        module._broadcast_state_dict = _codes_first(module._broadcast_state_dict)


def register_with_accelerate() -> None:
    """So does `accelerator.prepare` with `cpu_ram_efficient_loading`."""
    module: Any = import_module("accelerate.utils.fsdp_utils")
    if hasattr(module, "fsdp2_load_full_state_dict"):
        module.fsdp2_load_full_state_dict = _by_torch(module.fsdp2_load_full_state_dict)


def _codes_first(own: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(own)
    def broadcast(full: dict[str, Any], local: dict[str, Any], device: Any, *args: Any, **kwargs: Any) -> None:
        # What is given is only known to rank 0. All find the same error, before any waits for a tensor.
        ours = {n: t for n, t in full.items() if n in local and (quantized(t) or quantized(local[n]))}
        kinds = kinds_of(ours, from_rank0=True)
        parts = {n: _like(part, local[n], device) for n, part in parts_of(local, ours, kinds, from_rank0=True)}
        rest = {name: t for name, t in local.items() if name not in parts}
        own({n: t for n, t in full.items() if n not in parts and not quantized(t)}, rest, device, *args, **kwargs)
        local.clear()
        local.update(parts | rest)

    return broadcast


def _like(part: Any, place: Any, device: Any) -> Any:
    part = part.clone().to(device)
    if not isinstance(place, DTensor):
        return part
    mesh, placements = place.device_mesh, place.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=place.shape, stride=place.stride())


def _by_torch(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def load(accelerator: Any, model: Any, full: dict[str, Any], cpu_offload: bool = False, **kwargs: Any) -> Any:
        if not any(map(quantized, model.parameters())):
            return own(accelerator, model, full, cpu_offload=cpu_offload, **kwargs)
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=cpu_offload)
        set_model_state_dict(model, full, options=options)
        return model

    return load
