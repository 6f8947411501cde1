"""Which rows of an activation are padding.

A model's `attention_mask` [batch, position] is zero where there is no token. Rows at such positions must not count in a
Hessian. An activation's rows are positions of the mask if its leading axes are those of the mask, as they are or
flattened to one; a mixture of experts then gathers them, `tokens[numbers]`, and computes on what it gathered.
"""

import operator
from typing import Any

import torch
from torch import fx

from gptq_ao.passes.products.operators import GATHERS, gathered, op_name
from gptq_ao.passes.records import Program, dim

__all__ = ["MASKS", "TokenRows"]

MASKS = ("decoder_attention_mask", "attention_mask")


class TokenRows:
    """`of(node)`: the mask that speaks of a node's rows, and how they were gathered from its positions."""

    def __init__(self, program: Program) -> None:
        placeholders = program.placeholders
        inputs = [placeholders[name] for name in program.inputs if name is not None and dim(placeholders[name])]
        # torch.export gives each input its own symbol for the size of the batch, although all are equal.
        self._batches = {_size(i.meta["val"].shape[0]) for i in inputs}
        self._masks = [
            (i.name, _size(i.meta["val"].shape[1]), self._about(program, i.name))
            for mask in MASKS
            for i in inputs
            if i.name == mask and dim(i) == 2
        ]
        self._known: dict[fx.Node, tuple[str | None, tuple[str, ...]]] = {}

    def of(self, node: fx.Node) -> tuple[str | None, tuple[str, ...]]:
        """(mask, gathers) as in `records.Rows`; (None, ()) if no mask speaks of these rows."""
        if not self._masks:
            return None, ()
        # Back along the first operand of the same number of rows. A loop: a chain of nodes may be deeper than Python
        # lets functions call themselves.
        chain = []
        while node not in self._known:
            # Either the start of a chain, or a value whose rows are those of an earlier one.
            direct = self._positions(node)
            before = None if direct else self._before(node)
            if before is None:
                self._known[node] = (direct, ())
                break
            chain.append((node, *before))
            node = before[0]
        result = self._known[node]
        # Forward again, from the start of the chain: each gather adds its row numbers to those before.
        for later, _, gather in reversed(chain):
            mask, gathers = result
            result = (mask, (*gathers, gather) if gather else gathers) if mask else (None, ())
            self._known[later] = result
        return result

    def _positions(self, node: fx.Node) -> str | None:
        shape = [_size(s) for s in node.meta["val"].shape]
        for name, position, about in self._masks:
            # Three axes or more: of [batch, position] alone, the second would be the features.
            apart = len(shape) > 2 and shape[0] in self._batches and shape[1] == position
            # Sizes are expressions, so that other rows are not mistaken for positions because they are as many today.
            flat = len(shape) == 2 and any(shape[0] == batch * position for batch in self._batches)
            if (apart or flat) and node in about:
                return name
        return None

    def _before(self, node: fx.Node) -> tuple[fx.Node, str | None] | None:
        """The operand whose rows `node` has, and the numbers by which it gathered them, if it did.

        It does not matter what the operator computes: if it gives as many rows as it gets, it is taken to keep their
        order, as all operators do between the gather of a mixture of experts and the product."""
        if node.op != "call_function" or dim(node) != 2:
            return None
        if op_name(node) in GATHERS:
            found = gathered(node)
            return (found[0], found[1].name) if found is not None and dim(found[0]) == 2 else None
        rows = _size(node.meta["val"].shape[0])
        inputs = node.all_input_nodes
        if node.target is operator.getitem:  # of chunk or split
            inputs = inputs[0].all_input_nodes
        same = (i for i in inputs if dim(i) == 2 and _size(i.meta["val"].shape[0]) == rows)
        return next(((i, None) for i in same), None)

    def _about(self, program: Program, mask: str) -> set[fx.Node]:
        """The nodes that a mask speaks of, in a model with an encoder and a decoder: the decoder's mask of all that
        depends on the decoder's ids, the encoder's of everything else."""
        ids = program.placeholders.get("decoder_input_ids")
        reached = {ids} if ids is not None else set()
        for node in program.graph.nodes:
            # Not through sizes: that of the batch, which all have, may be asked of the decoder's ids.
            if any(i in reached for i in node.all_input_nodes) and not isinstance(node.meta.get("val"), torch.SymInt):
                reached.add(node)
        # Without a decoder, nothing is reached, and `attention_mask` speaks of every node.
        return reached if mask == "decoder_attention_mask" else set(program.graph.nodes) - reached


def _size(size: int | torch.SymInt) -> Any:
    # Expressions, since to compare symbolic sizes themselves would put a condition on the batch.
    return size if isinstance(size, int) else size.node.expr
