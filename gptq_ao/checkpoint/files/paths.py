"""Which files of a checkpoint may be opened: plain names, in the checkpoint's own directory."""

import json
import re
from pathlib import Path

from gptq_ao.errors import CheckpointError

__all__ = ["INDEX", "MANIFEST", "SINGLE_FILE", "check_weight_map", "confined", "shard_path"]


MANIFEST = "gptq_ao.json"
SINGLE_FILE = "model.safetensors"
INDEX = f"{SINGLE_FILE}.index.json"


# Begins with a letter or digit and has no slash: no "..", no absolute path, no hidden file.
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")


def check_weight_map(directory: Path) -> None:
    """Refuse a Hugging Face directory whose index names shards outside of it; transformers would follow such a name."""
    for index in directory.glob("*.index.json"):
        if index.name == INDEX and (directory / SINGLE_FILE).is_file():
            continue  # nobody reads it then
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
            raise CheckpointError(f"{index} is damaged: {type(e).__name__}: {e}") from e
        for file in sorted(map(str, files)):
            shard_path(directory, file)


def shard_path(directory: Path, file: str) -> Path:
    """A shard is a file in the directory itself (or, in a hub cache, in the blobs that its snapshots link to)."""
    if not _SHARD_NAME.fullmatch(file):
        raise CheckpointError(f"{directory} names the shard {file!r}: only plain *.safetensors names are allowed")
    path = confined(directory, file)
    if not path.is_file():
        raise CheckpointError(f"{directory} lacks the shard {file!r}")
    return path


def confined(directory: Path, file: str) -> Path:
    """
    Raises:
        CheckpointError: a file of a checkpoint is a link to somewhere else.
    """
    # `resolve` follows links, so that what counts is where the file really lies.
    root = directory.resolve()
    path = (directory / file).resolve()
    # A hub cache has MODEL/snapshots/COMMIT/file as a link into MODEL/blobs; also MODEL/snapshots/COMMIT/FOLDER/file.
    blobs = [p.parent.parent / "blobs" for p in (root, *root.parents) if p.parent.name == "snapshots"]
    if not path.is_relative_to(root) and path.parent not in blobs:
        raise CheckpointError(f"{file!r} of {directory} links to {path}, outside the checkpoint")
    return path
