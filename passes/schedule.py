"""Selection → Plan: which weights are solved together, and what runs in between.

    level(value)  = number of the last stage whose weights it depends on (0: none)
    stage(weight) = 1 + level of the activation it multiplies
    segment k     = what is needed, with stages < k quantized, to compute the activations of stage k

So segment k begins with the freshly quantized products of stage k−1 and ends at the activations of stage k: a layer
sees inputs made by already quantized layers ("true sequential"), although each node runs once. Nodes run as late as
possible.

A weight that is applied several times is solved once: its uses, and everything between them, form one stage. What that
stage computed with unquantized weights is stale afterwards, so the next segment computes it again.

Values that depend on no parameter of two or more dimensions (masks, positions, rotary tables) are cheap: each segment
makes its own instead of storing them for every batch.

Invariants: a segment reads only inputs and what earlier segments wrote; a node that is neither cheap nor stale runs in
one segment only; each stage's activations are computed in its segment, or kept from an earlier one.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping

import networkx as nx
from torch import fx

from gptq_ao.errors import PassError
from gptq_ao.passes.products.residual_stream import added_to
from gptq_ao.passes.records import LinearSite, Part, Plan, Program, Rows, Segment, Selection, SharedInput, Stage
from gptq_ao.passes.tracing.graph_module import graph_module

__all__ = ["schedule"]


def schedule(program: Program, selection: Selection) -> Plan:
    """The stages of the selected weights, and the graphs that run between them. The program is not changed."""
    nodes = {n.name: n for n in program.graph.nodes}
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    level = _levels(program, selection.sites, nodes)
    last = max(level[nodes[s.node]] for s in selection.sites)
    sites_of: list[list[LinearSite]] = [[] for _ in range(last)]
    for s in selection.sites:
        sites_of[level[nodes[s.node]] - 1].append(s)
    stages = tuple(_stage(sites, selection, level, nodes, k) for k, sites in enumerate(sites_of, 1))

    outputs = next(n for n in program.graph.nodes if n.op == "output").all_input_nodes
    targets = [[nodes[v] for shared in s.inputs for v in shared.values] for s in stages]
    # One more segment than there are stages: the tail, which leads to the model's outputs.
    targets.append(list(outputs))
    inputs = [n for n in program.graph.find_nodes(op="placeholder") if n.name in program.inputs]
    # What every segment can have without storing it per batch: weights, buffers, constants, and branches of torch.cond.
    static = set(program.graph.find_nodes(op="placeholder")) - set(inputs) | set(
        program.graph.find_nodes(op="get_attr")
    )
    cheap = _cheap(program, static, set(inputs))

    # Forward: what each segment computes. Backward: what of it must be kept.
    live = dict.fromkeys(inputs, 0)  # valid value → the segment that makes it
    bodies: list[list[fx.Node]] = []
    for k, wanted in enumerate(targets, 1):
        bodies.append(_needed(order, wanted, live, static))
        # The rest is not kept: level k is about to become stale, and cheap values are made again where they are needed.
        live |= {n: k for n in bodies[-1] if level[n] < k and n not in cheap}
    segments: list[Segment] = []
    keep: set[fx.Node] = set()
    for k, body, wanted in reversed(list(zip(range(1, len(targets) + 1), bodies, targets, strict=True))):
        # A wanted value may come from an earlier segment, and then no node of this body takes it.
        used = {i for n in body for i in n.all_input_nodes} | set(wanted)
        reads = sorted((n for n in used if live.get(n, k) < k), key=order.__getitem__)
        # The tail comes first here. Only its outputs are given: they are the model's, in the model's order.
        segments.append(_segment(program, order, body, reads, static, keep, wanted if not segments else None))
        keep = (keep - set(body)) | set(reads)  # what the segment before this one has to hand on
    segments.reverse()
    plan = Plan(stages, tuple(segments[:-1]), segments[-1], selection)
    _check(program, plan, level, cheap, nodes)
    return plan


def _levels(program: Program, sites: Iterable[LinearSite], nodes: dict[str, fx.Node]) -> dict[fx.Node, int]:
    graph = nx.DiGraph()
    graph.add_nodes_from(program.graph.nodes)
    graph.add_edges_from((i, n) for n in program.graph.nodes for i in n.all_input_nodes)
    uses: dict[str, list[fx.Node]] = {}
    for s in sites:
        uses.setdefault(s.weight, []).append(nodes[s.node])
    for first, *more in uses.values():
        for other in more:  # edges in both directions: the uses, and all paths between them, become one component
            graph.add_edges_from([(first, other), (other, first)])
    multiplied = {n for names in uses.values() for n in names}

    components = nx.condensation(graph)  # without cycles, so that levels can be counted along it
    level: dict[int, int] = {}
    for c in nx.topological_sort(components):
        before = max((level[p] for p in components.predecessors(c)), default=0)
        # One level more where a chosen weight is multiplied: what follows waits until that weight is quantized.
        level[c] = before + (not multiplied.isdisjoint(components.nodes[c]["members"]))
    return {n: level[c] for n, c in components.graph["mapping"].items()}


def _stage(
    sites: list[LinearSite],
    selection: Selection,
    level: dict[fx.Node, int],
    nodes: dict[str, fx.Node],
    number: int,
) -> Stage:
    by_weight: dict[str, list[LinearSite]] = {}
    for s in sites:
        by_weight.setdefault(s.weight, []).append(s)
    # Same rows, same number of experts: one Hessian serves all these parts.
    parts_of: dict[tuple[tuple[Rows, ...], int], list[Part]] = {}
    width = {r: s.layout.in_features for s in sites for r in s.rows}
    for uses in by_weight.values():
        for part, rows, experts in _parts(uses):
            parts_of.setdefault((rows, experts), []).append(part)
    # An activation of this stage that depends on a weight of this stage: one that is applied again.
    entangled = any(level[nodes[v]] >= number for s in sites for r in s.rows for v in r.values)

    def residuals(rows: tuple[Rows, ...], experts: int, parts: list[Part]) -> Iterator[tuple[Part, str]]:
        # Row i of the activation has to be row i of the stream, so no experts, convolutions or second uses.
        if len(rows) > 1 or experts > 1 or rows[0].arrange or rows[0].offsets or rows[0].gathers:
            return
        for part in parts:
            uses = by_weight[part.weight]
            if len(uses) == 1 and selection.settings[part.weight].compensate == "residual":
                stream = added_to(nodes[uses[0].node])
                # Inputs and parameters are the same in the original model: they have no error to correct. And if the
                # stream holds a product of this very stage, its quantized value is not known yet.
                if stream is not None and stream.op == "call_function" and level[stream] < number:
                    yield part, stream.name

    return Stage(
        tuple(
            SharedInput(
                f"hessian_{number}_{i}",
                rows,
                tuple(parts),
                width[rows[0]],
                experts,
                tuple(residuals(rows, experts, parts)),
            )
            for i, ((rows, experts), parts) in enumerate(parts_of.items())
        ),
        entangled,
    )


def _parts(uses: list[LinearSite]) -> list[tuple[Part, tuple[Rows, ...], int]]:
    """A weight's rows, cut wherever the part of some use begins or ends, so that no piece is multiplied in part only.
    Each piece comes with all activation rows that it multiplies, and the number of experts in it."""
    cuts = sorted({c for s in uses for c in s.part})
    pieces = []
    for start, stop in itertools.pairwise(cuts):
        over = [s for s in uses if s.part[0] <= start and stop <= s.part[1]]
        # Uses without rows are copies made by `reach_all_experts`: nobody observes them.
        if any(s.rows for s in over):
            rows = tuple(dict.fromkeys(r for s in over for r in s.rows))
            # From a use with rows: `reach_all_experts` may have made one Hessian of all experts there.
            experts = next(s.experts for s in over if s.rows)
            pieces.append((Part(over[0].weight, start, stop), rows, experts))
    return pieces


def _cheap(program: Program, static: set[fx.Node], inputs: set[fx.Node]) -> set[fx.Node]:
    """Nodes that do not depend on any parameter of two or more dimensions: no product, and little to compute."""
    heavy = {n for n in static if n.name in program.parameters and n.meta["val"].dim() >= 2}
    # In graph order, so whether an input is heavy is known before its users are looked at.
    for n in program.graph.nodes:
        if any(i in heavy for i in n.all_input_nodes):
            heavy.add(n)
    return {n for n in program.graph.nodes if n.op == "call_function" and n not in heavy}


def _needed(
    order: dict[fx.Node, int], wanted: Iterable[fx.Node], live: Mapping[fx.Node, int], static: set[fx.Node]
) -> list[fx.Node]:
    """The nodes that compute `wanted` from what there is, in graph order."""
    seen: set[fx.Node] = set()
    todo = [n for n in wanted if n not in live and n not in static]
    while todo:
        n = todo.pop()
        if n not in seen:
            seen.add(n)
            todo += [i for i in n.all_input_nodes if i not in live and i not in static]
    return sorted(seen, key=order.__getitem__)


def _segment(
    program: Program,
    order: dict[fx.Node, int],
    body: list[fx.Node],
    reads: list[fx.Node],
    static: set[fx.Node],
    keep: set[fx.Node],
    outputs: list[fx.Node] | None,
) -> Segment:
    used = {i for n in body for i in n.all_input_nodes}
    statics = sorted((n for n in used & static if n.op == "placeholder"), key=order.__getitem__)
    writes = [n for n in body if n in keep] if outputs is None else outputs
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    # Not handed in like placeholders: graphs, which the segment's module holds itself.
    attributes = sorted(
        (n for n in used & static if n.op == "get_attr"), key=order.__getitem__
    )  # the branches of torch.cond
    given = {*reads, *statics}
    for n in (*reads, *statics, *attributes, *body):
        copies[n] = graph.placeholder(n.name) if n in given else graph.node_copy(n, copies.__getitem__)
        # Stages, stores and observers refer to values by name, so names stay the same in all segments.
        copies[n].name, copies[n].meta = n.name, dict(n.meta)
    graph.output(tuple(copies[n] for n in writes))
    graph.lint()
    kept = sorted(keep, key=order.__getitem__)
    names = [tuple(n.name for n in nodes) for nodes in (reads, statics, writes, kept)]
    return Segment(graph_module(program.module, graph), names[0], names[1], names[2], names[3])


def _check(
    program: Program, plan: Plan, level: dict[fx.Node, int], cheap: set[fx.Node], nodes: dict[str, fx.Node]
) -> None:
    stored = {name for name in program.inputs if name is not None}
    ran: dict[str, int] = {}
    for k, segment in enumerate((*plan.segments, plan.tail), 1):
        missing = set(segment.reads) - stored
        if missing:
            raise PassError(f"segment {k} reads {sorted(missing)}, which no earlier segment keeps")
        inside = {n.name for n in segment.module.graph.nodes}
        for name in (n.name for n in segment.module.graph.nodes if n.op == "call_function"):
            # Level k or higher, yet already here: between two uses of a weight of stage k, before that is solved.
            stale = level[nodes[name]] >= k
            if name in ran and nodes[name] not in cheap and not stale and level[nodes[name]] < ran[name]:
                raise PassError(f"node {name} runs in segments {ran[name]} and {k}")
            ran[name] = k
        # The tail belongs to no stage.
        if k <= len(plan.stages):
            wanted = {v for shared in plan.stages[k - 1].inputs for v in shared.values}
            if not wanted <= inside:
                raise PassError(f"segment {k} does not reach {sorted(wanted - inside)}")
        stored = set(segment.keeps)
        if not stored <= nodes.keys():
            raise PassError(f"segment {k} keeps values that do not exist")
    if {w for s in plan.stages for shared in s.inputs for w in shared.weights} != set(plan.selection.settings):
        raise PassError("a chosen weight is in no stage")
