"""Rows of local files."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptq_ao.data.chats import CHAT_COLUMNS
from gptq_ao.errors import CalibrationError

__all__ = ["SUFFIXES", "columns_of", "file_rows"]


def file_rows(path: Path, column: str) -> list[Any]:
    """
    Raises:
        CalibrationError: it is of another kind, or cannot be read.
    """
    if path.suffix not in _READERS:
        raise CalibrationError(
            f"{path}: cannot read {path.suffix or 'a file without suffix'}, give {', '.join(_READERS)}"
        )
    try:
        return list(_READERS[path.suffix](path, column))
    except (ValueError, OSError) as e:
        # It is a ValueError itself, with a message that needs no more.
        if isinstance(e, CalibrationError):
            raise
        raise CalibrationError(f"{path} cannot be read: {e}") from e


def columns_of(names: list[str], column: str) -> list[str]:
    """Those that are read: `column`, or, where there is no text, a chat's, and what the system says beside it. Empty:
    none of these is there."""
    chat = next((name for name in CHAT_COLUMNS if name in names), None) if column == "text" else None
    found = column if column in names else chat
    if found is None:
        return []
    return [found, "system"] if found in CHAT_COLUMNS and "system" in names else [found]


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
    if isinstance(content, dict) and column not in CHAT_COLUMNS:
        content = content.get(column, [content])
    yield from content if isinstance(content, list) else [content]


def _txt(path: Path, column: str) -> Iterator[Any]:
    yield path.read_text(encoding="utf-8-sig")


def _parquet(path: Path, column: str) -> Iterator[Any]:
    # Imported only when it is needed: other files can be read without it.
    import pyarrow.parquet

    names = pyarrow.parquet.read_schema(path).names
    columns = columns_of(names, column)
    if not columns:
        raise CalibrationError(f"{path} has no column {column!r}: it has {names}")
    yield from pyarrow.parquet.read_table(path, columns=columns).to_pylist()


_READERS: dict[str, Callable[[Path, str], Iterator[Any]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".txt": _txt,
    ".parquet": _parquet,
}
SUFFIXES = tuple(_READERS)
