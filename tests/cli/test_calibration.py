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


def test_a_mixture(
    arguments: Arguments, hub: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = with_calibration(arguments("--json"), "c4=0.7", f"{tmp_path / 'text.txt'}=0.3")
    given = tuple("10" if part == "2" else part for part in given)
    found = run(monkeypatch, *given)["recipe"]
    assert found["calibration data"].startswith("7 sequences of c4: allenai/c4, en, split train")
    assert found["calibration data"].endswith("; 3 sequences of text.txt")
    again = run(monkeypatch, *given[:2], str(tmp_path / "again"), *given[3:])["recipe"]
    assert again == found
    kept = run(monkeypatch, *given[:2], str(tmp_path / "kept"), *given[3:], "--check-split", "2")
    assert kept["quality"]["tokens"] == 2 * 31
    counts = [int(part.split(" ")[0]) for part in kept["recipe"]["calibration data"].split("; ")]
    assert sum(counts) == 10
    assert 6 <= counts[0] <= 8  # of 8 and 4 that were drawn, without the two that are kept


def test_without_weights_all_give_as_much(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a file may be called like one with a weight."""
    names = [tmp_path / "a=0.9", tmp_path / "b=2.txt"]
    names[0].mkdir()
    names[1].write_text((tmp_path / "text.txt").read_text())
    sources = [str(names[1]), str(tmp_path / "text.txt")]
    found = run(monkeypatch, *with_calibration(arguments("--json"), *sources))["recipe"]
    assert found["calibration data"] == "1 sequence of b=2.txt; 1 sequence of text.txt"
    weighted = [f"{names[1]}=3", f"{tmp_path / 'text.txt'}=1"]
    given = tuple("4" if part == "2" else part for part in with_calibration(arguments("--json"), *weighted))
    found = run(monkeypatch, *given[:2], str(tmp_path / "w"), *given[3:])["recipe"]
    assert found["calibration data"] == "3 sequences of b=2.txt; 1 sequence of text.txt"


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (("c4=0.7,text.txt=0.3",), "one source in each, --calibration c4=0.7 --calibration text.jsonl=0.3"),
        (("c4=", "b.txt=1"), "--calibration c4=: '' is no weight: give a number above 0"),
        (("c4=much",), "'much' is no weight: give a number above 0"),
        (("c4=0", "b.txt=1"), "'0' is no weight"),
        (("c4=nan", "b.txt=1"), "'nan' is no weight"),
        (("c4=inf",), "'inf' is no weight"),
        (("c4=-1",), "'-1' is no weight"),
        (("c4", "b.txt=1"), "--calibration c4 has no weight, and others have one: give c4=WEIGHT"),
        (("c4=1", "c4=1000"), "source 0, counting from 0, of weight 1.0 gives none of 2 samples"),
    ],
)
def test_mixtures_that_cannot_be(
    sources: tuple[str, ...],
    message: str,
    arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = fail(monkeypatch, capsys, *with_calibration(arguments(), *sources))
    assert message in " ".join(said.split())
    assert not (tmp_path / "q").exists()


def test_documents_that_are_not_joined(arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the cat", "the dog and the cat sat", "a mat " * 30]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    given = with_calibration(arguments("--json", "--no-pack"), str(tmp_path / "texts.jsonl"))
    given = tuple("3" if part == "2" else part for part in given)
    found = run(monkeypatch, *given)
    from gptq_ao.data import text_batches
    from gptq_ao.integrations.transformers import load_tokenizer

    batches = text_batches(load_tokenizer(TINY), texts, seq_len=32, num_samples=3, batch_size=3, pack=False)
    tokens = int(batches[0]["attention_mask"].sum())
    assert {w["rows"] for w in found["layers"] if w["stage"]} == {tokens}
    assert found["recipe"]["calibration data"] == batches.described.replace("documents in memory", "texts.jsonl")
    planned = run(monkeypatch, "plan", *given[1:])
    assert planned["stages"] == found["stages"]


def test_padded_sequences_are_not_checked_with(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = " ".join(fail(monkeypatch, capsys, *arguments("--no-pack", "--check-split", "1")).split())
    assert "--check-split compares predictions of full sequences, and --no-pack makes padded ones" in said


@pytest.mark.parametrize("masked", [False, True])
def test_a_decoder_gets_what_the_encoder_gets(masked: bool) -> None:
    import torch

    from gptq_ao.cli.quantization import _inputs

    batch = {"input_ids": torch.ones(1, 4)} | ({"attention_mask": torch.ones(1, 4)} if masked else {})
    names = {*batch, *(f"decoder_{name}" for name in batch)}
    assert set(_inputs(SimpleNamespace(is_encoder_decoder=True), **batch)) == names
    assert _inputs(SimpleNamespace(is_encoder_decoder=False), **batch) == batch


def test_the_same_text_has_the_same_digest_wherever_it_came_from(
    arguments: Arguments, hub: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preset, a file and a list in Python: of the report's JSON, of the model card, and of the function that a
    journal compares by."""
    from gptq_ao.calibration.batches import digest, read_batches
    from gptq_ao.data import read_documents, text_batches
    from gptq_ao.integrations.transformers import load_tokenizer

    (text,) = read_documents("wikitext2")
    assert isinstance(text, str)
    (tmp_path / "same.txt").write_text(text)
    sources = {"preset": "wikitext2", "file": str(tmp_path / "same.txt")}
    found = {}
    for name, source in sources.items():
        given = with_calibration(arguments("--json"), source)
        found[name] = run(monkeypatch, *given[:2], str(tmp_path / name), *given[3:])["recipe"]["calibration"]
        assert f"- calibration: {found[name]}" in (tmp_path / name / "README.md").read_text()
    batches = text_batches(load_tokenizer(TINY), [text], num_samples=2, seq_len=32, batch_size=8)
    expected = f"1 batches, sha256 {digest(read_batches(batches))}"
    assert found == {"preset": expected, "file": expected}
