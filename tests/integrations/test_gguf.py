"""GGUF files as what is quantized: the numbers of their blocks, with a word about that."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from gptq_ao import gptq_config, load_quantized, quantize_, save_quantized
from gptq_ao.errors import CheckpointError, ConfigError, RoundedScalesWarning
from gptq_ao.integrations.gguf import dense_from_gguf
from gptq_ao.integrations.transformers import load_model
from gptq_ao.tensor import GroupTensor

from ..checkpoint.test_directories import assert_same_weights
from ..checkpoint.test_gguf import built, contents
from ..checkpoint.vocabularies import TEXT, TOKENIZERS
from ..cli.test_commands import fail, run

QWEN2 = "Qwen2's"


def file_of(path: Path, name: str = "Llama", tokenizer: str = QWEN2, **settings: Any) -> Any:
    """A file, and the quantized model in it."""
    model = built(name, **settings)
    save_quantized(model, path, format="gguf", tokenizer=TOKENIZERS[tokenizer]())
    return model


READ = dict.fromkeys(["Llama", "Llama, tied", "Qwen2", "Qwen3", "Qwen3, experts"], QWEN2)
# Of these transformers reads their own kinds of tokenizers only.
READ |= {"Gemma 2": "Gemma's", "Gemma 3": "Gemma's", "Phi-3": "SentencePiece's"}


@pytest.mark.parametrize(("name", "tokenizer"), READ.items())
@pytest.mark.parametrize("bits", [4, 8])
def test_the_numbers_of_the_blocks(name: str, tokenizer: str, bits: int, tmp_path: Path) -> None:
    model = file_of(tmp_path / "m.gguf", name, tokenizer, bits=bits)
    (tmp_path / "dense").mkdir()
    dense_from_gguf(tmp_path / "m.gguf", tmp_path / "dense")
    loaded: Any = load_model(str(tmp_path / "dense"))
    for parameter, value in loaded.named_parameters():
        meant = model.get_parameter(parameter)
        meant = meant.dequantize() if isinstance(meant, GroupTensor) else meant
        # A Gemma multiplies by 1 + weight, and that sum is in the file.
        larger = float("norm" in parameter and name.startswith("Gemma"))
        assert torch.equal(value + larger, meant + larger), parameter
    text = AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert text(TEXT).input_ids == TOKENIZERS[tokenizer]()(TEXT).input_ids
    kinds = loaded.config.requantized_from["types"]
    assert kinds[{4: "Q4_0", 8: "Q8_0"}[bits]] == sum(t.tensor_type.name in ("Q4_0", "Q8_0") for t in
                                                      contents(tmp_path / "m.gguf")[1].values())  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*no engine is known to serve:gptq_ao.errors.EngineWarning")
@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_quantize_a_file(stream: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Report, card and config say what it was; the tokenizer goes along; nothing else is left."""
    with pytest.warns(RoundedScalesWarning):
        file_of(tmp_path / "m.gguf", sym=False, rules={"lm_head.weight": {"bits": 8, "sym": True}})
    arguments = ("quantize", str(tmp_path / "m.gguf"), str(tmp_path / "q"), "--method", "rtn", "--group-size", "64")
    report = run(monkeypatch, *arguments, *stream, "--json")
    made_of = "m.gguf (14 tensors Q4_1, 6 tensors F32, 1 tensors Q8_0)"
    assert f"quantized again, from what another quantization had left: {made_of}" in report["notes"]
    assert f"- requantized from: {made_of}" in (tmp_path / "q" / "README.md").read_text()
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["requantized_from"] == {"file": "m.gguf", "types": {"Q4_1": 14, "F32": 6, "Q8_0": 1}}
    assert AutoTokenizer.from_pretrained(tmp_path / "q")(TEXT).input_ids == TOKENIZERS[QWEN2]()(TEXT).input_ids
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "q"]
    (tmp_path / "dense").mkdir()
    dense_from_gguf(tmp_path / "m.gguf", tmp_path / "dense")
    expected = load_model(str(tmp_path / "dense"))
    quantize_(expected, gptq_config(group_size=64, method="rtn"))
    assert assert_same_weights(expected, load_quantized(tmp_path / "q")) == 14


def test_from_a_file_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 bits 4 are made; the file says so."""
    file_of(tmp_path / "m.gguf", tokenizer="SentencePiece's", bits=8)
    given = ("--format", "gguf", "--calibration", str(tmp_path / "text.txt"), "--num-samples", "2", "--seq-len", "16")
    (tmp_path / "text.txt").write_text(TEXT * 20)
    arguments = ("quantize", str(tmp_path / "m.gguf"), str(tmp_path / "n.gguf"), "--group-size", "32", *given)
    run(monkeypatch, *arguments, "--effort", "fast", "--json")
    keys, tensors = contents(tmp_path / "n.gguf")
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q4_0"
    assert "requantized from: m.gguf (" in keys["general.description"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "n.gguf", "text.txt"]


def test_what_was_not_quantized_is_not_said_to_be(tmp_path: Path) -> None:
    """A file of F32 and BF16 tensors."""
    file_of(tmp_path / "m.gguf")
    (tmp_path / "dense").mkdir()
    dense_from_gguf(tmp_path / "m.gguf", tmp_path / "dense", torch.float16)
    model: Any = load_model(str(tmp_path / "dense"))
    assert model.dtype == torch.float16
    model.config.requantized_from["types"] = {"F32": 5, "BF16": 16}
    report = quantize_(model, gptq_config(group_size=32, method="rtn"))
    assert report is not None
    assert "requantized from" not in report.recipe


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_counts(path: Path) -> None:
    """A number of keys that no file has."""
    content = bytearray(path.read_bytes())
    content[16:24] = (2**62).to_bytes(8, "little")
    path.write_bytes(content)


def with_text(path: Path) -> None:
    path.write_text("no model")


def with_kind(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(
        content.replace(b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00llamb", 1)
    )


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (with_text, r"m.gguf is not a GGUF file: it begins with b'no m'"),
    "empty": (lambda path: path.write_bytes(b""), r"is not a GGUF file: it begins with b''"),
    "magic only": (lambda path: path.write_bytes(b"GGUF"), r"is truncated or damaged"),
    "shortened": (shortened, r"is truncated or damaged"),
    "counts": (with_counts, r"is truncated or damaged"),
    "unknown model": (with_kind, r"cannot be read by transformers: ValueError: .*llamb"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_files_that_are_none(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One message, and nothing is left beside the file."""
    change, message = DAMAGED[case]
    file_of(tmp_path / "m.gguf")
    change(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=message):
        dense_from_gguf(tmp_path / "m.gguf", tmp_path / "dense")
    fail(monkeypatch, capsys, "quantize", str(tmp_path / "m.gguf"), str(tmp_path / "q"), "--method", "rtn")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.filterwarnings("ignore:.*takes the long_factor")
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("Llama 3, scaled frequencies", "a tensor 'rope_freqs.weight'"),
        ("Llama, linear scaling", "rope.scaling.type 'lin"),
        ("Gemma 3, linear scaling", "rope.scaling.type 'lin"),
        ("Phi-3, long factors", "a tensor 'rope_factors_long.weight'"),
    ],
)
def test_frequencies_that_transformers_does_not_read(name: str, what: str, tmp_path: Path) -> None:
    file_of(tmp_path / "m.gguf", name)
    with pytest.raises(CheckpointError, match=rf"has {what}.* the model would be another one"):
        dense_from_gguf(tmp_path / "m.gguf", tmp_path / "dense")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("Gemma 2, large", r"query_pre_attn_scalar 256, and llama.cpp always computes 32"),
        ("Gemma 3, other frequencies", r"gemma3.rope.freq_base_swa 500.0, and the model 10000.0"),
        ("Gemma 2, caps", r"gemma2.attn_logit_softcapping 5.0, and the model 50.0"),
    ],
)
def test_numbers_that_transformers_does_not_read(name: str, what: str, tmp_path: Path) -> None:
    """It would go on with the usual ones of such models."""
    file_of(tmp_path / "m.gguf", name)
    with pytest.raises(CheckpointError, match=rf"becomes another model when transformers reads it: .*{what}"):
        dense_from_gguf(tmp_path / "m.gguf", tmp_path / "dense")


def test_parts_of_a_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("output_norm.weight", np.zeros(4, dtype=np.float32))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    with pytest.raises(CheckpointError, match=r"is one of 3 parts of a model: merge them first"):
        dense_from_gguf(tmp_path / "m.gguf", tmp_path / "dense")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("quantize", "GONE", "OUT", "--method", "rtn"), "gone.gguf does not exist"),
        (("plan", "FILE"), "is a GGUF file, which only `gptq-ao quantize` reads"),
        (("eval", "FILE", "--data", "FILE"), "is a GGUF file, which only `gptq-ao quantize` reads"),
        (("convert", "FILE", "OUT", "--format", "gptq"), "is a GGUF file, which only `gptq-ao quantize` reads"),
        (("inspect", "FILE"), "is a GGUF file, which only `gptq-ao quantize` reads"),
    ],
)
def test_commands(
    command: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    places = {"FILE": str(tmp_path / "m.gguf"), "GONE": str(tmp_path / "gone.gguf"), "OUT": str(tmp_path / "out")}
    assert message in fail(monkeypatch, capsys, *(places.get(word, word) for word in command))


def test_the_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ConfigError, match=r"need the package gguf, which cannot be imported .*pip install 'gptq_ao\[gguf\]'"
    ):
        dense_from_gguf(tmp_path / "m.gguf", tmp_path / "dense")
