"""A quantized weight in the order of its input features, neighbours of which share a scale: what formats without a
permutation can hold."""

import torch
from torch import Tensor

from gptq_ao.tensor import GroupTensor

__all__ = ["group_of_blocks", "natural_codes"]


def group_of_blocks(weight: GroupTensor, size: int) -> Tensor | None:
    """int64 [K/size]: which group of the weight each block of `size` neighbouring input features is in; None if one is
    in several, or the last one has fewer."""
    if weight.in_features % size:
        return None
    group_of = torch.arange(weight.in_features) // weight.group_size
    if weight.perm is not None:
        group_of = torch.empty_like(group_of).index_copy_(0, weight.perm.cpu().long(), group_of)
    blocks = group_of.unflatten(0, (-1, size))
    return blocks[:, 0] if bool((blocks == blocks[:, :1]).all()) else None


def natural_codes(weight: GroupTensor) -> Tensor:
    """uint8 [N, K] on the CPU, column k that of input feature k."""
    codes = weight.codes().cpu()
    if weight.perm is None:
        return codes
    return torch.empty_like(codes).index_copy_(1, weight.perm.cpu().long(), codes)
