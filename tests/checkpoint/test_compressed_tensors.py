"""compressed-tensors' pack-quantized: every number exactly, at all widths it has."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_ao.checkpoint.compressed_tensors.read import Scheme, compressed_schemes
from gptq_ao.checkpoint.compressed_tensors.tensors import decode_compressed, encode_compressed
from gptq_ao.errors import CheckpointError

from .writers import compressed_tensors, dense, meant


def parts(bits: int, n: int = 12, k: int = 96, groups: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """12 rows do not fill a word of zero points at any width."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scale = torch.randn(n, groups, generator=generator).bfloat16()
    zero_point = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator)
    return codes, scale, zero_point


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_weight_is_the_one_that_was_packed(bits: int, sym: bool, groups: int) -> None:
    codes, scale, zero_point = parts(bits, groups=groups)
    zero_point = torch.full_like(zero_point, 2 ** (bits - 1)) if sym else zero_point
    tensors = compressed_tensors(codes, scale, None if sym else zero_point, bits)
    read = decode_compressed(tensors, bits)
    group_of = torch.arange(96) // (96 // groups)
    assert torch.equal(meant(read), dense(codes, scale, zero_point, group_of))
    assert read.bits == (bits if bits in (2, 3, 4, 8) else 8)
    if bits in (2, 3, 4, 8):
        assert torch.equal(read.codes, codes)
        written = encode_compressed(read, torch.bfloat16)
        assert set(written) == set(tensors)
        assert all(torch.equal(written[name], t) and written[name].dtype == t.dtype for name, t in tensors.items())
    else:
        assert ((read.zero_point == 128).all()) == sym


def test_scales_are_written_in_the_model_s_dtype_only_if_it_holds_them() -> None:
    codes, scale, zero_point = parts(4)
    read = decode_compressed(compressed_tensors(codes, scale.half(), zero_point, 4), 4)
    assert encode_compressed(read, torch.bfloat16)["weight_scale"].dtype == torch.bfloat16
    fine = (scale.float() * 1.001).half()
    read = decode_compressed(compressed_tensors(codes, fine, zero_point, 4), 4)
    assert torch.equal(encode_compressed(read, torch.bfloat16)["weight_scale"], fine)
    assert torch.equal(encode_compressed(read, torch.float32)["weight_scale"], fine.float())


def test_the_order_that_old_versions_store() -> None:
    codes, scale, zero_point = parts(4)
    group_of = (torch.arange(96) // 32)[torch.randperm(96, generator=torch.Generator().manual_seed(0))]
    read = decode_compressed(compressed_tensors(codes, scale, zero_point, 4, group_of), 4)
    assert read.perm is not None
    assert torch.equal(meant(read), dense(codes, scale, zero_point, group_of))
    with pytest.raises(CheckpointError, match=r"weight_g_idx reaches from 0 to 7, of 3 groups"):
        decode_compressed(compressed_tensors(codes, scale, zero_point, 4, group_of.index_fill(0, group_of[:1], 7)), 4)


def config(**weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def test_schemes() -> None:
    assert compressed_schemes(config()) == [Scheme(4, True, 32)]
    assert compressed_schemes(config(strategy="channel", group_size=None, symmetric=False)) == [Scheme(4, False, None)]
    mixed = config()
    mixed["format"] = "mixed-precision"
    mixed["config_groups"]["group_0"]["format"] = "pack-quantized"
    assert compressed_schemes(mixed) == [Scheme(4, True, 32)]


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": "int-quantized"}, r"of the format 'int-quantized' cannot be read, only 'pack-quantized'"),
    "mixed": ({"format": "mixed-precision"}, r"of the format 'mixed-precision'"),
    "no-groups": ({"config_groups": {}}, r"has no 'config_groups'"),
    "no-weights": ({"config_groups": {"a": {"targets": []}}}, r"config group 'a' has no 'weights'"),
    "activations": (
        {"config_groups": {"a": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}}},
        r"config group 'a' quantizes activations \(input_activations\)",
    ),
    "cache": ({"kv_cache_scheme": {"num_bits": 8}}, r"has a kv_cache_scheme: it is more than quantized weights"),
    "transform": ({"transform_config": {"a": 1}}, r"has a transform_config"),
    "float": (config(type="float"), r"weights of 4 bits, type 'float'"),
    "bits": (config(num_bits=16), r"weights of 16 bits"),
    "strategy": (config(strategy="block"), r"the strategy 'block' with group_size 32"),
    "status": ({"quantization_status": "frozen"}, r"is 'frozen', only 'compressed'"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_ask_for_what_cannot_be_read(case: str) -> None:
    change, message = CONFIGS[case]
    with pytest.raises(CheckpointError, match=message):
        compressed_schemes({**config(), **change})
