"""transformers' own calls: `from_pretrained`, `save_pretrained`, `dequantize`, `generate`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPTQConfig
from transformers.quantizers import auto

from gptq_ao import GptqAoConfig, gptq_config, load_quantized, quantize_, save_quantized
from gptq_ao.checkpoint.compressed_tensors import read as compressed_tensors_read
from gptq_ao.checkpoint.gptq import read as gptq_read
from gptq_ao.errors import CheckpointError, ConfigError
from gptq_ao.integrations import transformers as integration
from gptq_ao.integrations.hf_quantizer import GptqAoQuantizer
from gptq_ao.tensor import GroupTensor, Int4GroupTensor

from ..checkpoint.test_directories import FORMATS, MODELS, assert_same_files, assert_same_weights, quantized
from ..models import tiny_llama, token_batches


@pytest.fixture(autouse=True)
def loads_all_formats(loaders: None) -> None:
    """Also where the packages that transformers' own loaders need are installed."""
    integration.load_with_gptq_ao("gptq", "compressed-tensors")


@pytest.mark.filterwarnings("ignore:.*'gpt2' were not compared with mlx-lm")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained_and_save_pretrained(name: str, format: str, tmp_path: Path) -> None:
    model = quantized(name)
    save_quantized(model, tmp_path / "a", format=format, max_shard_bytes=60_000)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert assert_same_weights(model, loaded) >= 8
    assert not any(p.requires_grad for p in loaded.parameters() if isinstance(p, GroupTensor))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    loaded.save_pretrained(tmp_path / "b", max_shard_size="60KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert assert_same_weights(model, again) >= 8
    assert_same_files(tmp_path / "a", tmp_path / "b")
    assert assert_same_weights(model, load_quantized(tmp_path / "b")) >= 8
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1


def test_generate_and_dequantize(tmp_path: Path) -> None:
    save_quantized(quantized(), tmp_path / "a", format="gptq")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16, device_map={"": "cpu"})
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, Int4GroupTensor)
    ids = token_batches(1)[0]["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert tokens.shape == (2, 45)
    with torch.no_grad():
        before = model(ids).logits
    dense = model.dequantize()
    assert not any(isinstance(p, GroupTensor) for p in dense.parameters())
    with torch.no_grad():
        # bf16: 2^-8 of the largest logit for each of some 20 products.
        assert (dense(ids).logits - before).abs().max() <= 20 * 2**-8 * before.abs().max()
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_quantize_on_load(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    reads: list[int] = []

    def calibration() -> Any:
        reads.append(1)
        return token_batches()

    config = GptqAoConfig(bits=4, group_size=32, effort="fast", calibration=calibration)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert len(reads) == 1
    expected = tiny_llama()
    quantize_(expected, gptq_config(bits=4, group_size=32, effort="fast", calibration=token_batches()))
    assert assert_same_weights(expected, model) == 14
    model.save_pretrained(tmp_path / "q")
    content = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert content["format"] == "gptq_ao"
    assert "quant_method" not in content
    assert "calibration" not in json.dumps(content)
    assert assert_same_weights(expected, AutoModelForCausalLM.from_pretrained(tmp_path / "q")) == 14
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=GptqAoConfig(8, 32))
    assert sum(isinstance(p, GroupTensor) for p in rounded.parameters()) == 14


def test_a_model_with_another_head(tmp_path: Path) -> None:
    """The quantized body of a language model, under a new head that is not in the checkpoint."""
    model = quantized()
    save_quantized(model, tmp_path / "a", format="gptq")
    other: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a", num_labels=3)
    assert assert_same_weights(model.model, other.model) == 14
    assert other.score.weight.shape == (3, 64)


def test_who_loads_what_can_be_changed_and_changed_back(tmp_path: Path) -> None:
    integration.load_with_transformers("gptq", "compressed-tensors")
    for method, name in (("gptq", "GptqHfQuantizer"), ("compressed-tensors", "CompressedTensorsHfQuantizer")):
        assert auto.AUTO_QUANTIZER_MAPPING[method].__name__ == name
    integration.load_with_transformers("gptq")  # twice is once
    integration.load_with_gptq_ao("gptq")
    integration.load_with_gptq_ao("gptq")
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is GptqAoQuantizer
    integration.load_with_transformers("gptq")
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"].__name__ == "GptqHfQuantizer"
    with pytest.raises(ConfigError, match=r"quant_method is 'gguf': give one of gptq, compressed-tensors, awq"):
        integration.load_with_gptq_ao("gguf")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("given", [{}, {"quantization_config": GPTQConfig(bits=4)}])
def test_experts_are_loaded_here_whoever_else_could(name: str, given: dict[str, Any], tmp_path: Path) -> None:
    """Where gptqmodel and optimum are installed, transformers' own loader is in charge, and knows no stacks."""
    integration.load_with_transformers("gptq")
    for format in ("gptq", "gptq_v2"):
        save_quantized(quantized(name), tmp_path / format, format=format)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / format, **given)
        assert assert_same_weights(quantized(name), loaded) >= 8
    # What it can load stays its own.
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"].__name__ == "GptqHfQuantizer"
    save_quantized(quantized(), tmp_path / "dense", format="gptq")
    with pytest.raises(ImportError, match=r"optimum|gptqmodel"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense")


def test_damaged_files_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    save_quantized(quantized(), tmp_path / "a", format="gptq")
    index = tmp_path / "a" / "model.safetensors.index.json"
    file = next((tmp_path / "a").glob("*.safetensors"))
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.scales"
    save_file({**tensors, name: tensors[name][:1].contiguous()}, file)
    with pytest.raises(CheckpointError, match=r"the config .* and the tensors of '.*up_proj' contradict each other"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    outside = tmp_path / "secret.safetensors"
    save_file(tensors, outside)
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../secret.safetensors")
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"its index names files outside of it, in .*"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def test_a_scale_that_is_no_number_stops_the_load(tmp_path: Path) -> None:
    save_quantized(quantized(), tmp_path / "a", format="gptq")
    file = next((tmp_path / "a").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.scales"][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"weight '.*up_proj.weight' is damaged: a scale is not finite"):
        load_quantized(tmp_path / "a")


def test_device_maps(tmp_path: Path) -> None:
    save_quantized(quantized(), tmp_path / "a", format="compressed-tensors")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "a", device_map="auto", max_memory={"cpu": "1GB"})
    assert assert_same_weights(quantized(), model) == 14
    with pytest.raises(ConfigError, match="cannot be offloaded to the disk"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a", device_map={"model": "cpu", "lm_head": "disk"})


def test_what_would_be_offloaded_to_the_disk_is_refused(tmp_path: Path) -> None:
    """Also where nobody said "disk": two layers of 14 weights do not fit into so little memory."""
    save_quantized(quantized(), tmp_path / "a", format="gptq")
    with pytest.raises(ConfigError, match="cannot be offloaded to the disk"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "a", device_map="auto", max_memory={"cpu": "50KB"}, offload_folder=tmp_path / "offload"
        )


@pytest.mark.parametrize("format", ["native", "gptq", "compressed-tensors"])
@pytest.mark.parametrize(
    "loader", [load_quantized, AutoModelForCausalLM.from_pretrained], ids=["load_quantized", "from_pretrained"]
)
def test_weights_are_decoded_where_they_go(
    loader: Any, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shown with meta, on which no number can be looked at: decoding is as far as it goes."""
    seen: set[str] = set()

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.update(t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        raise CheckpointError("was asked for")

    save_quantized(quantized(), tmp_path / "a", format=format)
    monkeypatch.setattr(gptq_read, "decode_gptq", spy)
    monkeypatch.setattr(compressed_tensors_read, "decode_compressed", spy)
    monkeypatch.setattr(Int4GroupTensor, "from_words", spy)
    where: dict[str, Any] = {"device": "meta"} if loader is load_quantized else {"device_map": {"": "meta"}}
    with pytest.raises((CheckpointError, RuntimeError)):
        loader(tmp_path / "a", **where)
    assert seen == {"meta"}


def test_an_unquantized_module_stays_as_it_is(tmp_path: Path) -> None:
    model = quantized(rules={"re:.*layers.0.self_attn.*": None})
    for format in ("gptq", "compressed-tensors"):
        save_quantized(model, tmp_path / format, format=format)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / format)
        assert isinstance(loaded.model.layers[0].self_attn.q_proj, nn.Linear)
        assert assert_same_weights(model, loaded) == 10
