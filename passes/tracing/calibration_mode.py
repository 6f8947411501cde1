"""The state in which a model is captured, and in which it runs: so that the graph computes what the model does."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["calibration_mode"]

# How the names of attention implementations begin that torch.export cannot capture.
_NOT_CAPTURABLE = ("flash_attention", "flex_attention", "paged", "kernels-community/")
# Marks an attribute that was not there, and is to be deleted again. (None would be a value.)
_MISSING = object()


@contextlib.contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no key-value cache, no fused attention module (it hides its weights), no checks of
    distributions' parameters (they read values). In Hugging Face configs, attention that cannot be captured becomes
    "sdpa", and experts "grouped_mm": one product for all experts instead of a loop over those that the data selects.
    Accelerate's mixed precision is off. All of it is restored on exit."""
    training = [m for m in model.modules() if m.training]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    checks = torch.distributions.Distribution._validate_args
    changed: list[tuple[Any, str, Any]] = []
    try:
        model.eval()
        for config in _configs(model):
            for name, value in _settings(config).items():
                changed.append((config, name, vars(config).get(name, _MISSING)))
                # Not setattr: transformers' setters of these pass the value on to sub-configs and models, unasked.
                vars(config)[name] = value
        for module in model.modules():
            own = vars(module)
            # Accelerate puts a forward under autocast in place of it, and keeps the original.
            if "_original_forward" in own and "forward" in own:
                changed.append((module, "forward", own["forward"]))
                own["forward"] = own["_original_forward"]
        torch.backends.mha.set_fastpath_enabled(False)
        torch.distributions.Distribution.set_default_validate_args(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch.distributions.Distribution.set_default_validate_args(checks)
        for owner, name, value in reversed(changed):
            if value is _MISSING:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = value
        # Not `model.train()`, which would also switch modules that were in eval mode before.
        for m in training:
            m.training = True


def _settings(config: Any) -> dict[str, Any]:
    """What has to change in one config, as its instance attributes."""
    settings: dict[str, Any] = {}
    if getattr(config, "use_cache", None):
        settings["use_cache"] = False
    if str(getattr(config, "_attn_implementation", None)).startswith(_NOT_CAPTURABLE):
        settings[_stored(config, "_attn_implementation")] = "sdpa"
    if getattr(config, "_experts_implementation", None) not in (None, "grouped_mm"):
        settings[_stored(config, "_experts_implementation")] = "grouped_mm"
    return settings


def _stored(config: Any, name: str) -> str:
    """The instance attribute behind a setting that transformers makes a property."""
    return f"{name}_internal" if f"{name}_internal" in vars(config) else name


def _configs(model: nn.Module) -> list[Any]:
    """The Hugging Face configs of a model's modules and their sub-configs, each once."""
    found: dict[int, Any] = {}
    todo: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]
    while todo:
        config = todo.pop()
        if id(config) not in found and hasattr(config, "to_dict"):
            found[id(config)] = config
            todo += [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ()]
    return list(found.values())
