"""Where the pipeline reads and replaces the weights of a model.

A parameter is usually where its module says. In a model that accelerate has dispatched (`device_map="auto"`,
`cpu_offload`, `disk_offload`) the modules' parameters are on the meta device, and hooks bring the values in for each
forward.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gptq_ao.errors import ConfigError, PassError
from gptq_ao.model.inspection import check_values
from gptq_ao.model.parts import is_in_parts

__all__ = ["ModelWeights", "Weights", "is_offloaded", "offload_hooks", "replace_parameter", "value_in_memory"]


class Weights(Protocol):
    """What the pipeline needs to know of a model's weights, wherever they are.

    Attributes:
        model: the modules; each parameter has its shape and dtype there, perhaps no values.
        device: where the model computes.
    """

    model: nn.Module

    @property
    def device(self) -> torch.device: ...

    def home(self, name: str, *, quantized: bool = False) -> torch.device | None:
        """In which memory a parameter or buffer is kept, or will be when it is quantized; None: in files."""
        ...

    def check(self, names: Iterable[str], result_bytes: Callable[[], int]) -> None:
        """Find what is wrong with the weights to be quantized, before any is.

        Args:
            names: those of the weights.
            result_bytes: what a checkpoint of the quantized model takes, counted when it is called.
        """

    def get(self, name: str, device: torch.device | None = None) -> Tensor:
        """A parameter or buffer, of its shape and dtype, perhaps quantized, on `device`; None: where it is kept."""
        ...

    def replace(self, name: str, new: Tensor) -> None:
        """Put a quantized tensor in place of a parameter of the same shape and dtype, under all its names."""

    def release(self, name: str) -> None:
        """No segment reads the quantized parameter any more."""


class ModelWeights:
    """The weights of a model in memory, offloaded ones included."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def device(self) -> torch.device:
        """Where the model computes, going by its first parameter; on the CPU, if that has no values yet."""
        # An offloaded parameter itself is on meta, so its hook is asked where it computes.
        device = self._execution_device(next(self.model.named_parameters())[0])
        return torch.device("cpu") if device.type == "meta" else device

    def home(self, name: str, *, quantized: bool = False) -> torch.device:
        """See `Weights`. What accelerate offloads counts as in host memory, wherever it is."""
        # A quantized weight is not offloaded again (see `replace`): it stays where it computes.
        device = self._execution_device(name) if quantized else _tensor(self.model, name).device
        return torch.device("cpu") if device.type == "meta" else device

    def check(self, names: Iterable[str], result_bytes: Callable[[], int]) -> None:
        """They have values, all of them finite."""
        check_values((name, self.get(name)) for name in names)

    def get(self, name: str, device: torch.device | None = None) -> Tensor:
        """See `Weights`.

        Raises:
            ConfigError: it is on the meta device, and no hook knows its values.
        """
        value = _tensor(self.model, name)
        if value.device.type == "meta":
            # What accelerate offloads is on meta between two forwards; the hook has a map from names to values.
            _, hook, key = _offloaded(self.model, name)
            if hook is None:
                raise ConfigError(f"{name!r} is on the meta device, it has no values: load the weights first")
            value = hook.weights_map[key].to(dtype=value.dtype)  # as the hook does
        return value.detach().to(device or value.device)

    def replace(self, name: str, new: Tensor) -> None:
        """See `Weights`. The new tensor is put on the device where the old one computes.

        It stays there, as it is small, and with it what else the same hook brought in: usually the bias.
        """
        for each in replace_parameter(self.model, name, new.to(self._execution_device(name))):
            module, hook, _ = _offloaded(self.model, each)
            # Otherwise the hook would put the old values back at the next forward.
            if hook is not None:
                _keep(module, hook)

    def release(self, name: str) -> None:
        """See `Weights`. It stays: it is the result."""

    def _execution_device(self, name: str) -> torch.device:
        value = _tensor(self.model, name)
        if is_in_parts(value) and not value.is_meta:  # FSDP2 may keep its part in host memory
            kind = value.device_mesh.device_type  # type: ignore[attr-defined]
            return value.device if value.device.type == kind else torch.device(kind, torch.cuda.current_device())
        device = value.device
        hook = _offloaded(self.model, name)[1] if device.type == "meta" else None
        return device if hook is None else torch.device(hook.execution_device)


def _tensor(model: nn.Module, name: str) -> Tensor:
    prefix, _, leaf = name.rpartition(".")
    value = getattr(model.get_submodule(prefix), leaf)
    assert isinstance(value, Tensor), name
    return value


def _offloaded(model: nn.Module, name: str) -> tuple[nn.Module, Any, str]:
    """The module whose hook brings in the tensor `name`, the hook, and the tensor's name there; hook None if none does.
    It is the module that has the tensor, or one around it that brings in all its submodules at once."""
    parts = name.split(".")
    # From the tensor's own module outwards.
    for depth in reversed(range(len(parts))):
        module = model.get_submodule(".".join(parts[:depth]))
        for hook in offload_hooks(module):
            # The hook of a module around it counts only if it places submodules too (`place_submodules`).
            if hook.offload and (hook.place_submodules or depth == len(parts) - 1):
                return module, hook, ".".join(parts[depth:])
    return model, None, name


def value_in_memory(model: nn.Module, name: str) -> Tensor | None:
    """What a hook has in memory for a parameter or buffer on the meta device; None if it is in a file, or nowhere."""
    _, hook, key = _offloaded(model, name)
    values = None if hook is None else hook.weights_map
    # Accelerate has one map for the whole model, and for each module a view of it. What is not in it is in files.
    key = getattr(values, "prefix", "") + key
    values = getattr(values, "dataset", values)
    values = getattr(values, "state_dict", values)
    return values.get(key) if isinstance(values, dict) else None


def is_offloaded(model: nn.Module, name: str) -> bool:
    return _tensor(model, name).device.type == "meta" and _offloaded(model, name)[1] is not None


def offload_hooks(module: nn.Module) -> Iterator[Any]:
    """Accelerate's hooks that place a module's tensors, recognized by what they have: accelerate may be missing."""
    hook = getattr(module, "_hf_hook", None)
    # Accelerate wraps several hooks of one module into one, which has them as `hooks`.
    yield from (h for h in getattr(hook, "hooks", (hook,)) if hasattr(h, "weights_map"))


def _keep(module: nn.Module, hook: Any) -> None:
    """Bring in what a hook offloads, for good."""
    recurse = hook.place_submodules
    for name, value in [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]:
        # Already in place: the quantized weight itself.
        if value.device.type != "meta":
            continue
        prefix, _, leaf = name.rpartition(".")
        owner = module.get_submodule(prefix)
        real = hook.weights_map[name].to(hook.execution_device, value.dtype)
        if leaf in owner._buffers:
            owner._buffers[leaf] = real
        else:
            owner._parameters[leaf] = nn.Parameter(real, requires_grad=value.requires_grad)
    # Last: with it the hook would send everything to meta again after the next forward.
    hook.offload = False


def replace_parameter(model: nn.Module, name: str, value: Tensor) -> tuple[str, ...]:
    """Replace the parameter `name` by `value`, which will not require gradients. Returns all names it has.

    Every name under which the parameter was registered (tied weights, shared modules) leads to the one new parameter;
    nothing else in the model is touched.

    Raises:
        PassError: the new tensor has another shape or dtype.
    """
    old = model.get_parameter(name)
    new = nn.Parameter(value, requires_grad=False)
    replaced = []
    # Duplicates included: a shared module is met once under each of its names, and all names are returned.
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module._parameters.items():
            # `is new`: a shared module that has been met under another name before.
            if parameter is old or parameter is new:
                module._parameters[leaf] = new
                replaced.append(f"{prefix}.{leaf}" if prefix else leaf)
    if name not in replaced or new.shape != old.shape or new.dtype != old.dtype:
        raise PassError(f"{name}: {old.dtype} {tuple(old.shape)} became {new.dtype} {tuple(new.shape)}")
    return tuple(replaced)
