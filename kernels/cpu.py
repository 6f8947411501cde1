"""bf16 4-bit linear on CPU by PyTorch's own kernel, which is faster than a dense product for few rows.

`aten::_weight_int4pack_mm_for_cpu` computes with w = (code − 8)·scale + offset, scale and offset in bf16. Its weight
layout depends on the instruction set, so it is made from ours at first use and kept beside it, as long as that lives;
of a stack, expert by expert.
"""

import weakref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gptq_ao.codes.tiles import unpack_codes, unpack_scale_zero
from gptq_ao.kernels import reference
from gptq_ao.kernels.packed import Packed

__all__ = ["forget", "linear", "linear_experts", "max_rows", "supports"]

ROWS_PER_CALL = 64  # the kernel is slower per row when it gets more than about 96
# More rows share one dequantization and a dense product. From how many on that pays depends on the processor: where its
# dense bf16 product is slow, this kernel would still be ahead at 256 rows.
MAX_ROWS = 256
# What PyTorch's operator takes: other group sizes go to the reference, and out_features are padded.
GROUP_SIZES = (32, 64, 128, 256)
ROW_MULTIPLE = 16

# qdata -> (versions when converted, the scale_zero it was converted with, {expert: weight, scales and offsets}). The
# expert of a matrix is called None.
_converted: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def max_rows(dtype: torch.dtype, bits: int, group_size: int) -> int:
    """The number of rows of x up to which `linear` is the faster way; 0 if it does not compute this."""
    return MAX_ROWS if bits == 4 and dtype == torch.bfloat16 and group_size in GROUP_SIZES else 0


def supports(x: Tensor, packed: Packed, stacked: bool = False) -> bool:
    """Whether `linear` computes x [..., K] by such a weight, or by one expert of a stack, and is the faster way."""
    rows = x.numel() // max(x.shape[-1], 1)
    return (
        0 < rows <= max_rows(x.dtype, packed.bits, packed.group_size)
        and packed.qdata.dim() == (4 if stacked else 3)
        and not packed.qdata.is_inference()  # no version counter: a change in place would go unnoticed
    )


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None, expert: int | None = None) -> Tensor:
    """x·Wᵀ + bias: bf16 [..., N] from x [..., K] and a matrix, or one expert of a stack. It differs from
    `reference.linear` by what rounding scales to bf16 changes."""
    weight, scale_and_offset = _convert(packed, expert)
    perm, group_size, out_features = packed.perm, packed.group_size, packed.out_features
    rows = x.reshape(-1, packed.in_features)
    rows = (rows if perm is None else rows[:, perm]).contiguous()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    if len(rows) <= ROWS_PER_CALL:
        y = product(rows, weight, group_size, scale_and_offset)
    else:
        y = torch.cat([product(part, weight, group_size, scale_and_offset) for part in rows.split(ROWS_PER_CALL)])
    # Without the output features that were padded.
    if y.shape[-1] != out_features:
        y = y[:, :out_features].contiguous()
    y = y.view(*x.shape[:-1], out_features)
    return y if bias is None else y + bias


def linear_experts(x: Tensor, packed: Packed, offsets: Tensor) -> Tensor:
    """See `reference.linear_experts`; each expert's rows [rows, K] by `linear`, where that is supported."""
    reference.check_experts(x, packed, offsets)

    def product(rows: Tensor, expert: int) -> Tensor:
        if supports(rows, packed, stacked=True):
            return linear(rows, packed, expert=expert)
        return reference.linear(rows, packed.expert(expert))

    return reference.by_expert(x, offsets, packed.out_features, product)


def forget(qdata: Tensor) -> None:
    """What was converted of the codes in this memory is out of date, though a version may not tell: they were written
    through another tensor."""
    memory = qdata.untyped_storage()._cdata
    for known in [t for t in _converted if t.untyped_storage()._cdata == memory]:
        _converted.pop(known, None)


def _convert(packed: Packed, expert: int | None = None) -> tuple[Tensor, Tensor]:
    """What the kernel takes of a weight: made at first use, and again once the weight was changed in place."""
    qdata, scale_zero = packed.qdata, packed.scale_zero
    version = (qdata._version, scale_zero._version)
    known = _converted.get(qdata)
    # The same codes with other scales are another weight.
    if known is None or known[0] != version or known[1]() is not scale_zero:
        known = _converted[qdata] = (version, weakref.ref(scale_zero), {})
    experts: dict[int | None, tuple[Tensor, Tensor]] = known[2]
    if expert not in experts:
        experts[expert] = _converted_matrix(packed if expert is None else packed.expert(expert))
    return experts[expert]


def _converted_matrix(packed: Packed) -> tuple[Tensor, Tensor]:
    padded = -(-packed.out_features // ROW_MULTIPLE) * ROW_MULTIPLE
    codes = unpack_codes(packed.qdata, None, 4, padded, packed.in_features)
    scale, zero_point = (t.float() for t in unpack_scale_zero(packed.scale_zero, padded))
    # (code − zero_point)·scale, in the operator's terms.
    offset = (8 - zero_point) * scale
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    scale_and_offset = torch.stack([scale, offset], -1).transpose(0, 1).to(torch.bfloat16).contiguous()
    return weight, scale_and_offset
