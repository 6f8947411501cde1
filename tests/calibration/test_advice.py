"""What is wrong with data is said with its number; of good data nothing is said."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gptq_ao import gptq_config, quantize_
from gptq_ao.calibration.advice import advice_on_rows, advice_on_text
from gptq_ao.calibration.batches import as_batch
from gptq_ao.report import WeightReport

from ..models import tiny_llama, token_batches

CONFIG = SimpleNamespace(max_position_embeddings=4096, vocab_size=5000)


def ids(rows: int = 4, length: int = 600, words: int = 5000) -> Any:
    return torch.randint(0, words, (rows, length), generator=torch.Generator().manual_seed(0))


SENTENCE = ids(1, 50)[0]


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([{"input_ids": ids()}], []),
        ([ids(), ids(1, 20)], []),  # by position; the longest counts
        ([(ids().int(),)], []),
        ([{"input_ids": SENTENCE.repeat(20).view(2, 500)}] * 2, ["3% of its runs of 16", "500 tokens at most, and"]),
        ([{"input_ids": ids()}] * 3, ["33% of its runs of 16 tokens are distinct"]),
        ([{"input_ids": ids(9, 511)}], ["511 tokens at most, and the model is for 4096: give longer ones"]),
        ([{"input_ids": ids(words=40)}], ["40 of the 5000 tokens of the vocabulary occur"]),
        ([{"input_ids": ids(1, 3, 1)}], ["3 tokens at most", "1 of the 5000 tokens"]),
        ([{"pixel_values": torch.zeros(2, 3, 8, 8)}], []),
        ([torch.zeros(2, 600)], []),
    ],
)
def test_text(batches: list[Any], expected: list[str]) -> None:
    found = advice_on_text([as_batch(b) for b in batches], CONFIG)
    assert len(found) == len(expected)
    for line, part in zip(found, expected, strict=True):
        assert line.startswith("calibration data: ")
        assert part in line


def test_a_context_that_is_short_itself() -> None:
    """A quarter of it is enough; and a model that says nothing of itself is not judged by it."""
    batches = [as_batch({"input_ids": ids(4, 64)})]
    assert advice_on_text(batches, SimpleNamespace(max_position_embeddings=256, vocab_size=5000)) == ()
    assert len(advice_on_text(batches, SimpleNamespace(max_position_embeddings=260, vocab_size=5000))) == 1
    assert advice_on_text(batches, None) == ()


def weight(name: str, rows: int, **more: Any) -> WeightReport:
    facts: dict[str, Any] = {"shape": (8, 100), "bits": 4, "group_size": -1, "method": "gptq", "stage": 1, "damp": 0.1}
    facts |= {"dead": 0, "error": 0.1, "bytes": 1, "original_bytes": 2, **more}
    return WeightReport(name=name, rows=rows, **facts)


def test_rows() -> None:
    weights = [
        weight("enough", 200),
        weight("few", 199),
        weight("fewest", 150),
        weight("experts", 700, expert_rows=(100, 300, 200, 100)),
        weight("fell back", 3, fallback="3 rows"),
        weight("rounded", 0, method="rtn"),
    ]
    (line,) = advice_on_rows(weights, dict.fromkeys([w.name for w in weights], 100))
    assert (
        "3 of 6 weights saw fewer than 2 rows for each input feature (fewest: fewest, 150 rows for 100 features)"
        in line
    )
    assert advice_on_rows(weights[:1], {"enough": 100}) == ()


def test_it_is_in_the_report() -> None:
    report = quantize_(tiny_llama(), gptq_config(4, effort="fast", calibration=token_batches(1)))
    assert report is not None
    (line,) = report.warnings
    assert "80 rows for 128 features" in line
    assert f"warning: {line}" in str(report)


def test_a_transposed_weight_has_the_inputs_that_it_has() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    for rows, count in ((32, 0), (31, 1)):
        report = quantize_(Transposed(), gptq_config(4, effort="fast", calibration=[x[:rows]]))
        assert report is not None
        assert len(report.warnings) == count
