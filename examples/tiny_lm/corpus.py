"""The text that every Python installation brings along: the sources of its standard library.

Nothing is downloaded, so training the tiny model, calibrating its quantization and measuring its loss
all work offline. The split is a hash of each file's relative path: a file held out under one Python
version is held out under every other, so a model trained under 3.12 never saw the text that a
measurement under 3.11 uses (up to code that the library repeats in, or moves between, several files).
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Literal

HELDOUT_SHARE = 0.05
MAX_BYTES = 300_000

# Not the standard library itself, or test data.
_FOREIGN = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
# Mostly tables: codec maps and their near-identical stubs, character lists.
_TABLES = {"encodings", "stringprep.py", "entities.py"}
# Generated when Python is built; differ from machine to machine.
_BUILD_PREFIXES = ("_sysconfigdata", "config-")


def _skipped(name: str) -> bool:
    """Whether a file or folder of this name is left out, wherever it is."""
    return name in _FOREIGN or name in _TABLES or name.startswith(_BUILD_PREFIXES)


def is_heldout(path: str) -> bool:
    """Whether the file at this relative posix path is held out: a pure function of the path."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELDOUT_SHARE * 2**64


def _sources(root: Path) -> dict[str, Path]:
    """The hand-written library files below ``root``, keyed and sorted by their relative posix path."""
    found: dict[str, Path] = {}
    for folder, folders, files in os.walk(root):
        # In place, so that the walk never enters a large site-packages.
        folders[:] = [name for name in folders if not _skipped(name)]
        for name in files:
            if name.endswith(".py") and not _skipped(name):
                path = Path(folder, name)
                found[path.relative_to(root).as_posix()] = path
    return dict(sorted(found.items()))


def documents(split: Literal["train", "heldout"]) -> list[str]:
    """The sources of one split, one string per file, sorted by relative path.

    Empty files, files above ``MAX_BYTES`` and files that are not UTF-8 are left out.

    Raises:
        ValueError: ``split`` is neither "train" nor "heldout".
        FileNotFoundError: this Python has no standard library sources on disk (a frozen or zipped one).
    """
    if split not in ("train", "heldout"):
        raise ValueError(f'split must be "train" or "heldout", not {split!r}')
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: list[str] = []
    for name, path in _sources(root).items():
        if is_heldout(name) != (split == "heldout") or not 0 < path.stat().st_size <= MAX_BYTES:
            continue
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    if not texts:
        raise FileNotFoundError(f"no standard library sources (*.py) under {root}")
    return texts
