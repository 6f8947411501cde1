"""What every format says of one weight, in the form in which `GroupTensor.from_words` takes it.

    w[n, perm[i]] = (code[n, i] − zero_point[n, i // g]) · scale[n, i // g]          g = K / G, the same for all groups

Files may have groups that are not of that kind. Two ways of writing the same numbers make them so, without loss:

1. Columns of a group that are scattered (a `g_idx` of activation order) are brought together by a permutation.
2. Groups of unequal sizes (352 features in groups of 128: 128, 128, 96) are split into equal ones of the greatest size
   that divides them all (32), which repeat the scale and zero point of the group they are part of.

Shapes: N = out_features, K = in_features, G = number of groups in a row.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_ao.codes.bit_stream import codes_to_words, words_to_codes
from gptq_ao.errors import CheckpointError

__all__ = ["GroupedWeight", "as_half", "in_equal_groups"]


@dataclass(frozen=True)
class GroupedWeight:
    """One weight.

    Attributes:
        bits: width of the codes here: 2, 3, 4 or 8.
        words: int32 [N, ⌈K·bits/32⌉], the codes as `codes/bit_stream.py` draws them, in any strides.
        in_features: K.
        scale: fp16 [N, G].
        zero_point: uint8 [N, G].
        perm: int64 [K] or None; column i of the codes belongs to input feature `perm[i]`.
        rounded: the largest relative change of a scale that is not an fp16 number; 0 if all are.
        moved: the largest distance between a group in the file and here, in steps (the distance of two codes), if the
            file has offsets that are no whole numbers of steps.
    """

    bits: int
    words: Tensor
    in_features: int
    scale: Tensor
    zero_point: Tensor
    perm: Tensor | None = None
    rounded: float = 0.0
    moved: float = 0.0

    @property
    def codes(self) -> Tensor:
        """uint8 [N, K]."""
        return words_to_codes(self.words, self.bits, self.in_features)


def in_equal_groups(weight: GroupedWeight, group_of: Tensor) -> GroupedWeight:
    """Apply the two rules above; they leave alone what is in natural, equal groups already.

    Args:
        weight: one without `perm`, whose scales and zero points [N, G] are those of the groups in the file.
        group_of: int64 [K], the group of every input feature, in 0 … G − 1.
    """
    words, scale, zero_point, perm = weight.words, weight.scale, weight.zero_point, None
    # The longest equal runs of neighbouring columns that never mix two groups, in the order of the file …
    size = _common_size(torch.unique_consecutive(group_of, return_counts=True)[1])
    # … and those that there would be if the columns of each group were brought together.
    together = _common_size(group_of.unique(return_counts=True)[1])
    if size < together:
        # Only if it makes runs longer: a permuted activation costs time at run time. Stable: columns keep their order
        # in a group.
        perm = group_of.argsort(stable=True)
        words, group_of, size = codes_to_words(weight.codes[:, perm], weight.bits), group_of[perm], together
    # For each run of the result the group of the file; a group split into several runs occurs several times.
    which = group_of[::size]
    if not torch.equal(which, torch.arange(scale.shape[1], device=which.device)):
        scale, zero_point = scale[:, which], zero_point[:, which]
    return replace(weight, words=words, scale=scale, zero_point=zero_point, perm=perm)


def as_half(scale: Tensor) -> tuple[Tensor, float]:
    """Scales as fp16, and the largest relative change of one; bf16 numbers only change if they are below 2^-17.

    Args:
        scale: fp16, bf16 or fp32, of any shape.

    Raises:
        CheckpointError: one is NaN, infinite, or too large for fp16.
    """
    half = scale.half()
    if not torch.isfinite(half).all():
        raise CheckpointError(f"a scale is not finite as fp16 (the largest is {scale.abs().max().item():.3g})")
    # fp16 already: nothing was rounded.
    if half.dtype == scale.dtype:
        return half, 0.0
    change = (half.float() - scale.float()).abs() / scale.float().abs()
    return half, float(change.nan_to_num(0.0).max())  # 0 / 0 where the scale is 0


def _common_size(sizes: Tensor) -> int:
    return math.gcd(*sizes.unique().tolist())
