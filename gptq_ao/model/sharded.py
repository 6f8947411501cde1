"""Models whose parameters are not theirs alone: each process has a part of them, or torch.distributed manages them."""

from collections.abc import Iterator

from torch import nn

from gptq_ao.errors import ConfigError

__all__ = ["check_whole", "shard_in"]

_PART = ", of which each process has a part"


def shard_in(model: nn.Module) -> str | None:
    """What shows that a model is sharded over processes (FSDP, tensor parallelism, ZeRO-3) or made by `replicate`, in
    words; None if it is not."""
    for name, t in _parts(model):
        home = next((c.__module__ for c in type(t).__mro__ if c.__module__.startswith("torch.distributed.")), "")
        what = None
        if ".fsdp" in home or ".tensor" in home:
            what = f"{type(t).__name__}{_PART}"
        # With `use_orig_params`, FSDP's parameters are plain ones, with a mark.
        elif getattr(t, "_fsdp_flattened", False):
            what = f"parameter of FSDP{_PART}"
        # DeepSpeed leaves empty parameters, with this attribute. It may be missing.
        elif hasattr(t, "ds_tensor"):
            what = f"parameter of ZeRO-3{_PART}"
        elif home.endswith(".replicate"):
            what = f"{type(t).__name__}, made by `replicate`, which keeps the parameters that it found"
        if what is not None:
            return f"{name!r} is a {what}" if name else f"the model is a {what}"
    return None


def check_whole(model: nn.Module) -> None:
    """
    Raises:
        ConfigError: the model is sharded over processes, or made by `replicate`.
    """
    shard = shard_in(model)
    if shard is not None:
        raise ConfigError(
            f"{shard}. Quantize the model first, then prepare it for several processes (fully_shard, FSDP, tensor "
            "parallelism). To quantize one that is prepared already, gather its values into a model that is not: "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True"
        )


def _parts(model: nn.Module) -> Iterator[tuple[str, object]]:
    yield from model.named_modules()
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
