"""`from_pretrained` fills the model, or says what does not fit: random weights are for new heads only."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
)

from gptq_ao import gptq_config, quantize_, save_quantized
from gptq_ao.errors import CheckpointError
from gptq_ao.tensor import GroupTensor

from ..checkpoint.test_directories import FORMATS, quantized
from ..models import seeded


def rename(directory: Path, change: Any) -> None:
    """Other names for the tensors, as if a wrapper had been saved."""
    file = next(directory.glob("*.safetensors"))
    save_file({change(name): t for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {change(name): f for name, f in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    config = json.loads((directory / "config.json").read_text())
    weights = config["quantization_config"].get("weights")
    if weights:
        config["quantization_config"]["weights"] = {change(name): entry for name, entry in weights.items()}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("loader", [AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize(
    "change",
    [
        lambda n: f"_orig_mod.{n}",
        lambda n: f"base_model.model.{n}",
        lambda n: n.replace("q_proj.", "q_proj.base_layer."),
        lambda n: n.replace("layers.1.", "layers.1.module."),
    ],
    ids=["compiled", "peft", "adapter", "one layer"],
)
def test_names_of_a_wrapper_are_no_weights_of_the_model(
    change: Any, loader: Any, format: str, tmp_path: Path, loaders: None
) -> None:
    save_quantized(quantized(), tmp_path / "a", format=format)
    rename(tmp_path / "a", change)
    with pytest.raises(CheckpointError, match=r"does not fit the Llama\w+: it lacks '.*' \(and \d+ more\), and has '"):
        loader.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("format", FORMATS)
def test_more_layers_than_were_saved(format: str, tmp_path: Path, loaders: None) -> None:
    save_quantized(quantized(), tmp_path / "a", format=format)
    with pytest.raises(CheckpointError, match=r"it lacks 'model.layers.2.*It was saved as LlamaForCausalLM"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a", num_hidden_layers=3)
    fewer: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "a", num_hidden_layers=1)
    assert isinstance(fewer.model.layers[0].mlp.up_proj.weight, GroupTensor)


def test_the_body_of_a_model_with_quantized_head_and_a_new_pooler(tmp_path: Path) -> None:
    small: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 96}
    model = seeded(BertForMaskedLM(BertConfig(**small, num_attention_heads=2, max_position_embeddings=32)))
    quantize_(model, gptq_config(bits=4, group_size=32, method="rtn"))
    assert isinstance(model.cls.predictions.transform.dense.weight, GroupTensor)
    save_quantized(model, tmp_path / "a")
    body, info = AutoModel.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert info["missing_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}
    assert isinstance(body.encoder.layer[0].output.dense.weight, GroupTensor)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
