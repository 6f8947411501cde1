"""What is written, and read again."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from gptq_ao.errors import CheckpointError
from gptq_ao.presentation.files import FACTS, PAGE, is_report, read_report, write_page
from gptq_ao.presentation.layers import depth_of, kind_of, short_kinds

from .reports import HOSTILE, report

DOCS = Path(__file__).parents[2] / "docs" / "report.md"


def test_the_facts_are_those_of_the_report(tmp_path: Path) -> None:
    made = report()
    made.save(tmp_path / "a" / "b", model="mine", plan={"seconds": {"solve": 4.0}, "peak_bytes": {}})
    facts = read_report(tmp_path / "a" / "b")
    assert (facts["format"], facts["format_version"], facts["model"]) == ("gptq_ao report", 1, "mine")
    for key, value in made.to_dict().items():
        assert facts[key] == json.loads(json.dumps(value)), key
    assert facts["plan"]["seconds"] == {"solve": 4.0}
    assert {p.name for p in (tmp_path / "a" / "b").iterdir()} == {FACTS, PAGE}


def test_every_key_is_documented(tmp_path: Path) -> None:
    report().save(tmp_path)
    facts = read_report(tmp_path)
    text = DOCS.read_text(encoding="utf-8")
    assert [key for key in (*facts, *facts["layers"][0], *facts["precision"][0]) if f"`{key}`" not in text] == []


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    made = dataclasses.replace(report(), measured={"KL": math.inf, "perplexity": math.nan, "tokens": 3})
    made.save(tmp_path)
    assert read_report(tmp_path)["measured"] == {"KL": None, "perplexity": None, "tokens": 3}
    assert (tmp_path / PAGE).is_file()


def test_the_page_can_be_written_again(tmp_path: Path) -> None:
    report().save(tmp_path, model="mine")
    before = (tmp_path / PAGE).read_text(encoding="utf-8")
    (tmp_path / PAGE).unlink()
    write_page(tmp_path, read_report(tmp_path))
    assert (tmp_path / PAGE).read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"has no report.json: report.save\(directory\) writes it in Python"),
        ("{", r"report.json cannot be read"),
        ("[" * 100_000, r"report.json cannot be read"),
        ("[]", r"is not a report of gptq_ao"),
        ('{"format": "gptq_ao journal"}', r"is not a report of gptq_ao"),
        ('{"format": "gptq_ao report", "format_version": 2, "gptq_ao": "9.9"}', r"version 2, .* reads 1: .*'9.9'"),
    ],
)
def test_what_cannot_be_read(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / FACTS).write_text(text)
    assert not is_report(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_report(tmp_path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/x/report.json could not be written"):
        report().save(tmp_path / "file" / "x")


def test_no_plots_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("gptq_ao.presentation.files.can_plot", lambda: False)
    report(names=HOSTILE).save(tmp_path)
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "<svg" not in page
    assert "Plots need matplotlib: pip install &#x27;gptq_ao[report]&#x27;" in page


@pytest.mark.parametrize(
    ("name", "depth", "kind"),
    [
        ("model.layers.3.mlp.down_proj.weight", 3, "model.layers.*.mlp.down_proj"),
        ("transformer.h.0.attn.c_attn.weight", 0, "transformer.h.*.attn.c_attn"),
        ("model.layers.12.mlp.experts.7.up_proj.weight", 12, "model.layers.*.mlp.experts.*.up_proj"),
        ("model.layers.1.mlp.experts.gate_up_proj", 1, "model.layers.*.mlp.experts.gate_up_proj"),
        ("lm_head.weight", None, "lm_head"),
        ("weight", None, "weight"),
        ("a.²." + "9" * 5000 + ".weight", None, "a.²." + "9" * 5000),
    ],
)
def test_where_a_weight_is(name: str, depth: int | None, kind: str) -> None:
    assert (depth_of(name), kind_of(name)) == (depth, kind)


def test_short_kinds_stay_different() -> None:
    kinds = ["model.layers.*.q", "model.layers.*.experts.*.up", "lm_head"]
    assert short_kinds(kinds) == dict(zip(kinds, ["q", "experts.*.up", "lm_head"], strict=True))
    both: list[Any] = ["encoder.layer.*.q", "decoder.layer.*.q"]
    assert short_kinds(both) == dict(zip(both, both, strict=True))
