"""Codes as little-endian bit streams in int32 words: the packing that GPTQ and compressed-tensors have in common.

Code j of a row takes the bits [j·bits, (j+1)·bits) of the row's stream, word i holds the bits [32·i, 32·(i+1)), lowest
first; the last word is filled up with zeros. At 3 bits a code may lie in two words. GPTQ's `qweight` is the transpose
of such a matrix of words, with one row for each output feature.
"""

import torch
from torch import Tensor

from gptq_ao.packing import pack_bits, unpack_bits

__all__ = ["codes_to_words", "word_count", "words_to_codes"]


def word_count(codes: int, bits: int) -> int:
    """Words of a row with so many codes."""
    return -(-codes * bits // 32)


def words_to_codes(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [R, W] to the first `count` codes of each row, uint8 [R, count]."""
    return unpack_bits(words.contiguous().view(torch.uint8), bits, count)


def codes_to_words(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `words_to_codes`: uint8 [R, count] to int32 [R, word_count(count, bits)]."""
    stream = pack_bits(codes, bits)
    count = word_count(codes.shape[1], bits)
    filled = torch.nn.functional.pad(stream, (0, 4 * count - stream.shape[1]))
    return filled.flatten().view(torch.int32).unflatten(0, (-1, count))  # flat: a single row may have any stride
