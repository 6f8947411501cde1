"""A quantized weight, before it is packed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_ao.codes.grid import dequantize

__all__ = ["Solution"]


@dataclass(frozen=True)
class Solution:
    """A quantized weight [N, K] with G groups per row.

    Attributes:
        codes: [N, K] uint8. Column i holds input feature `perm[i]` (or i).
        scale: [N, G] fp16.
        zero_point: [N, G] uint8.
        perm: [K] int32 for `act_order="group"`, else None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    perm: Tensor | None = None

    def split(self, sizes: list[int]) -> list["Solution"]:
        """Undo a stacking of weights along N."""
        parts = zip(self.codes.split(sizes), self.scale.split(sizes), self.zero_point.split(sizes), strict=True)
        return [Solution(c, s, z, self.perm) for c, s, z in parts]

    def dequantize(self) -> Tensor:
        """[N, K] fp32, columns in their natural order."""
        weight = dequantize(self.codes, self.scale, self.zero_point, torch.float32)
        return weight if self.perm is None else weight[:, torch.argsort(self.perm)]
