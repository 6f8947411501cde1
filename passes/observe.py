"""Plan → Plan whose segments observe: for every activation that weights of a stage read, a node that adds its rows to
that stage's Hessian.

Invariant: each Hessian of a stage has one observer module in that stage's segment, called once per activation; the
values a segment computes are those it computed before.
"""

import dataclasses

from torch import fx

from gptq_ao.errors import PassError
from gptq_ao.hessian import HessianObserver
from gptq_ao.passes.records import HessianGroup, Plan, Segment

__all__ = ["observe"]


def observe(plan: Plan) -> Plan:
    """A new Plan; the segments of the given one are unchanged."""
    segments = tuple(
        _with_observers(segment, stage.groups) for segment, stage in zip(plan.segments, plan.stages, strict=True)
    )
    result = dataclasses.replace(plan, segments=segments)
    _check(result)
    return result


def _with_observers(segment: Segment, groups: tuple[HessianGroup, ...]) -> Segment:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(segment.module.graph, copies))
    module = fx.GraphModule(segment.module, graph)  # with the attributes that the graph refers to
    by_name = {n.name: copies[n] for n in segment.module.graph.nodes if n in copies}
    for group in groups:
        module.add_submodule(group.name, HessianObserver(group.in_features))
        for activation, mask in group.activations:
            # After every placeholder, and after the value itself.
            value, last_input = by_name[activation], list(graph.find_nodes(op="placeholder"))[-1]
            with graph.inserting_after(last_input if value.op == "placeholder" else value):
                graph.call_module(group.name, (value, by_name[mask]) if mask is not None else (value,))
    graph.lint()
    module.recompile()
    return dataclasses.replace(segment, module=module)


def _check(plan: Plan) -> None:
    for number, (segment, stage) in enumerate(zip(plan.segments, plan.stages, strict=True), 1):
        calls = [n.target for n in segment.module.graph.nodes if n.op == "call_module"]
        wanted = [g.name for g in stage.groups for _ in g.activations]
        if sorted(calls) != sorted(wanted):
            raise PassError(f"segment {number} calls the observers {sorted(calls)}, its stage needs {sorted(wanted)}")
