"""Matrix products in full fp32 precision, whatever the process allows elsewhere."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["PARTS", "ieee_fp32", "product"]

PARTS = 2**28  # bytes, at most, of the two parts of a right factor in `product`


@contextmanager
def ieee_fp32(cuda: str = "ieee") -> Iterator[None]:
    """fp32 matrix products in full precision, whatever the user allows elsewhere, and without autocast. The flags are
    restored.

    Args:
        cuda: "tf32" for products there of which three digits are enough: eight times as fast on an H200.
    """
    owners = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [o.fp32_precision for o in owners]
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for o, precision in zip(owners, (cuda, "ieee"), strict=True):
        o.fp32_precision = precision
    try:
        with contextlib.ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        for o, precision in zip(owners, before, strict=True):
            o.fp32_precision = precision


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, [M, K] and [K, N] fp32, as precise as `ieee_fp32` says. Where that is full precision a GPU forms it
    from three products of TF32: of the numbers' first 11 bits, and of each one's first bits with the other's further
    ones. What is left out is 2⁻²¹ of |left|·|right| at most, less than a sum of thousands in fp32 is wrong by.

    Source: Ootomo & Yokota, "Recovering single precision accuracy from Tensor Cores" (2022).
    """
    if not right.is_cuda or torch.backends.cuda.matmul.fp32_precision != "ieee":
        return left @ right
    out = torch.empty(len(left), right.shape[1], device=right.device)
    high = _first_bits(left)
    low = left - high
    columns = max(1, PARTS // (2 * 4 * max(1, len(right))))
    with ieee_fp32(cuda="tf32"):
        for piece, into in zip(right.split(columns, 1), out.split(columns, 1), strict=True):
            first = _first_bits(piece)
            torch.mm(low, first, out=into)
            into.addmm_(high, piece - first)
            into.addmm_(high, first)
    return out


def _first_bits(t: Tensor) -> Tensor:
    """What TF32 has of fp32 numbers, cut off."""
    return (t.view(torch.int32) & -(2**13)).view(torch.float32)
