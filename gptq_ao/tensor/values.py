"""Operators that are not known to quantized weights: those that read work on the dense weight, those that write raise.

A result is then an ordinary tensor, of the weight's shape and dtype. Nothing is ever written to a dense copy that would
be thrown away.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree

__all__ = ["on_values", "refuse_to_write"]


def on_values(quantized: type[torch.Tensor], func: Any, args: Any, kwargs: Any) -> Any:
    """`func`, an operator, with every argument that is `quantized` replaced by the dense weight.

    Raises:
        NotImplementedError: it writes to one of them, or sends it to another process, which expects codes.
    """
    if func.namespace == "c10d":  # whose operators do not say what they write to
        held = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, quantized))
        raise NotImplementedError(
            f"{func} does not know {next(held)!r}: between processes, quantized weights are sent by broadcast, "
            "scatter, all_gather and what FSDP2 and DTensor do. Send `weight.dequantize()`, or each of its `parts()`"
        )
    for leaf in pytree.tree_leaves(list(_written(func, args, kwargs))):
        if isinstance(leaf, quantized):
            refuse_to_write(leaf, func)
    args, kwargs = pytree.tree_map_only(quantized, lambda w: w.dequantize(), (args, kwargs))
    return func(*args, **kwargs)


def _written(func: Any, args: Any, kwargs: Any) -> Iterable[Any]:
    """The arguments that an operator changes, by its schema."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs  # what is not given is left to its default
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield given.get(argument.name)


def refuse_to_write(weight: torch.Tensor, func: Any) -> None:
    """Raise a NotImplementedError: `func`, an operator or its name, would change parts of a quantized weight."""
    raise NotImplementedError(
        f"{func} cannot change {weight!r} in place: codes are written as a whole, by `copy_` from a weight of the same "
        "kind. Change `weight.dequantize()` instead, and put that in the weight's place or quantize it again"
    )
