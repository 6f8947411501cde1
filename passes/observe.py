"""Plan → Plan whose segments observe: for every activation that weights of a stage read, a node that adds its rows to
that stage's Hessian.

Invariant: each Hessian of a stage has one observer module in that stage's segment, called once for each of the
activations it is made of; the values a segment computes are those it computed before. A stage names only those residual
streams that are observed.
"""

import dataclasses

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from gptq_ao.errors import PassError
from gptq_ao.passes.records import Plan, Rows, Segment, SharedInput, Stage, twin
from gptq_ao.passes.tracing.graph_module import graph_module
from gptq_ao.solver.hessian import HessianObserver, gathered_mask

__all__ = ["observe", "uncompensated"]


def observe(plan: Plan) -> Plan:
    """A new Plan; the segments of the given one are unchanged."""
    stages = tuple(
        _with_differing_residuals(segment, stage) for segment, stage in zip(plan.segments, plan.stages, strict=True)
    )

    def compensated(shared: SharedInput) -> bool:
        # For experts there is no row to compare with, see `uncompensated`.
        return shared.experts == 1 and any(_wants_compensation(plan, w) for w in shared.weights)

    segments = tuple(
        _with_observers(segment, stage.inputs, [shared.name for shared in stage.inputs if compensated(shared)])
        for segment, stage in zip(plan.segments, stages, strict=True)
    )
    result = dataclasses.replace(plan, segments=segments, stages=stages)
    _check(result)
    return result


def uncompensated(plan: Plan) -> tuple[str, ...]:
    """The weights whose settings ask for compensation that is impossible: of experts, since the original model may send
    other tokens to them, and there is no row to compare with."""
    names: dict[str, None] = {}
    for segment, stage in zip(plan.segments, plan.stages, strict=True):
        nodes = {n.name: n for n in segment.module.graph.nodes}
        for shared in stage.inputs:
            if not all(_same_rows(nodes[r.value], r) for r in shared.rows) or shared.experts > 1:
                names |= dict.fromkeys(w for w in shared.weights if _wants_compensation(plan, w))
    return tuple(names)


def _wants_compensation(plan: Plan, weight: str) -> bool:
    return plan.selection.settings[weight].recipe.compensates


def _with_differing_residuals(segment: Segment, stage: Stage) -> Stage:
    """Drop the residual streams that are the same in the original model, for which there is nothing to correct. Those
    that stay are `Hessian.residuals`, in order."""
    names = {n.name for n in segment.module.graph.nodes}
    inputs = (
        dataclasses.replace(shared, residuals=tuple((part, r) for part, r in shared.residuals if twin(r) in names))
        for shared in stage.inputs
    )
    return dataclasses.replace(stage, inputs=tuple(inputs))


def _with_observers(segment: Segment, inputs: tuple[SharedInput, ...], compensated: list[str]) -> Segment:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(segment.module.graph, copies))
    module = graph_module(segment.module, graph)  # with the attributes that the graph refers to
    by_name = {n.name: copies[n] for n in segment.module.graph.nodes if n in copies}
    # Only values that quantization has changed have a twin.
    twins = {n.name: by_name[twin(n.name)] for n in segment.module.graph.nodes if twin(n.name) in by_name}
    place = {n: i for i, n in enumerate(graph.nodes)}
    for shared in inputs:
        module.add_submodule(shared.name, HessianObserver(shared.in_features, shared.experts))
        for rows in shared.rows:
            # Pairs: the residual stream as it is now, and as the original model has it.
            streams = [(by_name[r], twins[r]) for _, r in shared.residuals]
            _insert(graph, place, shared.name, rows, by_name, twins if shared.name in compensated else {}, streams)
    graph.lint()
    module.recompile()
    return dataclasses.replace(segment, module=module)


def _insert(
    graph: fx.Graph,
    place: dict[fx.Node, int],
    observer: str,
    rows: Rows,
    by_name: dict[str, fx.Node],
    twins: dict[str, fx.Node],
    streams: list[tuple[fx.Node, fx.Node]],
) -> None:
    """Bring the rows into form and hand them to the observer, as soon as all they are made of is there."""
    # The original model's activation, where its row i belongs to the same token as row i here.
    original = twins.get(rows.value) if _same_rows(by_name[rows.value], rows) else None
    inputs = [*(by_name[v] for v in rows.values), *(n for pair in streams for n in pair)]
    inputs += [original] if original is not None else []
    last_input = list(graph.find_nodes(op="placeholder"))[-1]  # nothing may stand between placeholders
    # As early as possible: an activation that only the observer still needs is freed right after it.
    with graph.inserting_after(max((*inputs, last_input), key=place.__getitem__)):
        # First the place, with a provisional argument. What brings the rows into form goes before it.
        call = graph.call_module(observer, (by_name[rows.value],))
    with graph.inserting_before(call):
        value, mask = by_name[rows.value], None
        if rows.mask is not None:
            gathers = [by_name[g] for g in rows.gathers]
            mask = graph.call_function(gathered_mask, (by_name[rows.mask], *gathers)) if gathers else by_name[rows.mask]
        if rows.arrange is not None:
            function, arguments = rows.arrange
            value = graph.call_function(function, (value, *arguments))
            if original is not None:
                original = graph.call_function(function, (original, *arguments))
        offsets = by_name[rows.offsets] if rows.offsets is not None else None
        call.args = (value, mask, offsets, original, tuple(streams))


def _same_rows(value: fx.Node, rows: Rows) -> bool:
    """Whether row i is that of the same token in the original model, whatever a router chose there. Not if rows were
    gathered, sorted by expert, or are as many as the data decides (an unbacked size)."""
    sizes = [s for s in value.meta["val"].shape if isinstance(s, torch.SymInt)]
    return rows.offsets is None and not rows.gathers and not free_unbacked_symbols(sizes)


def _check(plan: Plan) -> None:
    for number, (segment, stage) in enumerate(zip(plan.segments, plan.stages, strict=True), 1):
        calls = [n.target for n in segment.module.graph.nodes if n.op == "call_module"]
        # A weight that is applied several times has several activations, and the observer as many calls.
        wanted = [shared.name for shared in stage.inputs for _ in shared.rows]
        if sorted(calls) != sorted(wanted):
            raise PassError(f"segment {number} calls the observers {sorted(calls)}, its stage needs {sorted(wanted)}")
