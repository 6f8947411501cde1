"""The model card tells to load the model with a class that builds it."""

from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from torch import nn

from gptq_ao import gptq_config, quantize_, quantize_checkpoint, save_quantized
from gptq_ao.checkpoint.convert import convert_checkpoint
from gptq_ao.checkpoint.model_card import model_card

from ..models import tiny_llama, token_batches
from .test_directories import SMALL
from .test_model_config import llava, t5

LLAMA = {**SMALL, "num_hidden_layers": 1}
BERT: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 96}
BERT |= {"num_attention_heads": 2, "max_position_embeddings": 32}
WHISPER: dict[str, Any] = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64}
WHISPER |= {"decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 96}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}

MODELS: dict[str, tuple[Any, str]] = {
    "LlamaForCausalLM": (transformers.LlamaConfig(**LLAMA), "AutoModelForCausalLM"),
    "LlamaForSequenceClassification": (transformers.LlamaConfig(**LLAMA), "AutoModelForSequenceClassification"),
    "LlamaForTokenClassification": (transformers.LlamaConfig(**LLAMA), "AutoModelForTokenClassification"),
    "LlamaModel": (transformers.LlamaConfig(**LLAMA), "AutoModel"),
    "BertModel": (transformers.BertConfig(**BERT), "AutoModel"),
    "BertForMaskedLM": (transformers.BertConfig(**BERT), "AutoModelForMaskedLM"),
    "BertForPreTraining": (transformers.BertConfig(**BERT), "AutoModelForPreTraining"),
    "BertForQuestionAnswering": (transformers.BertConfig(**BERT), "AutoModelForQuestionAnswering"),
    "WhisperForConditionalGeneration": (transformers.WhisperConfig(**WHISPER), "AutoModelForSpeechSeq2Seq"),
}


def loading(card: str) -> str:
    return card.partition("```python\n")[2].partition("```")[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_class_builds_the_model(name: str, tmp_path: Path) -> None:
    config, auto = MODELS[name]
    model = getattr(transformers, name)(config).eval()
    quantize_(model, gptq_config(bits=4, group_size=32, method="rtn"))
    save_quantized(model, tmp_path / "a", format="native")
    code = loading((tmp_path / "a" / "README.md").read_text())
    assert f"model = {auto}.from_pretrained(" in code
    # As it is written there.
    names: dict[str, Any] = {}
    exec(code.replace("THIS_REPOSITORY", str(tmp_path / "a")), names)
    assert type(names["model"]) is type(model)


@pytest.mark.parametrize(("make", "auto"), [(lambda: llava(tied=True), "ImageTextToText"), (t5, "Seq2SeqLM")])
def test_other_kinds(make: Any, auto: str) -> None:
    assert f"\nmodel = AutoModelFor{auto}.from_pretrained(" in model_card(make(), None, [])


def test_a_class_that_no_auto_class_builds() -> None:
    class Mine(transformers.LlamaForCausalLM):
        pass

    model = Mine(transformers.LlamaConfig(**LLAMA))
    assert f"from {__name__} import Mine\n\nmodel = Mine.from_pretrained(" in model_card(model, None, [])
    model.config.auto_map = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.Mine"}
    code = loading(model_card(model, None, []))
    assert "from transformers import AutoModelForCausalLM" in code
    assert 'AutoModelForCausalLM.from_pretrained("THIS_REPOSITORY", trust_remote_code=True)' in code
    encoder = transformers.T5EncoderModel(t5().config)
    assert isinstance(encoder, nn.Module)
    assert "AutoModelForTextEncoding" in loading(model_card(encoder, None, []))


def metadata(directory: Path) -> dict[str, Any]:
    return next(yaml.safe_load_all((directory / "README.md").read_text()))


def with_card(directory: Path, text: str) -> Path:
    tiny_llama(layers=1).save_pretrained(directory)
    (directory / "README.md").write_text(text, encoding="utf-8")
    return directory


LICENSED = {"license": "other", "license_name": "ours", "license_link": "LICENSE", "language": ["de", "en"]}


@pytest.mark.parametrize("way", ["quantize_", "quantize_checkpoint"])
def test_license_and_original_stay(way: str, tmp_path: Path) -> None:
    """From the original, and through all formats. What the original was trained from is not what this was made of."""
    text = yaml.safe_dump({**LICENSED, "base_model": "someone/ancestor", "tags": ["x"], "metrics": [{"a": 1}]})
    directory = with_card(tmp_path / "a", f"---\n{text}---\n# It\n")
    config = gptq_config(4, 32, method="rtn")
    if way == "quantize_":
        model = transformers.AutoModelForCausalLM.from_pretrained(directory)
        quantize_(model, config)
        save_quantized(model, tmp_path / "b")
    else:
        quantize_checkpoint(directory, tmp_path / "b", config)
    expected = {"library_name": "transformers", **LICENSED, "tags": ["gptq_ao"]}
    assert metadata(tmp_path / "b") == expected
    # As it would be, if the original had been found on the hub.
    card = tmp_path / "b" / "README.md"
    card.write_text(card.read_text().replace("license:", "base_model: some/model\nlicense:", 1))
    places = ["b", "c", "d", "e", "f"]
    for source, out, format in zip(places, places[1:], ("gptq", "compressed-tensors", "native", "dense"), strict=False):
        convert_checkpoint(tmp_path / source, tmp_path / out, format)
        found = metadata(tmp_path / out)
        assert {**found, "tags": None} == {**expected, "base_model": "some/model", "tags": None}
        assert "quantized from some/model" in (tmp_path / out / "README.md").read_text()


CARDS = {
    "empty": "",
    "no metadata": "# It",
    "damaged": "---\nlicense: [\n---\n",
    "never ends": "---\nlicense: mit\n",
    "a list": "---\n- license\n---\n",
    "a table in the text": "x\n---\nlicense: mit\n---\n",
    "code": "---\nlicense: !!python/object/apply:os.getcwd []\n---\n",
    "too long": "---\nlicense: mit\n---\n" + "x" * 2**20,
}


@pytest.mark.parametrize("text", CARDS.values(), ids=CARDS)
def test_a_card_without_metadata_says_nothing(text: str, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(with_card(tmp_path / "a", text))
    save_quantized(model, tmp_path / "b", format="dense")
    assert metadata(tmp_path / "b") == {"library_name": "transformers", "tags": ["gptq_ao"]}


def test_weights_that_need_an_adapter_say_so() -> None:
    cards = []
    for rank in (4, 0):
        model = tiny_llama()
        report = quantize_(model, gptq_config(4, 16, effort="fast", adapter_rank=rank, calibration=token_batches()))
        assert report is not None
        cards.append(model_card(model, None, [(4, 16)], report))
        more = f"if none had been made: {report.adapter_bits_per_weight:.3f} bits per weight more"
        assert (more in cards[-1]) == (rank > 0)
    assert "- made for an adapter of PEFT" in cards[0]
    assert "adapter of PEFT" not in cards[1]
