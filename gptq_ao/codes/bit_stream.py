"""Rows of codes as files have them: one little-endian stream of bits each, as bytes or as int32 words.

Code j of a row takes the bits [j·bits, (j+1)·bits) of the row's stream. Byte i holds its bits [8·i, 8·(i+1)), word i
the bits [32·i, 32·(i+1)), lowest first; what is left of the last one is zero. At 3 bits a code may lie in two of them.

The native format stores bytes, GPTQ and compressed-tensors store words. GPTQ's `qweight` is the transpose of such a
matrix of words, with one row for each output feature.
"""

import torch
from torch import Tensor

from gptq_ao.codes.reinterpret import reinterpret

__all__ = ["codes_to_words", "pack_bits", "unpack_bits", "word_count", "words_to_codes"]


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., K] to their bit stream uint8 [..., ceil(K·bits/8)], contiguous."""
    codes = codes.contiguous()
    size = -(-codes.shape[-1] * bits // 8)
    if 8 % bits == 0:
        joined = _fill(codes, size * (8 // bits))
        while bits < 8:  # neighbours are joined until a byte is full
            joined, bits = joined[..., ::2] | joined[..., 1::2] << bits, 2 * bits
        return joined
    eights = _fill(codes, -(-codes.shape[-1] // 8) * 8).unflatten(-1, (-1, 8))
    words = eights[..., :1].long()  # eight codes each, in the low `bits` bytes
    for i in range(1, 8):
        words |= eights[..., i : i + 1].long() << (bits * i)
    return reinterpret(words, torch.uint8)[..., :bits].flatten(-2)[..., :size].contiguous()


def unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 [..., count]."""
    if 8 % bits == 0:
        place = torch.arange(0, 8, bits, dtype=torch.uint8, device=stream.device)
        return (stream.unsqueeze(-1) >> place).bitwise_and_(2**bits - 1).flatten(-2)[..., :count]
    eights = _fill(stream, -(-count // 8) * bits).unflatten(-1, (-1, bits))
    words = reinterpret(_fill(eights, 8), torch.int64)
    codes = stream.new_empty(*eights.shape[:-1], 8)
    for i in range(8):
        codes[..., i : i + 1] = words >> (bits * i) & (2**bits - 1)
    return codes.flatten(-2)[..., :count]


def word_count(codes: int, bits: int) -> int:
    """Words in the stream of one row."""
    return -(-codes * bits // 32)


def words_to_codes(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [R, W] to the first `count` codes of each row, uint8 [R, count]."""
    return unpack_bits(reinterpret(words, torch.uint8), bits, count)


def codes_to_words(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `words_to_codes`: uint8 [R, count] to int32 [R, word_count(count, bits)]."""
    stream = pack_bits(codes, bits)
    count = word_count(codes.shape[1], bits)
    return reinterpret(_fill(stream, 4 * count), torch.int32)


def _fill(x: Tensor, size: int) -> Tensor:
    """`x` with `size` elements in its last dimension: cut off, or filled up with zeros."""
    return x if x.shape[-1] == size else torch.nn.functional.pad(x, (0, size - x.shape[-1]))
