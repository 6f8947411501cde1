"""Program → every place where an activation is multiplied by a parameter, and all other matrices with the reason.

Invariant: every parameter with two or more dimensions is either in a site or excluded with a reason. Recognised are
`linear`, `addmm`, `mm` and `matmul`, with the parameter as it is or transposed: what is written as nn.Linear, Conv1D,
nn.MultiheadAttention or a product in plain torch. Nothing depends on module classes.
"""

import operator
import re
from collections import deque
from typing import Any

import torch
from torch import fx

from gptq_ao.errors import PassError
from gptq_ao.passes.records import Excluded, LinearSite, Program

__all__ = ["find_linears"]

aten = torch.ops.aten

_LINEARS = {aten.linear.default: (0, 1), aten.addmm.default: (1, 2)}  # op -> positions of activation and weight
_PRODUCTS = {aten.mm.default, aten.matmul.default}  # either operand may be the weight
_TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.mT.default, aten.transpose.int, aten.permute.default}
_EMBEDDINGS = {aten.embedding.default, aten.embedding_bag.padding_idx}
# Ops that keep the rows of an activation: XᵀX is the same before and after.
_ROW_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.contiguous.default,
    aten.clone.default,
}
_CHOICES = {aten.topk.default, aten.sort.default, aten.argmax.default, aten.argsort.default, aten.multinomial.default}
_PADDING_MASK = "attention_mask"  # [batch, position], zero where there is no token
_HEADS = re.compile(r"(.*\.)?(lm_head|embed_out)\.weight")


def find_linears(
    program: Program, heads: frozenset[str] = frozenset()
) -> tuple[tuple[LinearSite, ...], tuple[Excluded, ...]]:
    """Sites in graph order, and the matrices that no site multiplies.

    Args:
        heads: parameter names of output heads that the model itself declares.
    """
    sites: list[LinearSite] = []
    problems: dict[str, str] = {}
    embedded = {
        program.parameters[n.args[0].name]
        for n in program.graph.nodes
        if n.target in _EMBEDDINGS and n.args[0].name in program.parameters
    }
    for node in program.graph.nodes:
        for activation, weight in _operands(node):
            found = _parameter(weight, program)
            if found is None:
                continue
            name, flipped, shape = found
            if _depends_only_on_parameters(activation, program):
                problems[name] = f"multiplied by other parameters at {node.name}, not by an activation"
                continue
            # `linear` takes a weight [out, in]; the products take [in, out].
            transposed = flipped if node.target is aten.linear.default else not flipped
            rows = _rows_of(activation)
            sites.append(
                LinearSite(
                    weight=name,
                    node=node.name,
                    activation=rows.name,
                    mask=_mask_of(rows, program),
                    shape=(shape[1], shape[0]) if transposed else (shape[0], shape[1]),
                    transposed=transposed,
                    left_out=_left_out(name, node, embedded, heads),
                )
            )
    excluded = _excluded(program, {s.weight for s in sites}, problems)
    _check(program, sites, excluded)
    return tuple(sites), tuple(excluded)


def _operands(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Candidates (activation, weight) of a product."""
    if node.op != "call_function":
        return []
    if node.target in _LINEARS:
        x, w = _LINEARS[node.target]
        return [(node.args[x], node.args[w])]  # type: ignore[list-item]
    if node.target in _PRODUCTS and isinstance(node.args[1], fx.Node) and _dim(node.args[1]) == 2:
        return [(node.args[0], node.args[1])]  # type: ignore[list-item]
    return []


def _parameter(node: fx.Node, program: Program) -> tuple[str, bool, tuple[int, int]] | None:
    """If `node` is a matrix parameter, perhaps transposed: its name, whether it is transposed, its own shape."""
    flipped = False
    while node.op == "call_function" and node.target in _TRANSPOSES and _dim(node) == 2:
        axes: Any = node.args[1:]
        if node.target is aten.permute.default:
            axes = tuple(axes[0])
        identity = (
            bool(axes) and len({a % 2 for a in axes}) == 1 if node.target is aten.transpose.int else axes == (0, 1)
        )
        flipped ^= not identity
        node = node.args[0]  # type: ignore[assignment]
    name = program.parameters.get(node.name) if node.op == "placeholder" else None
    if name is None or _dim(node) != 2:
        return None
    rows, columns = (int(s) for s in node.meta["val"].shape)
    return name, flipped, (rows, columns)


def _rows_of(node: fx.Node) -> fx.Node:
    """Back through ops that keep the last axis and the set of rows."""
    while node.op == "call_function" and node.target in _ROW_VIEWS and _dim(node.args[0]) > 0:
        if node.args[0].meta["val"].shape[-1] != node.meta["val"].shape[-1]:  # type: ignore[union-attr]
            break
        node = node.args[0]  # type: ignore[assignment]
    return node


def _mask_of(rows: fx.Node, program: Program) -> str | None:
    """The padding mask, if the rows are the positions it speaks of: [batch, position, features]."""
    mask = program.placeholders.get(_PADDING_MASK) if _PADDING_MASK in program.inputs else None
    if mask is None or _dim(mask) != 2 or _dim(rows) != 3:
        return None
    same_positions = mask.meta["val"].shape[1] == rows.meta["val"].shape[1]
    return mask.name if same_positions else None


def _left_out(name: str, node: fx.Node, embedded: set[str], heads: frozenset[str]) -> str | None:
    if name in embedded:
        return "also the embedding table"
    if name in heads or _HEADS.fullmatch(name):
        return "output head"
    return "router: decides which experts run" if _chooses(node) else None


def _chooses(node: fx.Node) -> bool:
    """Whether the result selects something (top-k, argmax) before any other weight is applied to it."""
    seen, todo = {node}, deque(node.users)
    while todo:
        user = todo.popleft()
        if user in seen:
            continue
        seen.add(user)
        if user.target in _CHOICES:
            return True
        if (
            user.target in _LINEARS
            or user.target in _PRODUCTS
            or user.target is aten.scaled_dot_product_attention.default
        ):
            continue
        if any(i.op == "placeholder" and i not in seen and _dim(i) >= 2 for i in user.all_input_nodes):
            continue
        todo.extend(user.users)
    return False


def _depends_only_on_parameters(node: fx.Node, program: Program) -> bool:
    seen, todo = set(), [node]
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        if n.op == "placeholder" and n.name not in program.parameters:
            return False
        todo.extend(n.all_input_nodes)
    return True


def _excluded(program: Program, found: set[str], problems: dict[str, str]) -> list[Excluded]:
    excluded = []
    for placeholder in program.graph.find_nodes(op="placeholder"):
        name = program.parameters.get(placeholder.name)
        if name is None or name in found or _dim(placeholder) < 2:
            continue
        ops = sorted({_op_name(user) for user in placeholder.users})
        if name in problems:
            excluded.append(Excluded(name, problems[name], expected=False))
        elif not ops:
            excluded.append(Excluded(name, "not used by the captured forward", expected=True))
        elif placeholder.users and all(user.target in _EMBEDDINGS for user in placeholder.users):
            excluded.append(Excluded(name, "embedding table", expected=True))
        elif any(_reaches_product(user) for user in placeholder.users):
            reason = f"reaches a product in a form that is not supported, through {', '.join(ops)}"
            excluded.append(Excluded(name, reason, expected=False))
        else:
            excluded.append(Excluded(name, f"not a matrix of a product, used by {', '.join(ops)}", expected=True))
    return excluded


_MORE_PRODUCTS = {
    "aten::bmm",
    "aten::baddbmm",
    "aten::einsum",
    "aten::bilinear",
    "aten::convolution",
    "aten::lstm",
    "aten::gru",
}


def _reaches_product(node: fx.Node, depth: int = 8) -> bool:
    """Whether `node`, or what is made of it in a few steps, is an operand of a product."""
    name = _op_name(node).partition(".")[0]
    if name in _MORE_PRODUCTS or node.target in _LINEARS or node.target in _PRODUCTS:
        return True
    if name.startswith(("aten::conv", "aten::_grouped_mm")) or "grouped_mm" in name or "lstm" in name or "rnn" in name:
        return True
    return depth > 0 and _is_view(node) and any(_reaches_product(user, depth - 1) for user in node.users)


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    aliases = schema is not None and any(a.alias_info is not None for a in schema.arguments)
    return aliases or node.target in _ROW_VIEWS


def _op_name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else str(getattr(node.target, "__name__", node.target))


def _dim(node: Any) -> int:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _check(program: Program, sites: list[LinearSite], excluded: list[Excluded]) -> None:
    matrices = {
        program.parameters[n] for n, p in program.placeholders.items() if n in program.parameters and _dim(p) >= 2
    }
    listed = {s.weight for s in sites} | {e.weight for e in excluded}
    if matrices != listed:
        raise PassError(f"find_linears neither found nor listed {sorted(matrices ^ listed)}")
    orientations: dict[str, set[bool]] = {}
    for s in sites:
        orientations.setdefault(s.weight, set()).add(s.transposed)
    both = [w for w, o in orientations.items() if len(o) > 1]
    if both:
        raise PassError(f"{both[0]} is multiplied both as it is and transposed, which is not supported")
