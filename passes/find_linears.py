"""Program → every place where an activation is multiplied by a parameter, and all other matrices with the reason.

Invariant: every parameter with two or more dimensions is either in a site or excluded with a reason. Nothing depends on
module classes: `passes/products/table.py` knows the operators, `passes/products/weight_views.py` what lies between a
parameter and its product.
"""

import dataclasses
import re
from collections.abc import Collection

from torch import fx

from gptq_ao.errors import PassError
from gptq_ao.passes.products.operators import (
    ATTENTION,
    CASTS,
    CHOICES,
    COPIES,
    EMBEDDINGS,
    GATHERS,
    RESHAPES,
    is_view,
    op_name,
)
from gptq_ao.passes.products.table import Product, bias_of, multiplies, products
from gptq_ao.passes.products.token_rows import TokenRows
from gptq_ao.passes.products.weight_views import read_matrix, trace_parameter
from gptq_ao.passes.records import HEAD, Excluded, LinearSite, Program, Rows, dim

__all__ = ["ROUTER", "find_linears", "left_out_by_name"]

ROUTER = "router: decides which experts run"

# Usual names of output heads, for models that do not declare theirs.
_HEADS = re.compile(r"(.*\.)?(lm_head|embed_out|output_projection)\.weight")


def find_linears(
    program: Program, heads: frozenset[str] = frozenset()
) -> tuple[tuple[LinearSite, ...], tuple[Excluded, ...]]:
    """Sites in graph order, and the matrices that no site multiplies.

    Args:
        heads: parameter names of output heads that the model itself declares.
    """
    tokens = TokenRows(program)
    # Parameter → why it cannot be quantized. One use that is not supported rules out all others.
    sites: list[LinearSite] = []
    problems: dict[str, str] = {}
    for node in program.graph.nodes:
        for product in products(node):
            found = _site(node, product, program, tokens, problems)
            if found is not None:
                sites.append(found)
                break
    # Only now: a weight may be used again anywhere in the graph.
    _refuse_contradictions(sites, problems)
    sites = _with_reasons([s for s in sites if s.weight not in problems], program, heads)
    excluded = _excluded(program, {s.weight for s in sites}, problems)
    _check(program, sites, excluded)
    return tuple(sites), tuple(excluded)


def _site(
    node: fx.Node, product: Product, program: Program, tokens: TokenRows, problems: dict[str, str]
) -> LinearSite | None:
    found = trace_parameter(product.weight, program)
    if found is None:
        return None
    # A product of parameters alone has no rows that calibration data could decide: no Hessian.
    if _sources(product.activation, program) is not None:
        problems[found.weight] = f"{op_name(node)} multiplies it by other parameters, not by an activation"
        return None
    matrix = product.matrix(found.view)
    read = read_matrix(found.shape, matrix) if matrix is not None else None
    # `view_shape`: the parameter is neither a matrix nor a stack. Only some operators read such a one.
    if read is None or (read[0].view_shape is not None and not product.any_shape):
        problems[found.weight] = f"{op_name(node)} reads it across its rows and input features"
        return None
    layout, part, experts = read
    # Linears that read reshapes of one value share its Hessian. Arrangements and offsets are for the shape as it is.
    value = product.activation if product.arrange or product.offsets else _before_views(product.activation)
    # Only plain rows are tokens: an arranged activation has patches or other axes in their place.
    mask, gathers = tokens.of(product.activation) if product.arrange is None else (None, ())
    return LinearSite(
        weight=found.weight,
        node=node.name,
        layout=layout,
        part=part,
        rows=(Rows(value.name, product.arrange, product.offsets.name if product.offsets else None, mask, gathers),),
        # If all experts multiply the same rows, their Hessians are one, as if they were one tall matrix.
        experts=experts if product.experts else 1,
        left_out=product.note,
    )


def _before_views(node: fx.Node) -> fx.Node:
    """Back through operators that keep the rows of an activation, in their order: XᵀX is the same before and after.
    Not through casts: XᵀX is of the numbers that are multiplied, rounded if they are."""
    while node.op == "call_function" and op_name(node) in COPIES | RESHAPES:
        before = node.args[0]
        if not isinstance(before, fx.Node) or not dim(before) or not dim(node):
            break
        # Features were cut or joined, so that these rows are other vectors.
        if before.meta["val"].shape[-1] != node.meta["val"].shape[-1]:
            break
        node = before
    return node


def _refuse_contradictions(sites: list[LinearSite], problems: dict[str, str]) -> None:
    """All uses of a parameter have to agree on its layout, and on whether it holds experts: it is stored once, in one
    form."""
    first: dict[str, LinearSite] = {}
    for s in sites:
        other = first.setdefault(s.weight, s)
        if s.layout != other.layout:
            problems[s.weight] = f"{other.node} and {s.node} read it in two ways"
        elif s.experts != other.experts:
            problems[s.weight] = f"{other.node} multiplies it for all experts, {s.node} for a single one"


def _with_reasons(sites: list[LinearSite], program: Program, heads: frozenset[str]) -> list[LinearSite]:
    """Say of each site why its weight is left out by default, if it is."""
    nodes, choosing = {n.name: n for n in program.graph.nodes}, _choosing(program)
    embedded = {
        program.parameters[n.args[0].name]
        for n in program.graph.nodes
        if n.op == "call_function" and op_name(n) in EMBEDDINGS and n.args[0].name in program.parameters
    }

    def reason(site: LinearSite) -> str | None:
        by_name = left_out_by_name(site.weight, embedded, heads)
        return by_name or (ROUTER if nodes[site.node] in choosing else site.left_out)

    return [dataclasses.replace(s, left_out=reason(s)) for s in sites]


def left_out_by_name(weight: str, embedded: Collection[str], heads: Collection[str]) -> str | None:
    """Why a weight is not quantized by default, as far as that does not depend on what becomes of its products."""
    if weight in embedded:
        return "also the embedding table"
    return HEAD if weight in heads or _HEADS.fullmatch(weight) else None


def _choosing(program: Program) -> set[fx.Node]:
    """The nodes whose result selects something (top-k, argmax) before any other weight is applied to it."""
    found: set[fx.Node] = set()
    # Backwards, so that of all that reads a node it is known. Each node is looked at once, however deep the model is.
    for node in reversed(program.graph.nodes):
        if any(op_name(user) in CHOICES or (user in found and not _applies_weights(user)) for user in node.users):
            found.add(node)
    return found


def _applies_weights(node: fx.Node) -> bool:
    """What is chosen after another product is not this weight's choice; nor if another matrix or input takes part.
    (Parameters of one dimension are biases and scales: routers have those.)"""
    if multiplies(node) or op_name(node) in ATTENTION:
        return True
    return any(i.op == "placeholder" and dim(i) >= 2 for i in node.all_input_nodes)


def _sources(node: fx.Node, program: Program) -> set[str] | None:
    """The parameters that alone determine `node`; None if an input of the model has a part in it."""
    seen, found, todo = set(), set(), [node]
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        if n.op == "placeholder" and n.name in program.inputs:
            return None
        if n.name in program.parameters:
            found.add(program.parameters[n.name])
        todo.extend(n.all_input_nodes)
    # Nothing found: made of constants alone.
    return found or None


def _excluded(program: Program, found: set[str], problems: dict[str, str]) -> list[Excluded]:
    made_of = _made_of(program)
    excluded = []
    for placeholder in program.graph.find_nodes(op="placeholder"):
        name = program.parameters.get(placeholder.name)
        if name is None or name in found or dim(placeholder) < 2:
            continue
        ops = sorted({op_name(user) for user in placeholder.users})
        # From the most specific reason to the most general one.
        if name in problems:
            excluded.append(Excluded(name, problems[name], expected=False))
        elif not ops:
            excluded.append(Excluded(name, "not used by the captured forward", expected=True))
        elif all(op in EMBEDDINGS for op in ops):
            excluded.append(Excluded(name, "embedding table", expected=True))
        elif name in made_of:
            # Is the parameter itself the operand, or something that was computed from it?
            made = "it" if made_of[name] in ops else f"what {', '.join(ops)} makes of it"
            reason = f"{made_of[name]} multiplies by {made}, in a form that is not supported"
            excluded.append(Excluded(name, reason, expected=False))
        else:
            excluded.append(Excluded(name, f"not a matrix of a product, used by {', '.join(ops)}", expected=True))
    return excluded


def _made_of(program: Program) -> dict[str, str]:
    """Parameter → an operator that multiplies by something computed from this parameter (and perhaps others), or by a
    part of it that data selects. Such a weight matters, so the report says which operator does not support it."""
    result: dict[str, str] = {}
    for node in program.graph.nodes:
        if not multiplies(node):
            continue
        bias, weights = bias_of(node), {product.weight for product in products(node)}
        for operand in node.all_input_nodes:
            # Added, not multiplied: what a bias is made of could never be a matrix of the product.
            if operand is bias:
                continue
            names = _sources(operand, program)
            if not names and operand in weights:  # rows looked up as an activation are not part of a weight
                names = _selected_from(operand, program)
            for name in names or ():
                result.setdefault(name, op_name(node))
    return result


def _selected_from(node: fx.Node, program: Program) -> set[str]:
    """The parameter of which `node` is a part that depends on data (`weight[expert_ids]`)."""
    by_data = False
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        if not (is_view(node) or op_name(node) in COPIES | CASTS | RESHAPES | GATHERS):
            return set()
        by_data |= op_name(node) in GATHERS
        node = node.args[0]
    return {program.parameters[node.name]} if by_data and node.name in program.parameters else set()


def _check(program: Program, sites: list[LinearSite], excluded: list[Excluded]) -> None:
    matrices = {
        program.parameters[n] for n, p in program.placeholders.items() if n in program.parameters and dim(p) >= 2
    }
    listed = {s.weight for s in sites} | {e.weight for e in excluded}
    # A matrix in neither list would stay dense without anybody being told.
    if matrices != listed:
        raise PassError(f"find_linears neither found nor listed {sorted(matrices ^ listed)}")
