"""config.json says what the model is when it is saved, so that what is loaded is that model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from gptq_ao import gptq_config, load_quantized, quantize_, quantize_checkpoint, save_quantized

from ..models import seeded, tiny_llama, token_batches
from .test_directories import SMALL

IDS = token_batches(1)[0]["input_ids"].clamp(max=90)
FORMATS = ["native", "gptq", "compressed-tensors", "dense"]


def rounded(model: Any, **settings: Any) -> Any:
    quantize_(model, gptq_config(**{"bits": 4, "group_size": 32, "method": "rtn", **settings}))
    return model


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Its parameters only: `model.to` would cast buffers too, which are in no file."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def untied(model: Any) -> Any:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    return model


def tied_by_hand(model: Any) -> Any:
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def tied_by_data(model: Any) -> Any:
    model.lm_head.weight.data = model.model.embed_tokens.weight.data
    return model


def resized(model: Any) -> Any:
    model.resize_token_embeddings(128, mean_resizing=False)
    return model


def claiming(model: Any, config: Any) -> Any:
    """What a model still says that was loaded from other quantized files and is dense now."""
    config.quantization_config = {"quant_method": "awq", "bits": 4}
    return model


def llava(*, tied: bool) -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=95)
    config.tie_word_embeddings = tied
    return seeded(transformers.LlavaForConditionalGeneration(config))


def t5() -> Any:
    small: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "vocab_size": 96}
    return seeded(transformers.T5ForConditionalGeneration(transformers.T5Config(**small, decoder_start_token_id=0)))


# The model and what its config.json says at least.
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "bf16 in fp32": (lambda: cast(rounded(tiny_llama()), torch.bfloat16), {"dtype": "bfloat16"}),
    "fp16 in fp32": (lambda: cast(rounded(tiny_llama()), torch.float16), {"dtype": "float16"}),
    "fp32 in bf16": (lambda: rounded(cast(tiny_llama(dtype=torch.bfloat16), torch.float32)), {"dtype": "float32"}),
    "untied": (lambda: rounded(untied(tiny_llama(tied=True))), {"tie_word_embeddings": False}),
    "untied, quantized": (
        lambda: rounded(untied(tiny_llama(tied=True)), rules={"lm_head": {"bits": 8}}),
        {"tie_word_embeddings": False},
    ),
    "tied by hand": (lambda: rounded(tied_by_hand(tiny_llama())), {"tie_word_embeddings": True}),
    "tied by data": (lambda: rounded(tied_by_data(tiny_llama())), {"tie_word_embeddings": True}),
    "resized": (lambda: rounded(resized(tiny_llama(tied=True))), {"vocab_size": 128, "tie_word_embeddings": True}),
    "resized when quantized": (lambda: resized(rounded(tiny_llama())), {"vocab_size": 128}),
    "other quantization": (lambda: rounded(claiming(m := tiny_llama(), m.config)), {}),
    "llava": (
        lambda: rounded(cast(untied(claiming(m := llava(tied=True), m.config.text_config)), torch.bfloat16)),
        {
            "dtype": "bfloat16",
            "tie_word_embeddings": False,
            "text_config": {"dtype": "bfloat16", "tie_word_embeddings": False, "quantization_config": None},
            "vision_config": {"dtype": "bfloat16"},
        },
    ),
    "llava resized": (
        lambda: rounded(resized(llava(tied=True))),
        {"tie_word_embeddings": True, "text_config": {"vocab_size": 128, "tie_word_embeddings": True}},
    ),
    # Its embeddings stay tied to each other, which the config cannot say apart from the head's.
    "T5": (lambda: rounded(untied(t5())), {"tie_word_embeddings": True}),
}


def outputs(model: Any) -> Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, **more).logits
    return logits


def assert_says(config: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_says(config[key], value)
        else:
            assert config.get(key) == value, key


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_loaded_is_what_was_saved(case: str, format: str, tmp_path: Path, loaders: None) -> None:
    make, expected = CASES[case]
    model = make()
    before = model.config.to_dict()
    save_quantized(model, tmp_path / "a", format=format)
    assert model.config.to_dict() == before
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert_says(config, {"architectures": [type(model).__name__], **expected})
    assert (config.get("quantization_config") is None) == (format == "dense")
    auto = {
        "LlavaForConditionalGeneration": AutoModelForImageTextToText,
        "T5ForConditionalGeneration": AutoModelForSeq2SeqLM,
    }
    loaded = [auto.get(type(model).__name__, AutoModelForCausalLM).from_pretrained(tmp_path / "a")]
    if format == "dense":
        # Its products are rounded elsewhere: the values that the codes stand for.
        assert {p.dtype for p in loaded[0].parameters()} == {p.dtype for p in model.parameters()}
        torch.testing.assert_close(outputs(loaded[0]), outputs(model), rtol=0, atol=0.05)
        return
    for each in (*loaded, load_quantized(tmp_path / "a")):
        assert torch.equal(outputs(each), outputs(model))


def in_two_dtypes() -> Any:
    """Its norms in fp32, which computes their outputs in fp32: the layers after them want bf16 again."""
    model = tiny_llama(dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data = p.data.float() * 1.001  # no bf16 number
    return rounded(model)


def test_tensors_of_several_dtypes_stay_what_they_are_in_the_native_format(tmp_path: Path) -> None:
    model = in_two_dtypes()
    save_quantized(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    for loaded in (load_quantized(tmp_path / "a"), AutoModelForCausalLM.from_pretrained(tmp_path / "a")):
        for (name, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
            assert p.dtype == q.dtype, name
            assert torch.equal(p, q) if "norm" in name else True, name
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert {p.dtype for p in other.parameters()} == {torch.float32}


def test_streamed(tmp_path: Path) -> None:
    tiny_llama(dtype=torch.bfloat16, tied=True).save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    del config["dtype"]  # then it is that of the tensors
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    quantize_checkpoint(tmp_path / "source", tmp_path / "a", gptq_config(bits=4, group_size=32, method="rtn"))
    assert_says(
        json.loads((tmp_path / "a" / "config.json").read_text()), {"dtype": "bfloat16", "tie_word_embeddings": True}
    )


@pytest.mark.parametrize("format", ["native", "gptq", "compressed-tensors"])
def test_a_quantized_head_that_the_config_calls_tied(format: str, tmp_path: Path, loaders: None) -> None:
    model = rounded(untied(tiny_llama(tied=True)), rules={"lm_head": {"bits": 8}})
    save_quantized(model, tmp_path / "a", format=format)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    for load in (load_quantized, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(outputs(load(tmp_path / "a")), outputs(model))
