"""What a config may ask for, so that a wrong number is an error, and neither fills the memory nor takes minutes."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gptq_ao.errors import CheckpointError

__all__ = ["Limits", "check_counts"]

# Names that configs of transformers share. All else is found when the model is built.
_COUNTS = {"num_hidden_layers", "num_layers", "n_layer", "num_attention_heads", "num_key_value_heads", "head_dim"}
_COUNTS |= {"vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size"}
_COUNTS |= {"num_experts", "num_local_experts", "n_routed_experts"}
# Configs make lists as long as this, and building a layer takes about a millisecond.
_MOST_LAYERS = 2000

_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)


def check_counts(config: Mapping[str, Any], where: object) -> None:
    """
    Args:
        config: content of a config.json.
        where: its place, for messages.

    Raises:
        CheckpointError: it has a size that no model has.
    """
    for name, value in _entries(config):
        if type(value) is not int:
            continue  # transformers checks types
        layers = name.endswith(("layers", "layer"))
        most = _MOST_LAYERS if layers else 2**31 - 1
        # A layer may also be named by its number, counted from the last one: -2.
        if (name in _COUNTS and not 0 <= value <= most) or (layers and value > most):
            raise CheckpointError(f"{where} says {name} = {value}, which cannot be: at least 0, at most {most}")


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _entries(value)
        yield name, value


class Limits(TorchFunctionMode):
    """Within: a tensor that is made is not larger, and parameters are not more, than they can be.

    Args:
        shapes: those of the tensors in the checkpoint's files; None: unknown.
        where: place of the config, for messages.
    """

    def __init__(self, shapes: Iterable[Sequence[int]] | None, where: object) -> None:
        super().__init__()
        self._where = where
        sizes = None if shapes is None else [math.prod(shape) for shape in shapes]
        # Models compute tensors that are in no file, and split what is one tensor there: the bounds are generous.
        self._elements = 2**36 if sizes is None else max(2**28, 2 * sum(sizes))
        self._parameters = 100_000 if sizes is None else max(10_000, 8 * len(sizes))

    def count_parameter(self) -> None:
        self._parameters -= 1
        if self._parameters < 0:
            raise CheckpointError(f"{self._where} describes a model of more parameters than there can be")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FACTORIES or func is torch.arange:
            self._check(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _check(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        if func is torch.arange:
            sizes = args[:2] if len(args) > 1 else (0, *args, *(kwargs[k] for k in ("end",) if k in kwargs))
            shape = [int(abs(sizes[-1] - sizes[0]))]
        else:
            size = kwargs.get("size", args[0] if args and isinstance(args[0], Sequence) else args)
            shape = [int(n) for n in size if isinstance(n, int)]
        if min(shape, default=0) < 0 or math.prod(shape) > self._elements:
            raise CheckpointError(f"{self._where} describes a tensor of shape {shape}, which cannot be")
