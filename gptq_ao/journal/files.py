"""Files of a journal: written so that they are on the disk when the call returns, and read without trust."""

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from gptq_ao.checkpoint.files.durable import sync_directory
from gptq_ao.errors import CheckpointError

__all__ = [
    "TENSOR_FILE",
    "append_line",
    "hash_of",
    "open_plain",
    "read_lines",
    "read_tensors",
    "write_tensors",
]

# All names there are: no slash, so none leads out of the directory.
TENSOR_FILE = re.compile(r"(stage|snapshot)-\d{5}-\d{5}\.safetensors")
_CHUNK = 2**22


def open_plain(path: Path, flags: int) -> int:
    """A descriptor of a file that is no link, pipe or device.

    Raises:
        CheckpointError: it is one.
    """
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link: a journal has none, so this was not written here")
    # O_BINARY: without it, Windows writes two bytes for each that is a newline.
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, name, 0)
    file = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise CheckpointError(f"{path} is no file: a journal has nothing else, so this was not written here")
    return file


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write contiguous tensors on the CPU. Returns the file's SHA-256.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    content = safetensors.torch.save(dict(tensors))
    try:
        file = open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            _write(file, content)
            os.fsync(file)
        finally:
            os.close(file)
        sync_directory(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)  # its room may be needed
        raise
    return hashlib.sha256(content).hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """
    Raises:
        CheckpointError: it is not a safetensors file.
    """
    with open(open_plain(path, os.O_RDONLY), "rb") as file:
        content = file.read()
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, KeyError, ValueError) as e:
        raise CheckpointError(f"{path} is damaged: {e}") from e


def hash_of(path: Path) -> str | None:
    """A file's SHA-256; None if there is none.

    Raises:
        CheckpointError: it is a link.
    """
    found = hashlib.sha256()
    try:
        file = open_plain(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with open(file, "rb", buffering=0) as opened:
        while chunk := opened.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def append_line(path: Path, said: Mapping[str, Any]) -> None:
    """Append an object as a line of JSON, with its own digest.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    new = not path.exists()
    file = open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        end = os.fstat(file).st_size
        try:
            _write(file, json.dumps({**said, "sha256": _digest(said)}).encode() + b"\n")
            os.fsync(file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(file, end)
            raise
    finally:
        os.close(file)
    if new:
        sync_directory(path.parent)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The lines, and whether what follows them was cut off: the last one may be there in part. That part is removed.

    Raises:
        CheckpointError: a line before it is not one that was written here.
    """
    try:
        file = open_plain(path, os.O_RDWR)
    except FileNotFoundError:
        return [], False
    with open(file, "r+b") as opened:
        content = opened.read()
        lines: list[dict[str, Any]] = []
        whole = content.splitlines(keepends=True)
        end = 0
        for number, line in enumerate(whole, 1):
            said = _parsed(line)
            if said is None:
                if number < len(whole):
                    raise CheckpointError(
                        f"{path} is damaged: line {number} of {len(whole)} is not what was written. Remove "
                        f"{path.parent} to begin anew"
                    )
                opened.truncate(end)
                os.fsync(file)
                return lines, True
            lines.append(said)
            end += len(line)
    return lines, False


def _write(file: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:  # one call may write less
        rest = rest[os.write(file, rest) :]


def _digest(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """What a whole line says."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not line.endswith(b"\n") or not isinstance(said, dict):
        return None
    return said if said.pop("sha256", None) == _digest(said) else None
