"""GPTQ's tensors, as AutoGPTQ defined them and GPTQModel writes them.

A linear layer of N output and K input features, b bits, G groups:

    qweight  int32 [⌈K·b/32⌉, N]   codes, packed along K (see `codes/bit_stream.py`)
    qzeros   int32 [G, ⌈N·b/32⌉]   zero points, packed along N
    scales   fp16  [G, N]          (also bf16 or fp32)
    g_idx    int32 [K]             group of each input feature; may be missing where that is k // group_size

    w[n, k] = (code[k, n] − zero_point[g, n]) · scales[g, n],  g = g_idx[k]

**Version 1** (`"gptq"`) stores zero points minus one. GPTQModel subtracts 0x11111111 (at 4 bits) from the whole word,
so that a zero point of 0 borrows from the field above it; only the addition of the same number to the whole word undoes
that. At 3 bits each field is decremented by itself. **Version 2** (`"gptq_v2"`) stores them as they are.

**Labels lie.** There are symmetric checkpoints that say version 1 and store version 2. As all zero points of a
symmetric weight are 2^(b−1), what is stored decides, not the label.

**What cannot be read.** AutoGPTQ packed asymmetric version-1 zero points so that a zero point of 0 sets all higher bits
of its word to one: the fields above are lost. A word that ends in two fields of ones is refused, unless GPTQModel,
which borrows, wrote it.

Source: the packing code of GPTQModel 7.7 and AutoGPTQ 0.7.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_ao.checkpoint.exchange.grouped_weight import GroupedWeight, as_half, in_equal_groups
from gptq_ao.codes.bit_stream import codes_to_words, words_to_codes
from gptq_ao.errors import CheckpointError

__all__ = ["ZeroPoints", "decode_gptq", "encode_gptq"]

_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # a one in every field
# Highest bits of a word that are all ones after AutoGPTQ packed a zero point of 0 below its last field. At 3 bits
# three words are packed as one, and fields cross their borders: one number for each of the three.
_LOST_BITS = {2: (4,), 3: (5, 4, 6), 4: (8,), 8: (16,)}


@dataclass(frozen=True)
class ZeroPoints:
    """What a checkpoint says of its zero points.

    Attributes:
        version: 1 or 2.
        sym: whether they are all 2^(b−1).
        borrows: whether GPTQModel wrote them.
    """

    version: int
    sym: bool
    borrows: bool


def decode_gptq(
    tensors: Mapping[str, Tensor], bits: int, in_features: int, group_size: int, stored: ZeroPoints
) -> GroupedWeight:
    """Read one weight.

    Args:
        tensors: `qweight`, `qzeros`, `scales` and perhaps `g_idx`, in the shapes above, on the device that decodes.
        in_features: K.
        group_size: number of input features in a group; only used where `g_idx` is missing.
        stored: what the checkpoint says of its zero points.

    Raises:
        CheckpointError: a `g_idx` is out of range, a scale is not finite, or zero points cannot be recovered.
    """
    scale, rounded = as_half(tensors["scales"].T)
    n, groups = scale.shape
    zero_point = _zero_points(tensors["qzeros"], bits, n, stored).T
    g_idx = tensors.get("g_idx")
    if g_idx is None:
        # The natural order: neighbours share a scale.
        g_idx = torch.arange(in_features, device=scale.device) // group_size
    # A file may say anything; these numbers will index the scales.
    elif int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise CheckpointError(f"g_idx reaches from {int(g_idx.min())} to {int(g_idx.max())}, of {groups} groups")
    weight = GroupedWeight(bits, tensors["qweight"].T, in_features, scale, zero_point, None, rounded)
    return in_equal_groups(weight, g_idx.long())


def encode_gptq(weight: GroupedWeight, *, version: int) -> dict[str, Tensor]:
    """The tensors of a weight; the inverse of `decode_gptq` for weights in groups of one size.

    Args:
        version: that of the format: 1 for symmetric weights, which every reader decodes alike, else 2.
    """
    words, group_size = weight.words, weight.in_features // weight.scale.shape[1]
    group_of = torch.arange(weight.in_features) // group_size
    # Files have columns in the order of the input features, and g_idx says which group each belongs to.
    if weight.perm is not None:
        codes = weight.codes
        words = codes_to_words(torch.empty_like(codes).index_copy_(1, weight.perm.long(), codes), weight.bits)
        group_of = torch.empty_like(group_of).index_copy_(0, weight.perm.long(), group_of)
    # Version 1 stores zero points minus one. They are symmetric, so never 0, and nothing wraps around.
    stored = weight.zero_point - int(version == 1)
    return {
        "qweight": words.T.contiguous(),
        "qzeros": codes_to_words(stored.T.contiguous(), weight.bits),
        "scales": weight.scale.T.contiguous(),
        "g_idx": group_of.to(torch.int32),
    }


def _zero_points(qzeros: Tensor, bits: int, n: int, stored: ZeroPoints) -> Tensor:
    """uint8 [G, N]."""
    fields = words_to_codes(qzeros, bits, n)
    middle = 2 ** (bits - 1)
    # All alike and in the middle of the grid, or one below it: which of the two it is, the label does not decide.
    if stored.sym and int(fields.min()) == int(fields.max()) in (middle, middle - 1):
        return torch.full_like(fields, middle)
    if stored.version == 2:
        return fields
    if not stored.borrows:
        _check_recoverable(qzeros, bits)
    # Here each field was decremented by itself, so 0 became 7, and 7 becomes 0 again.
    if bits == 3:
        return (fields + 1) & 7
    # As unsigned 32-bit numbers, in int64: a carry runs through the fields of a word and is lost at its end.
    plus = (qzeros.long() + _ONES[bits]) & 0xFFFFFFFF
    # Back to int32: a number with the highest bit set is a negative one.
    return words_to_codes((plus - (plus >> 31 << 32)).int(), bits, n)


def _check_recoverable(qzeros: Tensor, bits: int) -> None:
    for first, top in enumerate(_LOST_BITS[bits]):
        # Shifting an int32 to the right repeats its sign, so −1 means that its highest `top` bits are all ones.
        if bool((qzeros[:, first :: len(_LOST_BITS[bits])] >> (32 - top) == -1).any()):
            raise CheckpointError(
                "its zero points are stored minus one (version 1) by a writer that loses those above a zero point of "
                "0, and there are such: the weight cannot be recovered. Quantize the original model again"
            )
