"""Text as calibration batches.

Every document's tokens follow one separator (the tokenizer's beginning-of-text token, else its end-of-text token, else
none); documents are concatenated in order and cut into chunks of equal length without overlap. No padding, so no
position is wasted or masked.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_ao.errors import CalibrationError, ConfigError

__all__ = ["as_chats", "read_documents", "spaced", "text_batches", "token_chunks"]

Source = str | Path | Iterable[Any]


def text_batches(
    tokenizer: Callable[..., Any],
    source: Source,
    *,
    num_samples: int = 128,
    seq_len: int = 2048,
    batch_size: int = 1,
    seed: int = 0,
    split: str = "train",
    column: str = "text",
) -> list[dict[str, Tensor]]:
    """Calibration batches `{"input_ids": int64 [batch_size, seq_len]}` from text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        source: a list of documents (strings, or dicts that hold one), a `datasets.Dataset` or data frame, a local
            .jsonl, .json, .txt or .parquet file, or a name for `datasets.load_dataset` (`"name"` or
            `"name:configuration"`).
        num_samples: chunks to draw, without repetition; all of them if there are fewer.
        seed: of the draw. The global random state is neither read nor changed.
        split, column: where the text is in a dataset; `column` also in files and documents with fields.

    Raises:
        CalibrationError: the source cannot be read, holds something that is not text, or less than one chunk.
        ConfigError: a number is less than 1, or the seed is too large.
    """
    for name, value in (("num_samples", num_samples), ("seq_len", seq_len), ("batch_size", batch_size)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} is {value!r}: give a number, 1 or more")
    if type(seed) is not int or not -(2**63) <= seed < 2**64:
        raise ConfigError(f"seed is {seed!r}: give a number of at most 64 bits")
    chunks = token_chunks(tokenizer, read_documents(source, split=split, column=column), seq_len)
    # A generator of its own, on the CPU: the same seed draws the same chunks anywhere.
    order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(seed))[:num_samples]
    return [{"input_ids": rows} for rows in chunks[order].split(batch_size)]


def token_chunks(tokenizer: Callable[..., Any], documents: Iterable[str], seq_len: int) -> Tensor:
    """All chunks of `documents`, int64 [chunks, seq_len]; the remainder is left out."""
    # Asked for None, not for truth: a token may have the number 0.
    separator = getattr(tokenizer, "bos_token_id", None)
    separator = getattr(tokenizer, "eos_token_id", None) if separator is None else separator
    tokens: list[int] = []
    for text in _strings(documents, "the documents"):
        if separator is not None:
            tokens.append(separator)
        # The separator is placed by hand, so the tokenizer must add none. Not verbose: it would warn of long documents.
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    # What does not fill a chunk is dropped: padding would be calibrated on.
    count = len(tokens) // seq_len
    if count == 0:
        raise CalibrationError(
            f"the text has {len(tokens)} tokens, less than one sequence of {seq_len}: give more text "
            "or a smaller seq_len"
        )
    return torch.tensor(tokens[: count * seq_len]).view(count, seq_len)


def as_chats(tokenizer: Any, documents: Iterable[str]) -> list[str]:
    """Each document as what a user says, in the words of the tokenizer's chat template.

    Raises:
        ConfigError: the tokenizer has no template, or one that takes no such message.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the tokenizer has no chat template: leave out --chat-template")
    try:
        made = [
            tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False) for text in documents
        ]
    # A template is a program of its own.
    except Exception as e:
        raise ConfigError(f"the tokenizer's chat template cannot be used: {type(e).__name__}: {e}") from e
    # `token_chunks` puts it there.
    first = getattr(tokenizer, "bos_token", None) or ""
    return [text.removeprefix(first) for text in made]


def spaced(chunks: Tensor, at_most: int) -> Tensor:
    """`at_most` of the chunks [n, L], evenly spaced over all of them, the first included."""
    return chunks if len(chunks) <= at_most else chunks[torch.arange(at_most) * len(chunks) // at_most]


def read_documents(source: Source, *, split: str = "train", column: str = "text") -> list[str]:
    """The documents of a source that `text_batches` takes."""
    if not isinstance(source, str | Path):
        documents = _texts(_rows(source, split, column), column, _name(source))
    elif os.path.isfile(source):
        documents = _read_file(Path(source), column)
    # A mistyped file name must not be looked up as a dataset on the hub.
    elif Path(source).suffix in _READERS:
        raise CalibrationError(f"there is no file {str(source)!r}")
    else:
        documents = _read_dataset(str(source), split, column)
    if not documents:
        raise CalibrationError(f"{_name(source)} holds no document")
    return list(_strings(documents, _name(source)))


def _strings(documents: Iterable[Any], name: str) -> Iterator[str]:
    for number, text in enumerate(documents):
        if not isinstance(text, str):
            what = "null" if text is None else f"a {type(text).__name__}"
            raise CalibrationError(
                f"{name}: document {number}, counting from 0, is {what}, not a string: leave such documents out"
            )
        try:
            text.encode()
        except UnicodeEncodeError as e:  # half of a pair, such as "\\ud83d" in JSON
            raise CalibrationError(f"{name}: document {number}, counting from 0, is no text: {e}") from e
        yield text


def _read_file(path: Path, column: str) -> list[Any]:
    if path.suffix not in _READERS:
        raise CalibrationError(
            f"{path}: cannot read {path.suffix or 'a file without suffix'}, give {', '.join(_READERS)}"
        )
    try:
        return _texts(_READERS[path.suffix](path, column), column, repr(str(path)))
    except (ValueError, OSError) as e:
        # It is a ValueError itself, with a message that needs no more.
        if isinstance(e, CalibrationError):
            raise
        raise CalibrationError(f"{path} cannot be read: {e}") from e


def _jsonl(path: Path, column: str) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield json.loads(line)
            except ValueError as e:
                raise CalibrationError(f"{path} cannot be read: line {number} is not JSON: {e}") from e


def _json(path: Path, column: str) -> Iterator[Any]:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    # An object either has a list of texts under the name of the column, or is a single record.
    content = content.get(column, [content]) if isinstance(content, dict) else content
    yield from content if isinstance(content, list) else [content]


def _txt(path: Path, column: str) -> Iterator[Any]:
    yield path.read_text(encoding="utf-8-sig")


def _parquet(path: Path, column: str) -> Iterator[Any]:
    # Imported only when it is needed: other files can be read without it.
    import pyarrow.parquet

    if column not in pyarrow.parquet.read_schema(path).names:
        raise CalibrationError(f"{path} has no column {column!r}")
    yield from pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist()


_READERS: dict[str, Callable[[Path, str], Iterator[Any]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".txt": _txt,
    ".parquet": _parquet,
}


def _read_dataset(name: str, split: str, column: str) -> list[Any]:
    import datasets

    # "name:configuration".
    path, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(path, configuration or None, split=split)
    except Exception as e:  # a missing name, no network, no such split: datasets raises a different error for each
        raise CalibrationError(f"dataset {name!r}, split {split!r}, cannot be loaded: {type(e).__name__}: {e}") from e
    if column not in rows.column_names:
        raise CalibrationError(f"dataset {name!r} has the columns {rows.column_names}, not {column!r}")
    return list(rows[column])


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
    if column not in names:
        raise CalibrationError(f"the data set has the columns {list(names)}, not {column!r}: name one, column=…")
    # A data set that is streamed has no columns to be had at once.
    return source[column] if hasattr(source, "__getitem__") else source


def _texts(rows: Iterable[Any], column: str, name: str) -> list[Any]:
    """Each row's field `column`, where it has fields."""
    texts = []
    for number, row in enumerate(rows):
        if isinstance(row, Mapping) and column not in row:
            raise CalibrationError(f"{name}: a record has the fields {sorted(row)}, not {column!r}: document {number}")
        texts.append(row[column] if isinstance(row, Mapping) else row)
    return texts


def _name(source: Source) -> str:
    if isinstance(source, str | Path):
        return repr(str(source))
    return "the list of documents" if isinstance(source, list | tuple) else "the data set"
