"""The model inside of wrappers: what is quantized, and what the names in a checkpoint are those of.

A wrapper puts a name of its own before, or into, the names of the parameters. Files with such names fit no model:
transformers would load random weights from them.
"""

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gptq_ao.errors import CheckpointError
from gptq_ao.model.sharded import check_whole, shard_in

__all__ = ["is_hf_model", "same_forward", "unwrapped"]

# Where wrappers have the module: torch.compile, checkpoint_wrapper and offload_wrapper, Lightning Fabric. By
# name, since their classes take long to import, or may be missing.
_INSIDE = ("_orig_mod", "_checkpoint_wrapped_module", "_forward_module")


def same_forward(model: nn.Module, *, whole: bool = True) -> nn.Module:
    """The model without wrappers, wherever in it they are, that take the same arguments as what is inside:
    torch.compile, checkpoint_wrapper, DataParallel, DistributedDataParallel, Fabric.setup. Modules are shared with the
    model, which stays as it is; those around a wrapper are copies.

    Raises:
        ConfigError: it is sharded over processes, see `check_whole`; not asked for if it need not be `whole`.
    """
    if whole:
        check_whole(model)
    return _bare(model, {})


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that a checkpoint holds: `same_forward`, and without what is around a Hugging Face model, if that
    has no parameter or buffer of its own.

    Raises:
        CheckpointError: the parameters are not those of a model alone: it has adapters, is sharded over processes, or
            is around a Hugging Face model and has parameters of its own.
    """
    bare = _bare(model, {})
    _refuse_adapters(bare)
    _refuse_shards(bare)
    inside = next((m for m in bare.modules() if is_hf_model(m)), None)
    if inside is None or inside is bare:
        return bare
    own = next((n for n, t in _tensors(bare) if id(t) not in {id(t) for _, t in _tensors(inside)}), None)
    if own is None:
        return inside
    # Without a config it is like any module of torch. With one, its files would pass for those of the model inside.
    if hasattr(getattr(bare, "config", None), "save_pretrained"):
        raise CheckpointError(
            f"the {type(bare).__name__} has the config of the {type(inside).__name__} inside of it, and parameters of "
            f"its own, such as {own!r}, that no loader would find: save the {type(inside).__name__}"
        )
    return bare


def is_hf_model(module: nn.Module) -> bool:
    """Whether transformers can build such a model from a config. Wrappers often have a `config` too."""
    return hasattr(type(module), "_from_config")


def _bare(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    while (inside := _inside(module)) is not None:
        module = inside
    if id(module) not in done:
        done[id(module)] = module  # a module may contain itself
        children = {name: None if m is None else _bare(m, done) for name, m in module._modules.items()}
        if any(m is not module._modules[name] for name, m in children.items()):
            # Not `copy.copy`: of its modules, FSDP2 makes new ones instead.
            done[id(module)] = same = object.__new__(type(module))
            vars(same).update(vars(module), _modules=children)
    return done[id(module)]


def _inside(wrapper: nn.Module) -> nn.Module | None:
    """What a module is around; None if it is no wrapper."""
    if isinstance(wrapper, DataParallel | DistributedDataParallel):
        return wrapper.module
    if _is_empty_adapter(wrapper):
        return wrapper._modules["base_layer"]
    return next((m for name, m in wrapper._modules.items() if name in _INSIDE), None)


def _is_peft(module: nn.Module) -> bool:
    return any(c.__module__.split(".")[0] == "peft" for c in type(module).__mro__)


def _is_empty_adapter(module: nn.Module) -> bool:
    """What is left of a layer of PEFT whose adapters were deleted."""
    names = getattr(module, "adapter_layer_names", ())
    return _is_peft(module) and "base_layer" in module._modules and not any(len(getattr(module, n, ())) for n in names)


def _refuse_adapters(model: nn.Module) -> None:
    found = next(((name, m) for name, m in model.named_modules() if _is_peft(m)), None)
    if found is not None:
        name, module = found
        what = f"{name!r} is a {type(module).__name__}" if name else f"the model is a {type(module).__name__}"
        raise CheckpointError(
            f"{what}: with the layers of an adapter in between, no loader would find the weights. Save the adapter by "
            "itself (its own `save_pretrained`), and the model without it: after `model = model.unload()` of a "
            "PeftModel, or `model.delete_adapter(name)` of a model of transformers. To have the adapter in the "
            "weights, merge it before they are quantized (`merge_and_unload`)"
        )


def _refuse_shards(model: nn.Module) -> None:
    shard = shard_in(model)
    if shard is not None:
        raise CheckpointError(
            f"{shard}: gather the values first, into a model that is not sharded "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)"
        )


def _tensors(module: nn.Module) -> Iterator[tuple[str, object]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
