"""Whatever the architecture: the command line keeps the class and every tensor of the source."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file

from gptq_ao import load_quantized
from gptq_ao.errors import CheckpointError
from gptq_ao.integrations.transformers import load_model

from ..models import seeded, tiny_llama
from .test_commands import TINY, fail, run

HEADS = {"num_hidden_layers": 1, "num_attention_heads": 4}
TEXT = {**HEADS, "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
PICTURE = {**HEADS, "hidden_size": 64, "intermediate_size": 64, "image_size": 32, "patch_size": 16}
BERT = {**HEADS, "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 64}
AUDIO = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
AUDIO |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 16, "vocab_size": 64}
AUDIO |= {"max_source_positions": 32, "max_target_positions": 32}


def whisper() -> Any:
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    return t.WhisperForConditionalGeneration(t.WhisperConfig(**AUDIO, **tokens, begin_suppress_tokens=None))


def t5() -> Any:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    return t.T5ForConditionalGeneration(t.T5Config(vocab_size=4096, **sizes, decoder_start_token_id=0))


def qwen3_5() -> Any:
    linear: dict[str, Any] = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "layer_types": ["full_attention"]}
    picture = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    tokens = {
        "image_token_id": 4090,
        "video_token_id": 4091,
        "vision_start_token_id": 4092,
        "vision_end_token_id": 4093,
    }
    text: dict[str, Any] = {**TEXT, **linear, "head_dim": 16}
    config = t.Qwen3_5Config(text_config=text, vision_config={**picture, "patch_size": 14}, **tokens)
    return t.Qwen3_5ForConditionalGeneration(config)


def llama4() -> Any:
    text = {**TEXT, "head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64, "pad_token_id": 0}
    outputs = {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}
    picture = {**PICTURE, "intermediate_size": 256, **outputs}
    return t.Llama4ForConditionalGeneration(t.Llama4Config(text_config=text, vision_config=picture))


def mllama() -> Any:
    text: dict[str, Any] = {**TEXT, "num_hidden_layers": 2, "cross_attention_layers": [1], "pad_token_id": 0}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    picture: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 4}
    picture |= {"intermediate_size": 64, "image_size": 32, "patch_size": 16, "vision_output_dim": 128}
    picture |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1}
    return t.MllamaForConditionalGeneration(t.MllamaConfig(vision_config=picture, text_config=text))


def llava() -> Any:
    tokens = {"image_token_index": 4095}
    config = t.LlavaConfig(vision_config=t.CLIPVisionConfig(**PICTURE), text_config=t.LlamaConfig(**TEXT), **tokens)
    return t.LlavaForConditionalGeneration(config)


# What a user may give the command line → (model, the input it takes).
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "image-text-qwen": (qwen3_5, "input_ids"),
    "image-text-llama4": (llama4, "input_ids"),
    "image-text-mllama": (mllama, "input_ids"),
    "image-text-llava": (llava, "input_ids"),
    "seq2seq": (t5, "input_ids"),
    "encoder": (lambda: t.BertModel(t.BertConfig(**BERT)), "input_ids"),
    "masked": (lambda: t.BertForMaskedLM(t.BertConfig(**BERT)), "input_ids"),
    "classifier": (lambda: t.BertForSequenceClassification(t.BertConfig(**BERT)), "input_ids"),
    "causal-classifier": (
        lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**TEXT, pad_token_id=0)),
        "input_ids",
    ),
    "tokens": (lambda: t.BertForTokenClassification(t.BertConfig(**BERT)), "input_ids"),
    "body": (lambda: t.LlamaModel(t.LlamaConfig(**TEXT)), "input_ids"),
    "image": (lambda: t.ViTForImageClassification(t.ViTConfig(**PICTURE)), "pixel_values"),
    "audio": (whisper, "input_features"),
}
BESIDE = ("preprocessor_config.json", "chat_template.jinja", "LICENSE")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("def add(a, b):\n    return a + b\n" * 100)
    return str(path)


def source(name: str, directory: Path) -> Path:
    seeded(MODELS[name][0]()).save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TINY) / file, directory)
    for file in BESIDE:
        (directory / file).write_text("{}")
    return directory


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["memory", "streamed"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_the_source_is_lost(
    name: str, stream: tuple[str, ...], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, out, dense = source(name, tmp_path / "a"), tmp_path / "b", tmp_path / "c"
    data = ("--calibration", text, "--num-samples", "2", "--seq-len", "32", "--effort", "fast")
    with_text = MODELS[name][1] == "input_ids"
    arguments = (*data, *stream) if with_text else ("--method", "rtn", *stream)
    report = run(monkeypatch, "quantize", str(directory), str(out), "--group-size", "32", *arguments, "--json")
    assert report["weights"] > 0
    assert {w["method"] for w in report["layers"]} == ({"gptq"} if with_text else {"rtn"})
    assert (report["ignored"], report["lost"]) == ([], [])
    for file in (*BESIDE, "tokenizer.json"):
        assert (out / file).read_bytes() == (directory / file).read_bytes()
    before, after = (json.loads((place / "config.json").read_text()) for place in (directory, out))
    assert after["architectures"] == before["architectures"]
    assert after["model_type"] == before["model_type"]
    assert type(load_quantized(out)).__name__ == before["architectures"][0]
    # Under the names of the source, and those that are not quantized with its values.
    run(monkeypatch, "convert", str(out), str(dense), "--format", "dense", "--json")
    old, new = load_file(directory / "model.safetensors"), load_file(dense / "model-00001-of-00001.safetensors")
    assert set(new) == set(old)
    unchanged = [key for key in old if torch.equal(old[key], new[key])]
    assert len(old) - len(unchanged) >= min(report["weights"], 1)
    assert {key for key in old if old[key].dim() < 2} <= set(unchanged)


@pytest.mark.parametrize("name", [name for name, (_, takes) in MODELS.items() if takes != "input_ids"])
def test_a_model_that_takes_no_text_says_so(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = source(name, tmp_path / "a")
    said = fail(monkeypatch, capsys, "quantize", str(directory), str(tmp_path / "b"), "--calibration", text)
    kind = type(MODELS[name][0]()).__name__
    assert f"the {kind} takes {MODELS[name][1]}, and would be calibrated with text" in said


def test_a_checkpoint_that_lacks_weights_is_not_filled_with_random_ones(tmp_path: Path) -> None:
    """A head that its body was saved without: transformers would make one, and say so in a table."""
    model = tiny_llama()
    model.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(CheckpointError, match=r"does not fit the LlamaForCausalLM: it lacks lm_head.weight"):
        load_model(str(tmp_path))
