"""`gptq-ao diagnose`: what it writes, and that `quantize` takes it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gptq_ao.presentation.files import read_report

from .test_commands import fail, run

Arguments = Callable[..., tuple[str, ...]]


def test_the_rules_that_it_writes_can_be_given(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments("--bits", "2")
    text = ("--data", str(tmp_path / "text.txt"), "--seq-len", "32", "--max-chunks", "3", "--add-bits", "0.9")
    with monkeypatch.context() as patch:
        run(patch, *given)
        found = run(patch, "diagnose", str(tmp_path / "q"), "--reference", str(tmp_path / "a"), *text, "--json")
    folder = tmp_path / "q" / "report"
    assert {p.name for p in folder.iterdir()} == {"report.json", "report.html", "diagnosis.json", "rules.yaml"}
    facts = json.loads((folder / "diagnosis.json").read_text())
    assert facts == {k: v for k, v in found.items() if k not in ("model", "reference", "out")}
    assert read_report(folder)["diagnosis"] == facts
    page = (folder / "report.html").read_text()
    assert "<h2>Diagnosis</h2>" in page
    assert "Worst predictions" in page
    rules = yaml.safe_load((folder / "rules.yaml").read_text())
    assert rules == facts["advice"]["rules"]
    with monkeypatch.context() as patch:
        better = run(
            patch, *given[:2], str(tmp_path / "b"), *given[3:], "--rules", str(folder / "rules.yaml"), "--json"
        )
    got = {layer["name"].removesuffix(".weight"): layer["bits"] for layer in better["layers"]}
    assert {name: got[name] for name in rules} == {name: rule["bits"] for name, rule in rules.items()}
    assert {bits for name, bits in got.items() if name not in rules} == {2}


def test_where_it_is_written(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a report or without one; not on the hub, nor over a file."""
    given = arguments("--no-report")
    text = ("--reference", str(tmp_path / "a"), "--data", str(tmp_path / "text.txt"), "--seq-len", "32")
    with monkeypatch.context() as patch:
        run(patch, *given)
        said = run(patch, "diagnose", str(tmp_path / "q"), *text, "--out", str(tmp_path / "found"), "--add-bits", "0.9")
    assert said.splitlines()[-1] == f"gptq-ao quantize … --rules {tmp_path / 'found' / 'rules.yaml'} follows the advice"
    assert not (tmp_path / "q" / "report").exists()
    assert "give --out" in fail(monkeypatch, capsys, "diagnose", "owner/model", *text)
    taken = ("--out", str(tmp_path / "text.txt"))
    assert "text.txt could not be written" in fail(monkeypatch, capsys, "diagnose", str(tmp_path / "q"), *text, *taken)
