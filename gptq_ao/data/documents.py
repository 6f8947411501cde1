"""The documents of a source, whatever it is: texts and chats, in its order."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from gptq_ao.data.chats import Document, chat_in
from gptq_ao.data.files import SUFFIXES, columns_of, file_rows
from gptq_ao.data.hub import BUFFER, hub_rows, located, named, whole_dataset
from gptq_ao.errors import CalibrationError

__all__ = ["Opened", "Source", "checked", "opened", "read_documents"]

Source = str | Path | Iterable[Any]

_AT_MOST = 4096  # documents of a stream, where it is not known how many are needed


@dataclass(frozen=True)
class Opened:
    """A source that is being read.

    Attributes:
        documents: each is read when it is asked for, once.
        streamed: whether there may be far more of them than anyone needs.
        name: for messages.
        said: for the report: what it is, without where it lay on this machine.
    """

    documents: Iterator[Document]
    streamed: bool
    name: str
    said: str


def opened(source: Source, *, split: str = "train", column: str = "text", seed: int = 0) -> Opened:
    """
    Args:
        source: see `text_batches`.
        seed: of the order of what is streamed.

    Raises:
        CalibrationError: it cannot be read, or holds something that is neither text nor a chat. What is read later
            raises it when it is read.
    """
    name = _name(source)
    if not isinstance(source, str | Path):
        documents = _documents(_rows(source, split, column), column, name)
        return Opened(checked(documents, name), False, name, "documents in memory")
    said = Path(source).name
    if os.path.isfile(source):
        documents = _documents(file_rows(Path(source), column), column, name)
    # A mistyped file name must not be looked up as a dataset on the hub.
    elif Path(source).suffix in SUFFIXES and not str(source).startswith("hf:"):
        raise CalibrationError(f"there is no file {str(source)!r}")
    # What lies here has that name already.
    elif os.path.isdir(source) or (dataset := named(str(source), split=split, column=column)) is None:
        documents = _documents(whole_dataset(str(source), split, column), column, name)
        said = f"{said if os.path.isdir(source) else source}, split {split}"
    else:
        return _streamed(located(dataset), seed)
    return Opened(checked(documents, name), False, name, said)


def _streamed(dataset: Any, seed: int) -> Opened:
    rows, name = hub_rows(dataset, seed), repr(dataset.name)
    first = next(rows, None)
    if first is None:
        raise CalibrationError(f"{name} holds no document")
    columns = columns_of(list(first), dataset.column)
    if not columns:
        raise CalibrationError(f"{name} has the columns {sorted(first)}, not {dataset.column!r}: name one, #COLUMN")
    dataset = replace(dataset, column=columns[0])
    documents = checked(_documents(chain([first], rows), columns[0], name), name)
    if dataset.lines:  # few: all of them are one text, with an empty line between two, as is usual
        return Opened(iter(["\n\n".join(map(str, documents))]), False, name, str(dataset))
    return Opened(documents, True, name, f"{dataset}, shuffled with seed {seed} in a buffer of {BUFFER} rows")


def read_documents(source: Source, *, split: str = "train", column: str = "text") -> list[Document]:
    """The documents of a source that `text_batches` takes: texts, or chats as lists of messages. Of a stream, the first
    4096.

    Raises:
        CalibrationError: as `text_batches` does.
    """
    found = opened(source, split=split, column=column)
    documents = list(islice(found.documents, _AT_MOST) if found.streamed else found.documents)
    if not documents:
        raise CalibrationError(f"{found.name} holds no document")
    return documents


def checked(documents: Iterable[Any], name: str) -> Iterator[Document]:
    """
    Raises:
        CalibrationError: one is neither text nor a chat.
    """
    for number, document in enumerate(documents):
        where = f"{name}: document {number}, counting from 0,"
        if not isinstance(document, str):
            chat = chat_in(document, f"{name}: document {number}")
            if chat is None:
                what = "null" if document is None else f"a {type(document).__name__}"
                raise CalibrationError(f"{where} is {what}, not a string: leave such documents out")
            yield chat
            continue
        try:
            document.encode()
        except UnicodeEncodeError as e:  # half of a pair, such as "\\ud83d" in JSON
            raise CalibrationError(f"{where} is no text: {e}") from e
        yield document


def _rows(source: Iterable[Any], split: str, column: str) -> Iterable[Any]:
    """The documents, or rows that hold them, of what is not a name."""
    if isinstance(source, Mapping):  # a DatasetDict
        if split not in source:
            raise CalibrationError(f"the data set has the splits {list(source)}, not {split!r}: name one, split=…")
        source = source[split]
    # Those of a Dataset, or of a data frame, whose elements would be the names of its columns.
    names = getattr(source, "column_names", None)
    names = getattr(source, "columns", None) if names is None else names
    if names is None:
        return source
    columns = columns_of(list(names), column)
    if not columns:
        raise CalibrationError(f"the data set has the columns {list(names)}, not {column!r}: name one, column=…")
    if hasattr(source, "select_columns"):  # a Dataset, in memory or streamed
        return source.select_columns(columns)
    table: Any = source
    return table[columns].to_dict("records")


def _documents(rows: Iterable[Any], column: str, name: str) -> Iterator[Any]:
    """What is in each row, where it has fields: its field `column`, or the messages of a chat."""
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            yield row
            continue
        columns = columns_of(list(row), column)
        if not columns:
            raise CalibrationError(f"{name}: a record has the fields {sorted(row)}, not {column!r}: document {number}")
        system = row.get("system")
        document = row[columns[0]]
        if system and isinstance(system, str) and not isinstance(document, str):
            document = _with_system(chat_in(document, f"{name}: document {number}"), system) or document
        yield document


def _with_system(chat: list[Any] | None, system: str) -> list[Any] | None:
    """ShareGPT's sets have it in a field beside the messages."""
    given = chat is None or any(m["role"] == "system" for m in chat)
    return chat if given or chat is None else [{"role": "system", "content": system}, *chat]


def _name(source: Source) -> str:
    if isinstance(source, str | Path):
        return repr(str(source))
    return "the list of documents" if isinstance(source, list | tuple) else "the data set"
