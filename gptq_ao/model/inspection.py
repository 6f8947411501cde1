"""What can be known of a model before it is captured, and what can be wrong with it."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from gptq_ao.errors import ConfigError, NoLinearError, NonFiniteError
from gptq_ao.model.parts import local_part

__all__ = ["check_unquantized", "check_values", "name_filter", "output_heads"]

# By name, as those who define them may not be installed: torchao's, bitsandbytes', quanto's.
_CLASSES = {"TorchAOBaseTensor", "NF4Tensor", "Params4bit", "Int8Params", "QTensor"}
# Tensors of other libraries' modules that hold several codes in an integer: GPTQ and AWQ, compressed-tensors, HQQ.
_WORDS = {"qweight", "weight_packed", "W_q"}


def check_unquantized(model: nn.Module, chosen: Callable[[str], bool] = lambda name: True) -> None:
    """
    Args:
        chosen: whether the parameter or buffer of a name may be quantized.

    Raises:
        ConfigError: a weight is quantized, by whatever library; or it has no shape yet.
        NoLinearError: there are no parameters.
    """
    found = [(name, what) for name, what in _quantized(model) if chosen(name)]
    if found:
        name, what = found[0]
        raise ConfigError(
            f"the model is already quantized: {len(found)} of its weights, such as {name!r} ({what}). Start from the "
            "original weights, or leave these out, by filter_fn or a rule"
        )
    if next(model.parameters(), None) is None:
        raise NoLinearError(f"the model ({type(model).__name__}) has no parameters: nothing to quantize")
    lazy = next((n for n, p in model.named_parameters() if isinstance(p, nn.UninitializedParameter)), None)
    if lazy is not None:
        raise ConfigError(f"{lazy!r} has no shape yet: run the model once on a batch, then quantize it")


def _quantized(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of weights, and what they are."""
    for prefix, module in model.named_modules():
        for leaf, t in (*module._parameters.items(), *module._buffers.items()):
            what = None if t is None else _packed(leaf, t)
            if what is not None:
                yield f"{prefix}.{leaf}".removeprefix("."), what
        # PyTorch's own quantized modules hold no tensors.
        if ".ao.nn." in type(module).__module__ and "quantized" in type(module).__module__:
            yield prefix, f"{type(module).__module__}.{type(module).__name__}"


def _packed(leaf: str, t: Tensor) -> str | None:
    if _CLASSES & {c.__name__ for c in type(local_part(t)).__mro__} or t.is_quantized:
        return type(local_part(t)).__name__ if type(t) not in (Tensor, nn.Parameter) else str(t.dtype)
    if isinstance(t, nn.UninitializedParameter | nn.UninitializedBuffer) or t.dim() < 2:
        return None
    # Codes are numbers of 8 bits, or several to a word of 32. (Other integers in a model are tables.)
    codes = t.dtype.itemsize == 1 and t.dtype != torch.bool and (isinstance(t, nn.Parameter) or leaf == "weight")
    words = leaf in _WORDS and not t.dtype.is_floating_point
    return str(t.dtype) if codes or words else None


def check_values(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """
    Args:
        parameters: names and values, of any shape and dtype.

    Raises:
        NonFiniteError: a value is NaN or infinite.
    """
    for name, parameter in parameters:
        # Both ends are NaN if any value is. To ask each value takes more memory than the values.
        if not parameter.numel() or torch.isfinite(torch.stack(parameter.aminmax())).all():
            continue
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
            chosen |= {id(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None}

    def wanted(name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        return id(getattr(model.get_submodule(module), leaf)) in chosen

    return wanted


def output_heads(model: nn.Module) -> frozenset[str]:
    """The output head of a Hugging Face model, by the model's own word."""
    declared = getattr(model, "get_output_embeddings", lambda: None)()
    # Where an adapter trains a copy of the head, there are two.
    weights = [getattr(head, "weight", None) for head in (declared, getattr(declared, "original_module", None))]
    # All names of the tensor: a head that is tied to the embedding also has the embedding's.
    named = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, p in named if any(p is weight for weight in weights))
