"""What a segment took, and when another will take the same: it runs the same operators on values of the same form."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from gptq_ao.passes.records import Segment, Stage
from gptq_ao.planning.live_bytes import storages

__all__ = ["Kept", "Run", "SegmentRuns", "graph_form", "kept", "made", "value_forms"]


@dataclass(frozen=True)
class Kept:
    """A value that a segment has written: a new tensor, a view, or (dtype None) something else.

    Attributes:
        view_of: number of the value that it shares its memory with, among those read and those written before it.
    """

    constant: Any = None
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    view_of: int | None = None


@dataclass(frozen=True)
class Run:
    """With a batch of some shape, the statics being there.

    Attributes:
        peak: bytes at most, besides what was alive before.
        left: bytes that the observers hold afterwards, besides their sums.
        kept: the leaves of what it has written that later segments read, and `spec`, how they make up those values.
        rows: that each observer has seen.
        observing: which part of `flops` is the observers'.
    """

    peak: int
    left: int
    kept: tuple[Kept, ...]
    spec: pytree.TreeSpec
    flops: Mapping[torch.dtype, int]
    moved: int
    rows: tuple[int, ...]
    observing: Mapping[torch.dtype, int]


@dataclass(frozen=True)
class SegmentRuns:
    """
    Attributes:
        peak, statics: bytes at most while its statics were made, and bytes of them, besides what was alive before.
        runs: for each shape of batch.
    """

    peak: int
    statics: int
    runs: tuple[Run, ...]


def made(kept: tuple[Kept, ...], reads: Iterable[Any]) -> list[Any]:
    """What a run has written, once more; the leaves of it."""
    values = pytree.tree_leaves(list(reads))
    known = len(values)
    for k in kept:
        if k.view_of is not None:
            values.append(values[k.view_of].as_strided(k.shape, k.stride, k.offset))
        elif k.dtype is not None:
            values.append(torch.empty_strided(k.shape, k.stride, dtype=k.dtype, device=k.device))
        else:
            values.append(k.constant)
    return values[known:]


def kept(reads: Iterable[Any], written: Iterable[Any]) -> tuple[Kept, ...]:
    """The leaves of what was written."""
    owner: dict[int, int] = {}
    found = []
    values = pytree.tree_leaves(list(reads))
    known = len(values)
    for i, v in enumerate((*values, *pytree.tree_leaves(list(written)))):
        at = min((owner.setdefault(key, i) for key in storages(v)), default=i) if isinstance(v, Tensor) else i
        if i < known:
            continue
        if not isinstance(v, Tensor):
            found.append(Kept(v))
            continue
        view_of = at if at < i else None
        found.append(Kept(None, tuple(v.shape), v.stride(), int(v.storage_offset()), v.dtype, v.device, view_of))
    return tuple(found)


def graph_form(stage: Stage, segment: Segment) -> tuple[Any, ...]:
    """Equal for segments that differ in nothing but names. What they read and hold is not in it."""
    observers = {shared.name: (i, shared.in_features, shared.experts) for i, shared in enumerate(stage.inputs)}
    number: dict[fx.Node, int] = {}
    nodes = []
    for node in segment.module.graph.nodes:
        target: Any = node.target
        if node.op == "placeholder":
            target = len(number)
        elif node.op == "call_module":
            streams = [now for now, _ in node.args[4]]  # see `observe`
            target = (observers[str(target)], tuple(int(now.meta["val"].shape[-1]) for now in streams))
        elif node.op == "get_attr":
            target = id(getattr(segment.module, str(target)))  # held by the program, which all segments are of
        nodes.append((node.op, target, _frozen(node.args, number), _frozen(node.kwargs, number)))
        number[node] = len(number)
    kept = tuple(name in segment.keeps for name in segment.writes)
    return (*nodes, len(segment.reads), len(segment.statics), kept)


def value_forms(values: Iterable[Any]) -> tuple[Any, ...]:
    """Equal for values that operators cannot tell from one another, as long as tensors are fake."""
    first: dict[int, int] = {}

    def form(v: Any) -> Any:
        if not isinstance(v, Tensor):
            return type(v), repr(v)
        shared = [(first.setdefault(key, len(first)), s.nbytes()) for key, s in storages(v).items()]
        return type(v), v.shape, v.stride(), v.storage_offset(), v.dtype, v.device, tuple(shared)

    leaves, spec = pytree.tree_flatten(list(values))
    return spec, *(form(v) for v in leaves)


def _frozen(a: Any, number: dict[fx.Node, int]) -> Any:
    """Arguments of a node, as something that can be compared and hashed."""
    if isinstance(a, fx.Node):
        return fx.Node, number[a]
    if isinstance(a, list | tuple):
        return list, tuple(_frozen(x, number) for x in a)
    if isinstance(a, dict):
        return dict, tuple((k, _frozen(x, number)) for k, x in a.items())
    if isinstance(a, slice):
        return slice, _frozen((a.start, a.stop, a.step), number)
    return type(a), repr(a)  # numbers that are equal may differ in type, or sign
