"""`save_pretrained` of transformers into the directory that a model was loaded from, which leaves files lying there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptq_ao import load_quantized, save_quantized
from gptq_ao.checkpoint.formats import format_of
from gptq_ao.errors import CheckpointError
from gptq_ao.integrations.transformers import load_model

from ..checkpoint.test_directories import FORMATS, assert_same_weights, quantized

LOADERS = (load_quantized, AutoModelForCausalLM.from_pretrained, lambda path: load_model(str(path)))


@pytest.fixture(autouse=True)
def ours(loaders: None) -> None:
    """Checkpoints of all formats are loaded by this package."""


@pytest.mark.parametrize("sizes", [(10_000_000, "5GB"), (60_000, "5GB"), (10_000_000, "60KB"), (60_000, "40KB")])
@pytest.mark.parametrize("format", FORMATS)
def test_a_checkpoint_that_loads(format: str, sizes: tuple[int, str], tmp_path: Path) -> None:
    """From one file or several to one or several; then again, from files that this model is still mapped to."""
    model = quantized()
    save_quantized(model, tmp_path, format=format, max_shard_bytes=sizes[0])
    for size in (sizes[1], sizes[1], "80KB", "5GB"):
        AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path, max_shard_size=size)
        for load in LOADERS:
            assert assert_same_weights(model, load(tmp_path)) == 14


@pytest.mark.parametrize("format", FORMATS)
def test_another_dtype(format: str, tmp_path: Path) -> None:
    save_quantized(quantized(), tmp_path / "a", format=format, max_shard_bytes=60_000)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "a", max_shard_size="60KB")
    for load in LOADERS:
        assert assert_same_weights(model, load(tmp_path / "a")) == 14


@pytest.mark.parametrize("size", ["5GB", "60KB"])
@pytest.mark.parametrize("format", FORMATS)
def test_dense_weights_over_quantized_ones(format: str, size: str, tmp_path: Path) -> None:
    save_quantized(quantized(), tmp_path / "a", format=format, max_shard_bytes=60_000)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "a").dequantize()
    model.save_pretrained(tmp_path / "a", max_shard_size=size)
    assert format_of(tmp_path / "a") is None
    assert assert_same_weights(model, load_model(str(tmp_path / "a"))) == 0
    with pytest.raises(CheckpointError, match="is not quantized"):
        load_quantized(tmp_path / "a")


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_other_settings(format: str, tmp_path: Path) -> None:
    """What is left of GPTQ's second config, by another library, does not say the same as the new one."""
    save_quantized(quantized(sym=format == "gptq"), tmp_path / "a", format=format)
    # As that library wrote it: it says of all weights that their columns have an order.
    other = {"desc_act": True, "meta": {"quantizer": ["other:1.0"]}}
    config, aside = tmp_path / "a" / "config.json", tmp_path / "a" / "quantize_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "quantization_config": {**content["quantization_config"], **other}}))
    aside.write_text(json.dumps({**json.loads(aside.read_text()), **other}))
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "a")
    for load in LOADERS:
        assert assert_same_weights(quantized(sym=format == "gptq"), load(tmp_path / "a")) == 14


def test_save_quantized_overwrites_nothing(tmp_path: Path) -> None:
    save_quantized(quantized(), tmp_path / "a")
    model = load_quantized(tmp_path / "a")
    with pytest.raises(CheckpointError, match="is not empty: nothing is overwritten, choose another directory"):
        save_quantized(model, tmp_path / "a")
    assert assert_same_weights(model, load_quantized(tmp_path / "a")) == 14
