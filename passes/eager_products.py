"""The products of activations and parameters in a model that just runs, without a graph.

A torch function mode sees every function that a forward calls. A weight is recognized by the memory of an operand, its
rows by the operand's strides, as in `weight_views.py`. What else the graph passes know from the graph, the mode follows
from result to result: which weights a router's choice comes from, and which gathered rows are padding.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gptq_ao import activation_rows
from gptq_ao.passes.records import Layout, Part
from gptq_ao.passes.weight_views import read_matrix

__all__ = ["Parameters", "Use", "Watch"]

F = torch.nn.functional


@dataclass(frozen=True)
class Use:
    """One product of an activation and some rows of a parameter.

    Attributes:
        part: which rows of the layout's matrix; into how many `experts` they fall.
        activation: as the function got it.
        rows: the same with the rows along the last axis but one, as a Hessian takes them.
        counts: zero where a row is padding, or None.
    """

    layout: Layout
    part: Part
    experts: int
    activation: Tensor
    rows: Tensor
    counts: Tensor | None


class Parameters:
    """The matrix parameters of a model, found again in what its functions are called with."""

    def __init__(self, model: nn.Module) -> None:
        matrices = {n: p for n, p in model.named_parameters() if p.dim() >= 2}
        self.shapes = {n: tuple(p.shape) for n, p in matrices.items()}
        self._names = {
            p.untyped_storage().data_ptr(): n
            for n, p in matrices.items()
            if p.is_contiguous() and p.storage_offset() == 0 and p.device.type != "meta"
        }

    def name_of(self, value: Any) -> str | None:
        return self._names.get(value.untyped_storage().data_ptr()) if type(value) in (Tensor, nn.Parameter) else None


class Watch(TorchFunctionMode):
    """Calls `on_use(use)` before a product of a parameter is computed.

    Attributes:
        embedded: parameters that were looked up by index.
        choosing: parameters whose product was ranked (top-k, argmax) before anything else was multiplied.
    """

    def __init__(self, parameters: Parameters, mask: Tensor | None, on_use: Callable[[Use], None]) -> None:
        super().__init__()
        self.embedded: set[str] = set()
        self.choosing: set[str] = set()
        self._parameters, self._mask, self._on_use = parameters, mask, on_use
        self._origins: Any = WeakTensorKeyDictionary()  # result → the weights of the product it comes from
        self._counts: Any = WeakTensorKeyDictionary()  # rows gathered from the mask's positions → what counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        use = self._use(func, args, kwargs)
        if use is not None:
            self._on_use(use)
        elif func in _EMBEDDINGS:
            self.embedded |= {n for a in (*args, *kwargs.values()) if (n := self._parameters.name_of(a)) is not None}
        out = func(*args, **kwargs)
        self._follow(func, args, out, use)
        return out

    def _use(self, func: Any, args: Any, kwargs: Any) -> Use | None:
        find = _FUNCTIONS.get(func)
        for o in find(*args, **kwargs) if find is not None else ():
            name = self._parameters.name_of(o.weight)
            if name is None or self._parameters.name_of(o.activation) is not None:
                continue
            read = read_matrix(self._parameters.shapes[name], o.matrix)
            if read is not None and (o.any_shape or read[0].view_as is None):
                layout, (start, stop), experts = read
                counts = None if o.other_rows else self._counts.get(o.activation, self._mask)
                experts = experts if o.separate else 1
                return Use(layout, Part(name, start, stop), experts, o.activation, o.rows(), counts)
        return None

    def _follow(self, func: Any, args: Any, out: Any, use: Use | None) -> None:
        inputs = [a for a in args if isinstance(a, Tensor)]
        origins = {use.part.weight} if use else set().union(*(self._origins.get(i, ()) for i in inputs))
        if func in _CHOICES:
            self.choosing |= origins
        for result in out if isinstance(out, tuple | list) else (out,):
            if isinstance(result, Tensor) and result.is_floating_point():
                if origins:
                    self._origins[result] = origins
                counts = self._counts_of(func, args, inputs, result)
                if counts is not None:
                    self._counts[result] = counts

    def _counts_of(self, func: Any, args: Any, inputs: list[Tensor], result: Tensor) -> Tensor | None:
        if self._mask is None or result.dim() != 2:
            return None
        if func in _GATHERS and args[0].dim() == 2:
            every = self._mask.reshape(-1) if args[0].shape[0] == self._mask.numel() else None
            known, numbers = self._counts.get(args[0], every), args[1] if func is Tensor.__getitem__ else args[2]
            plain = isinstance(numbers, Tensor) and numbers.dim() == 1
            return known[numbers] if known is not None and plain else None
        return next((self._counts[i] for i in inputs if i in self._counts and i.shape[0] == result.shape[0]), None)


class _Operands(NamedTuple):
    """`matrix`: the weight as [out, in] or [experts, out, in]. `separate`: experts have rows of their own."""

    activation: Tensor
    weight: Tensor
    matrix: Tensor
    separate: bool = False
    any_shape: bool = False
    rows: Callable[[], Tensor] = lambda: torch.empty(0)
    other_rows: bool = False  # not the positions that a padding mask speaks of


def _linear(input: Tensor, weight: Tensor, bias: Any = None) -> Iterator[_Operands]:
    yield _Operands(input, weight, weight, rows=lambda: input)


def _matmul(a: Tensor, b: Tensor, **_: Any) -> Iterator[_Operands]:
    if b.dim() in (2, 3) and a.dim() <= max(3, 5 - b.dim()):
        separate = b.dim() == 3 and a.dim() == 3 and a.shape[0] != 1
        yield _Operands(a, b, b.mT, separate, rows=lambda: a)
    if a.dim() in (2, 3) and b.dim() <= 3:
        separate = a.dim() == 3 and b.dim() == 3 and b.shape[0] != 1
        yield _Operands(b, a, a, separate, rows=lambda: activation_rows.columns(b), other_rows=True)


def _addmm(_: Any, a: Tensor, b: Tensor, **__: Any) -> Iterator[_Operands]:
    yield from _matmul(a, b)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Iterator[_Operands]:
    if weight.shape[1] == 1 and groups > 1:
        return  # depthwise

    def each(value: Any) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * (weight.dim() - 2) if len(values) == 1 else values

    def rows() -> Tensor:
        pads = padding if isinstance(padding, str) else each(padding)
        kernel = tuple(weight.shape[2:])
        return activation_rows.patches(input, kernel, each(stride), pads, each(dilation), groups)

    filters = weight.reshape(groups, weight.shape[0] // groups, -1)
    yield _Operands(input, weight, filters, True, any_shape=True, rows=rows, other_rows=True)


def _of(*names: str) -> set[Any]:
    return {getattr(owner, n) for owner, n in itertools.product((torch, Tensor), names) if hasattr(owner, n)}


_FUNCTIONS: dict[Any, Callable[..., Iterator[_Operands]]] = {
    F.linear: _linear,
    **dict.fromkeys(_of("matmul", "mm", "bmm", "__matmul__"), _matmul),
    **dict.fromkeys(_of("addmm", "baddbmm"), _addmm),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _convolution),
}
_EMBEDDINGS = {F.embedding, F.embedding_bag, torch.embedding}
_CHOICES = _of("topk", "sort", "argmax", "argsort", "multinomial")
_GATHERS = {Tensor.__getitem__, *_of("index_select")}
