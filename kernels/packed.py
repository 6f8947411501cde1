"""A packed weight as every kernel here takes it."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from gptq_ao.codes.tiles import TILE_ROWS

__all__ = ["Packed"]


class Packed(NamedTuple):
    """W [..., out_features, in_features]. The operators in `ops.py` take these fields one by one, in this order.

    Attributes:
        qdata: int32 [..., N/16, K/KE, 128], words of codes, see `codes/tiles.py`.
        scale_zero: int32 [..., N/16, G, 16], scales and zero points.
        high_plane: int32 [..., N/16, K/128, 64], the high bits of 3-bit codes; None for other widths.
        perm: int32 [K] or None. Column i of the codes belongs to input feature `perm[i]`.
        bits: width of a code.
        group_size: number of neighbouring columns that share a scale.
        out_features, in_features: N and K, without padding.
    """

    qdata: Tensor
    scale_zero: Tensor
    high_plane: Tensor | None
    perm: Tensor | None
    bits: int
    group_size: int
    out_features: int
    in_features: int

    def is_contiguous(self) -> bool:
        return self.qdata.is_contiguous() and self.scale_zero.is_contiguous()

    def each(self, change: Callable[[Tensor], Tensor]) -> "Packed":
        """`change` applied to the tensors that have one part for each tile of rows: all but `perm`."""
        high_plane = None if self.high_plane is None else change(self.high_plane)
        return self._replace(qdata=change(self.qdata), scale_zero=change(self.scale_zero), high_plane=high_plane)

    def expert(self, index: int) -> "Packed":
        """One matrix of a stack, without a copy."""
        return self.each(lambda t: t[index])

    def rows(self, first: int, last: int) -> "Packed":
        """Output features from `first`, a multiple of TILE_ROWS, to `last`, of every matrix; contiguous, so of a stack
        it is a copy."""
        tiles = slice(first // TILE_ROWS, -(-last // TILE_ROWS))
        part = self.each(lambda t: t[..., tiles, :, :].contiguous())
        return part._replace(out_features=last - first)
