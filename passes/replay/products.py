"""The products of activations and parameters in a model that just runs, without a graph.

A torch function mode sees every function that a forward calls. One that multiplies is described as a node of a graph
of one, so that `passes/products/table.py` says what it computes; a weight is recognized by the memory of an operand,
and `passes/products/weight_views.py` says which of its rows the operand's strides read.
"""

import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from gptq_ao.passes.products.operators import ATTENTION, CHOICES, EMBEDDINGS, GATHERS
from gptq_ao.passes.products.table import MULTIPLYING, Product, products
from gptq_ao.passes.products.weight_views import ParameterView, read_matrix
from gptq_ao.passes.records import Layout, Part

__all__ = ["Parameters", "Problem", "Use", "Watch", "multiplies", "operator_name"]

F = torch.nn.functional
Arrange = tuple[Callable[..., Tensor], tuple[Any, ...]]


@dataclass(frozen=True)
class Use:
    """One product of an activation and some rows of a parameter.

    Attributes:
        layout, part: which rows of which matrix; into how many `experts` they fall.
        activation: as the function got it.
        arrange, offsets: how its rows lie, see `records.Rows`; with the tensor of offsets itself.
        note: why such a product is not quantized unless a rule asks for it, or None.
    """

    layout: Layout
    part: Part
    experts: int
    activation: Tensor
    arrange: Arrange | None
    offsets: Tensor | None
    note: str | None

    @property
    def rows(self) -> Tensor:
        """The activation as a Hessian takes it: [..., in_features], or [experts, ..., in_features]."""
        if self.arrange is None:
            return self.activation
        function, arguments = self.arrange
        return function(self.activation, *arguments)


@dataclass(frozen=True)
class Problem:
    """A product that a parameter takes part in, in a way that rules out to quantize it."""

    weight: str
    reason: str


class Parameters:
    """The matrix parameters of a model, found again in what its functions are called with.

    Attributes:
        shapes: name → shape.
        unreadable: name → why it would not be recognized.
    """

    def __init__(self, model: nn.Module) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.unreadable: dict[str, str] = {}
        # Several parameters may lie in one storage: start and stop there, name, parameter.
        self._at: dict[int, list[tuple[int, int, str, Tensor]]] = {}
        for name, p in model.named_parameters():
            if p.dim() < 2:
                continue
            self.shapes[name] = tuple(p.shape)
            if not p.is_floating_point():
                self.unreadable[name] = f"its values are {p.dtype}"
            # `read_matrix` understands offsets and strides as those of a contiguous parameter.
            elif not p.is_contiguous():
                self.unreadable[name] = "it is not contiguous in memory"
            else:
                start = int(p.storage_offset())
                place = (start, start + p.numel(), name, p)
                self._at.setdefault(p.untyped_storage().data_ptr(), []).append(place)

    def name_of(self, value: Any) -> str | None:
        """The parameter in whose memory a tensor lies: a view of it, then, since computed tensors have memory of their
        own. Subclasses are not asked, they may have no memory at all."""
        if type(value) not in (Tensor, nn.Parameter):
            return None
        # A view of another dtype counts its offset in other units, so it cannot be compared.
        for start, stop, name, p in self._at.get(value.untyped_storage().data_ptr(), ()):
            if start <= value.storage_offset() < stop and value.dtype == p.dtype:
                return name
        return None

    def find(self, func: Any, args: Any, kwargs: Any) -> Use | list[Problem]:
        """What a call multiplies, if a parameter takes part; an empty list if none does."""
        operator = _operator(func)
        if operator is None:
            return []
        node, tensors = _node(operator, args, kwargs)
        problems, candidates = [], list(products(node))
        for product in candidates:
            weight, activation = tensors[product.weight], tensors[product.activation]
            name = self.name_of(weight)
            if name is None:
                continue
            if self.name_of(activation) is not None:
                problems.append(Problem(name, f"{_title(operator)} multiplies it by other parameters"))
                continue
            use = self._read(name, weight, product, tensors)
            if use is not None:
                return use
            problems.append(Problem(name, f"{_title(operator)} reads it across its rows and input features"))
        # An operator with its products inside (an LSTM), or operands that the table cannot read.
        if not candidates:
            names = dict.fromkeys(n for t in tensors.values() if (n := self.name_of(t)) is not None)
            reason = f"{_title(operator)} multiplies by it, in a form that is not supported"
            problems = [Problem(n, reason) for n in names]
        return problems

    def _read(self, name: str, weight: Tensor, product: Product, tensors: dict[Any, Tensor]) -> Use | None:
        matrix = product.matrix(self._on_meta(name, weight).view)
        read = read_matrix(self.shapes[name], matrix) if matrix is not None else None
        if read is None or (read[0].view_shape is not None and not product.any_shape):
            return None
        layout, (start, stop), experts = read
        return Use(
            layout,
            Part(name, start, stop),
            experts if product.experts else 1,
            tensors[product.activation],
            product.arrange,
            tensors[product.offsets] if product.offsets is not None else None,
            product.note,
        )

    def _on_meta(self, name: str, value: Tensor) -> ParameterView:
        """The operand as a view of a parameter that starts its own storage, which is what `read_matrix` takes. (In the
        model several parameters may lie in one storage.)"""
        places = self._at[value.untyped_storage().data_ptr()]
        begin = next(start for start, _, other, _ in places if other == name)
        whole = torch.empty(self.shapes[name], device="meta")
        view = whole.as_strided(value.shape, value.stride(), value.storage_offset() - begin)
        return ParameterView(name, self.shapes[name], view)


def multiplies(func: Any) -> bool:
    """Whether a function of torch is a product in which a weight could take part."""
    return _operator(func) is not None


class Watch(TorchFunctionMode):
    """A mode whose `before` and `after` are told of every function that is called, also inside of Python functions of
    torch that would hide what they call."""

    def before(self, func: Any, args: Any, kwargs: Any) -> None:
        """What is about to be computed."""

    def after(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """What was computed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OPENED:
            # While a mode handles a call it is switched off. On again, it is told of the calls inside.
            with self:
                return _opened(func)(*args, **kwargs)
        self.before(func, args, kwargs)
        out = func(*args, **kwargs)
        self.after(func, args, kwargs, out)
        return out


# Written in Python, with products by weights inside: a mode is told of the whole, and not of its parts.
_OPENED = {F.multi_head_attention_forward}


def _opened(func: types.FunctionType) -> Callable[..., Any]:
    """The same function, but one that does not ask modes first whether they take over. What it calls still asks."""
    # With other globals, rather than patched: nothing changes for other threads.
    inside = {**func.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(func.__code__, inside, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


# Functions of torch that are an operator of another name.
_ALSO_CALLED = {"aten::_grouped_mm": "grouped_mm", "aten::index": "__getitem__", "aten::matmul": "__matmul__"}


def _names() -> dict[Any, str]:
    """Function of torch → the operator of `passes/products/` that it is. Modules and tensors call these."""
    found = {}
    for name in sorted(MULTIPLYING | ATTENTION | CHOICES | EMBEDDINGS | GATHERS):
        short = name.partition("::")[2]
        for owner, each in itertools.product((F, torch, Tensor), (short, _ALSO_CALLED.get(name, short))):
            function = getattr(owner, each, None)
            if name.startswith("aten::") and callable(function):
                found[function] = name
    return found


_NAMES = _names()


def operator_name(func: Any) -> str:
    """`namespace::name` of the operator that a function of torch is, where the tables of `passes/products/` know it;
    else an empty string."""
    if isinstance(func, torch._ops.OpOverload):
        return str(func._schema.name)
    return str(func._qualified_op_name if isinstance(func, torch._ops.OpOverloadPacket) else _NAMES.get(func, ""))


def _operator(func: Any) -> Any:
    """The operator that a function is, if it multiplies."""
    name = operator_name(func)
    if name not in MULTIPLYING:
        return None
    if isinstance(func, torch._ops.OpOverload):
        return func
    namespace, _, short = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), short)
    return getattr(packet, packet.overloads()[0])


def _node(operator: Any, args: Any, kwargs: Any) -> tuple[fx.Node, dict[Any, Tensor]]:
    """The call as the only node of a graph, and the tensors behind its inputs."""
    names = [a.name for a in operator._schema.arguments]
    # torch.einsum also takes operands one by one, where the operator takes a list.
    if operator._schema.name == "aten::einsum" and len(args) > 1 and isinstance(args[1], Tensor):
        args = (args[0], list(args[1:]))
    kwargs, args = dict(kwargs), list(args)
    while len(args) < len(names) and names[len(args)] in kwargs:  # operands are looked up by position
        args.append(kwargs.pop(names[len(args)]))
    graph = fx.Graph()  # the tables take nodes; what they need of a tensor is its shape
    tensors: dict[Any, Tensor] = {}

    def placeholder(t: Tensor) -> fx.Node:
        node = graph.placeholder(f"x{len(tensors)}")
        # Not the tensor itself: nodes refer to each other in circles, and it would live until these are collected.
        node.meta["val"] = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        tensors[node] = t
        return node

    args, kwargs = pytree.tree_map_only(Tensor, placeholder, (args, kwargs))
    return graph.call_function(operator, tuple(args), kwargs), tensors


def _title(operator: Any) -> str:
    return str(operator._schema.name)
