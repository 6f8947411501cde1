"""What is measured in the run is what `evaluate` measures of both models afterwards, wherever the weights are."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_ao import gptq_config, load_quantized, quantize_, quantize_checkpoint
from gptq_ao.calibration import activation_store
from gptq_ao.distributed.ranks import Ranks
from gptq_ao.errors import ConfigError, QualityError
from gptq_ao.evaluate import evaluate
from gptq_ao.pipeline import quantize as pipeline
from gptq_ao.quality import check as quality
from gptq_ao.quality.check import QualityCheck
from gptq_ao.report import Report

from ..models import tiny_llama, token_batches
from ..pipeline.test_experts import mixture

CHUNKS = torch.randint(0, 96, (5, 17), generator=torch.Generator().manual_seed(3))


def config(**settings: Any) -> Any:
    return gptq_config(3, effort="fast", calibration=token_batches(2), **settings)


def agrees(report: Report, model: nn.Module, original: nn.Module, chunks: Tensor = CHUNKS) -> None:
    found = report.quality
    assert found is not None
    expected, alone = evaluate(model, chunks, original), evaluate(original, chunks)
    # Sums of the same fp32 numbers in another order.
    assert found.kl == pytest.approx(expected.kl, rel=1e-5)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert found.original_perplexity == pytest.approx(alone.perplexity, rel=1e-5)
    assert found.tokens == expected.tokens
    assert found.kl > 1e-4
    assert report.measured == found.measured
    assert report.seconds["quality"] > 0


def branching() -> Any:
    """A model that is no graph: its forwards are replayed."""
    model = tiny_llama(layers=1)
    forward = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: forward(x) if float(x.sum()) < 1e9 else x
    return model


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tied=True), mixture, branching])
@pytest.mark.parametrize("chunks", [CHUNKS, CHUNKS[:1, :2]], ids=["many", "one prediction"])
def test_in_memory(make: Callable[[], Any], chunks: Tensor) -> None:
    model, original = make(), make()
    state = torch.get_rng_state()
    report = quantize_(model.train(), config(), quality=QualityCheck(chunks, max_kl=1e9, text="some"))
    assert report is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    agrees(report, model, original.eval(), chunks)
    assert report.quality is not None
    assert (report.quality.max_kl, report.quality.missed, report.quality.text) == (1e9, (), "some")


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tied=True), mixture])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_in_files(make: Callable[[], Any], method: str, tmp_path: Path) -> None:
    original = make()
    original.save_pretrained(tmp_path / "a")
    check = QualityCheck(CHUNKS)
    report = quantize_checkpoint(tmp_path / "a", tmp_path / "q", config(method=method), quality=check)
    agrees(report, load_quantized(tmp_path / "q"), original)
    assert "KL(original ‖ quantized), nats per token: " in (tmp_path / "q" / "README.md").read_text()


def test_of_files_a_layer_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(layers=4).save_pretrained(tmp_path / "a")
    from gptq_ao.pipeline.quantize_checkpoint import CheckpointWeights
    from gptq_ao.quality.piecewise import _Piece

    there: list[int] = []
    load = _Piece.load

    def loaded(piece: Any, *args: object) -> None:
        load(piece, *args)
        layers = piece._weights.model.model.layers
        there.append(sum(not p.is_meta for layer in layers for p in layer.parameters()))

    monkeypatch.setattr(_Piece, "load", loaded)
    seen: list[nn.Module] = []
    made = CheckpointWeights.__init__

    def make(weights: CheckpointWeights, *args: Any) -> None:
        made(weights, *args)
        seen.append(weights.model)

    monkeypatch.setattr(CheckpointWeights, "__init__", make)
    quantize_checkpoint(tmp_path / "a", tmp_path / "q", config(method="rtn"), quality=QualityCheck(CHUNKS))
    assert max(there) == 9  # of one decoder layer
    (model,) = seen
    assert all(p.is_meta for p in model.parameters())
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_what_waits_in_files_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []
    make = activation_store.tempfile.TemporaryDirectory

    def made(*args: Any, **kwargs: Any) -> Any:
        folder = make(*args, **kwargs)
        folders.append(Path(folder.name))
        return folder

    monkeypatch.setattr(activation_store.tempfile, "TemporaryDirectory", made)
    reports = []
    for limit in ("1GiB", "7KiB"):  # one chunk's log-probabilities take 6
        report = quantize_(tiny_llama(), config(), quality=QualityCheck(CHUNKS), max_memory={"cpu": limit})
        assert report is not None
        reports.append(report.quality)
    assert folders
    assert not any(folder.exists() for folder in folders)
    assert reports[0] == reports[1]


def test_forwards_are_of_as_many_chunks_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """And how many run at once changes nothing but the last digits."""
    monkeypatch.setattr(quality, "_LOGITS", 2 * 17 * 96 * 4)
    sizes: list[int] = []
    predict = quality.next_tokens

    def predicted(model: nn.Module, ids: Tensor) -> Tensor:
        sizes.append(len(ids))
        return predict(model, ids)

    monkeypatch.setattr(quality, "next_tokens", predicted)
    model = tiny_llama()
    original = copy.deepcopy(model)
    report = quantize_(model, config(), quality=QualityCheck(CHUNKS))
    assert report is not None
    assert sizes == [1, 2, 2, 1, 2, 2, 1]
    agrees(report, model, original)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"max_kl": 1e-6}, r"KL\(original ‖ quantized\) is 0\.\d+, more than 1e-06"),
        ({"max_perplexity_ratio": 0.5}, r"perplexity divided by the original's is \d\.\d+, more than 0.5"),
        ({"max_kl": 1e-6, "max_perplexity_ratio": 0.5}, r"KL.*; perplexity divided"),
    ],
)
def test_a_limit_that_is_exceeded(limit: dict[str, Any], message: str, tmp_path: Path) -> None:
    """In memory, the model is as it was; in files, nothing is where it would be, and the work is not lost."""
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QualityError, match=message):
        quantize_(model, config(), quality=QualityCheck(CHUNKS, **limit))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    report = quantize_(model, config(), quality=QualityCheck(CHUNKS, required=False, **limit))
    assert report is not None
    assert report.quality is not None
    assert len(report.quality.missed) == len(limit)
    assert "quality: " + report.quality.missed[0] in str(report)
    tiny_llama().save_pretrained(tmp_path / "a")
    with pytest.raises(QualityError, match=message) as e:
        quantize_checkpoint(tmp_path / "a", tmp_path / "q", config(), quality=QualityCheck(CHUNKS, **limit))
    assert "resume=True) goes on from there" in e.value.__notes__[0]
    assert not (tmp_path / "q").exists()
    # Nothing is solved again.
    again = quantize_checkpoint(tmp_path / "a", tmp_path / "q", config(), resume=True, quality=QualityCheck(CHUNKS))
    assert again.quality is not None
    assert again.quality.missed == ()


def test_what_is_no_number_exceeds_every_limit() -> None:
    from gptq_ao.report import Quality

    found = Quality(math.nan, math.inf, 2.0, 3, max_kl=1e9, max_perplexity_ratio=1e9)
    assert [text.partition(" is ")[2] for text in found.missed] == ["nan, more than 1e+09", "inf, more than 1e+09"]
    assert Quality(math.nan, math.inf, 2.0, 3).missed == ()


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(96, 32), nn.Linear(32, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.embedding(input_ids).mean(1))


def t5() -> Any:
    from ..checkpoint.test_model_config import t5 as make

    return make()


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (Classifier, {}, r"quality of this Classifier cannot be checked.*IndexError|outputs have shape"),
        (t5, {}, r"quality of this T5ForConditionalGeneration cannot be checked.*ValueError"),
        (tiny_llama, {"chunks": CHUNKS + 90}, r"token ids from 90 to \d+, and the model's vocabulary has 96"),
        (tiny_llama, {"chunks": CHUNKS - 90}, r"token ids from -90 to 4, and the"),
    ],
)
def test_a_model_that_cannot_be_checked(make: Callable[[], Any], given: dict[str, Any], message: str) -> None:
    """Before the first weight changes."""
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        quantize_(model, gptq_config(4, 16, method="rtn"), quality=QualityCheck(**{"chunks": CHUNKS, **given}))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_no_room_for_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "free_bytes", lambda device: 400)
    monkeypatch.setattr(quality, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    # 80 predictions of 96 words, less what may be in memory: a quarter of what is free.
    with pytest.raises(ConfigError, match=rf"of which {80 * 96 * 4 - 100} bytes in files in .*, where 1000 are free"):
        quantize_(tiny_llama(), config(), quality=QualityCheck(CHUNKS))


def test_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "of", lambda *args: Ranks(size=2))
    monkeypatch.setattr(pipeline, "check_agreement", lambda job: None)
    with pytest.raises(ConfigError, match=r"quality is checked in one process that has the whole model"):
        quantize_(tiny_llama(), config(), quality=QualityCheck(CHUNKS))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_kl": 0}, r"max_kl is 0: give a positive number"),
        ({"max_kl": math.nan}, r"max_kl is nan"),
        ({"max_kl": True}, r"max_kl is True"),
        ({"max_perplexity_ratio": math.inf}, r"max_perplexity_ratio is inf"),
        ({"max_perplexity_ratio": "1"}, r"max_perplexity_ratio is '1'"),
        ({"chunks": CHUNKS.float()}, r"token ids, an int64 tensor \[n, L\]"),
        ({"chunks": CHUNKS[0]}, r"token ids, an int64 tensor \[n, L\]"),
        ({"chunks": CHUNKS[:0]}, r"shape \(0, 17\): nothing to predict"),
        ({"chunks": CHUNKS[:, :1]}, r"shape \(5, 1\): nothing to predict"),
    ],
)
def test_settings_that_mean_nothing(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QualityCheck(**{"chunks": CHUNKS, **given})
