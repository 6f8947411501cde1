"""Which sizes of the inputs a graph is valid for: those that the model fixed, its ranges, and the branches it took.

Sizes of a fake input are numbers or expressions (SymPy) of symbols, one symbol for each size that is free.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor

from gptq_ao.errors import CalibrationError

__all__ = ["check_sizes", "static_size"]

Range = tuple[float, float]


def static_size(size: int | torch.SymInt) -> int | None:
    """The one value a size can have, or None."""
    if isinstance(size, int):
        return size
    return int(size.node.expr) if size.node.expr.is_number else None


def check_sizes(
    fakes: Mapping[str, Tensor],
    given: Mapping[str, Any],
    ranges: Mapping[Any, Range],
    guards: tuple[Any, ...],
    where: str,
) -> None:
    """Compare a batch with the inputs of the captured graph, by name.

    Args:
        ranges: symbol to the smallest and the largest size.
        guards: conditions over the symbols.

    Raises:
        CalibrationError: names `where`, the input, its size, the condition, and what to do.
    """
    for name, fake in fakes.items():
        value = given[name]
        if not isinstance(value, Tensor) or value.dim() != fake.dim() or value.dtype != fake.dtype:
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise CalibrationError(
                f"{where}: input {name!r} is {got}, the model was captured with {fake.dtype} of {fake.dim()} dimensions"
            )
    symbols: dict[Any, int] = {}
    places: dict[Any, Any] = {}  # symbol → a symbol that is named after where that size is found
    # First the sizes that are one number or one symbol: they say what each symbol is in this batch.
    for name, axis, expression, size in _sizes(fakes, given):
        low, high = ranges.get(expression, (0, float("inf"))) if expression.is_Symbol else (0, float("inf"))
        if expression.is_number:
            low = high = int(expression)
        if not low <= size <= high:
            limits = f"{low:g}" if low == high else f"at least {low:g}" if size < low else f"at most {high:g}"
            raise CalibrationError(
                f"{where}: input {name!r} has {size} elements along axis {axis}; the model fixed that size at capture, "
                f"to {limits} (it loops or branches over it). Give every batch such a size"
            )
        if expression.is_Symbol and expression not in symbols:
            symbols[expression], places[expression] = size, type(expression)(f"{name}.shape[{axis}]")
    # With all symbols known, sizes that are formulas of several of them can be compared.
    for name, axis, expression, size in _sizes(fakes, given):
        wanted = expression.subs(symbols)
        if wanted.is_number and wanted != size:
            raise CalibrationError(
                f"{where}: input {name!r} has {size} elements along axis {axis}, but the model needs "
                f"{expression.xreplace(places)} = {wanted} there. Give the inputs of a batch sizes that fit each other"
            )
    guard = _broken(guards, tuple(symbols.items()))
    if guard is not None:
        sizes = ", ".join(f"{places[s]} = {symbols[s]}" for s in sorted(guard.free_symbols, key=str))
        raise CalibrationError(
            f"{where}: with {sizes} the model takes another path than the captured one, which needs "
            f"{guard.xreplace(places)}. Give batches of one length, that of the first"
        )


def _sizes(fakes: Mapping[str, Tensor], given: Mapping[str, Any]) -> Iterator[tuple[str, int, Any, int]]:
    """(input, axis, expression of the size, size in the batch)."""
    for name, fake in fakes.items():
        for axis, size in enumerate(fake.shape):
            expression = sympy.Integer(size) if isinstance(size, int) else size.node.expr
            yield name, axis, expression, given[name].shape[axis]


@functools.lru_cache(maxsize=64)  # most batches have the same sizes, and SymPy is slow
def _broken(guards: tuple[Any, ...], sizes: tuple[tuple[Any, int], ...]) -> Any:
    """The first condition that is not met, or None."""
    return next((g for g in guards if not _holds(g, dict(sizes))), None)


def _holds(guard: Any, sizes: Mapping[Any, int]) -> bool:
    """A capture with two rows or more may exclude a size of 1 for no other reason: 1 is fine where 2 and 3 are."""
    if bool(guard.subs(sizes)):
        return True
    larger = [{s: n if v == 1 else v for s, v in sizes.items()} for n in (2, 3)]
    return 1 in sizes.values() and all(bool(guard.subs(sizes)) for sizes in larger)
