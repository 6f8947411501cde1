"""Put a new tensor in place of a parameter of the original module.

Invariant: every name under which the parameter was registered (tied weights, shared modules) leads to the one new
parameter; nothing else in the model is touched.
"""

from torch import Tensor, nn

from gptq_ao.errors import PassError

__all__ = ["replace_parameter"]


def replace_parameter(model: nn.Module, name: str, value: Tensor) -> tuple[str, ...]:
    """Replace the parameter `name` by `value`, which will not require gradients. Returns all names it has."""
    old = model.get_parameter(name)
    new = nn.Parameter(value, requires_grad=False)
    replaced = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module._parameters.items():
            if parameter is old or parameter is new:
                module._parameters[leaf] = new
                replaced.append(f"{prefix}.{leaf}" if prefix else leaf)
    if name not in replaced or new.shape != old.shape or new.dtype != old.dtype:
        raise PassError(f"{name}: {old.dtype} {tuple(old.shape)} became {new.dtype} {tuple(new.shape)}")
    return tuple(replaced)
