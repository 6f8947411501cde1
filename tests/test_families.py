"""A representative dozen of the models in docs/supported-models.md; `make families` tries them all."""

import pytest

from .families.causal_lm import causal_lm_entries
from .families.encoders import encoder_entries
from .families.entry import Row, run
from .families.page import page
from .families.plain import plain_entries

ENTRIES = {e.name: e for e in (*plain_entries(), *encoder_entries(), *causal_lm_entries())}
# name → (weights quantized, Hessians)
EXPECTED = {
    "nn.Transformer": (11, 12),
    "diffusion UNet block": (16, 13),
    "robot policy, action chunks": (11, 12),
    "dataclass as output": (3, 2),
    "distribution as output": (3, 2),
    "autocast inside": (2, 2),
    "activation checkpointing": (12, 8),
    "experts in a Python loop": (8, 8),
    "stacked experts, bmm": (2, 2),
    "stacked experts, einsum": (2, 2),
    "one parameter in three chunks": (2, 2),
    "a weight applied twice": (2, 2),
    "T5": (32, 21),
    "Whisper": (34, 23),
    "GPT2Config": (8, 8),
    "FalconConfig": (8, 6),
    "GptOssConfig": (12, 8),
    "MambaConfig": (8, 8),
    "Qwen3NextConfig": (19, 12),
    "DINOv2": (13, 9),
}


# The last two loop over positions: graphs of thousands of nodes. Of the others, relatives are tried always.
LONG = {"Whisper", "GPT2Config", "FalconConfig", "diffusion UNet block", "stacked experts, bmm", "dataclass as output"}
LONG |= {"autocast inside", "activation checkpointing", "a weight applied twice", "MambaConfig", "Qwen3NextConfig"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n in LONG else ()) for n in EXPECTED])
def test_family(name: str) -> None:
    row = run(ENTRIES[name])
    assert (row.problem, dict(row.missed), row.difference) == ("", {}, 0.0)
    assert row.generates is not False
    assert row.path == "export"
    assert (row.quantized, row.hessians) == EXPECTED[name]


def test_what_cannot_be_quantized_is_a_row_that_says_so() -> None:
    row = run(ENTRIES["LSTM"])
    assert row.quantized == 1
    assert set(row.missed) == {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}
    assert not row.good
    text = page([row, Row("X", "others", problem="not built: ImportError: no y")])
    assert "| LSTM | 1/3 | 1 | 1 | yes |  | export | not quantized: `lstm.weight_hh_l0` and 1 more: aten::lstm" in text
    assert "| together | 2 | 1 | 1 | 0 | 1 |" in text
    assert "not built: ImportError: no y" in text
