"""What a layer adds to the product with a quantized weight: a matrix of low rank, as LoRA's."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["LowRank"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """B·A, added to a weight that is read as [N, K], N output and K input features; for a stack of E such matrices
    (experts), one for each.

    Attributes:
        A: [r, K] fp32; [E, r, K] for a stack.
        B: [N, r] fp32; [E, N, r] for a stack.
    """

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    @property
    def nbytes(self) -> int:
        return self.A.nbytes + self.B.nbytes

    def dense(self) -> Tensor:
        """[N, K] fp32; of a stack, one matrix below the other, [E·N, K]."""
        return (self.B @ self.A).flatten(end_dim=-2)
