"""A quantization_config that is given where the checkpoint has one, or where there is none and another library's is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig, TorchAoConfig

from gptq_ao import GptqAoConfig, gptq_config, load_quantized, save_quantized
from gptq_ao.errors import ConfigError
from gptq_ao.integrations import transformers as integration
from gptq_ao.tensor import GroupTensor, tensor_class

from ..checkpoint.test_directories import assert_same_weights, quantized
from ..models import tiny_llama, token_batches


@pytest.fixture(autouse=True)
def loads_all_formats(loaders: None) -> None:
    integration.load_with_gptq_ao("gptq", "compressed-tensors")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model, quantized and saved in several formats: 4 bits in groups of 32, symmetric."""
    root = tmp_path_factory.mktemp("given")
    for format in ("native", "gptq", "compressed-tensors"):
        save_quantized(quantized(), root / format, format=format)
    tiny_llama().save_pretrained(root / "dense")
    return root


@pytest.mark.parametrize(
    ("format", "given"),
    [
        ("gptq", GPTQConfig(bits=4)),
        ("gptq", GPTQConfig(bits=4, group_size=32, sym=True, backend="auto", max_input_length=512)),
        ("gptq", {"quant_method": "gptq", "bits": 4}),
        ("native", {"quant_method": "gptq_ao"}),
        ("compressed-tensors", {"quant_method": "compressed-tensors", "run_compressed": True}),
    ],
    ids=["bits", "more", "dict", "native", "compressed-tensors"],
)
def test_what_agrees_loads(format: str, given: Any, directories: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(directories / format, quantization_config=given)
    assert assert_same_weights(quantized(), loaded) >= 8
    assert loaded.config.quantization_config.quant_method == ("gptq_ao" if format == "native" else format)


@pytest.mark.parametrize(
    ("format", "given", "message"),
    [
        (
            "gptq",
            GPTQConfig(bits=8),
            r"GPTQConfig that is given contradicts .* says bits 8, the files 4. Leave",
        ),
        ("gptq", GPTQConfig(bits=4, group_size=64), r"it says group_size 64, the files 32"),
        ("gptq", GPTQConfig(bits=4, sym=False), r"it says sym False, the files True"),
        ("gptq", AwqConfig(bits=4), r"AwqConfig .* it says quant_method 'awq', the files 'gptq'"),
        ("native", GPTQConfig(bits=4), r"it says quant_method 'gptq', the files 'gptq_ao'"),
        ("gptq", {"bits": 2}, r"the dict that is given contradicts .* bits 2, the files 4"),
        ("gptq", GptqAoConfig(4, 32), r"quantized already \(quant_method 'gptq'\): leave quantization_config out"),
        ("native", GptqAoConfig(4, 32), r"quantized already \(quant_method 'gptq_ao'\)"),
        (
            "compressed-tensors",
            {"quant_method": "compressed-tensors", "dequantize": True},
            r"leave quantization_config out, and call model\.dequantize\(\)",
        ),
        (
            "dense",
            GPTQConfig(bits=4, dataset=["a b"]),
            r"not quantized, and GPTQConfig does not say how .*GptqAoConfig",
        ),
    ],
)
def test_what_contradicts_is_refused(format: str, given: Any, message: str, directories: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoModelForCausalLM.from_pretrained(directories / format, quantization_config=given)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_model_quantized_by_torchao_s_config(bits: int, directories: Path, tmp_path: Path) -> None:
    config = TorchAoConfig(gptq_config(bits, 32, method="rtn"))
    model = AutoModelForCausalLM.from_pretrained(directories / "dense", quantization_config=config)
    ids = token_batches(1)[0]["input_ids"]
    expected = model(ids).logits
    save_quantized(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    model.save_pretrained(tmp_path / "c")  # a second time too
    for directory in (tmp_path / "a", tmp_path / "b", tmp_path / "c"):
        for loaded in (load_quantized(directory), AutoModelForCausalLM.from_pretrained(directory)):
            assert sum(type(p) is tensor_class(bits) for p in loaded.parameters()) == 14
            assert torch.equal(loaded(ids).logits, expected)


def test_torchao_s_own_weights_are_written_as_before(directories: Path, tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(directories / "dense", quantization_config=config)
    model.save_pretrained(tmp_path)
    assert '"quant_method": "torchao"' in (tmp_path / "config.json").read_text()


def test_a_dequantized_model_trains(directories: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directories / "gptq").dequantize()
    assert not any(isinstance(p, GroupTensor) for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    model(**token_batches(1)[0]).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
