"""The same bytes as numbers of another size. PyTorch runs on little-endian machines only."""

import torch
from torch import Tensor

__all__ = ["reinterpret"]


def reinterpret(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` [..., n] as `dtype` [..., n · bytes of x's dtype / bytes of `dtype`], contiguous: a view, if `x` is.

    `Tensor.view(dtype)` refuses what `contiguous` leaves as it is: a dimension of size one may have any stride.
    """
    count, rest = divmod(x.shape[-1] * x.itemsize, dtype.itemsize)
    assert rest == 0
    flat = x.contiguous().as_strided((x.numel(),), (1,))
    # A part of a tensor may begin within one of the larger numbers.
    aligned = flat.storage_offset() * x.itemsize % dtype.itemsize == 0
    return (flat if aligned else flat.clone()).view(dtype).view(*x.shape[:-1], count)
