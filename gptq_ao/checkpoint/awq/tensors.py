"""AWQ's tensors, as AutoAWQ's GEMM kernels take them.

A linear layer of N output and K input features, G groups, always of 4 bits:

    qweight  int32 [K, N/8]   codes, eight output features in a word
    qzeros   int32 [G, N/8]   zero points, in the same way
    scales   fp16  [G, N]

    w[n, k] = (code[k, n] − zero_point[g, n]) · scales[g, n],  g = k // (K/G)

**Interleaved.** From its lowest bits to its highest, a word holds the output features 0, 2, 4, 6, 1, 3, 5, 7 of its
eight: its kernel takes two codes out of a word at a time.

Source: the packing code of AutoAWQ 0.2.
"""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from gptq_ao.checkpoint.exchange.grouped_weight import GroupedWeight, as_half
from gptq_ao.codes.bit_stream import codes_to_words, words_to_codes

__all__ = ["AWQ_BITS", "PER_WORD", "decode_awq", "encode_awq"]

AWQ_BITS = 4
PER_WORD = 32 // AWQ_BITS
_PACKED = ("qweight", "qzeros")
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output feature of each field of a word
_PLACE = tuple(_ORDER.index(feature) for feature in range(PER_WORD))  # field of each output feature


def decode_awq(tensors: Mapping[str, Tensor]) -> GroupedWeight:
    """Read one weight.

    Args:
        tensors: `qweight`, `qzeros` and `scales`, in the shapes above, on the device that decodes.

    Raises:
        CheckpointError: a scale is not finite.
    """
    scale, rounded = as_half(tensors["scales"].T)
    zero_point = _fields(words_to_codes(tensors["qzeros"], AWQ_BITS, len(scale)), _PLACE).T
    words = _along_inputs(tensors["qweight"])
    return GroupedWeight(AWQ_BITS, words, len(tensors["qweight"]), scale, zero_point, None, rounded)


def encode_awq(weight: GroupedWeight) -> dict[str, Tensor]:
    """The tensors of a weight of 4 bits without `perm`, whose N is a multiple of 8; the inverse of `decode_awq`."""
    fields = (_fields(t.T, _ORDER).contiguous() for t in (weight.codes, weight.zero_point))
    packed = {part: codes_to_words(t, AWQ_BITS) for part, t in zip(_PACKED, fields, strict=True)}
    return {**packed, "scales": weight.scale.T.contiguous()}


def _along_inputs(qweight: Tensor) -> Tensor:
    """From words of eight output features, int32 [K, N/8], to words of eight input features, [N, ⌈K/8⌉]."""
    rest = -len(qweight) % PER_WORD
    rows = torch.nn.functional.pad(qweight, (0, 0, 0, rest)).unflatten(0, (-1, PER_WORD))
    words = []  # of each output feature of eight
    for place in _PLACE:
        codes = ((row >> AWQ_BITS * place).bitwise_and_(2**AWQ_BITS - 1) for row in rows.unbind(1))
        words.append(functools.reduce(torch.Tensor.bitwise_or_, (c << AWQ_BITS * i for i, c in enumerate(codes))))
    return torch.stack(words, dim=-1).flatten(1).T


def _fields(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """[R, N] with each eight neighbouring columns in another order."""
    return codes.unflatten(1, (-1, PER_WORD))[..., torch.tensor(order, device=codes.device)].flatten(1)
