"""The Hessian of a linear layer's output error: H = XᵀX / rows.

For a layer y = W·x the squared output error of changed weights Ŵ over the calibration rows X is
tr((W−Ŵ)·XᵀX·(W−Ŵ)ᵀ), so XᵀX is all that GPTQ needs to know about the data, and layers that read the same activation
share it.

Numerics: sums are kept in fp32. Products of bf16 or fp16 numbers are exact in fp32; fp32 inputs are multiplied in full
precision (no TF32). The division by the number of rows happens once, at the end.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Hessian", "HessianObserver", "ieee_fp32"]


@dataclass(frozen=True)
class Hessian:
    """The finished statistics of one activation.

    Attributes:
        matrix: [K, K] fp32, XᵀX / rows.
        rows: how many activation rows (tokens) were summed.
        first_bad_batch: index of the first batch with a NaN or infinite activation (or one whose square exceeds fp32).
    """

    matrix: Tensor
    rows: int
    first_bad_batch: int | None = None


class HessianObserver(nn.Module):
    """Sums XᵀX of all it is called with. Nothing here waits for the device: host values are read in `finish`."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self._reset()

    def _reset(self) -> None:
        self._sum: Tensor | None = None
        self._rows: list[int | Tensor] = []
        self._finite: list[Tensor] = []
        self._unseen_batches = 0  # before the first call

    def forward(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the rows of `x` [..., K], on its device; those where `mask` [...] is zero (padding) are left out.

        A mask of other leading sizes than x's is not used: x is then the same for all of a batch, and no row of it is
        padding.
        """
        rows = x.detach().reshape(-1, self.in_features)
        if mask is None or mask.shape != x.shape[:-1]:
            self._rows.append(rows.shape[0])
        else:
            keep = mask.reshape(-1, 1) != 0
            # A product with zero would keep a NaN that sits in the padding.
            rows = torch.where(keep, rows, torch.zeros((), dtype=rows.dtype, device=rows.device))
            self._rows.append(keep.sum())
        if self._sum is None:
            self._sum = torch.zeros(self.in_features, self.in_features, dtype=torch.float32, device=x.device)
        if rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16):
            self._sum += torch.mm(rows.T, rows, out_dtype=torch.float32)  # tensor cores
        else:
            rows = rows.float()
            with ieee_fp32():
                self._sum.addmm_(rows.T, rows)

    def end_batch(self) -> None:
        """Note whether the sums are still finite, so that `finish` can name the batch that spoiled them."""
        if self._sum is None:
            self._unseen_batches += 1
        else:
            self._finite.append(torch.isfinite(self._sum.diagonal()).all())

    def finish(self) -> Hessian:
        """The Hessian of all calls so far. The observer starts anew and gives its memory back.

        Raises:
            RuntimeError: it was never called.
        """
        if self._sum is None:
            raise RuntimeError("a HessianObserver was never called")
        total, rows = self._sum, sum(int(r) for r in self._rows)
        finite = [True] * self._unseen_batches + (torch.stack(self._finite).tolist() if self._finite else [])
        self._reset()
        return Hessian(total.div_(max(rows, 1)), rows, finite.index(False) if False in finite else None)


@contextmanager
def ieee_fp32() -> Iterator[None]:
    """fp32 matrix products in full precision, whatever the user allows elsewhere. The flags are restored."""
    owners = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [o.fp32_precision for o in owners]
    for o in owners:
        o.fp32_precision = "ieee"
    try:
        yield
    finally:
        for o, precision in zip(owners, before, strict=True):
            o.fp32_precision = precision
