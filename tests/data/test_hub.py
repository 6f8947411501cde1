"""Sets of the hub, without one: what is asked of `datasets` is checked, and it reads repositories that lie here."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptq_ao.data import PRESETS, read_documents, text_batches
from gptq_ao.data.hub import BUFFER, named
from gptq_ao.errors import CalibrationError

from .models import Bytes, Chatting, stream

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Stands for the network: remembers what is asked, and gives rows."""

    def __init__(self, patch: pytest.MonkeyPatch, rows: list[dict[str, Any]], license: Any = "mit") -> None:
        import datasets
        import huggingface_hub

        self.loads: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.lookups: list[tuple[str, str | None]] = []
        self.read = 0

        def load(*args: Any, **how: Any) -> Any:
            self.loads.append((args, how))

            def generate() -> Any:
                for row in rows:
                    self.read += 1
                    yield row

            return datasets.IterableDataset.from_generator(generate)

        def look(_: Any, repository: str, *, revision: str | None = None, timeout: float) -> Any:
            self.lookups.append((repository, revision))
            return SimpleNamespace(sha=COMMIT, card_data=SimpleNamespace(license=license))

        patch.setattr(datasets, "load_dataset", load)
        patch.setattr(huggingface_hub.HfApi, "dataset_info", look)


def rows_for(name: str, count: int = 40) -> list[dict[str, Any]]:
    column = PRESETS[name].column
    if column == "text":
        return [{"text": f"document {n:03}", "url": "x"} for n in range(count)]
    if column == "messages":
        return [{"messages": [{"role": "user", "content": f"question {n:03}"}], "id": n} for n in range(count)]
    return [{"system": "think", "conversations": [{"from": "user", "value": f"q {n:03}"}]} for n in range(count)]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_what_a_preset_asks_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    preset, hub = PRESETS[name], Hub(monkeypatch, rows_for(name))
    revision = preset.revision or COMMIT
    batches = text_batches(Chatting(), name, num_samples=4, seq_len=8)
    asked = {"split": preset.train, "revision": revision, "streaming": True}  # and no code of theirs is run
    assert hub.loads == [((preset.repository, preset.config), asked)]
    # A commit is what it is: nobody is asked what it is now.
    assert hub.lookups == ([] if preset.revision else [(preset.repository, None)])
    for part in (name, preset.repository, preset.config, revision, preset.license, f"split {preset.train}"):
        assert part in batches.described
    assert ("shuffled with seed 0 in a buffer of 1000 rows" in batches.described) != preset.lines
    assert batches.described.startswith("4 sequences of ")


def test_every_revision_of_the_table_is_a_commit() -> None:
    assert all(p.revision is None or re.fullmatch("[0-9a-f]{40}", p.revision) for p in PRESETS.values())
    assert all(p.license for p in PRESETS.values())


def test_the_table_is_documented() -> None:
    """And the help of the command names all of it."""
    root = Path(__file__).parents[2]
    page = (root / "docs" / "calibration.md").read_text(encoding="utf-8")
    for name, p in PRESETS.items():
        revision = "the newest" if p.revision is None else p.revision[:7]
        cells = (f"`{name}`", p.repository, p.config, p.test or "", p.license, revision)
        assert f"| {' | '.join(cells)} |".replace("|  |", "| |") in page
        assert name in (root / "gptq_ao" / "cli" / "request.py").read_text(encoding="utf-8")
        assert name in (root / "docs" / "cli.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/convert/parquet", "f" * 40])
def test_another_revision_of_a_preset(revision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, rows_for("c4"))
    described = text_batches(Bytes(), f"c4@{revision}", num_samples=2, seq_len=8).described
    resolved = revision if len(revision) == 40 else COMMIT
    assert hub.loads[0][1]["revision"] == resolved
    assert hub.lookups == ([] if len(revision) == 40 else [("allenai/c4", revision)])
    assert f"revision {resolved}" in described
    assert "license ODC-BY" in described


@pytest.mark.parametrize(
    ("source", "repository", "config", "split", "column", "revision"),
    [
        ("hf:owner/name", "owner/name", None, "train", "text", None),
        ("hf:name", "name", None, "train", "text", None),
        ("hf:owner/name:config", "owner/name", "config", "train", "text", None),
        ("hf:owner/name:config:test", "owner/name", "config", "test", "text", None),
        ("hf:owner/name::test", "owner/name", None, "test", "text", None),
        ("hf:owner/name#body", "owner/name", None, "train", "body", None),
        ("hf:owner/name@main", "owner/name", None, "train", "text", "main"),
        ("hf:owner/na.me-1:c_1.0:test#a b@refs/pr/3", "owner/na.me-1", "c_1.0", "test", "a b", "refs/pr/3"),
    ],
)
def test_any_other_set(
    source: str,
    repository: str,
    config: str | None,
    split: str,
    column: str,
    revision: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = Hub(monkeypatch, [{column: f"document {n}", "text": "x"} for n in range(9)])
    described = text_batches(Bytes(), source, num_samples=2, seq_len=8).described
    assert hub.lookups == [(repository, revision)]
    assert hub.loads == [((repository, config), {"split": split, "revision": COMMIT, "streaming": True})]
    assert f"{repository}, {f'{config}, ' if config else ''}split {split}, column {column}, revision" in described
    assert "license mit" in described


@pytest.mark.parametrize("source", ["hf:", "hf:owner/name@", "hf:a#", "hf:a:b:c:d"])
def test_what_is_no_name(source: str) -> None:
    with pytest.raises(CalibrationError, match=r"is not hf:REPOSITORY\[:CONFIG\]\[:SPLIT\]\[#COLUMN\]\[@REVISION\]"):
        named(source, split="train", column="text")


@pytest.mark.parametrize(("license", "said"), [(None, "not stated"), (["mit", "gpl-3.0"], "mit, gpl-3.0")])
def test_the_license_of_a_card(license: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, [{"text": "some text"}], license)
    assert f"license {said}, shuffled" in text_batches(Bytes(), "hf:o/n", seq_len=4).described


def test_no_more_is_read_than_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, rows_for("c4", 10 * BUFFER))
    batches = text_batches(Bytes(), "c4", num_samples=3, seq_len=26)
    assert hub.read < BUFFER + 20
    assert len(batches) == 3
    assert len(text_batches(Bytes(), "c4", num_samples=5, seq_len=26, pack=False)) == 5
    assert len(read_documents("c4")) == 4096


def test_the_order_is_that_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, rows_for("c4", 400))
    drawn = [[b["input_ids"].tolist() for b in text_batches(Bytes(), "c4", seed=s, seq_len=13)] for s in (3, 3, -1)]
    assert drawn[0] == drawn[1] != drawn[2]
    firsts = {text[0][0] for text in drawn[0]}
    assert firsts == {0}  # whole documents: 12 bytes behind a separator


def test_lines_are_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, [{"text": t} for t in ("", " = A = \n", "", "of a\n")])
    text = "\n\n = A = \n\n\n\n\nof a\n"
    assert read_documents("wikitext2") == [text]
    batches = text_batches(Bytes(), "wikitext2", seq_len=len(text) + 1)
    assert batches[0]["input_ids"].tolist() == [stream([text])]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_what_is_held_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    preset, hub = PRESETS[name], Hub(monkeypatch, rows_for(name))
    if preset.test is None:
        with pytest.raises(CalibrationError, match=f"{name} holds no text out"):
            read_documents(name, split="test")
    else:
        read_documents(name, split="test")
        assert hub.loads[0][1]["split"] == preset.test


def test_what_lies_here_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    Path("c4").write_text("x")
    with pytest.raises(CalibrationError, match="c4: cannot read a file without suffix"):
        read_documents("c4")
    Path("ultrachat").mkdir()
    Path("ultrachat/train.jsonl").write_text('{"text": "mine"}')
    assert read_documents("ultrachat") == ["mine"]


def repository(tmp_path: Path) -> Path:
    """With files of two splits, of two configurations that its card names."""
    folder = tmp_path / "owner" / "name"
    card = ["configs:"]
    for config in ("default", "other"):
        (folder / config).mkdir(parents=True)
        card += [f"- config_name: {config}", "  data_files:"]
        for split in ("train", "test"):
            lines = [json.dumps({"body": f"{config} {split} {n}", "n": n}) for n in range(3)]
            (folder / config / f"{split}.jsonl").write_text("\n".join(lines))
            card += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join(["---", *card, "---", ""]))
    return folder


def test_a_repository_that_lies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` itself streams it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = repository(tmp_path)
    for config in ("default", "other"):
        for split in ("train", "test"):
            found = read_documents(f"hf:{folder}:{config}:{split}#body")
            assert sorted(map(str, found)) == [f"{config} {split} {n}" for n in range(3)]
    said = text_batches(Bytes(), f"hf:{folder}:default:train#body", num_samples=1, seq_len=4).described
    assert said.startswith("1 sequence of name, default, split train, column body, license not stated")
    with pytest.raises(CalibrationError, match=r"has the columns \['body', 'n'\], not 'text': name one, #COLUMN"):
        read_documents(f"hf:{folder}:default")
    with pytest.raises(CalibrationError, match=r"split 'nope', cannot be loaded: ValueError.*\n.*give a local file"):
        read_documents(f"hf:{folder}:default:nope#body")
    with pytest.raises(CalibrationError, match="cannot be loaded: "):
        read_documents(f"hf:{folder}:missing#body")


def no_network(*_: Any, **__: Any) -> Any:
    raise ConnectionError("Couldn't reach the hub")


@pytest.mark.parametrize("place", ["lookup", "load", "rows"])
def test_without_a_network(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is missed first; also in the middle."""
    import datasets
    import huggingface_hub

    Hub(monkeypatch, [{"text": "x"}])
    if place == "lookup":
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_network)
    elif place == "load":
        monkeypatch.setattr(datasets, "load_dataset", no_network)
    else:

        def broken() -> Any:
            yield {"text": "x"}
            no_network()

        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.IterableDataset.from_generator(broken))
    with pytest.raises(CalibrationError) as e:
        text_batches(Bytes(), "openthoughts" if place == "lookup" else "c4", seq_len=4)
    assert "cannot be loaded: ConnectionError: Couldn't reach the hub" in str(e.value)
    assert "Without a network, give a local file (.jsonl, .json, .txt, .parquet) or a folder" in str(e.value)


@pytest.mark.parametrize(("name", "meant"), [("wikitext", "wikitext2"), ("fineweb_edu", "fineweb-edu"), ("C4x", None)])
def test_a_name_that_is_almost_a_preset(name: str, meant: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(CalibrationError, match=rf"dataset '{name}', split 'train', cannot be loaded") as e:
        read_documents(name)
    assert str(e.value).endswith(f"\nThere is a preset {meant!r}") == (meant is not None)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in ("c4", "some/name"):
        with pytest.raises(CalibrationError, match=r"needs a package that is missing .*: pip install datasets, or"):
            read_documents(source)


def test_a_preset_whose_column_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, [{"prompt": "x", "answer": "y"}])
    with pytest.raises(CalibrationError, match=r"'ultrachat' has the columns \['answer', 'prompt'\], not 'messages'"):
        read_documents("ultrachat")


def test_an_empty_set(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, [])
    with pytest.raises(CalibrationError, match="'c4' holds no document"):
        text_batches(Bytes(), "c4")
