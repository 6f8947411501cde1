"""New values in the form of a quantized weight, for when there is no calibration data: each rounded to nearest."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gptq_ao.codes.grid import choose_grid, round_to_grid
from gptq_ao.tensor.group_tensor import GroupTensor

__all__ = ["nearest"]

CHUNK = 2**24  # values at a time: there are several copies of them in fp32


def nearest(weight: GroupTensor, values: Tensor) -> GroupTensor:
    """`values` with the bits, groups, order of columns, layout and dtype of `weight`.

    Each group keeps its grid or takes the one that spans its new values, whichever is closer to them. So values that
    have not changed stay exactly as they are, and no group is further off than rounding to nearest would leave it.

    Args:
        values: floating point, of the shape of `weight`.

    Raises:
        NonFiniteError: a value is NaN or infinite, or too large for an fp16 scale.
    """
    lead, groups = weight.qdata.shape[:-3], weight.in_features // weight.group_size
    matrix = (
        (weight.in_features, weight.out_features) if weight.transposed else (weight.out_features, weight.in_features)
    )
    rows = values.detach().reshape(*lead, *matrix)
    rows = rows.mT if weight.transposed else rows
    rows = rows if weight.perm is None else rows[..., weight.perm.long()]
    old = (weight.scale.reshape(-1, groups), weight.zero_point.reshape(-1, groups))
    parts = zip(*_chunks(rows.reshape(-1, weight.in_features), *old, weight.bits, weight.dtype), strict=True)
    codes, scale, zero_point = (torch.cat(part).reshape(*lead, weight.out_features, -1) for part in parts)
    return type(weight).from_codes(
        codes,
        scale,
        zero_point,
        dtype=weight.dtype,
        perm=weight.perm,
        transposed=weight.transposed,
        view_shape=weight.view_shape,
    )


def _chunks(
    rows: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Codes, scales and zero points of some rows at a time."""
    group_size = rows.shape[-1] // scale.shape[-1]
    # What the weight's recipe was, as far as its grids show it.
    sym, signed = bool((zero_point == 2 ** (bits - 1)).all()), bool((scale < 0).any())
    size = max(1, CHUNK // rows.shape[-1])
    for some, *old in zip(rows.split(size), scale.split(size), zero_point.split(size), strict=True):
        some = some.float()
        new = choose_grid(some, group_size, bits, sym, sym and signed)
        values = some.unflatten(-1, (-1, group_size))
        kept, kept_error = _rounded(values, old[0], old[1], bits, dtype)
        codes, error = _rounded(values, *new, bits, dtype)
        keep = kept_error <= error
        yield (
            torch.where(keep.unsqueeze(-1), kept, codes).flatten(-2).to(torch.uint8),
            torch.where(keep, old[0], new[0]),
            torch.where(keep, old[1], new[1]),
        )


def _rounded(values: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [..., G, columns] fp32, and the squared error [..., G] of each group, of what they stand for in `dtype`."""
    scale, zero_point = scale.unsqueeze(-1).float(), zero_point.unsqueeze(-1).float()
    codes = round_to_grid(values, scale, zero_point, bits)
    return codes, (codes - zero_point).mul_(scale).to(dtype).float().sub_(values).square_().sum(-1)
