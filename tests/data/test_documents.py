import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_ao.data import read_documents, spaced, text_batches, token_chunks
from gptq_ao.errors import CalibrationError, ConfigError

from .models import Bytes

DOCUMENTS = ["abc", "", "defgh", "ij"]


def test_chunks_are_documents_behind_separators_concatenated() -> None:
    stream = [0, *(b + 1 for b in b"abc"), 0, 0, *(b + 1 for b in b"defgh"), 0, *(b + 1 for b in b"ij")]
    assert token_chunks(Bytes(), DOCUMENTS, 4).tolist() == [stream[0:4], stream[4:8], stream[8:12]]


@pytest.mark.parametrize(("bos", "eos", "first"), [(0, 300, 0), (None, 300, 300), (None, None, 98)])
def test_the_separator(bos: int | None, eos: int | None, first: int) -> None:
    tokenizer = Bytes()
    tokenizer.bos_token_id, tokenizer.eos_token_id = bos, eos
    assert token_chunks(tokenizer, DOCUMENTS, 4)[0, 0] == first


def test_batches_are_a_seeded_draw_that_leaves_the_global_state_alone() -> None:
    text = ["".join(map(chr, range(32, 120))) * 20]
    before = torch.get_rng_state()
    batches = text_batches(Bytes(), text, num_samples=7, seq_len=16, batch_size=3, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert [b["input_ids"].shape for b in batches] == [(3, 16), (3, 16), (1, 16)]
    chunks = token_chunks(Bytes(), text, 16)
    order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(5))[:7]
    assert torch.equal(torch.cat([b["input_ids"] for b in batches]), chunks[order])
    again = text_batches(Bytes(), text, num_samples=7, seq_len=16, batch_size=3, seed=6)
    assert not torch.equal(again[0]["input_ids"], batches[0]["input_ids"])


def test_fewer_chunks_than_asked_for() -> None:
    batches = text_batches(Bytes(), ["x" * 40], num_samples=128, seq_len=16)
    assert len(batches) == 2


def test_too_little_text() -> None:
    with pytest.raises(CalibrationError, match="the text has 4 tokens, less than one sequence of 16"):
        text_batches(Bytes(), ["abc"], seq_len=16)


@pytest.mark.parametrize(
    ("count", "at_most", "rows"), [(10, 3, [0, 3, 6]), (10, 10, list(range(10))), (5, 9, list(range(5)))]
)
def test_evenly_spaced_chunks(count: int, at_most: int, rows: list[int]) -> None:
    assert spaced(torch.arange(count).unsqueeze(1), at_most).flatten().tolist() == rows


def parquet(path: Path, column: str) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({column: ["one", "two"], "id": [1, 2]}), path)


def test_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n"two"\n')
    (tmp_path / "b.json").write_text('["one", {"text": "two"}]')
    (tmp_path / "c.json").write_text('{"text": ["one", "two"]}')
    (tmp_path / "d.txt").write_text("one\ntwo")
    parquet(tmp_path / "e.parquet", "text")
    for name in ("a.jsonl", "b.json", "c.json", "e.parquet"):
        assert read_documents(tmp_path / name) == ["one", "two"]
    assert read_documents(str(tmp_path / "d.txt")) == ["one\ntwo"]


def test_another_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one", "text": "two"}')
    assert read_documents(tmp_path / "a.jsonl", column="body") == ["one"]


def test_a_dataset_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` itself reads it: a directory of files is the one kind of name that needs no network."""
    folder = tmp_path / "my_dataset"
    folder.mkdir()
    for split, texts in (("train", ["one", "two"]), ("test", ["three"])):
        lines = [json.dumps({"text": t, "other": "x"}) for t in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert read_documents(str(folder)) == ["one", "two"]
    assert read_documents(str(folder), split="test") == ["three"]
    with pytest.raises(CalibrationError, match=r"has the columns \['text', 'other'\], not 'body'"):
        read_documents(str(folder), column="body")
    with pytest.raises(CalibrationError, match=r"split 'nope', cannot be loaded: ValueError"):
        read_documents(str(folder), split="nope")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "one"}\n{"text": ', r"a.jsonl cannot be read: line 2 is not JSON"),
        ("a.jsonl", '{"body": "one"}', r"a record has the fields \['body'\], not 'text'"),
        ("a.jsonl", '{"text": 7}', r"a.jsonl': document 0, counting from 0, is a int, not a string"),
        (
            "a.jsonl",
            '{"text": "one"}\n\n{"text": null}',
            r"a.jsonl': document 1, counting from 0, is null, not a string",
        ),
        ("a.json", '["one", null]', r"a.json': document 1, counting from 0, is null, not a string: leave such"),
        ("a.json", '{"text": ["one", ["two"]]}', r"a.json': document 1, counting from 0, is a list, not"),
        ("a.jsonl", "", r"holds no document"),
        ("a.csv", "x", r"cannot read .csv, give .jsonl, .json, .txt, .parquet"),
        ("a.parquet", "not parquet", r"a.parquet cannot be read: "),
        (
            "a.jsonl",
            '{"text": "one"}\n{"text": "\\ud83d"}',
            r"a.jsonl': document 1, counting from 0, is no text: .*ud83d",
        ),
    ],
    ids=["cut-off", "no-column", "number", "null", "json-null", "json-list", "empty", "suffix", "no-parquet", "half"],
)
def test_files_that_cannot_be_used(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=message):
        read_documents(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", "one"), ("a.jsonl", '{"text": "one"}'), ("a.json", '["one"]')],
    ids=["txt", "jsonl", "json"],
)
def test_a_mark_of_the_encoding_is_not_text(name: str, content: str, tmp_path: Path) -> None:
    """Editors on Windows begin files with it."""
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_documents(tmp_path / name) == ["one"]


def test_a_name_longer_than_any_file_has() -> None:
    with pytest.raises(CalibrationError, match="there is no file"):
        read_documents("x" * 5000 + ".txt")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"there is no file '.*gone.jsonl'"):
        read_documents(tmp_path / "gone.jsonl")


def test_a_parquet_file_without_the_column(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", "body")
    with pytest.raises(CalibrationError, match=r"a.parquet has no column 'text'"):
        read_documents(tmp_path / "a.parquet")


def test_a_null_in_a_parquet_file(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two", None]}), tmp_path / "a.parquet")
    with pytest.raises(CalibrationError, match=r"a.parquet': document 2, counting from 0, is null"):
        read_documents(tmp_path / "a.parquet")


@pytest.mark.parametrize("documents", [[], ["a", 3], ["a", None], ["a", b"b"], ["a", ["b"]]])
def test_a_list_that_cannot_be_used(documents: list[Any]) -> None:
    said = r"the list of documents( holds no document|: document 1, counting from 0, is (a int|null|a bytes|a list), )"
    with pytest.raises(CalibrationError, match=said):
        read_documents(documents)
    if documents:
        with pytest.raises(CalibrationError, match="the documents: document 1, counting from 0"):
            token_chunks(Bytes(), documents, 1)


def data_sets(column: str) -> dict[str, Any]:
    import datasets
    import pandas  # type: ignore[import-untyped]

    rows = datasets.Dataset.from_dict({column: ["one", "two"], "id": [1, 2]})
    return {
        "Dataset": rows,
        "with_format": rows.with_format("torch"),
        "streamed": rows.to_iterable_dataset(),
        "DatasetDict": datasets.DatasetDict(train=rows, test=rows.select([])),
        "data frame": pandas.DataFrame({column: ["one", "two"], "id": [1, 2]}),
        "series": pandas.Series(["one", "two"]),
        "dicts": [{column: "one", "id": 1}, {column: "two"}],
        "generator": (text for text in ("one", "two")),
    }


KINDS = ("Dataset", "with_format", "streamed", "DatasetDict", "data frame", "series", "dicts", "generator")


@pytest.mark.parametrize("kind", KINDS)
def test_data_sets_in_memory(kind: str) -> None:
    assert read_documents(data_sets("text")[kind]) == ["one", "two"]
    assert read_documents(data_sets("body")[kind], column="body") == ["one", "two"]
    assert len(text_batches(Bytes(), data_sets("text")[kind], seq_len=4)) == 2
    if kind not in ("series", "generator"):
        with pytest.raises(CalibrationError, match=r"\[('text', 'id'|'id', 'text')\], not 'body'"):
            read_documents(data_sets("text")[kind], column="body")


def test_the_split_of_a_data_set_in_memory() -> None:
    splits = data_sets("text")["DatasetDict"]
    with pytest.raises(CalibrationError, match=r"the data set has the splits \['train', 'test'\], not 'validation'"):
        read_documents(splits, split="validation")
    with pytest.raises(CalibrationError, match=r"the data set holds no document"):
        read_documents(splits, split="test")


@pytest.mark.parametrize("name", ["num_samples", "seq_len", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_numbers_of_chunks(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is {value!r}: give a number, 1 or more"):
        text_batches(Bytes(), ["abc"], **{name: value})
