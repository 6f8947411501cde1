"""So that what was written survives the machine, too."""

import os
from pathlib import Path

__all__ = ["sync_directory", "sync_tree"]


def sync_tree(directory: Path) -> None:
    """All that is in a directory is on the disk when the call returns.

    Raises:
        OSError: it is not.
    """
    for folder, _, files in os.walk(directory):
        for name in files:
            _sync(Path(folder) / name)
        sync_directory(Path(folder))


def sync_directory(directory: Path) -> None:
    """The names in it are on the disk when the call returns."""
    if os.name != "nt":  # which cannot
        _sync(directory)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
