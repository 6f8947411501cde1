"""What can be known of a model before it is captured, and what can be wrong with it."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from gptq_ao.errors import ConfigError, NoLinearError, NonFiniteError

__all__ = ["check_unquantized", "check_values", "name_filter", "output_heads"]


def check_unquantized(model: nn.Module) -> None:
    """
    Raises:
        ConfigError: a parameter is quantized.
        NoLinearError: there are no parameters.
    """
    if next(model.parameters(), None) is None:
        raise NoLinearError(f"the model ({type(model).__name__}) has no parameters: nothing to quantize")
    # The base class of torchao, so that weights quantized by torchao are recognized as well.
    done = [name for name, p in model.named_parameters() if isinstance(p, TorchAOBaseTensor)]
    if done:
        raise ConfigError(
            f"the model is already quantized: {len(done)} of its parameters, such as {done[0]!r}, are "
            f"{type(model.get_parameter(done[0])).__name__}. Start from the original weights"
        )


def check_values(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """
    Args:
        parameters: names and values, of any shape and dtype.

    Raises:
        NonFiniteError: a value is NaN or infinite.
    """
    for name, parameter in parameters:
        bad = int((~torch.isfinite(parameter)).sum())
        if bad:
            raise NonFiniteError(
                f"{bad} elements of {name!r} {tuple(parameter.shape)} are NaN or infinite: repair the checkpoint first"
            )


def name_filter(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool]) -> Callable[[str], bool]:
    """A condition on modules as one on parameter names. A shared parameter is wanted if one of its modules is."""
    chosen = set()
    # A shared module has several names, and the filter may want it by any of them.
    for prefix, module in model.named_modules(remove_duplicate=False):
        if filter_fn(module, prefix):
            # By identity: a tied parameter has another name in each module.
            chosen |= {id(p) for p in module._parameters.values() if p is not None}
    return lambda name: id(model.get_parameter(name)) in chosen


def output_heads(model: nn.Module) -> frozenset[str]:
    """The output head of a Hugging Face model, by the model's own word."""
    declared = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(declared, "weight", None)
    # All names of the tensor: a head that is tied to the embedding also has the embedding's.
    return frozenset(name for name, p in model.named_parameters(remove_duplicate=False) if p is weight)
