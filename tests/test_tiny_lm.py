"""The script that trains the tiny language models: two steps of it, for every family."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from gptq_ao.tiny_lm import train

SHIPPED = Path(__file__).parents[1] / "examples" / "tiny_lm"
TEXT = "def π(x):\r\n\treturn '\N{SNAKE}' + 'e\u0301'  # \u212b\n" * 8  # NFC would change two of the characters


@pytest.mark.parametrize(
    ("family", "model_class", "parameters"),
    [
        ("llama", "LlamaForCausalLM", 1_837_056),
        ("qwen3", "Qwen3ForCausalLM", 10_131_456),
        ("gpt2", "GPT2LMHeadModel", 10_942_848),
    ],
)
def test_trains_and_loads(
    family: str, model_class: str, parameters: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "BATCH", 2)
    monkeypatch.setattr(train, "documents", lambda split: [TEXT] * 3)
    argv = ["x", "--out", str(tmp_path), "--family", family, "--steps", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    train.main()

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model).__name__ == model_class
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert {width % 128 for width in in_features(model)} == {0}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == [byte + 1 for byte in TEXT.encode()]
    assert tokenizer.decode(ids) == TEXT
    report = json.loads((tmp_path / "training.json").read_text())
    assert report.keys() == json.loads((SHIPPED / "training.json").read_text()).keys()
    assert (report["parameters"], report["steps"]) == (parameters, 2)
    loss, chunks = train.heldout_loss(model.eval(), train.token_stream([TEXT] * 3))
    assert report["heldout_chunks"] == chunks > 0
    # It is rounded to four digits.
    assert report["heldout_nats_per_byte"] == pytest.approx(loss, abs=1e-4)


def in_features(model: torch.nn.Module) -> set[int]:
    linear = {m.in_features for m in model.modules() if isinstance(m, torch.nn.Linear)}
    return linear | {m.weight.shape[0] for m in model.modules() if isinstance(m, Conv1D)}


@pytest.mark.parametrize("family", train.FAMILIES)
def test_trains_the_function_of_the_model(family: str) -> None:
    """The loss by the model's modules is the model's own, and dropout reaches all that the blocks add, in training."""
    model = train.build_model(family, torch.Generator().manual_seed(0)).eval()
    windows = torch.randint(257, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=windows, labels=windows).loss
        train.add_dropout(model, 1.0)
        torch.testing.assert_close(train.training_loss(model, windows), expected)
        model.train()
        embedded = model.get_input_embeddings()(windows)
        if family == "gpt2":
            embedded = embedded + model.transformer.wpe.weight[:33]
        norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
        # With everything dropped, the embedding alone is left.
        torch.testing.assert_close(train.last_hidden(model, windows), norm(embedded))


def test_the_shipped_model_is_the_default_family() -> None:
    shipped = AutoConfig.from_pretrained(SHIPPED).to_diff_dict()
    built = train.build_model("llama", torch.Generator()).config.to_diff_dict()
    written_on_saving = {"architectures", "dtype", "transformers_version", "_name_or_path"}
    assert {k: v for k, v in shipped.items() if k not in written_on_saving} == {
        k: v for k, v in built.items() if k not in written_on_saving
    }
    report, llama = json.loads((SHIPPED / "training.json").read_text()), train.FAMILIES["llama"]
    names = ("steps", "peak_learning_rate", "weight_decay", "dropout")
    assert [report[name] for name in names] == [llama.steps, llama.peak_lr, llama.weight_decay, llama.dropout]
