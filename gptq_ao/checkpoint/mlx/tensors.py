"""MLX's tensors of a weight, in its mode "affine".

A linear layer of N output and K input features, b bits, groups of g = 32, 64 or 128:

    weight  uint32 [N, K·b/32]    codes, packed along K (see `codes/bit_stream.py`)
    scales  [N, K/g]              fp16, bf16 or fp32
    biases  [N, K/g]              of the same dtype; not the layer's bias

    w[n, k] = code[n, k] · scales[n, k // g] + biases[n, k // g]

**Written.** biases = −zero_point·scale. Of a symmetric weight the zero point is a power of two, so nothing is rounded;
of an asymmetric one the product has up to 19 binary digits, which fp32 has and fp16 has not.

**Read.** A weight here has whole zero points, −biases / scales. Files that this package wrote have such; those of MLX
itself nearly, since they round the scale after they chose the bias; learned ones need not.

Source: `mx.quantize` of MLX 0.32.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from gptq_ao.checkpoint.exchange.grouped_weight import GroupedWeight, as_half
from gptq_ao.checkpoint.exchange.natural_order import group_of_blocks, natural_codes
from gptq_ao.codes.bit_stream import codes_to_words, words_to_codes
from gptq_ao.codes.reinterpret import reinterpret
from gptq_ao.config import BITS
from gptq_ao.errors import CheckpointError
from gptq_ao.tensor import GroupTensor

__all__ = ["SIZES", "biases_moved", "decode_mlx", "dequantize_mlx", "encode_mlx", "written_size"]

SIZES = (128, 64, 32)
_WIDEST = 8


def written_size(weight: GroupTensor) -> int | None:
    """The largest group size of MLX in which the weight can be written; larger groups repeat their scale. None: there
    is none."""
    return next((size for size in SIZES if group_of_blocks(weight, size) is not None), None)


def encode_mlx(weight: GroupTensor) -> dict[str, Tensor]:
    """The tensors of a weight [N, K] that has a `written_size`, on the CPU."""
    scale, zero_point = _in_groups(weight)
    biases = _biases(scale, zero_point)
    words = codes_to_words(natural_codes(weight), weight.bits)
    return {"weight": reinterpret(words.contiguous(), torch.uint32), "scales": scale, "biases": biases}


def biases_moved(weight: GroupTensor) -> float:
    """The largest distance between a bias that `encode_mlx` rounds and −zero_point·scale, in steps of its group (the
    distance of two codes); infinite, if a bias is too large for its dtype."""
    scale, zero_point = _in_groups(weight)
    exact = -(zero_point.double() * scale.double())
    error = (_biases(scale, zero_point).double() - exact).abs() / scale.double().abs()
    return float(error.nan_to_num(0.0, posinf=torch.inf).max())  # 0 / 0 where the scale is 0


def decode_mlx(tensors: Mapping[str, Tensor], bits: int) -> GroupedWeight:
    """Read one weight.

    Args:
        tensors: those above by their names, in those shapes, on the device that decodes.
        bits: width of the codes, 2 to 6 or 8. Of 5 and 6, and of weights with a group that is all on one side of zero,
            they are held as codes of 8 bits, which is exact.

    Raises:
        CheckpointError: a number is not finite, or a group is too far on one side of zero.
    """
    scales, biases = tensors["scales"], tensors["biases"]
    scale, rounded = as_half(scales)
    if not torch.isfinite(biases).all():
        raise CheckpointError("a bias is not finite")
    # fp64 holds both, and their quotient well enough to find the nearest whole number.
    steps = -(biases.double() / scales.double())
    flat = scales == 0
    if bool((flat & (biases != 0)).any()):
        raise CheckpointError("a group has the scale 0, and a bias: all its weights are alike, and not 0")
    steps = torch.where(flat, 0.0, steps)
    whole = steps.round()
    # A bias that is the product as its dtype has it says nothing else than the product.
    meant = -(whole * scales.double()).to(biases.dtype)
    moved = torch.where(meant == biases, 0.0, (steps - whole).abs())
    words, k = reinterpret(tensors["weight"].contiguous(), torch.int32), tensors["weight"].shape[1] * 32 // bits
    held, low, high = bits, float(whole.min()), float(whole.max())
    if bits not in BITS or low < 0 or high >= 2**bits:
        held, up = _WIDEST, max(0.0, -low)
        if high + up >= 2**held or 2**bits - 1 + up >= 2**held:
            raise CheckpointError(
                "a group is so far on one side of zero that no zero point of 8 bits reaches it: only MLX can read it"
            )
        # Codes and zero points move up together: their difference is what counts.
        words = codes_to_words(words_to_codes(words, bits, k) + int(up), held)
        whole = whole + up
    return GroupedWeight(held, words, k, scale, whole.to(torch.uint8), None, rounded, float(moved.max()))


def dequantize_mlx(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """The weight [N, K] in the dtype of its scales, from fp32, whatever its biases are."""
    words, scales = reinterpret(tensors["weight"].contiguous(), torch.int32), tensors["scales"]
    codes = words_to_codes(words, bits, tensors["weight"].shape[1] * 32 // bits).unflatten(1, (scales.shape[1], -1))
    values = codes.float() * scales.float().unsqueeze(-1) + tensors["biases"].float().unsqueeze(-1)
    return values.flatten(1).to(scales.dtype)


def _in_groups(weight: GroupTensor) -> tuple[Tensor, Tensor]:
    """Scales, in the dtype in which they are written, and zero points of MLX's groups."""
    size = written_size(weight)
    assert size is not None
    group = group_of_blocks(weight, size)
    assert group is not None
    scale, zero_point = weight.scale.cpu()[:, group], weight.zero_point.cpu()[:, group]
    # In fp32 everything is exact. A model in bf16 has scales of fp16, unless it was read from a file with others.
    if weight.dtype == torch.float32:
        return scale.float(), zero_point
    same = weight.dtype == torch.bfloat16 and torch.equal(scale.bfloat16().half(), scale)
    return scale.to(torch.bfloat16 if same else torch.float16), zero_point


def _biases(scale: Tensor, zero_point: Tensor) -> Tensor:
    # The product is exact in fp32, of 11 and 8 binary digits, and then rounded.
    return -(zero_point.float() * scale.float()).to(scale.dtype)
