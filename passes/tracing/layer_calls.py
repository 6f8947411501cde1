"""While a model is traced, layers that are alike run twice; from the third on, one node stands for all that they do.

    hidden = layers[0](hidden)    traced
    hidden = layers[1](hidden)    traced, and found to be the same graph as that of layers[0]: may be repeated
    hidden = layers[2](hidden)    gptq_ao_layer("repeat", 0, inputs, weights)

The model's own Python runs from beginning to end, so what it does around its layers is traced as always. `unroll.py`
puts copies of the nodes of layers[1] in the place of each such node.

A layer is repeated only if nothing that its forward can see is different: the attributes that the traced forward has
read (`alike_layers.py`), the form of all inputs, what the rest of the model holds, the mode torch is in. And a traced
layer may be repeated only if it is a function of its inputs and weights: it changes no attribute, writes to no tensor
but its own, and returns new tensors (or its inputs). All else is traced, layer by layer.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from gptq_ao.passes.tracing.alike_layers import Alike, Place, State, alike_layers, hooked, same_state, state

__all__ = ["LAYER", "NUMBER", "LayerCalls", "is_size", "layer_calls"]

NUMBER = "gptq_ao_layer"  # in `meta` of the nodes of a layer that is repeated


class _Layer(HigherOrderOperator):
    """("traced", number, inputs, weights, outputs) after the nodes of a layer that may be repeated, and
    ("repeat", number, inputs, weights) → outputs for one that is the same. It only stands in a graph."""

    def __call__(self, *args: Any) -> Any:
        raise NotImplementedError("stands in a graph, and is replaced before that runs")


LAYER = _Layer("gptq_ao_layer")


@dataclass(frozen=True)
class _Output:
    """A leaf of what a layer returns: its input of that number, a tensor like `new`, or else a constant."""

    given: int | None = None
    new: Tensor | None = None
    constant: Any = None


@dataclass(frozen=True)
class _Traced:
    """A layer that has run.

    Attributes:
        key: form of its inputs, and the mode torch was in.
        around: what the rest of the model held.
        inputs, weights: their nodes.
        nodes: what it made.
        reads: the attributes it has read; None if nobody looked.
        outputs: None if it may not be repeated.
        number: of those that are repeated.
    """

    layer: nn.Module
    key: Any
    around: State
    inputs: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    reads: frozenset[Place] | None
    outputs: tuple[_Output, ...] | None
    spec: pytree.TreeSpec | None
    number: int | None = None


class _UnclearError(Exception):
    """Of an input, it cannot be said when another is the same."""


class LayerCalls:
    """What is known of the layers that have run.

    Attributes:
        repeated: how many were not traced.
        took_part: whether any of them ran otherwise than it would have.
    """

    def __init__(self, model: nn.Module) -> None:
        self.repeated, self.took_part = 0, False
        self._groups = alike_layers(model)
        grouped = {m for group in self._groups for layer in group.layers for m in layer.modules()}
        self._around = [m for m in model.modules() if m not in grouped]
        self._before = {layer: state(layer.modules()) for group in self._groups for layer in group.layers}
        self._traced: dict[Alike, list[_Traced]] = {group: [] for group in self._groups}
        self._numbers = itertools.count()

    def install(self) -> None:
        """In place of the forwards. `stand_in` takes it back."""
        for group in self._groups:
            for layer in dict.fromkeys(group.layers):
                vars(layer)["forward"] = self._instead_of(layer.forward, group, layer)
                self._before[layer] = state(layer.modules())

    def _instead_of(self, forward: Callable[..., Any], group: Alike, layer: nn.Module) -> Callable[..., Any]:
        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._call(forward, group, layer, args, kwargs)

        return call

    def _call(self, forward: Callable[..., Any], group: Alike, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        mode = get_proxy_mode()
        if mode is None or hooked(layer) or not same_state(self._before[layer], state(layer.modules())):
            return forward(*args, **kwargs)
        tracer: Any = mode.tracer
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
        weights = [*layer.parameters(), *layer.buffers()]
        try:
            key = (spec, *_forms(leaves), *_ambient(tensors))
            inputs, own = _proxies(tensors, tracer), _proxies(weights, tracer)
        except _UnclearError:
            return forward(*args, **kwargs)
        around = state(self._around, tensors=True)
        known = self._traced[group]
        earlier = [t for t in known if t.key == key and same_state(t.around, around)]
        for t in earlier:
            if t.number is not None and group.agree(t.layer, layer, t.reads or ()):
                self.repeated, self.took_part = self.repeated + 1, True
                return _repeat(t, tensors, inputs, own, tracer)

        last = next(iter(reversed(tracer.graph.nodes)))
        inside = state(layer.modules(), tensors=True)
        # The first of all runs as it is: the second has to make the same graph, although it is watched.
        self.took_part |= bool(known)
        with group.watched(layer) if known else contextlib.nullcontext() as reads:
            result = forward(*args, **kwargs)
        nodes = []
        while (last := last.next).op != "root":
            nodes.append(last)
        unchanged = (
            same_state(inside, state(layer.modules(), tensors=True))
            and same_state(around, state(self._around, tensors=True))
            and _untouched(leaves, spec, (args, kwargs))
        )
        out, out_spec = pytree.tree_flatten(result)
        sources = tuple(p.node for p in (*inputs, *own))
        outputs = _outputs(out, tensors, tracer) if unchanged and _is_function(nodes, sources) else None
        t = _Traced(
            layer,
            key,
            around,
            sources[: len(inputs)],
            sources[len(inputs) :],
            tuple(nodes),
            None if reads is None else frozenset(reads),
            None if outputs is None or _aliases(outputs, sources) else outputs,
            out_spec,
        )
        if t.outputs is not None and t.reads is not None:
            twins = (e for e in earlier if e.outputs is not None and group.agree(e.layer, layer, t.reads))
            if any(_same_graph(e, t, tracer.root) for e in twins):
                t = _Traced(**{**vars(t), "number": next(self._numbers)})
                for node in nodes:
                    node.meta[NUMBER] = t.number
                returned = tuple(get_proxy_slot(o, tracer).proxy for o in out if isinstance(o, Tensor))
                end = tracer.create_proxy(
                    "call_function", LAYER, ("traced", t.number, tuple(inputs), tuple(own), returned), {}
                )
                end.node.meta["val"] = None
        known.append(t)
        return result


@contextlib.contextmanager
def layer_calls(model: nn.Module) -> Iterator[LayerCalls]:
    """Within, which has to be within `stand_in`, layers that are alike run twice in a trace."""
    calls = LayerCalls(model)
    calls.install()
    yield calls


def _repeat(t: _Traced, tensors: list[Any], inputs: list[Any], own: list[Any], tracer: Any) -> Any:
    """What the layer returns, and the node that it comes from."""
    assert t.outputs is not None
    assert t.spec is not None
    proxy = tracer.create_proxy("call_function", LAYER, ("repeat", t.number, tuple(inputs), tuple(own)), {})
    made = []
    with disable_proxy_modes_tracing():
        for o in t.outputs:
            if o.new is not None:
                like: Any = o.new
                with like.fake_mode:
                    made.append(torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device))
    track_tensor_tree(tuple(made), proxy, constant=None, tracer=tracer)
    new = iter(made)
    leaves = [
        next(new) if o.new is not None else tensors[o.given] if o.given is not None else o.constant for o in t.outputs
    ]
    return pytree.tree_unflatten(leaves, t.spec)


def _forms(leaves: list[Any]) -> Iterator[Any]:
    """Equal where a forward cannot tell one from the other before it computes with the numbers in them."""
    first: dict[int, int] = {}
    for leaf in leaves:
        if isinstance(leaf, FakeTensor):
            sizes = tuple(map(_expression, (*leaf.shape, *leaf.stride(), leaf.storage_offset())))
            same = first.setdefault(id(leaf), len(first))  # one tensor that is given twice
            yield type(leaf), leaf.dtype, leaf.device, leaf.layout, sizes, leaf.requires_grad, same
        elif isinstance(leaf, torch.SymInt):
            yield torch.SymInt, leaf.node.expr
        elif isinstance(leaf, int | float | str | bool | torch.dtype | torch.device | None):
            yield type(leaf), repr(leaf)
        elif isinstance(leaf, Tensor):
            yield _Same(leaf), leaf._version
        else:
            raise _UnclearError


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal only for the very same object, which it keeps."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _ambient(tensors: list[Any]) -> Iterator[Any]:
    yield torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_inference_mode_enabled()
    yield len(torch.overrides._get_current_function_mode_stack())
    for kind in sorted({t.device.type for t in tensors}):
        yield torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _expression(size: int | torch.SymInt) -> Any:
    return size if isinstance(size, int) else size.node.expr


def _proxies(tensors: list[Any], tracer: Any) -> list[Any]:
    """What they are in the graph.

    Raises:
        _UnclearError: not in it, or a constant, whose value Python may ask for.
    """
    slots = [get_proxy_slot(t, tracer, None) for t in tensors]
    if any(slot is None or slot.constant is not None for slot in slots):
        raise _UnclearError
    return [slot.proxy for slot in slots]


def _untouched(leaves: list[Any], spec: pytree.TreeSpec, given: Any) -> bool:
    """Whether lists and dicts among the inputs still hold what they held."""
    now, spec_now = pytree.tree_flatten(given)
    return spec == spec_now and all(a is b for a, b in zip(leaves, now, strict=True))


def is_size(node: fx.Node) -> bool:
    """A number that was made of sizes. What reads it depends on no tensor through it."""
    return isinstance(node.meta.get("val"), int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)


def _values(node: fx.Node) -> list[Any]:
    return pytree.tree_leaves(node.meta.get("val"))


def _storages(nodes: Any) -> set[int]:
    return {v.untyped_storage()._cdata for n in nodes for v in _values(n) if isinstance(v, Tensor)}


def _is_function(nodes: list[fx.Node], sources: tuple[fx.Node, ...]) -> bool:
    """Whether these nodes read no other tensor, write only to what they made, and have sizes that no data decides."""
    inside, allowed = set(nodes), set(sources)
    outside = {i for n in nodes if not is_size(n) for i in n.all_input_nodes} - inside
    if any(n.op != "get_attr" and not is_size(n) for n in outside - allowed):
        return False
    if any(v is not None and free_unbacked_symbols(v) for n in nodes for v in _values(n)):
        return False
    given = _storages(outside | allowed)
    writes = (n for n in nodes if isinstance(n.target, OpOverload) and n.target._schema.is_mutable)
    return not any(_storages(n.all_input_nodes[:1]) & given for n in writes)


def _outputs(out: list[Any], tensors: list[Any], tracer: Any) -> tuple[_Output, ...] | None:
    """None if some output cannot be made again."""
    found = []
    for leaf in out:
        given = next((i for i, t in enumerate(tensors) if t is leaf), None)
        if given is not None:
            found.append(_Output(given=given))
        elif isinstance(leaf, FakeTensor):
            offset = leaf.storage_offset()
            if get_proxy_slot(leaf, tracer, None) is None or not isinstance(offset, int) or offset:
                return None
            if leaf.layout is not torch.strided or leaf.requires_grad:
                return None
            found.append(_Output(new=leaf))
        elif isinstance(leaf, int | float | str | bool | None | torch.dtype | torch.device):
            found.append(_Output(constant=leaf))
        else:
            return None
    return tuple(found)


def _aliases(outputs: tuple[_Output, ...], sources: tuple[fx.Node, ...]) -> bool:
    """Whether a new output is a view of an input, a weight or another output: what is written to one is seen in the
    other, and copies would not show it."""
    made = [o.new.untyped_storage()._cdata for o in outputs if o.new is not None]
    return len(set(made)) < len(made) or bool(set(made) & _storages(sources))


def _same_graph(one: _Traced, other: _Traced, root: nn.Module) -> bool:
    """Whether two layers made the same nodes, but for their inputs and weights. Sizes are compared as expressions: they
    are computed where they first occur, and read from there by all that follow."""
    pairs = zip((*one.inputs, *one.weights), (*other.inputs, *other.weights), strict=True)
    match: dict[Any, fx.Node] = {}
    if any(match.setdefault(a, b) is not b for a, b in pairs):
        return False

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if is_size(a) and is_size(b):
                return bool(_expression(a.meta["val"]) == _expression(b.meta["val"]))
            return match.get(a, a) is b
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, list | tuple) and isinstance(b, list | tuple):
            return len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, slice) and isinstance(b, slice):
            return same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
        return type(a) is type(b) and repr(a) == repr(b)

    first, second = ([n for n in t.nodes if not is_size(n)] for t in (one, other))
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if a.op != b.op or not (_same_constant(a, b, root) if a.op == "get_attr" else a.target == b.target):
            return False
        if not same(a.args, b.args) or not same(a.kwargs, b.kwargs) or _looks(a) != _looks(b):
            return False
        match[a] = b
    return True


def _same_constant(a: fx.Node, b: fx.Node, root: Any) -> bool:
    one, other = (functools.reduce(getattr, str(n.target).split("."), root) for n in (a, b))
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is other
    if one is other or isinstance(one, FakeTensor) or isinstance(other, FakeTensor):
        return one is other
    with unset_fake_temporarily(), disable_proxy_modes_tracing():
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _looks(node: fx.Node) -> Any:
    return [
        (v.dtype, v.device, *map(_expression, (*v.shape, *v.stride()))) if isinstance(v, Tensor) else type(v)
        for v in _values(node)
    ]
