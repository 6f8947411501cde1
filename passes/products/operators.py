"""What the passes know of operators that do not multiply. (Those that do stand in `table.py`.)

To teach the library a new operator, add its name to the set that it belongs in: every pass, and the replay of a model
that has no graph, then treats it like the others there. No operator is in two sets.
"""

from typing import Any

import torch
from torch import fx

from gptq_ao.passes.records import dim

__all__ = [
    "ASSERTIONS",
    "ATTENTION",
    "CASTS",
    "CHOICES",
    "COPIES",
    "DATA_ASSERTIONS",
    "DROPOUTS",
    "EMBEDDINGS",
    "GATHERS",
    "RESHAPES",
    "RESIZES",
    "gathered",
    "is_view",
    "op_name",
]

# The numbers of the first operand, in its shape; perhaps elsewhere in memory.
COPIES = frozenset(
    {
        "aten::alias",
        "aten::clone",
        "aten::contiguous",
        "aten::detach",
        "aten::lift_fresh",
        "aten::lift_fresh_copy",
    }
)
# The same, but of another dtype or on another device: they may be rounded.
CASTS = frozenset({"aten::_to_copy", "aten::to", "aten::type_as"})
# The numbers of the first operand, in their order, under another shape.
RESHAPES = frozenset(
    {
        "aten::_unsafe_view",
        "aten::flatten",
        "aten::ravel",
        "aten::reshape",
        "aten::reshape_as",
        "aten::squeeze",
        "aten::unflatten",
        "aten::unsqueeze",
        "aten::view",
        "aten::view_as",
    }
)
# Numbers of the first operand repeated or left out along an axis: all of them, once, where the shape stays.
RESIZES = frozenset({"aten::broadcast_to", "aten::expand", "aten::expand_as", "aten::narrow", "aten::slice"})
# (input, p, train): the identity unless training.
DROPOUTS = frozenset({"aten::alpha_dropout", "aten::dropout", "aten::feature_alpha_dropout", "aten::feature_dropout"})
# Rows of the first operand, in an order and a number that data decides: see `gathered`.
GATHERS = frozenset({"aten::index", "aten::index_select"})
# The first operand is a table, of which rows are looked up.
EMBEDDINGS = frozenset({"aten::embedding", "aten::embedding_bag"})
# Which is the largest? A weight whose product is asked that is a router.
CHOICES = frozenset({"aten::argmax", "aten::argsort", "aten::multinomial", "aten::sort", "aten::topk"})
# Mixes rows by scores that it computes: a choice made after it was not made by the products before it.
ATTENTION = frozenset({"aten::scaled_dot_product_attention"})
# Checks of what the data is, while the model runs.
DATA_ASSERTIONS = frozenset({"aten::_assert_async", "aten::_assert_scalar"})
# Checks of shapes and dtypes, which torch.export leaves behind. (One is a Python function of torch.)
ASSERTIONS = frozenset(
    {
        "aten::_assert_tensor_metadata",
        "aten::sym_constrain_range",
        "aten::sym_constrain_range_for_size",
        "_check",
    }
)


def op_name(node: fx.Node) -> str:
    """`namespace::name` without the overload, or a Python function's name. Names, since an operator may be registered
    after this module is imported."""
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else str(getattr(node.target, "__name__", node.target))


def is_view(node: fx.Node) -> bool:
    """Whether the operator's declaration says that its result may share the memory of its first argument."""
    schema: Any = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable or not schema.arguments:
        return False
    return schema.arguments[0].alias_info is not None


def gathered(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """x and the row numbers, a vector, of `x[numbers]` or `index_select(x, 0, numbers)`; None for all other nodes.

    A boolean mask does not count: only the data says how many rows it selects, so they cannot be told apart by size.
    """
    name = op_name(node)
    if name not in GATHERS:
        return None
    x: Any = node.args[0]
    numbers: Any = node.args[-1]
    if name == "aten::index":
        numbers = numbers[0] if len(numbers) == 1 else None
    elif node.args[1] not in (0, -dim(x)):
        return None  # of another axis
    if dim(numbers) != 1 or numbers.meta["val"].dtype == torch.bool:
        return None
    return x, numbers
