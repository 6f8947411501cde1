"""compressed-tensors' pack-quantized: every number exactly, at all widths it has."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gptq_ao import load_quantized, save_quantized
from gptq_ao.checkpoint.compressed_tensors.read import Scheme, compressed_schemes
from gptq_ao.checkpoint.compressed_tensors.tensors import decode_compressed, encode_compressed
from gptq_ao.errors import CheckpointError

from .test_directories import assert_same_weights, quantized
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


# What versions from 0.5 to 0.20 write of nothing more than packed weights: changes of the config, of its scheme.
SPARSE_IN_NAME = {"format": "dense", "global_sparsity": 0.14, "ignore": [], "sparsity_structure": "unstructured"}
SPARSE_IN_NAME |= {"registry_requires_subclass": False, "targets": []}
WRITTEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense sparsity": ({"sparsity_config": SPARSE_IN_NAME}, {}),
    "empty sparsity": ({"sparsity_config": {}, "moe_sparsity_config": None}, {}),
    "frozen": ({"quantization_status": "frozen"}, {}),
    "calibration": ({"quantization_status": "calibration"}, {}),
    "no status": ({"quantization_status": None}, {}),
    "version": ({"version": "0.9.2.a20250101", "global_compression_ratio": 1.8, "kv_cache_scheme": None}, {}),
    "no transforms": ({"transform_config": {"config_groups": {}}, "ignore": None}, {}),
    "no format": ({"format": None}, {}),
    "unknown": ({"of_tomorrow": None, "more": {}}, {"of_tomorrow": None}),
    "nulls": ({}, {"symmetric": None, "strategy": None, "type": None, "observer_kwargs": {}, "block_structure": None}),
    "old observer": ({}, {"observer": "minmax", "actorder": "weight", "dynamic": False, "zp_dtype": None}),
}


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("case", WRITTEN)
def test_configs_of_all_versions_are_read(case: str, key: str, tmp_path: Path, loaders: None) -> None:
    save_quantized(quantized(), tmp_path / "a", format="compressed-tensors")
    content = json.loads((tmp_path / "a" / "config.json").read_text())
    found = content.pop("quantization_config")
    change, scheme_change = WRITTEN[case]
    for scheme in found["config_groups"].values():
        scheme["weights"] |= scheme_change
        scheme |= {"input_activations": None, "output_activations": {}}
    if key == "compression_config":
        del found["quant_method"]
    (tmp_path / "a" / "config.json").write_text(json.dumps({**content, key: {**found, **change}}))
    for load in (load_quantized, AutoModelForCausalLM.from_pretrained):
        assert assert_same_weights(quantized(), load(tmp_path / "a")) == 14


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
    "tensor": (config(strategy=None, group_size=None), r"the strategy 'tensor' with group_size None"),
    "status": ({"quantization_status": "initialized"}, r"is 'initialized', only 'compressed', 'frozen', 'calibration'"),
    "sparse": (
        {"sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}},
        r"has a sparsity_config of the format 'sparse-24-bitmask': it is more than quantized weights",
    ),
    "unnamed sparsity": ({"sparsity_config": {"sparsity_structure": "2:4"}}, r"has a sparsity_config: it is more"),
    "rotations": ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, r"has a transform_config"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_ask_for_what_cannot_be_read(case: str) -> None:
    change, message = CONFIGS[case]
    with pytest.raises(CheckpointError, match=message):
        compressed_schemes({**config(), **change})
