"""`progress=`: told of every stage, whatever way a model is quantized, and of every batch that is scored."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_ao import gptq_config, quantize_, quantize_checkpoint
from gptq_ao.evaluate import evaluate

from .models import seeded, tiny_llama, token_batches
from .pipeline.test_replay import Branching

Told = list[tuple[int, int, str, float]]


def check(told: Told, names: list[str]) -> None:
    assert [name for _, _, name, _ in told] == names
    assert [(stage, of) for stage, of, _, _ in told] == [(i, len(names)) for i in range(1, len(names) + 1)]
    seconds = [s for *_, s in told]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


FIRST_OF_STAGE = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
STAGES = [f"model.layers.{i}.{name}" for i in range(2) for name in FIRST_OF_STAGE]


def test_stages_of_a_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: Told = []
    config = gptq_config(4, 32, calibration=token_batches())
    report = quantize_(tiny_llama(), config, progress=lambda *a: told.append(a))
    assert report is not None
    assert report.stages == len(told)
    check(told, STAGES)
    tiny_llama().save_pretrained(tmp_path / "source")
    streamed: Told = []
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", config, progress=lambda *a: streamed.append(a))
    check(streamed, STAGES)
    assert "stage/s" not in capsys.readouterr().err


def test_weights_that_are_rounded_to_nearest() -> None:
    told: Told = []
    report = quantize_(tiny_llama(layers=1), gptq_config(4, 32, method="rtn"), progress=lambda *a: told.append(a))
    assert report is not None
    check(told, [w.name.removesuffix(".weight") for w in report.weights])


def test_weights_of_a_model_that_is_replayed() -> None:
    told: Told = []
    data = [torch.randn(8, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    report = quantize_(seeded(Branching()), gptq_config(4, -1, calibration=data), progress=lambda *a: told.append(a))
    assert report is not None
    assert report.capture == "replay"
    check(told, ["first", "low", "high", "last"])


def test_automatic_precision_counts_twice() -> None:
    told: Told = []
    config = gptq_config(target_bits=6, group_size=32, calibration=token_batches())
    quantize_(tiny_llama(layers=1), config, progress=lambda *a: told.append(a))
    assert [name for _, _, name, _ in told[:4]] == [f"measure {name}" for name in STAGES[:4]]
    check(told[:4], [f"measure {name}" for name in STAGES[:4]])
    assert [stage for stage, *_ in told[4:]] == list(range(1, len(told) - 3))


def test_batches_that_are_scored() -> None:
    told: Told = []
    chunks = torch.zeros(5, 8, dtype=torch.long)
    evaluate(tiny_llama(layers=1), chunks, batch_size=2, progress=lambda *a: told.append(a))
    check(told, ["evaluate"] * 3)


def test_what_it_raises_ends_the_call() -> None:
    def stop(stage: int, of: int, name: str, seconds: float) -> None:
        if stage == 2:
            raise RuntimeError(f"enough after {stage} of {of}")

    model: Any = tiny_llama()
    before = list(model.parameters())
    with pytest.raises(RuntimeError, match="enough after 2 of 8"):
        quantize_(model, gptq_config(4, 32, calibration=token_batches()), progress=stop)
    assert all(p is q for p, q in zip(model.parameters(), before, strict=True))
