"""Which parameters of a model belong to adapters: they are trained, and stay as they are."""

from torch import nn

__all__ = ["adapter_names"]

# What a layer of PEFT puts its adapters around, or trains a copy of.
_AROUND = {"base_layer", "original_module"}


def adapter_names(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that layers of PEFT have beside what they are around, whatever the method."""
    names: set[str] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        # All layers of PEFT say by this where their adapters are; not by which of them have matrices.
        if hasattr(module, "adapter_layer_names"):
            inside = (name for name, _ in module.named_parameters(remove_duplicate=False))
            names |= {f"{prefix}.{n}".removeprefix(".") for n in inside if not _AROUND & set(n.split("."))}
    return frozenset(names)
