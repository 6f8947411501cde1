"""Weights of one output feature, of one group, of a single word: in every format and width, written and read."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gptq_ao.checkpoint.compressed_tensors.tensors import decode_compressed, encode_compressed
from gptq_ao.checkpoint.exchange.hub_names import grouped
from gptq_ao.checkpoint.exchange.packed_weight import held
from gptq_ao.checkpoint.gptq.tensors import ZeroPoints, decode_gptq, encode_gptq
from gptq_ao.checkpoint.native.tensors import encode_native, from_stored, stored_entry
from gptq_ao.tensor import GroupTensor, tensor_class
from tests.codes.test_reinterpret import stored_in_any_way

Stored = Callable[[Tensor], Tensor]


def native(weight: GroupTensor, sym: bool, stored: Stored) -> GroupTensor:
    tensors = {f"w.{name}": stored(t) for name, t in encode_native(weight).items()}
    return from_stored("w", stored_entry(weight), tensors.__getitem__, "here")


def gptq(version: int) -> Callable[[GroupTensor, bool, Stored], GroupTensor]:
    def there_and_back(weight: GroupTensor, sym: bool, stored: Stored) -> GroupTensor:
        encoded = encode_gptq(grouped(weight), version=version)
        tensors = {name: stored(t) if t.dim() == 2 else t for name, t in encoded.items()}
        points = ZeroPoints(version, sym=sym, borrows=True)
        return held(decode_gptq(tensors, weight.bits, weight.in_features, weight.group_size, points), weight.dtype)

    return there_and_back


def compressed(weight: GroupTensor, sym: bool, stored: Stored) -> GroupTensor:
    encoded = encode_compressed(grouped(weight), weight.dtype)
    tensors = {name: stored(t) if t.dim() == 2 else t for name, t in encoded.items()}
    return held(decode_compressed(tensors, weight.bits), weight.dtype)


FORMATS = {"native": native, "gptq": gptq(1), "gptq_v2": gptq(2), "compressed-tensors": compressed}


@stored_in_any_way
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
# Asymmetric weights are not written as version 1, which is ambiguous for them.
@pytest.mark.parametrize(("format", "sym"), [(f, s) for f in FORMATS for s in (True, False) if s or f != "gptq"])
def test_small_weights_come_back(format: str, bits: int, sym: bool, stored: Stored) -> None:
    generator = torch.Generator().manual_seed(bits)
    # Output features, input features, groups. GPTQ's words hold whole rows of 32 codes only at 32 input features.
    for n, k, groups in [(1, 32, 1), (1, 32, 2), (1, 96, 3), (2, 32, 1), (4, 32, 1), (16, 64, 2), (33, 32, 1)]:
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
        zero_point = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator)
        zero_point = torch.full_like(zero_point, 2 ** (bits - 1)) if sym else zero_point
        scale = torch.rand(n, groups, generator=generator).half()
        weight = tensor_class(bits).from_codes(codes, scale, zero_point, dtype=torch.float16)
        read = FORMATS[format](weight, sym, stored)
        assert torch.equal(read.codes(), codes), (n, k, groups)
        assert torch.equal(read.scale, scale), (n, k, groups)
        assert torch.equal(read.zero_point, zero_point), (n, k, groups)
