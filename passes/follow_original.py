"""Plan → Plan whose segments compute every value twice where it differs: once with the weights quantized so far, and
once as the original model would.

A layer can then make up for what the quantization before it did to its inputs (`solver/compensate.py`). It costs a
second forward, the waiting activations a second time, and the original weights until their products have run.

Invariant: the values that a segment computed before are computed as before; `twin(name)` is what `name` would be if
nothing were quantized, and is missing where that is the same.
"""

import dataclasses

from torch import fx

from gptq_ao.passes.records import Plan, Program, Segment, twin, twin_of
from gptq_ao.passes.tracing.graph_module import graph_module

__all__ = ["follow_original", "last_reads"]


def follow_original(program: Program, plan: Plan) -> Plan:
    """A new Plan. Its segments read the original values of parameters as statics named `twin(placeholder)`."""
    # Weight → number of the stage that quantizes it.
    stage_of = {
        w: number for number, stage in enumerate(plan.stages, 1) for shared in stage.inputs for w in shared.weights
    }
    stored: set[str] = set()  # names of values that wait twice
    segments = []
    for number, segment in enumerate(plan.segments, 1):
        # Weights of earlier stages. Those that no stage quantizes never differ, so they count as of this stage.
        quantized = {
            name for name in segment.statics if stage_of.get(program.parameters.get(name, ""), number) < number
        }
        twice = _differing(segment, quantized | (stored & set(segment.reads)))
        segments.append(_doubled(segment, twice, stored))
        # What was written here waits twice if it was computed twice; what came from before, if it did so already.
        stored = {n for n in segment.keeps if n in (twice if n in segment.writes else stored)}
    return dataclasses.replace(plan, segments=tuple(segments))


def last_reads(program: Program, plan: Plan) -> dict[str, int]:
    """Parameter → number of the last segment that reads its original value, for those that one does read."""
    found: dict[str, int] = {}
    for number, segment in enumerate(plan.segments, 1):
        placeholders = (twin_of(static) for static in segment.statics)
        found |= {program.parameters[p]: number for p in placeholders if p is not None}
    return found


def _differing(segment: Segment, sources: set[str]) -> set[str]:
    """The names of nodes that are in `sources` or depend on one."""
    found = set(sources)
    for node in segment.module.graph.nodes:
        if node.op == "call_function" and any(i.name in found for i in node.all_input_nodes):
            found.add(node.name)
    return found


def _doubled(segment: Segment, twice: set[str], stored: set[str]) -> Segment:
    graph = fx.Graph()
    first: dict[fx.Node, fx.Node] = {}
    second: dict[fx.Node, fx.Node] = {}
    nodes = list(segment.module.graph.nodes)
    by_name = {n.name: n for n in nodes}

    def copy(node: fx.Node, copies: dict[fx.Node, fx.Node], name: str) -> None:
        # A twin reads the twins of its inputs. An input without one is the same in both models, and shared.
        new = graph.node_copy(node, lambda n: copies.get(n, first[n]) if n in first else copies[n])
        new.name, new.meta = name, dict(node.meta)
        if node.op == "placeholder":
            new.target = name
        copies[node] = new

    # Placeholders are called by position: reads and their twins, then statics and theirs, as `_with_twins` lists them.
    for names in (segment.reads, segment.statics):
        for name in names:
            copy(by_name[name], first, name)
        for name in names:
            if name in twice:
                copy(by_name[name], second, twin(name))
    body = [n for n in nodes if n.op not in ("placeholder", "output")]
    for node in body:
        copy(node, first, node.name)
    for node in body:
        if node.name in twice:
            copy(node, second, twin(node.name))

    reads, statics, writes = (_with_twins(names, twice) for names in (segment.reads, segment.statics, segment.writes))
    # The same rule as for `stored` in `follow_original`.
    kept = {n for n in segment.keeps if n in (twice if n in segment.writes else stored)}
    outputs = [first[by_name[n]] for n in segment.writes] + [second[by_name[n]] for n in segment.writes if n in twice]
    graph.output(tuple(outputs))
    graph.lint()
    return Segment(graph_module(segment.module, graph), reads, statics, writes, _with_twins(segment.keeps, kept))


def _with_twins(names: tuple[str, ...], twice: set[str]) -> tuple[str, ...]:
    return (*names, *(twin(n) for n in names if n in twice))
