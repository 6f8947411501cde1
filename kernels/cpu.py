"""bf16 4-bit linear on CPU by PyTorch's own kernel, which is faster than a dense product for few rows.

`aten::_weight_int4pack_mm_for_cpu` computes with w = (code − 8)·scale + offset, scale and offset in bf16. Its weight
layout depends on the instruction set, so it is made from ours at first use and kept beside it, as long as that lives.
"""

import weakref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gptq_ao.packing import unpack_codes, unpack_scale_zero

__all__ = ["linear", "max_rows", "supports"]

ROWS_PER_CALL = 64  # the kernel is slower per row when it gets more than about 96
# Above, one dequantization is shared by many rows. Where that pays depends on the processor's dense bf16 product; where
# that is slow, this kernel would still be ahead at 256 rows.
MAX_ROWS = 256
GROUP_SIZES = (32, 64, 128, 256)
ROW_MULTIPLE = 16

# qdata -> (versions when converted, the scale_zero it was converted with, converted weight, scales and offsets)
_converted: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def max_rows(dtype: torch.dtype, bits: int, group_size: int) -> int:
    """Up to how many rows of x `linear` is the faster way; 0: it does not compute this."""
    return MAX_ROWS if bits == 4 and dtype == torch.bfloat16 and group_size in GROUP_SIZES else 0


def supports(x: Tensor, qdata: Tensor, bits: int, group_size: int) -> bool:
    """Whether `linear` computes this, and is the faster way."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return (
        0 < rows <= max_rows(x.dtype, bits, group_size)
        and qdata.dim() == 3
        and not qdata.is_inference()  # no version counter: a change in place would go unnoticed
    )


def linear(
    x: Tensor,
    qdata: Tensor,
    scale_zero: Tensor,
    perm: Tensor | None,
    group_size: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    """x·Wᵀ, x [..., K] bf16; the result is within bf16 rounding of the scales of `reference.linear`."""
    weight, scale_and_offset = _convert(qdata, scale_zero, out_features, in_features)
    rows = x.reshape(-1, in_features)
    rows = (rows if perm is None else rows[:, perm]).contiguous()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    if len(rows) <= ROWS_PER_CALL:
        y = product(rows, weight, group_size, scale_and_offset)
    else:
        y = torch.cat([product(part, weight, group_size, scale_and_offset) for part in rows.split(ROWS_PER_CALL)])
    if y.shape[-1] != out_features:
        y = y[:, :out_features].contiguous()
    return y.view(*x.shape[:-1], out_features)


def _convert(qdata: Tensor, scale_zero: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    version = (qdata._version, scale_zero._version)
    known = _converted.get(qdata)
    if known is not None and known[0] == version and known[1]() is scale_zero:
        return known[2], known[3]
    padded = -(-out_features // ROW_MULTIPLE) * ROW_MULTIPLE
    codes = unpack_codes(qdata, None, 4, padded, in_features)
    scale, zero_point = (t.float() for t in unpack_scale_zero(scale_zero, padded))
    offset = (8 - zero_point) * scale
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    scale_and_offset = torch.stack([scale, offset], -1).transpose(0, 1).to(torch.bfloat16).contiguous()
    _converted[qdata] = (version, weakref.ref(scale_zero), weight, scale_and_offset)
    return weight, scale_and_offset
