"""A format is one record: what is said of it anywhere follows from that."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto
from typer.testing import CliRunner

from gptq_ao import cli, load_quantized, save_quantized
from gptq_ao.checkpoint import formats
from gptq_ao.checkpoint.convert import convert_checkpoint
from gptq_ao.checkpoint.exchange.format import Format
from gptq_ao.checkpoint.exchange.grouped_weight import GroupedWeight
from gptq_ao.checkpoint.exchange.hub_names import grouped
from gptq_ao.checkpoint.exchange.packed_weight import PackedWeight, Rounding
from gptq_ao.checkpoint.files.shards import StoredTensor
from gptq_ao.codes.bit_stream import codes_to_words
from gptq_ao.errors import CheckpointError, ConfigError
from gptq_ao.integrations import transformers as integration
from gptq_ao.integrations.transformers import load_model
from gptq_ao.tensor import GroupTensor

from .test_directories import assert_same_files, assert_same_weights, quantized

PARTS = ("bytes", "steps", "middles")


def encode(weight: GroupTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """A byte for each code [N, K], scales and zero points [N, G]."""
    made = grouped(weight)
    return {"bytes": made.codes, "steps": made.scale, "middles": made.zero_point}


def decode(tensors: Mapping[str, Tensor]) -> GroupedWeight:
    words = codes_to_words(tensors["bytes"], 8)
    return GroupedWeight(8, words, tensors["bytes"].shape[1], tensors["steps"], tensors["middles"])


def read(config: Mapping[str, Any], stored: Mapping[str, StoredTensor], rounding: Rounding) -> Iterator[PackedWeight]:
    for name in [n for n in stored if n.endswith(".bytes")]:
        module = name.removesuffix(".bytes")
        parts = {part: stored[f"{module}.{part}"] for part in PARTS}
        (n, k), groups = parts["bytes"].shape, parts["steps"].shape[1]
        yield PackedWeight(f"{module}.weight", 8, k // groups, (n, k), torch.float32, parts, decode, rounding)


TOY = Format(
    name="toy",
    quant_method="toys",
    parts=PARTS,
    read=read,
    config=lambda model: {"quant_method": "toys"},
    encode=encode,
    scale="steps",
    others=r"\.(bytes|middles)$",
    config_file="toy.json",
)


@pytest.fixture
def toy(loaders: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy among the formats, as a line in `formats.py` would put it there."""
    monkeypatch.setitem(formats.FORMATS, "toy", TOY)
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.setitem(mapping, "toys", None)  # removed afterwards
    integration.register()


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_a_new_format_is_a_folder_and_a_line(name: str, toy: None, tmp_path: Path) -> None:
    model = quantized(name, bits=8)
    save_quantized(model, tmp_path / "a", format="toy")
    assert json.loads((tmp_path / "a" / "toy.json").read_text()) == {"quant_method": "toys"}
    assert formats.format_of(tmp_path / "a") is TOY
    for loaded in (load_quantized(tmp_path / "a"), load_model(str(tmp_path / "a"))):
        assert assert_same_weights(model, loaded) >= 8
    served: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert assert_same_weights(model, served) >= 8
    served.save_pretrained(tmp_path / "b")
    assert_same_files(tmp_path / "a", tmp_path / "b")
    assert convert_checkpoint(tmp_path / "a", tmp_path / "c", "native") == "toy"
    assert convert_checkpoint(tmp_path / "c", tmp_path / "d", "toy") == "native"
    assert_same_files(tmp_path / "a", tmp_path / "d")


def test_everyone_who_lists_formats_knows_a_new_one(toy: None, tmp_path: Path) -> None:
    save_quantized(quantized(bits=8), tmp_path / "a", format="toy")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "\n- toys\n" in card
    assert "\n- format: toy\n" in card
    assert "import gptq_ao  # before the next line" in card  # transformers has no loader of its own
    facts = json.loads(CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "a"), "--json"]).stdout)
    assert (facts["format"], len(facts["quantized"])) == ("toy", 14)
    assert {(x["bits"], x["group_size"]) for x in facts["quantized"]} == {(8, 32)}
    with pytest.raises(ConfigError, match=r"format is 'ggml': give one of native, .*, toy, dense, gguf$"):
        save_quantized(quantized(), tmp_path / "b", format="ggml")
    (tmp_path / "a" / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(CheckpointError, match=r"quantized with 'hqq', which cannot be read, only .*, toys$"):
        load_quantized(tmp_path / "a")


def test_a_format_that_does_not_exist_is_refused_before_a_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"format is 'ggml': give one of"):
        convert_checkpoint(tmp_path / "gone", tmp_path / "out", "ggml")


@pytest.mark.parametrize("format", formats.FORMATS.values(), ids=formats.FORMATS)
def test_what_a_record_says_fits_together(format: Format, tmp_path: Path) -> None:
    """Of the parts of a weight, transformers reads one and leaves the others alone."""
    assert formats.FORMATS[format.name] is format
    others = {part for part in format.parts if re.search(format.others, f"model.up_proj.{part}")}
    assert others == {*format.parts} - {format.scale}
    save_quantized(quantized(), tmp_path / "a", format=format.name)
    assert formats.format_of(tmp_path / "a") is format
    found = formats.open_quantized(tmp_path / "a")
    assert found.format is format
    assert len(found.weights) == 14
    # MLX's codes have the name of the dense weight.
    assert not any(name.endswith(tuple({*format.parts} - {"weight"})) for name in found.dense)


def test_inspect_a_native_checkpoint_that_transformers_wrote(tmp_path: Path) -> None:
    """It has no manifest."""
    save_quantized(quantized(), tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    facts = json.loads(CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "b"), "--json"]).stdout)
    assert (facts["format"], len(facts["quantized"])) == ("native", 14)
    assert "model.norm.weight" in facts["dense"]
