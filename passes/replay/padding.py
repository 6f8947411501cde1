"""Which rows of an activation are padding, in a model that just runs.

Rows are positions of the model's `attention_mask` [batch, position] if an activation begins with the axes of the mask,
as they are or flattened to one. What a mixture of experts gathers from them, `tokens[numbers]`, is followed from result
to result. (For a graph, `passes/products/token_rows.py` finds the same.)
"""

from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gptq_ao.calibration.batches import Batch
from gptq_ao.passes.products.operators import GATHERS
from gptq_ao.passes.products.token_rows import MASKS
from gptq_ao.passes.replay.products import operator_name

__all__ = ["Padding"]


class Padding:
    """`of(x)`: zero where a row of x is padding, in the dtype of the mask: [batch, position], or one number for each
    row of x that was gathered."""

    def __init__(self, batch: Batch) -> None:
        given = [batch.kwargs.get(name) for name in MASKS]
        self._masks = [m for m in given if isinstance(m, Tensor) and m.dim() == 2]
        # Tensor → the mask of its rows. Weak, or every activation of a batch would stay in memory.
        self._gathered: Any = WeakTensorKeyDictionary()

    def of(self, x: Tensor) -> Tensor | None:
        """The mask of the rows of x [..., K], zero where a row is padding; None if no mask fits, or if two could."""
        if not self._masks:
            return None
        if x in self._gathered:
            return self._gathered[x]
        fit = [m for m in self._masks if x.shape[:2] == m.shape or (x.dim() == 2 and x.shape[0] == m.numel())]
        return fit[0] if len(fit) == 1 else None

    def follow(self, func: Any, args: Any, out: Any) -> None:
        """Note which rows a result has: those that it gathered, or those of an operand with the same number of rows."""
        if not self._masks or not isinstance(out, Tensor) or out.dim() != 2:
            return
        name = operator_name(func)
        if name in GATHERS and (name == "aten::index" or args[1:2] in ((0,), (-2,))):  # index_select of rows
            x, numbers = args[0], args[-1]
            mask = self.of(x) if x.dim() == 2 else None
            if mask is not None and isinstance(numbers, Tensor) and numbers.dim() == 1:
                self._gathered[out] = mask.reshape(-1)[numbers]
            return
        # An operator that gives as many rows as it gets is taken to keep their order, as in `TokenRows`.
        operands = [a for a in args if isinstance(a, Tensor)]
        same = (a for a in operands if a in self._gathered and a.shape[0] == out.shape[0])
        source = next(same, None)
        if source is not None:
            self._gathered[out] = self._gathered[source]
