"""A quantized weight in GGUF's blocks: 32 neighbouring input features of a row, which share a scale.

    Q8_0   d fp16, 32 × int8 q             w = d·q
    Q4_0   d fp16, 32 × 4 bits q           w = d·(q − 8)
    Q4_1   d fp16, m fp16, 32 × 4 bits q   w = d·q + m

The 16 bytes of four-bit codes have those of the first 16 features in their low halves, the others in their high ones.
A group that is larger than a block repeats its scale; scales may be negative. So symmetric weights are held exactly. An
asymmetric one needs m = −zero_point·scale, which has more digits than fp16: that is rounded.

Source: `ggml-common.h` and `ggml-quants.c` of llama.cpp.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_ao.checkpoint.exchange.natural_order import group_of_blocks, natural_codes
from gptq_ao.tensor import GroupTensor

__all__ = ["BLOCK", "Blocks", "block_kind", "to_blocks", "why_no_blocks"]

BLOCK = 32
_KINDS = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}  # by bits, and whether it is symmetric


@dataclass(frozen=True)
class Blocks:
    """
    Attributes:
        data: uint8 [N, bytes of a row].
        moved: the largest distance between an offset that was rounded and what it should be, in steps of its group (the
            distance of two codes); 0 if all are exact.
    """

    data: Tensor
    moved: float


def block_kind(weight: GroupTensor) -> str:
    """GGUF's name of the type, of a weight that has one."""
    return _KINDS[weight.bits, weight.symmetric]


def why_no_blocks(weight: GroupTensor) -> str | None:
    """Why GGUF cannot hold a weight [N, K]; None if it can."""
    if weight.bits not in (4, 8):
        return f"it has {weight.bits} bits, and GGUF's blocks with scales of this kind have 4 or 8"
    if (weight.bits, weight.symmetric) not in _KINDS:
        return "it has 8 bits and is asymmetric, and GGUF's blocks of 8 bits have no offset: quantize with sym=True"
    if weight.in_features % BLOCK:
        return f"it has {weight.in_features} input features, and GGUF needs multiples of {BLOCK}"
    if group_of_blocks(weight, BLOCK) is None:
        order = "its columns are in activation order" if weight.perm is not None else f"groups of {weight.group_size}"
        return f"{order}: the {BLOCK} neighbouring input features of a block would need more than one scale"
    if not weight.symmetric and not torch.isfinite(_offset(weight.scale, weight.zero_point)).all():
        return "an offset, zero_point·scale, is larger than fp16 can be"
    return None


def to_blocks(weight: GroupTensor, kind: str) -> Blocks:
    """A weight that GGUF can hold, on the CPU.

    Args:
        kind: that of the weight, or the asymmetric one of its bits.
    """
    codes, scale, zero_point = natural_codes(weight), weight.scale.cpu(), weight.zero_point.cpu()
    group = group_of_blocks(weight, BLOCK)
    assert group is not None
    # [N, blocks, …] from here on.
    codes = codes.unflatten(1, (-1, BLOCK))
    scale, zero_point = scale[:, group].unsqueeze(-1), zero_point[:, group].unsqueeze(-1)
    if kind == "Q8_0":
        # As int8: 128 less is another highest bit.
        return Blocks(_row(scale, codes ^ 128), 0.0)
    halves = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    if kind == "Q4_0":
        return Blocks(_row(scale, halves), 0.0)
    offset = _offset(scale, zero_point)
    return Blocks(_row(scale, offset, halves), _moved(scale, zero_point, offset))


def _offset(scale: Tensor, zero_point: Tensor) -> Tensor:
    """fp16: the product is exact in fp32, of 11 and 4 binary digits, and then rounded."""
    return -(zero_point.float() * scale.float()).half()


def _moved(scale: Tensor, zero_point: Tensor, offset: Tensor) -> float:
    error = (offset.float() + zero_point.float() * scale.float()).abs() / scale.float().abs()
    return float(error.nan_to_num(0.0).max())  # 0 / 0 where the scale is 0


def _row(*parts: Tensor) -> Tensor:
    """The bytes of blocks made of these parts [N, blocks, …], one after the other."""
    return torch.cat([p.contiguous().view(torch.uint8) for p in parts], dim=-1).flatten(1)
