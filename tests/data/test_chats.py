"""Rows with messages, wherever they are: calibrated with as the tokenizer's own template has them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_ao.data import read_documents, text_batches, token_chunks
from gptq_ao.errors import CalibrationError, ConfigError

from .models import Bytes, Chatting, stream, tiny

FIRST = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
SECOND = [{"role": "user", "content": "three"}]
CHATS = [FIRST, SECOND]
WRITTEN = ["<user>one</user><assistant>two</assistant>", "<user>three</user>"]


def shared(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    """As ShareGPT has it."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in chat]


def sources(tmp_path: Path) -> dict[str, Any]:
    import datasets
    import pandas  # type: ignore[import-untyped]
    import pyarrow
    import pyarrow.parquet

    rows = datasets.Dataset.from_list([{"messages": c, "id": 1} for c in CHATS])
    files = {}
    for name, content in {
        "messages.jsonl": "\n".join(json.dumps({"messages": c}) for c in CHATS),
        "sharegpt.jsonl": "\n".join(json.dumps({"id": 7, "conversations": shared(c)}) for c in CHATS),
        "list.json": json.dumps([{"messages": c} for c in CHATS]),
        "bare.jsonl": "\n".join(json.dumps(c) for c in CHATS),
    }.items():
        files[name] = tmp_path / name
        files[name].write_text(content)
    files["table.parquet"] = tmp_path / "table.parquet"
    table = pyarrow.table({"messages": CHATS, "id": [1, 2]})
    pyarrow.parquet.write_table(table, files["table.parquet"])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text((tmp_path / "messages.jsonl").read_text())
    return {
        **files,
        "folder": str(folder),
        "Dataset": rows,
        "streamed": rows.to_iterable_dataset(),
        "DatasetDict": datasets.DatasetDict(train=rows),
        "data frame": pandas.DataFrame({"messages": CHATS}),
        "data frame of parquet": pandas.read_parquet(files["table.parquet"]),
        "chats": CHATS,
        "dicts": [{"messages": c} for c in CHATS],
        "structs of lists": [{"messages": {k: [m[k] for m in c] for k in ("role", "content")}} for c in CHATS],
    }


KINDS = (
    "messages.jsonl",
    "sharegpt.jsonl",
    "list.json",
    "bare.jsonl",
    "table.parquet",
    "folder",
    "Dataset",
    "streamed",
    "DatasetDict",
    "data frame",
    "data frame of parquet",
    "chats",
    "dicts",
    "structs of lists",
)


@pytest.mark.parametrize("kind", KINDS)
def test_chats_of_every_source(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = sources(tmp_path)[kind]
    assert read_documents(source) == CHATS
    batches = text_batches(Chatting(), source, seq_len=len(stream(WRITTEN)))
    assert [b["input_ids"].tolist() for b in batches] == [[stream(WRITTEN)]]


@pytest.mark.parametrize("kind", ["Dataset", "dicts", "data frame", "table.parquet"])
def test_chats_in_a_column_of_another_name(kind: str, tmp_path: Path) -> None:
    import datasets
    import pandas
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": "no", "turns": c} for c in CHATS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table.parquet")
    source: Any = {
        "Dataset": datasets.Dataset.from_list(rows),
        "dicts": rows,
        "data frame": pandas.DataFrame(rows),
        "table.parquet": tmp_path / "table.parquet",
    }[kind]
    assert read_documents(source, column="turns") == CHATS
    assert read_documents(source) == ["no", "no"]


@pytest.mark.parametrize("own", [False, True])
def test_what_the_system_says_beside_the_messages(own: bool, tmp_path: Path) -> None:
    """OpenThoughts has it in a field of its own. What a chat says itself counts more."""
    import datasets

    said = [{"role": "system", "content": "be brief"}]
    rows = [{"system": "be long" if own else "be brief", "conversations": shared((said if own else []) + FIRST)}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    for source in (rows, tmp_path / "a.jsonl", datasets.Dataset.from_list(rows)):
        for column in ("text", "conversations"):
            assert read_documents(source, column=column) == [said + FIRST]


def test_text_and_chats_together() -> None:
    mixed: list[Any] = [{"text": "plain"}, {"messages": SECOND}, "words", FIRST]
    written = ["plain", WRITTEN[1], "words", WRITTEN[0]]
    tokens = stream(written)
    found = token_chunks(Chatting(), read_documents(mixed), 5).flatten().tolist()
    assert found == tokens[: len(tokens) // 5 * 5]
    users = text_batches(Chatting(), ["hello"], seq_len=19, chat_template=True)[0]["input_ids"]
    assert users[0].tolist() == stream(["<user>hello</user>"])


def test_fields_that_the_template_reads_stay() -> None:
    """Calls of tools, and what columnar files fill up with null."""
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    chat = [
        {"role": "user", "content": "x", "tool_calls": None, "name": None},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "user", "content": [{"type": "text", "text": "y"}], "tool_calls": None},
    ]
    assert read_documents([{"messages": chat}]) == [
        [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": call},
            {"role": "user", "content": [{"type": "text", "text": "y"}]},
        ]
    ]


@pytest.mark.parametrize("pack", [True, False])
def test_a_real_tokenizer_and_its_own_tokens(pack: bool) -> None:
    """What begins a text is written once, by whichever of the two does."""
    tokenizer = tiny()
    own = tokenizer.apply_chat_template(FIRST, tokenize=True, return_dict=True)["input_ids"]
    batch = text_batches(tokenizer, [FIRST], seq_len=len(own) if pack else 100, pack=pack)[0]
    assert batch["input_ids"].tolist() == [own]


@pytest.mark.parametrize("pack", [True, False])
def test_a_tokenizer_without_a_template(pack: bool) -> None:
    for tokenizer in (Bytes(), tiny(None)):
        with pytest.raises(ConfigError, match=r"has no chat template, and the list of documents is a chat"):
            text_batches(tokenizer, CHATS, seq_len=4, pack=pack)
    with pytest.raises(ConfigError, match="has no chat template, and the documents is a chat"):
        token_chunks(Bytes(), CHATS, 4)


def test_a_template_that_refuses() -> None:
    tokenizer = tiny("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ConfigError, match="chat template cannot be used: TemplateError: roles must alternate"):
        text_batches(tokenizer, CHATS, seq_len=4)


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], r"a.jsonl': document 1 is a chat without messages: leave such documents out"),
        ([{"content": "x"}], r"a.jsonl': document 1, message 0, counting from 0, has no role"),
        ([*FIRST, {"role": "user"}], r"a.jsonl': document 1, message 2, counting from 0, has no content"),
        ([{"role": "user", "content": 7}], r"document 1, message 0, counting from 0, has no content"),
        (["x"], r"a.jsonl': document 1, counting from 0, is a list, not a string"),
        ({"role": "user"}, r"a.jsonl': document 1, counting from 0, is a dict, not a string"),
        (None, r"a.jsonl': document 1, counting from 0, is null, not a string"),
    ],
    ids=["empty", "role", "content", "number", "strings", "one-message", "null"],
)
def test_chats_that_cannot_be_used(chat: Any, message: str, tmp_path: Path) -> None:
    lines = [{"messages": FIRST}, {"messages": chat}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(CalibrationError, match=message):
        read_documents(tmp_path / "a.jsonl")


def test_nothing_is_drawn_from_the_global_state() -> None:
    before = torch.get_rng_state()
    text_batches(Chatting(), CHATS, seq_len=8, pack=False)
    assert torch.equal(torch.get_rng_state(), before)
