"""A product → the value that its output is added to: the residual stream of a transformer."""

from torch import fx

from gptq_ao.passes.products.operators import CASTS, COPIES, RESHAPES, op_name
from gptq_ao.passes.records import dim

__all__ = ["added_to"]

# What may lie between a product and the sum. The rounding of a cast is small beside the error that is made up for.
_UNCHANGED = COPIES | RESHAPES | CASTS


def added_to(product: fx.Node) -> fx.Node | None:
    """The other operand of the sum, of the same shape; None if the product's output goes elsewhere, too, or is changed
    before (scaled, normalized)."""
    node = product
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.op != "call_function":
            return None
        # alpha would scale one operand; and a value added to itself is a sum with one input.
        if op_name(user) == "aten::add" and user.kwargs.get("alpha", 1) == 1 and len(user.all_input_nodes) == 2:
            other = next(n for n in user.all_input_nodes if n is not node)
            if dim(other) == dim(node) and other.meta["val"].shape == node.meta["val"].shape:
                return other
            if dim(other) != 1:  # of a bias, go on
                return None
        elif op_name(user) not in _UNCHANGED or user.args[0] is not node:
            return None
        node = user
    return None
