"""A document for each row: what is padding is in no Hessian, whichever token stands there."""

from typing import Any

import pytest
import torch
import transformers

from gptq_ao import gptq_config, quantize_
from gptq_ao.calibration.advice import advice_on_text
from gptq_ao.calibration.batches import as_batch
from gptq_ao.data import text_batches, token_chunks
from gptq_ao.errors import CalibrationError

from ..models import seeded, tiny_llama
from .models import Bytes

DOCUMENTS = ["abcde fgh", "ij", "klmnopqrstuv", "", "  \n", "w", "xyz" * 9]
LENGTHS = sorted(len(text) + 1 for text in DOCUMENTS if text.strip())


class Small(Bytes):
    """Of fewer than 96 tokens."""

    def __init__(self, pad: int | None = None) -> None:
        self.pad_token_id, self.eos_token_id = pad, 95

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [b - 31 for b in text.encode()]}


def rows(batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    """Without padding."""
    return [
        ids[mask != 0].tolist() for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]


def test_each_document_is_a_row() -> None:
    batches = text_batches(Small(pad=7), DOCUMENTS, seq_len=100, batch_size=2, pack=False)
    expected = [[0, *Small()(text)["input_ids"]] for text in DOCUMENTS if text.strip()]
    assert sorted(rows(batches)) == sorted(expected)
    assert [b["input_ids"].shape for b in batches] == [(2, 28), (2, 28), (1, 28)]  # as long as the longest
    for b in batches:
        assert b["attention_mask"].dtype == b["input_ids"].dtype == torch.int64
        assert (b["input_ids"][b["attention_mask"] == 0] == 7).all()
        assert (b["attention_mask"].diff(dim=1) <= 0).all()  # on the right
    assert batches.described == "5 sequences of documents in memory, a document each, 0 of them cut to 100 tokens" + (
        ", fewer than the 128 that were asked for"
    )


def test_long_documents_are_cut_and_it_is_said() -> None:
    batches = text_batches(Small(), DOCUMENTS, num_samples=5, seq_len=10, batch_size=9, pack=False)
    assert sorted(map(len, rows(batches))) == [min(n, 10) for n in LENGTHS]
    assert batches.described.endswith("a document each, 2 of them cut to 10 tokens")


@pytest.mark.parametrize(("pad", "filler"), [(7, 7), (0, 0), (None, 95)])
def test_the_token_that_stands_where_there_is_none(pad: int | None, filler: int) -> None:
    (batch,) = text_batches(Small(pad), ["a", "abc"], seq_len=9, batch_size=2, pack=False)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == filler).all()


def test_a_draw_of_documents() -> None:
    found = [rows(text_batches(Small(), DOCUMENTS, num_samples=3, seq_len=40, pack=False, seed=s)) for s in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert len(found[0]) == 3


def test_without_a_token_that_begins_a_text() -> None:
    tokenizer = Small()
    tokenizer.bos_token_id = None
    (batch,) = text_batches(tokenizer, ["a"], seq_len=9, pack=False)
    assert batch["input_ids"].tolist() == [[ord("a") - 31]]


def test_only_empty_documents() -> None:
    with pytest.raises(CalibrationError, match="the list of documents holds no document that is not empty"):
        text_batches(Small(), ["", " "], seq_len=9, pack=False)


def bert() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
    return seeded(transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=96, **sizes)))


def t5() -> Any:
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 16, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
    return seeded(
        transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=96, dropout_rate=0.0, **sizes))
    )


class Halting(torch.nn.Module):
    """No graph: how long it runs depends on values. Its forwards are replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = torch.nn.Embedding(96, 32), torch.nn.Linear(32, 32)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        for _ in range(2 if x.sum() > 1e9 else 1):
            x = self.linear(x)
        return x


MODELS: dict[str, Any] = {
    "llama": lambda: tiny_llama(layers=1),
    "bert": bert,
    "t5": t5,
    "replayed": lambda: seeded(Halting()),
}


def quantized(name: str, pad: int, batch_size: int) -> tuple[Any, Any]:
    batches = text_batches(Small(pad), DOCUMENTS, seq_len=40, batch_size=batch_size, pack=False)
    if name == "t5":
        for b in batches:
            b |= {"decoder_input_ids": b["input_ids"], "decoder_attention_mask": b["attention_mask"]}
    model = MODELS[name]().eval()
    return model, quantize_(model, gptq_config(4, 16, effort="fast", calibration=batches))


@pytest.mark.parametrize("name", MODELS)
def test_padding_enters_no_hessian(name: str) -> None:
    """Another token there, and not one bit of the result is another one; and what is counted are the tokens."""
    models, reports = zip(*(quantized(name, pad, 2) for pad in (3, 71)), strict=True)
    assert reports[0].capture == ("replay" if name == "replayed" else "export")
    for first, second in zip(reports[0].weights, reports[1].weights, strict=True):
        assert first.method == "gptq"
        assert first.rows == second.rows
        assert first.rows == sum(LENGTHS)
        assert first.error == second.error
    for key, value in models[0].state_dict().items():
        other = models[1].state_dict()[key]
        pairs = zip(value.tensors(), other.tensors(), strict=True) if hasattr(value, "tensors") else [(value, other)]
        assert all(torch.equal(a, b) for a, b in pairs), key


def test_padding_is_no_text_to_be_advised_about() -> None:
    """Sixteen fillers in a row are no repetition of the text."""
    texts = ["".join(chr(33 + (n * 7 + k * (3 + n)) % 60) for k in range(20)) for n in range(4)]
    long = "".join(chr(33 + (k * k + k // 9) % 80) for k in range(300))
    batches = [as_batch(b) for b in text_batches(Small(), [*texts, long], seq_len=300, batch_size=5, pack=False)]
    assert advice_on_text(batches, None) == ()
    whole = [as_batch({"input_ids": b.kwargs["input_ids"]}) for b in batches]
    assert "are distinct" in advice_on_text(whole, None)[0]


def test_packed_is_what_it_was() -> None:
    batches = text_batches(Small(), DOCUMENTS, seq_len=7, batch_size=3)
    assert all(set(b) == {"input_ids"} for b in batches)
    chunks = token_chunks(Small(), DOCUMENTS, 7)
    assert sorted(r for b in batches for r in b["input_ids"].tolist()) == sorted(chunks.tolist())
