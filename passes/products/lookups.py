"""Rows of tables that data asks for: token ids of an embedding, positions of a table of positions."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from gptq_ao.errors import CalibrationError
from gptq_ao.passes.products.operators import CASTS, COPIES, EMBEDDINGS, RESHAPES, op_name
from gptq_ao.passes.records import Program

__all__ = ["Lookup", "check_rows", "lookups"]


@dataclass(frozen=True)
class Lookup:
    """
    Attributes:
        table: the name of the parameter or buffer in the model.
        size: how many rows it has.
        index: the node of the row numbers.
        source: the input that holds them as they are; None if they are computed.
        least: the smallest number allowed.
    """

    table: str
    size: int
    index: fx.Node
    source: str | None
    least: int


def lookups(program: Program) -> Iterator[Lookup]:
    """All in parameters and buffers."""
    names = {**program.parameters, **program.buffers}
    for node in program.graph.nodes:
        table, axis, index, least = _operands(node)
        base = _base(table)
        if table is None or base is None or base.name not in names or not isinstance(index, fx.Node):
            continue
        size = table.meta["val"].shape[axis]
        if isinstance(size, int) and index.meta["val"].dtype not in (torch.bool, torch.uint8):  # those are masks
            source = _base(index)
            held = source is not None and source.name in program.inputs
            yield Lookup(
                names[base.name],
                size,
                index,
                source.name if held and source is not None else None,
                -size if least is None else least,
            )


def check_rows(index: Tensor, size: int, least: int, table: str, source: str | None, where: str) -> None:
    """
    Args:
        index: row numbers, of any shape.

    Raises:
        CalibrationError: one is not between `least` and `size`; names the rest.
    """
    if not index.numel():
        return
    low, high = (int(v) for v in index.aminmax())
    if least <= low and high < size:
        return
    bad = low if low < least else high
    if source is not None:
        advice = (
            "a padding id such as -1 or -100 is for labels; pad with one of the tokenizer's ids, and an attention_mask"
            if bad < 0
            else "use the tokenizer of this model"
        )
        raise CalibrationError(
            f"{where}: input {source!r} has the id {bad}, and {table!r} has {size} rows, 0 to {size - 1}: {advice}"
        )
    raise CalibrationError(
        f"{where}: the model looks up row {bad} of {table!r}, which has {size} rows: give it shorter sequences, if "
        "these are positions, or other ids"
    )


def _operands(node: fx.Node) -> tuple[fx.Node | None, int, fx.Node | None, int | None]:
    """Table, axis, row numbers, the smallest number allowed (None: −size)."""
    if node.op == "call_function":
        name, args = op_name(node), node.args
        if name in EMBEDDINGS:
            return args[0], 0, args[1], 0  # type: ignore[return-value]
        if name == "aten::index_select":
            return args[0], args[1], args[2], 0  # type: ignore[return-value]
        if name == "aten::index" and isinstance(args[1], list | tuple) and isinstance(args[1][0], fx.Node):
            return args[0], 0, args[1][0], None  # type: ignore[return-value]
    return None, 0, None, 0


def _base(node: fx.Node | None) -> fx.Node | None:
    """The placeholder whose numbers a node has, in whatever shape."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if op_name(node) not in COPIES | CASTS | RESHAPES:
            return None
        node = node.args[0]  # type: ignore[assignment]
    return node if isinstance(node, fx.Node) and node.op == "placeholder" else None
