"""So that what was written survives the machine, too."""

import os
from pathlib import Path

__all__ = ["sync_directory", "sync_file", "sync_tree"]


def sync_tree(directory: Path) -> None:
    """A file, or all that is in a directory, is on the disk when the call returns.

    Raises:
        OSError: it is not.
    """
    if directory.is_file():
        sync_file(directory)
    for folder, _, files in os.walk(directory):
        for name in files:
            sync_file(Path(folder) / name)
        sync_directory(Path(folder))


def sync_directory(directory: Path) -> None:
    """The names in it are on the disk when the call returns."""
    if os.name != "nt":  # which cannot
        sync_file(directory)


def sync_file(path: Path) -> None:
    """Its contents are on the disk when the call returns."""
    file = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # there only what may be written
    try:
        os.fsync(file)
    finally:
        os.close(file)
