"""The Hessian of a linear layer's output error: H = XᵀX / rows.

For a layer y = W·x the squared output error of changed weights Ŵ over the calibration rows X is
tr((W−Ŵ)·XᵀX·(W−Ŵ)ᵀ), so XᵀX is all that GPTQ needs to know about the data, and layers that read the same activation
share it.

Numerics: sums are kept in fp32. Products of bf16 or fp16 numbers are exact in fp32; fp32 inputs are multiplied in full
precision (no TF32). The division by the number of rows happens once, at the end; where several processes have observed
rows, after their sums are added up.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptq_ao.distributed.ranks import ALONE, Ranks
from gptq_ao.solver.fp32 import ieee_fp32

__all__ = ["Hessian", "HessianObserver", "gathered_mask", "kept_rows"]


@dataclass(frozen=True)
class Hessian:
    """The finished statistics of one activation.

    Attributes:
        matrix: [K, K] fp32, XᵀX / rows.
        rows: how many activation rows (tokens) were summed.
        first_bad_batch: index of the first batch with a NaN or infinite activation (or one whose square exceeds fp32).
        drift: [K, K] fp32, (X₀−X)ᵀX / rows with the rows X₀ of the original model; None where it was not observed, or
            they are the same.
        residuals: [N, K] fp32 each, (R₀−R)ᵀX / rows with the rows R [rows, N] of a residual stream.
    """

    matrix: Tensor
    rows: int
    first_bad_batch: int | None = None
    drift: Tensor | None = None
    residuals: tuple[Tensor, ...] = ()


class HessianObserver(nn.Module):
    """Sums XᵀX of all it is called with; for experts, one sum for each. Where rows are sorted by expert the numbers of
    rows are read on the host; otherwise nothing here waits for the device before `finish`.

    Attributes:
        panel: rows of XᵀX that are one product. Smaller ones would not keep a GPU busy.
        portion: the experts that are looked at.
    """

    panel = 1024

    def __init__(self, in_features: int, experts: int = 1) -> None:
        super().__init__()
        self.in_features, self.experts = in_features, experts
        self.portion = range(experts)
        self._reset()

    def look_at(self, portion: range) -> None:
        """Sum the rows of these experts only, from now on. Nothing may have been summed since `finish`."""
        self.portion = portion

    def _reset(self) -> None:
        self._sum: Tensor | None = None
        self._drift: Tensor | None = None
        self._residuals: tuple[Tensor, ...] = ()
        self._rows: list[Tensor] = []  # [experts of the portion] each
        self._finite: list[Tensor] = []
        self._unseen_batches = 0  # before the first call

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
        original: Tensor | None = None,
        streams: tuple[tuple[Tensor, Tensor], ...] = (),
    ) -> None:
        """Add the rows of `x`, on its device.

        Args:
            x: [..., K]; for experts [E, ..., K], or [T, K] sorted by expert.
            mask: zero where a row is padding and does not count: [...], or its first axes, or, for x [T, K], anything
                of T elements. One of other sizes is not used: x is then the same for all of a batch, and no row of it
                is padding.
            offsets: [E], the cumulative number of sorted rows. Rows after the last offset belong to no expert.
            original: what x is in the original model; not for experts.
            streams: [..., N] each, of as many rows as x: residual streams here and in the original model.
        """
        if not self.portion:
            return
        x = x.detach()
        keep = kept_rows(x, mask) if mask is not None else None
        if keep is not None:
            # A product with zero would keep a NaN that sits in the padding.
            x = torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))
        if self._sum is None:
            sides = (len(self.portion), self.in_features, self.in_features)
            self._sum = torch.zeros(sides, dtype=torch.float32, device=x.device)
        if offsets is not None:
            bounds = list(itertools.pairwise(self._bounds(x, offsets)))[self.portion.start : self.portion.stop]
            parts = [x[start:stop] for start, stop in bounds]
            counts = [keep[start:stop].sum() for start, stop in bounds] if keep is not None else None
        elif self.experts > 1:
            every = x.reshape(self.experts, -1, self.in_features)
            parts = list(every[self.portion.start : self.portion.stop])
            # Rows that a router sent elsewhere are zeros here.
            counts = [(p != 0).any(-1).sum() for p in parts]
        else:
            parts = [x.reshape(-1, self.in_features)]
            counts = [keep.sum()] if keep is not None else None
        for total, rows in zip(self._sum, parts, strict=True):
            self._add_square(total, rows)
        self._add_differences(x, keep, original, streams)
        # Counts of a mask stay on the device until `finish`: to read them here would make the host wait in every batch.
        known = torch.tensor([p.shape[0] for p in parts])
        self._rows.append(known if counts is None else torch.stack(counts))

    def _add_square(self, total: Tensor, rows: Tensor) -> None:
        """total += rowsᵀ·rows, panel by panel, each up to its last element of the diagonal: half of the work, if there
        are many."""
        rows = rows if _on_tensor_cores(rows) else rows.float()  # once, not in every panel
        for start in range(0, self.in_features, self.panel):
            end = min(start + self.panel, self.in_features)
            _add(total[start:end, :end], rows[:, start:end], rows[:, :end])

    def _mirror(self, total: Tensor) -> None:
        """Fill in what `_add_square` leaves out: the same numbers."""
        for start in range(self.panel, self.in_features, self.panel):
            total[:start, start : start + self.panel] = total[start : start + self.panel, :start].T

    def _add_differences(
        self, x: Tensor, keep: Tensor | None, original: Tensor | None, streams: tuple[tuple[Tensor, Tensor], ...]
    ) -> None:
        rows = x.reshape(-1, self.in_features)

        def difference(now: Tensor, then: Tensor) -> Tensor:
            # A stream may have other leading axes than x: [batch, position] where x has rows.
            changed = (then.detach() - now.detach()).to(x.dtype).reshape(len(rows), -1)
            if keep is None:
                return changed
            return torch.where(keep.reshape(-1, 1), changed, torch.zeros((), dtype=x.dtype, device=x.device))

        if original is not None:
            if self._drift is None:
                self._drift = torch.zeros(self.in_features, self.in_features, dtype=torch.float32, device=x.device)
            _add(self._drift, difference(x, original), rows)
        changes = [difference(now, then) for now, then in streams]
        if not self._residuals:
            self._residuals = tuple(
                torch.zeros(c.shape[1], self.in_features, dtype=torch.float32, device=x.device) for c in changes
            )
        for total, change in zip(self._residuals, changes, strict=True):
            _add(total, change, rows)

    def _bounds(self, x: Tensor, offsets: Tensor) -> list[int]:
        """Where each expert's rows of `x` begin and end."""
        return [0, *offsets.tolist()]

    def end_batch(self) -> None:
        """Note whether the sums are still finite, so that `finish` can name the batch that spoiled them."""
        if self._sum is None:
            self._unseen_batches += 1
        else:
            self._finite.append(torch.isfinite(self._sum.diagonal(dim1=-2, dim2=-1)).all())

    def start(self, device: torch.device, drift: bool, widths: Sequence[int]) -> None:
        """Sums of no rows, as if it had been called: for a rank without a batch.

        Args:
            drift: whether the others are called with `original`.
            widths: N of each of their `streams`.
        """
        k = self.in_features

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self._sum, self._drift = zeros(len(self.portion), k, k), zeros(k, k) if drift else None
        self._residuals = tuple(zeros(n, k) for n in widths)

    def finish(self, ranks: Ranks = ALONE) -> tuple[Hessian, ...]:
        """The Hessian of all calls so far, or those of the portion's experts; with `ranks`, of the calls on all of
        them. The observer starts anew and gives its memory back.

        Raises:
            RuntimeError: it was never called.
        """
        if self._sum is None:
            raise RuntimeError("a HessianObserver was never called")
        totals, drift, residuals = self._sum, self._drift, self._residuals
        seen = torch.stack([r.cpu() for r in self._rows]).sum(0).tolist() if self._rows else [0] * len(totals)
        finite = [True] * self._unseen_batches + (torch.stack(self._finite).tolist() if self._finite else [])
        self._reset()
        said = ranks.tell([seen, ranks.number(finite.index(False)) if False in finite else None])
        rows = [sum(of_expert) for of_expert in zip(*(seen for seen, _ in said), strict=True)]
        bad = min((batch for _, batch in said if batch is not None), default=None)
        # Expert by expert, so that a sum does not depend on which other experts are in the portion.
        ranks.sum_([*totals, *([] if drift is None else [drift]), *residuals])
        for total in totals:
            self._mirror(total)
        if drift is not None:
            drift.div_(max(rows[0], 1))
        residuals = tuple(r.div_(max(rows[0], 1)) for r in residuals)
        return tuple(Hessian(t.div_(max(n, 1)), n, bad, drift, residuals) for t, n in zip(totals, rows, strict=True))


def gathered_mask(mask: Tensor, *gathers: Tensor) -> Tensor:
    """The mask [batch, position] of rows that were gathered from its flattened positions, once or several times."""
    mask = mask.reshape(-1)
    for numbers in gathers:
        mask = mask[numbers]
    return mask


def kept_rows(x: Tensor, mask: Tensor) -> Tensor | None:
    """bool [..., 1]: which rows of x [..., K] are not padding, if the mask says so; see `HessianObserver.forward`."""
    if x.dim() == 2 and mask.numel() == x.shape[0]:
        return mask.reshape(-1, 1) != 0
    if mask.dim() < x.dim() and x.shape[: mask.dim()] == mask.shape:
        keep = mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim())) != 0
        return keep.expand(*x.shape[:-1], 1)
    return None


def _on_tensor_cores(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def _add(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += leftᵀ·right."""
    if _on_tensor_cores(right):
        torch.addmm(total, left.T, right, out_dtype=torch.float32, out=total)  # tensor cores
    else:
        with ieee_fp32():
            total.addmm_(left.float().T, right.float())
