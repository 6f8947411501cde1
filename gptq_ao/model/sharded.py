"""Models whose parameters are not theirs alone: each process has a part of them, or torch.distributed manages them."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from gptq_ao.errors import ConfigError
from gptq_ao.model.parts import is_in_parts

__all__ = ["check_gatherable", "check_whole", "own_class", "shard_in"]

_PART = ", of which each process has a part"
_GATHER = (
    "gather its values into a model that is not: "
    "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True"
)


def shard_in(model: nn.Module) -> str | None:
    """What shows that a model is sharded over processes (FSDP, tensor parallelism, ZeRO-3) or made by `replicate`, in
    words; None if it is not."""
    return next((what for what, _ in _shards(model)), None)


def check_whole(model: nn.Module) -> None:
    """
    Raises:
        ConfigError: the model is sharded over processes, or made by `replicate`.
    """
    shard, gatherable = next(_shards(model), (None, False))
    if shard is not None:
        together = " If all processes quantize it together, pass distributed=True to quantize_: it stays sharded."
        raise ConfigError(
            f"{shard}. Quantize the model first, then prepare it for several processes (fully_shard, FSDP, tensor "
            f"parallelism).{together if gatherable else ''} To quantize one that is prepared already, {_GATHER}"
        )


def check_gatherable(model: nn.Module, ranks: Collection[int]) -> None:
    """
    Args:
        ranks: global numbers of the processes that quantize together.

    Raises:
        ConfigError: the parameters are not those of FSDP2 or DTensors, or in parts of other processes too.
    """
    refused = next((what for what, gatherable in _shards(model) if not gatherable), None)
    if refused is not None:
        raise ConfigError(
            f"{refused}. Only a model of fully_shard (FSDP2), or of DTensors (tensor parallelism), is quantized as it "
            f"is. Quantize the model first, then prepare it for several processes; or {_GATHER}"
        )
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if not is_in_parts(t):
            continue
        part: Any = t
        mesh, placements = part.device_mesh, part.placements
        others = sorted(set(mesh.mesh.flatten().tolist()) - set(ranks))
        if others or mesh.get_coordinate() is None:
            raise ConfigError(
                f"{name!r} has parts on the ranks {sorted(mesh.mesh.flatten().tolist())}, and those that quantize "
                f"together are {sorted(ranks)}: all that have a part have to take part, with distributed=True or "
                "their process_group"
            )
        if any(p.is_partial() for p in placements):
            raise ConfigError(f"{name!r} is in parts that are yet to be added up, {placements}: redistribute it first")
        if t.is_meta:
            raise ConfigError(f"{name!r} is on the meta device, it has no values: load the weights first")


def own_class(model: nn.Module) -> type:
    """Without what `fully_shard` makes of it."""
    return next(c for c in type(model).__mro__ if not c.__module__.startswith("torch.distributed."))


def _shards(model: nn.Module) -> Iterator[tuple[str, bool]]:
    """What shows it, in words, and whether FSDP2 or DTensor made it so: then it can be gathered, weight by weight."""
    for name, t in _parts(model):
        home = next((c.__module__ for c in type(t).__mro__ if c.__module__.startswith("torch.distributed.")), "")
        what, gatherable = None, False
        if ".fsdp" in home or ".tensor" in home:
            what = f"{type(t).__name__}{_PART}"
            gatherable = "._fully_shard" in home or (isinstance(t, torch.Tensor) and is_in_parts(t))
        # With `use_orig_params`, FSDP's parameters are plain ones, with a mark.
        elif getattr(t, "_fsdp_flattened", False):
            what = f"parameter of FSDP{_PART}"
        # DeepSpeed leaves empty parameters, with this attribute. It may be missing.
        elif hasattr(t, "ds_tensor"):
            what = f"parameter of ZeRO-3{_PART}"
        elif home.endswith(".replicate"):
            what = f"{type(t).__name__}, made by `replicate`, which keeps the parameters that it found"
        if what is not None:
            yield (f"{name!r} is a {what}" if name else f"the model is a {what}"), gatherable


def _parts(model: nn.Module) -> Iterator[tuple[str, object]]:
    yield from model.named_modules()
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
