"""Program + sites → the same, in which every token reaches every expert for the Hessians (and for nothing else).

A router sends a token to k of E experts, so an expert may see few rows of the calibration data, or none. Here all see
all of them:

* A stack that multiplies gathered tokens, `x[numbers]·W[e]`, gets the rows of x: one Hessian, shared by all experts.
* A stack further down multiplies what an earlier one made of the tokens. The part of the graph between the router's
  choice and that product is copied ⌈E/k⌉ times, each copy with a choice of its own: every token to the experts
  0 … k−1, to k … 2k−1, and so on. The copies end in observers; what the model computes does not depend on them.
"""

import dataclasses

import torch
from torch import Tensor, fx

from gptq_ao.errors import ConfigError
from gptq_ao.passes.products.operators import gathered, op_name
from gptq_ao.passes.records import LinearSite, Program, Rows, dim, static_size
from gptq_ao.passes.tracing.graph_module import graph_module

__all__ = ["reach_all_experts", "same_choice"]


def same_choice(choice: Tensor, first: int) -> Tensor:
    """In place of a router's choice, integers [T, k]: the experts `first` … `first` + k − 1 for every token."""
    experts = torch.arange(first, first + choice.shape[1], dtype=choice.dtype, device=choice.device)
    return experts.expand_as(choice).contiguous()


def reach_all_experts(program: Program, sites: tuple[LinearSite, ...]) -> tuple[Program, tuple[LinearSite, ...]]:
    """A new Program; the given one is unchanged. Sites that see rows by expert get rows of all tokens.

    Raises:
        ConfigError: a stack of experts gets its rows in another way than sorted by a router's choice.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, copies))
    for old, new in copies.items():
        # Sites name nodes, and a copied graph may have renamed them.
        new.name = old.name
    result: list[LinearSite] = []
    for site in sites:
        # Only rows sorted by expert (with offsets) depend on the router. All other sites see every token anyway.
        result += _all_tokens(graph, site, sites) if site.rows[0].offsets is not None else [site]
    graph.lint()
    return dataclasses.replace(program, module=graph_module(program.module, graph)), tuple(result)


def _all_tokens(graph: fx.Graph, site: LinearSite, sites: tuple[LinearSite, ...]) -> list[LinearSite]:
    (rows,) = site.rows
    nodes = {n.name: n for n in graph.nodes}
    value, offsets = nodes[rows.value], nodes[rows.offsets or ""]
    choice = _choice(offsets)
    if choice is None:
        raise ConfigError(
            f"calibrate_all_experts: {site.weight!r} gets its rows from {op_name(value)}, in no way known to depend on "
            "a router's choice. Leave the setting out, or exclude the weight by a rule"
        )
    taken = value
    while op_name(taken) == "aten::masked_fill" and isinstance(taken.args[0], fx.Node):
        taken = taken.args[0]  # rows of experts that are elsewhere (expert parallel): with all tokens, none
    tokens, _ = gathered(taken) or (None, None)
    # The first stack of a layer: the tensor that its rows were gathered from holds every token once.
    if tokens is not None and not _descends(tokens, choice):
        # Rows before the gather, hence without its row numbers.
        every = Rows(tokens.name, mask=rows.mask, gathers=rows.gathers[:-1])
        return [dataclasses.replace(site, rows=(every,), experts=1)]

    # k, the number of experts that a token is sent to.
    per_token = static_size(choice.meta["val"].shape[1]) or 1
    between = _between(graph, choice, (value, offsets))
    found, others = [], []
    for start in range(0, site.experts, per_token):
        # If k does not divide E, the last copy begins earlier: experts beyond E do not exist.
        copied = _copy(graph, choice, min(start, site.experts - per_token), between)

        def renamed(name: str, copied: dict[fx.Node, fx.Node] = copied) -> str:
            return copied.get(nodes[name], nodes[name]).name

        gathers = tuple(renamed(g) for g in rows.gathers)
        found.append(Rows(renamed(value.name), offsets=renamed(offsets.name), mask=rows.mask, gathers=gathers))
        # A copied product is a use of its weight too, without rows that anyone has to observe.
        others += [dataclasses.replace(s, node=renamed(s.node), rows=()) for s in sites if nodes[s.node] in copied]
    return [dataclasses.replace(site, rows=tuple(found)), *others]


def _copy(graph: fx.Graph, choice: fx.Node, first: int, between: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The nodes once more, after another choice."""
    copied: dict[fx.Node, fx.Node] = {}
    # At the end of the graph, where everything that a copy reads has been computed.
    with graph.inserting_before(next(n for n in graph.nodes if n.op == "output")):
        copied[choice] = graph.call_function(same_choice, (choice, first))
        copied[choice].meta = dict(choice.meta)
        for node in between:
            # What does not depend on the choice is not copied: both read the same node.
            copied[node] = graph.node_copy(node, lambda n: copied.get(n, n))
    return copied


def _choice(offsets: fx.Node) -> fx.Node | None:
    """The router's choice [T, k] that `offsets` counts: back along first operands to the first integer matrix."""
    node = offsets
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        # A row of integers per token: the numbers of its experts. (Values of a router are floats.)
        if dim(node) == 2 and not node.meta["val"].is_floating_point():
            return node
    return None


def _between(graph: fx.Graph, start: fx.Node, ends: tuple[fx.Node, ...]) -> list[fx.Node]:
    """Nodes after `start` that depend on it and lead to `ends`, in graph order."""
    after = {start}
    for node in graph.nodes:
        if any(i in after for i in node.all_input_nodes):
            after.add(node)
    leading, todo = set(), list(ends)
    while todo:
        node = todo.pop()
        if node in after and node is not start and node not in leading:
            leading.add(node)
            todo += node.all_input_nodes
    return [n for n in graph.nodes if n in leading]


def _descends(node: object, ancestor: fx.Node) -> bool:
    """Whether the values of `node` depend on those of `ancestor`; that sizes do does not count."""
    seen, todo = set(), [node]
    while todo:
        n = todo.pop()
        if n is ancestor:
            return True
        if isinstance(n, fx.Node) and n not in seen and not isinstance(n.meta.get("val"), int | torch.SymInt):
            seen.add(n)
            todo += n.all_input_nodes
    return False
