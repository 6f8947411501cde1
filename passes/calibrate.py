"""Segment × batches → Hessians: run one segment on every batch and hand on the values that later segments need.

If a stage's Hessians do not fit in memory together, its segment runs several times, for a portion of them each. The
sums are the same: each is of the same rows in the same order.

Invariant: after a segment's last run the store holds, per batch, exactly the segment's `keeps`, and before it what was
there.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import fx

from gptq_ao.calibration.activation_store import ActivationStore
from gptq_ao.distributed.ranks import ALONE, Ranks
from gptq_ao.errors import NonFiniteError
from gptq_ao.passes.records import Portion, Segment, SharedInput, Stage
from gptq_ao.solver.hessian import Hessian, HessianObserver

__all__ = ["calibrate", "compared", "run_only", "run_segment"]

Values = dict[str, Any]


def run_segment(segment: Segment, values: Values, statics: list[Any]) -> tuple[Any, ...]:
    """One batch through one segment: what it writes."""
    with torch.no_grad():
        return segment.module(*(values[name] for name in segment.reads), *statics)


def calibrate(
    segment: Segment,
    stage: Stage,
    store: ActivationStore,
    static: Callable[[str], Any],
    ranks: Ranks = ALONE,
    portion: Portion | None = None,
    *,
    last: bool = True,
) -> tuple[tuple[Hessian, ...], ...]:
    """Run every batch, in order, through a segment with observers (see `observe.py`).

    Args:
        store: per batch the live values by name; updated in place.
        static: a parameter, buffer or constant by placeholder name; asked once per run.
        ranks: each of which has a share of the batches in its store.
        portion: whose Hessians to sum; None: all.
        last: whether no other portion follows. Otherwise the store stays as it is, and so does the state of random
            numbers, so that the model draws the same again.

    Returns:
        The Hessians of each of `stage.inputs`, in order: one, or one per expert of the portion; of the batches of all
        ranks.

    Raises:
        NonFiniteError: an activation is NaN or infinite; names the weights that read it and the batch.
    """
    observers = [cast(HessianObserver, segment.module.get_submodule(shared.name)) for shared in stage.inputs]
    for observer, experts in zip(observers, portion or [range(s.experts) for s in stage.inputs], strict=True):
        observer.look_at(experts)
    cuda = [store.device] if store.device.type == "cuda" else []
    with contextlib.nullcontext() if last else torch.random.fork_rng(cuda):
        for _ in _run(segment, store, static, ranks, replace=last):
            for observer in observers:
                if observer.portion:
                    observer.end_batch()
    if not len(store):
        for shared, observer in zip(stage.inputs, observers, strict=True):
            if observer.portion:
                observer.start(store.device, *compared(segment, shared))
    hessians = tuple(observer.finish(ranks) if observer.portion else () for observer in observers)
    for shared, of_shared in zip(stage.inputs, hessians, strict=True):
        first = next(iter(of_shared), None)
        if first is not None and first.first_bad_batch is not None:
            raise NonFiniteError(
                f"the input of {', '.join(shared.weights)} is NaN or infinite in calibration batch "
                f"{first.first_bad_batch} (or its squares exceed fp32). Check that batch, or run the model in bf16 "
                "or fp32"
            )
    return hessians


def compared(segment: Segment, shared: SharedInput) -> tuple[bool, list[int]]:
    """Whether an observer sees what its rows are in the original model, and the widths of the residual streams that it
    sees; as `observe` has it."""
    calls = segment.module.graph.find_nodes(op="call_module", target=shared.name)
    originals, streams = zip(*(call.args[3:] for call in calls), strict=True)
    return any(node is not None for node in originals), [int(now.meta["val"].shape[-1]) for now, _ in streams[0]]


def run_only(segment: Segment, store: ActivationStore, static: Callable[[str], Any], ranks: Ranks = ALONE) -> None:
    """`calibrate` of a segment whose stage is solved already: for what later segments read, and without observers."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(segment.module.graph, {}))
    for node in graph.find_nodes(op="call_module"):
        graph.erase_node(node)
    graph.eliminate_dead_code()  # what was computed for them
    plain = dataclasses.replace(segment, module=fx.GraphModule(segment.module, graph))
    for _ in _run(plain, store, static, ranks, replace=True):
        pass


def _run(
    segment: Segment, store: ActivationStore, static: Callable[[str], Any], ranks: Ranks, *, replace: bool
) -> Iterator[None]:
    """One batch after the other, each once the one before was looked at."""
    statics = [static(name) for name in segment.statics]
    for index, values in enumerate(store.read(segment.reads)):
        try:
            written = dict(zip(segment.writes, run_segment(segment, values, statics), strict=True))
        except Exception as e:
            e.add_note(f"in calibration batch {ranks.number(index)}")
            raise
        if replace:
            store.replace(index, written, segment.keeps)
        del written  # the store may have put it elsewhere
        yield
