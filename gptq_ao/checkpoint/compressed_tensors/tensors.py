"""The tensors of compressed-tensors' format `pack-quantized`, which llm-compressor writes.

A linear layer of N output and K input features, b bits (2 to 8), G groups (1 for strategy "channel"):

    weight_packed      int32 [N, ⌈K·b/32⌉]   code + 2^(b−1), packed along K (see `codes/bit_stream.py`)
    weight_scale       [N, G]                in the model's dtype
    weight_zero_point  int32 [⌈N·b/32⌉, G]   zero point + 2^(b−1), packed along N; only of asymmetric weights
    weight_shape       int64 [2]             N, K
    weight_g_idx       int32 [K]             group of each input feature; written up to compressed-tensors 0.18

    w[n, k] = (code[n, k] − zero_point[n, g]) · weight_scale[n, g],  g = k // (K/G) or weight_g_idx[k]

Codes of 5, 6 and 7 bits are held as 8-bit codes of the same value.

Source: compressed-tensors 0.19, `compressors/pack_quantized`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from gptq_ao.checkpoint.exchange.grouped_weight import GroupedWeight, as_half, in_equal_groups
from gptq_ao.codes.bit_stream import codes_to_words, words_to_codes
from gptq_ao.config import BITS
from gptq_ao.errors import CheckpointError

__all__ = ["decode_compressed", "encode_compressed"]


def decode_compressed(tensors: Mapping[str, Tensor], bits: int) -> GroupedWeight:
    """Read one weight.

    Args:
        tensors: those above by their names, in those shapes, on the device that decodes; `weight_zero_point` and
            `weight_g_idx` may be missing.
        bits: width of the codes, 2 to 8.

    Raises:
        CheckpointError: `weight_shape` contradicts the shapes, `weight_g_idx` is out of range, a scale is not finite.
    """
    scale, rounded = as_half(tensors["weight_scale"])
    n, groups = scale.shape
    k = int(tensors["weight_shape"][1])
    words = tensors["weight_packed"]
    if "weight_zero_point" in tensors:
        # Packed along N, so each column is a bit stream: transposed, unpacked and transposed back.
        zero_point = words_to_codes(tensors["weight_zero_point"].T, bits, n).T
    else:
        # Symmetric weights store no zero point. As codes are stored with 2^(b−1) added, that is where their zero is.
        zero_point = torch.full((n, groups), 2 ** (bits - 1), dtype=torch.uint8, device=scale.device)
    held = bits if bits in BITS else 8
    if held != bits:  # codes and zero points move up together: their difference is what counts
        up = 2 ** (held - 1) - 2 ** (bits - 1)
        words, zero_point = codes_to_words(words_to_codes(words, bits, k) + up, held), zero_point + up
    g_idx = tensors.get("weight_g_idx")
    if g_idx is None:
        g_idx = torch.arange(k, device=scale.device) // (k // groups)
    elif int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise CheckpointError(f"weight_g_idx reaches from {int(g_idx.min())} to {int(g_idx.max())}, of {groups} groups")
    return in_equal_groups(GroupedWeight(held, words, k, scale, zero_point, None, rounded), g_idx.long())


def encode_compressed(weight: GroupedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a weight without `perm`; the inverse of `decode_compressed`.

    Args:
        dtype: that of the scales, if it holds them exactly (they are fp16 otherwise).
    """
    scale = weight.scale.to(dtype)
    tensors = {
        "weight_packed": weight.words,
        # bf16 has fewer digits than fp16, so a scale could change; then fp16 is written.
        "weight_scale": scale if torch.equal(scale.half(), weight.scale) else weight.scale,
        "weight_shape": torch.tensor([len(weight.scale), weight.in_features]),
    }
    if bool((weight.zero_point != 2 ** (weight.bits - 1)).any()):
        stream = codes_to_words(weight.zero_point.T.contiguous(), weight.bits)
        tensors["weight_zero_point"] = stream.T.contiguous()
    return {name: t.contiguous() for name, t in tensors.items()}
