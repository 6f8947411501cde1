"""What `--calibration` names: files, presets, sets of the hub, and mixtures of them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from .test_commands import TINY, fail, run

Arguments = Callable[..., tuple[str, ...]]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """In place of the network: rows that fit any preset. Returns what was asked."""
    import datasets
    import huggingface_hub

    asked: list[dict[str, Any]] = []

    def load(repository: str, config: str | None, **how: Any) -> Any:
        asked.append({"repository": repository, "config": config, **how})
        texts = [f"{n} the cat sat on the mat and looked at the dog " * 3 for n in range(60)]
        rows = [{"text": t, "messages": [{"role": "user", "content": t}]} for t in texts]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    def look(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(sha=COMMIT, card_data=SimpleNamespace(license="mit"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", look)
    return asked


def with_calibration(given: tuple[str, ...], *sources: str) -> tuple[str, ...]:
    """In place of the file of `arguments`."""
    at = given.index("--calibration")
    return (*given[:at], *(part for s in sources for part in ("--calibration", s)), *given[at + 2 :])


def test_a_preset_in_report_card_and_log(
    arguments: Arguments, hub: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = run(monkeypatch, *with_calibration(arguments(), "fineweb-edu"))
    said = json.loads((tmp_path / "q" / "report" / "report.json").read_text())["recipe"]["calibration data"]
    assert said == (
        "2 sequences of fineweb-edu: HuggingFaceFW/fineweb-edu, sample-10BT, split train, column text, revision "
        "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9, license ODC-BY, shuffled with seed 0 in a buffer of 1000 rows"
    )
    assert f"calibrated with {said}" in printed
    assert f"- calibration data: {said}" in (tmp_path / "q" / "README.md").read_text()
    assert said in (tmp_path / "q" / "report" / "report.html").read_text()
    assert [a["repository"] for a in hub] == ["HuggingFaceFW/fineweb-edu"]


def test_any_other_set(arguments: Arguments, hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(monkeypatch, *with_calibration(arguments("--json"), "hf:owner/name:config:dev#text@v2"))
    assert hub == [
        {"repository": "owner/name", "config": "config", "split": "dev", "revision": COMMIT, "streaming": True}
    ]
    assert f"revision {COMMIT}, license mit" in found["recipe"]["calibration data"]


def test_held_out_text_of_a_preset(
    arguments: Arguments, hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(monkeypatch, *with_calibration(arguments("--json", "--check", "c4"), "c4"))
    assert {a["split"] for a in hub} == {"train", "validation"}
    assert found["quality"]["tokens"] > 0
    scored = run(monkeypatch, "eval", TINY, "--data", "wikitext2", "--seq-len", "32", "--max-chunks", "2", "--json")
    assert scored["tokens"] == 2 * 31
    assert hub[-1]["split"] == "test"


def test_nothing_is_held_out(
    arguments: Arguments,
    hub: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "tulu3 holds no text out" in fail(monkeypatch, capsys, *arguments("--check", "tulu3"))
    assert not (tmp_path / "q").exists()


def test_no_network(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    said = fail(monkeypatch, capsys, *with_calibration(arguments(), "c4"))
    assert "ConnectionError: no route" in said
    assert "Without a network, give a local file" in said
    assert not (tmp_path / "q").exists()
